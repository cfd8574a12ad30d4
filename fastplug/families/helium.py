"""Helium: neighbouring channels rotated, the norm's weight before the cast."""

from fastplug.families.row import Family, NormRow, RopeRow

HELIUM = Family(
    "helium",
    "transformers.models.helium.modeling_helium",
    "Helium",
    norm=NormRow(cast_first=False),
    rope=RopeRow("interleaved"),
)
FAMILIES = (HELIUM,)
