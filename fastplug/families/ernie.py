"""ERNIE 4.5, dense and as a mixture: neighbouring channels rotated, in fp32."""

from fastplug.families.row import Family, RopeRow

ERNIE4_5 = Family(
    "ernie4_5",
    "transformers.models.ernie4_5.modeling_ernie4_5",
    "Ernie4_5",
    rope=RopeRow("interleaved"),
)
ERNIE4_5_MOE = Family(
    "ernie4_5_moe",
    "transformers.models.ernie4_5_moe.modeling_ernie4_5_moe",
    "Ernie4_5_Moe",
    rope=RopeRow("interleaved"),
    mixture=True,
    trace_loss=True,
)
FAMILIES = (ERNIE4_5, ERNIE4_5_MOE)
