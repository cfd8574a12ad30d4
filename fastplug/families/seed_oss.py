"""Seed-OSS: dropout after the last projections of attention and MLP."""

from fastplug.families.row import Family

SEED_OSS = Family(
    "seed_oss",
    "transformers.models.seed_oss.modeling_seed_oss",
    "SeedOss",
    output_dropout="residual_dropout",
)
FAMILIES = (SEED_OSS,)
