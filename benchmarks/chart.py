"""Draw the milliseconds and the memory of a ``benchmarks.step`` result.

    python -m benchmarks.chart benchmarks/results/STEP.json docs/step.png

Results that failed their check are left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

COLORS = {"fastplug": "#0b6e4f", "unsloth": "#c8553d", "axolotl": "#e0a458", "liger": "#8d99ae", "hf": "#4a4e69"}


def color(system: str) -> str:
    """A system's colour is that of its family: ``fastplug-graphs-off`` is drawn as ``fastplug``."""
    return next((value for name, value in COLORS.items() if system.startswith(name)), "#999999")


def draw(record: dict[str, Any], out: Path) -> None:
    """Write a PNG with one line of two bar charts for each row of ``record``.

    Raises:
        ValueError: If no result is valid.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = [r for r in record["results"] if not r.get("trouble") and not r.get("error") and not r["dead"]]
    if not results:
        raise ValueError("no result of this record is valid: there is nothing to draw")
    rows = list(dict.fromkeys(r["row"] for r in results))
    bars = [[r for r in results if r["row"] == row] for row in rows]
    heights = [0.7 + 0.3 * len(mine) for mine in bars]
    figure, axes = plt.subplots(
        len(rows), 2, figsize=(10, 0.8 + sum(heights)), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for line, row, mine in zip(axes, rows, bars):
        total = "wall_s" in mine[0]
        first = ("wall_s", f"s for {mine[0]['steps']} steps") if total else ("ms", "ms a step")
        for axis, (key, unit) in zip(line, (first, ("peak_gib", "GiB peak"))):
            values = [r.get(key) or 0.0 for r in mine]
            drawn = axis.barh([r["system"] for r in mine], values, color=[color(r["system"]) for r in mine])
            axis.bar_label(drawn, fmt="%.4g", padding=3)
            axis.set_title(f"{row}: {unit}", fontsize=9, loc="left")
            axis.invert_yaxis()
            axis.margins(x=0.15)
            axis.spines[["top", "right"]].set_visible(False)
    hardware, versions = record.get("hardware", {}), record["versions"]
    where = hardware.get("gpu") or results[0].get("gpu") or hardware.get("cpu", "")
    figure.suptitle(f"{record['shape']}, {where}, fastplug {versions['fastplug']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(out, dpi=140)
    plt.close(figure)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
