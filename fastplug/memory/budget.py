"""What the option ``memory`` says: amounts of memory as people write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fastplug.errors import OptionError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
UNITS["TIB"] = 2**40
FORCED = ("keep", "full")
HOW = "write 'auto', an amount such as '8GiB', a fraction of the device such as 0.9, 'keep' or 'full'"


@dataclass(frozen=True)
class Amount:
    """So many bytes, or a fraction of the device's memory; exactly one is given."""

    bytes: int | None = None
    fraction: float | None = None

    def of(self, total: int) -> int:
        """Bytes on a device with ``total`` bytes."""
        return self.bytes if self.bytes is not None else int(total * (self.fraction or 0.0))


def amount(value: Any, name: str = "memory", how: str = HOW) -> Amount:
    """``"8GiB"``, ``"8 GB"``, ``"90%"``, ``0.9`` or ``"0.9"``.

    Raises:
        OptionError: It is something else, negative, or more than the whole device.
    """
    text = str(value).strip()
    match = re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*|%)", text)
    if match is None or isinstance(value, bool):
        raise OptionError(f"fastplug: {name} cannot be {value!r}; {how}")
    number, unit = float(match[1]), match[2].upper()
    if unit in ("", "%"):
        fraction = number / 100 if unit == "%" else number
        if fraction > 1:
            raise OptionError(
                f"fastplug: {name}={value!r} has no unit, and as a fraction of the device it is more than all; "
                f"say {text}GiB if you mean that"
            )
        return Amount(fraction=fraction)
    if unit not in UNITS:
        raise OptionError(f"fastplug: {name}={value!r} has an unknown unit; {how}")
    return Amount(bytes=int(number * UNITS[unit]))


def check(memory: Any, headroom: Any) -> None:
    """Raise ``OptionError`` unless both options can be read."""
    if memory is not None and memory not in ("auto", *FORCED):
        found = amount(memory)
        if not found.bytes and not found.fraction:
            raise OptionError(f"fastplug: memory cannot be {memory!r}: that is nothing; {HOW}")
    if headroom is not None:
        amount(headroom, "headroom", "write an amount such as '2GiB' or a fraction of the device such as 0.1")


def gib(size: float) -> str:
    """So many bytes in GiB, or in a smaller unit where that would leave them one digit or none."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(size) >= 0.1 * unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} bytes"


__all__ = ["FORCED", "Amount", "amount", "check", "gib"]
