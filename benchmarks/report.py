"""Compare the systems of a row, and print it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.rows import Row

LOSS, NORM = 5e-3, 3e-2  # relative: bf16 steps of different kernels differ by less than a tenth of it

COLUMNS = {"ms": 9, "in a row": 9, "busy": 9, "GiB": 7, "x fastplug": 11, "loss": 10, "|grad|": 10, "dead": 5}

Result = dict[str, Any]


def oracle(results: list[Result], row: str, earlier: Sequence[Result] = ()) -> Result | None:
    """What a row's systems are compared with: the unpatched model, or the first system that ran.

    With and without gradient checkpointing a model computes the same, so that the unpatched one, which may not fit
    without, need run but once. ``earlier``: what it gave in another run, with the same weights and tokens.
    """
    ran = [r for r in results if not r.get("error")]
    rows = (row, str(Row.parse(row).otherwise_checkpointed))
    for found in (ran, earlier):
        for name in ("hf", "hf-prepared"):
            for this in rows:
                for result in found:
                    if (result["system"], result["row"]) == (name, this):
                        return result
    return next((r for r in ran if r["row"] == row), None)


def unpatched(records: Sequence[dict[str, Any]], shape: str, layers: int | None) -> list[Result]:
    """The unpatched model's results in the records of earlier runs, for :func:`oracle`.

    Raises:
        ValueError: A record is of another shape or number of layers.
    """
    found: list[Result] = []
    for record in records:
        if (record["shape"], record["layers"]) != (shape, layers):
            raise ValueError(
                f"that run was of {record['shape']} with layers={record['layers']}, not of {shape}, {layers}"
            )
        mine = [r for r in record["results"] if r["system"] in ("hf", "hf-prepared") and not r.get("error")]
        found += [{**r, "earlier": record["date"]} for r in mine]
    return found


def check(result: Result, reference: Result | None) -> str:
    """Why a result does not count, or an empty string."""
    if result.get("error"):
        return str(result["error"])
    if result["dead"]:
        return f"{result['dead']} LoRA tensors got no gradient"
    if reference is None or reference is result:
        return ""
    if result["trained"] != reference["trained"]:
        return f"{result['trained']} trained tensors against {reference['trained']}"
    for key, tolerance in (("loss", LOSS), ("grad_norm", NORM)):
        # The other way round a NaN would pass.
        if not abs(result[key] - reference[key]) <= tolerance * abs(reference[key]):
            return f"{key} {result[key]} against {reference[key]} of {called(reference)}"
    return ""


def called(reference: Result | None) -> str:
    """What the report calls what a row is checked against."""
    if reference is None:
        return "nothing"
    return reference["system"] + (f" in a run of {reference['earlier']}" if "earlier" in reference else "")


def table(results: list[Result], earlier: Sequence[Result] = ()) -> list[str]:
    """The lines of the report: times, memory, how many times slower than fastplug, and what the check compared."""
    head = (
        f"{'ms':>9s}{'in a row':>9s}{'busy':>9s}{'GiB':>7s}{'x fastplug':>11s}{'loss':>10s}{'|grad|':>10s}{'dead':>5s}"
    )
    lines = []
    for row in dict.fromkeys(r["row"] for r in results):
        mine = [r for r in results if r["row"] == row]
        reference = oracle(results, row, earlier)
        against = reference["system"] if reference else "nothing"
        note = "" if against == "hf" else ", the unpatched model did not run"
        lines += ["", f"{row}, checked against {called(reference)}{note}", f"  {'system':26s}{head}"]
        valid = [r for r in mine if r["system"].startswith("fastplug") and not check(r, reference)]
        ours = min(valid, key=lambda r: r["system"] != "fastplug", default=None)  # without options, if it ran
        lines += ["  " + _line(result, reference, ours, _plain(result, results)) for result in mine]
    return lines


def _plain(result: Result, results: list[Result]) -> Result | None:
    """The same system's run of the row without DoRA, where it ran and counts."""
    row = str(Row.parse(result["row"]).without_dora)
    if row == result["row"]:
        return None
    for other in results:
        if (other["system"], other["row"]) == (result["system"], row) and not check(other, oracle(results, row)):
            return other
    return None


def _line(result: Result, reference: Result | None, ours: Result | None, plain: Result | None) -> str:
    name, trouble = result["system"], check(result, reference)
    if result.get("error"):
        return f"{name:26s} left out: {trouble}"
    ratio = "invalid" if trouble else f"{result['ms'] / ours['ms']:.2f}" if ours else "-"
    notes = []
    if "wall_s" in result:
        notes.append(f"{result['wall_s']} s for {result['steps']} steps, the first {result['first_s']} s")
    if reference is not None and _differ(result.get("weights"), reference.get("weights")):
        notes.append(f"embeddings differ from {reference['system']}'s")
    if plain is not None and not trouble:
        notes.append(f"{result['ms'] / plain['ms']:.2f} x its time without DoRA")
    notes += [trouble] if trouble else []
    return (
        f"{name:26s}{result['ms']:9.1f}{_number(result.get('running_ms')):>9s}{_number(result.get('busy_ms')):>9s}"
        f"{_number(result.get('peak_gib'), 2):>7s}{ratio:>11s}{result['loss']:10.4f}{result['grad_norm']:10.4f}"
        f"{result['dead']:5d}  {'; '.join(notes)}"
    ).rstrip()


def _differ(one: float | None, other: float | None) -> bool:
    """A model that stays loaded is not looked at again."""
    return one is not None and other is not None and one != other


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def brief(result: Result) -> str:
    """What the progress line shows of a result."""
    keys = ("load_s", "first_s", "warm_s", "wall_s", "ms", "ms_min", "running_ms", "busy_ms", "steps", "peak_gib",
            "first_peak_gib", "loss", "grad_norm")  # fmt: skip
    return " ".join(f"{key}={result[key]}" for key in keys if result.get(key) is not None)
