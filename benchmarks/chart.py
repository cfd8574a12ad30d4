"""Draw the milliseconds and the memory of a ``benchmarks.step`` result.

python -m benchmarks.chart benchmarks/results/STEP.json docs/step.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

COLORS = {"fastplug": "#0b6e4f", "unsloth": "#c8553d", "axolotl": "#e0a458", "liger": "#8d99ae", "hf": "#4a4e69"}


def draw(record: dict, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = [r for r in record["results"] if not r.get("error") and not r["dead"]]
    rows = list(dict.fromkeys(r["row"] for r in results))
    figure, axes = plt.subplots(len(rows), 2, figsize=(9, 0.6 + 1.5 * len(rows)), squeeze=False)
    for line, row in zip(axes, rows):
        mine = [r for r in results if r["row"] == row]
        for axis, key, unit in zip(line, ("ms", "peak_gib"), ("ms a step", "GiB peak")):
            bars = axis.barh(
                [r["system"] for r in mine], [r[key] for r in mine], color=[COLORS[r["system"]] for r in mine]
            )
            axis.bar_label(bars, fmt="%.4g", padding=3)
            axis.set_title(f"{row}: {unit}", fontsize=9, loc="left")
            axis.margins(x=0.15)
            axis.spines[["top", "right"]].set_visible(False)
    versions = record["versions"]
    figure.suptitle(f"{record['shape']}, {results[0]['gpu']}, fastplug {versions['fastplug']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(out, dpi=140)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
