"""The schema of the ``fastplug:`` key: the fields of :class:`fastplug.Options`, made into a pydantic model."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model, field_validator

from fastplug.options import Options

_hints = get_type_hints(Options)

if TYPE_CHECKING:

    class FastPlugOptions(BaseModel):
        """The options of fastplug."""

else:
    FastPlugOptions = create_model(
        "FastPlugOptions",
        __config__=ConfigDict(extra="forbid"),
        __doc__="The options of fastplug: the same keys and defaults as fastplug.Options.",
        **{field.name: (_hints[field.name], field.default) for field in fields(Options)},
    )


class FastPlugArgs(BaseModel):
    """What Axolotl adds to its own schema while the plugin is in use."""

    fastplug: FastPlugOptions | None = None

    @field_validator("fastplug", mode="before")
    @classmethod
    def _check(cls, given: Any) -> Any:
        """Let Options judge names and values, so that its messages are the same everywhere.

        Raises:
            OptionError: Names the nearest known option or the possible values. pydantic shows it, being a ValueError.
        """
        return None if given is None else Options.of(given).as_dict()
