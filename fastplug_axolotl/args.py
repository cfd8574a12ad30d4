"""The schema of the ``fastplug:`` key: the fields of :class:`fastplug.Options`, made into a pydantic model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model, field_validator

from fastplug.errors import OptionError
from fastplug.options import Options
from fastplug.run_exports import parse_exports

IN_BACKWARD = "optimizer_in_backward"
_hints = get_type_hints(Options)

if TYPE_CHECKING:

    class FastPlugOptions(BaseModel):
        """The options of fastplug."""

else:
    FastPlugOptions = create_model(
        "FastPlugOptions",
        __config__=ConfigDict(extra="forbid"),
        __doc__="The options of fastplug: the same keys and defaults as fastplug.Options, `export`, and "
        "`optimizer_in_backward`.",
        **{field.name: (_hints[field.name], field.default) for field in fields(Options)},
        export=(Any, None),
        **{IN_BACKWARD: (bool, False)},
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
        if given is None:
            return None
        options, export = split(given)
        return {**options.as_dict(), "export": export, IN_BACKWARD: steps_in_backward(given)}


def split(given: Mapping[str, Any] | None) -> tuple[Options, Any]:
    """The options of fastplug under the key, and what its ``export`` asks for, both checked.

    Raises:
        OptionError: An unknown name or an impossible value.
    """
    if not isinstance(given, Mapping | None):
        return Options.of(given), None  # says what is wrong
    options = dict(given or {})
    export = options.pop("export", None)
    parse_exports(export)
    options.pop(IN_BACKWARD, None)
    return Options.of(options, also=("export", IN_BACKWARD)), export


def steps_in_backward(given: Mapping[str, Any] | None) -> bool:
    """Whether the key asks for an optimizer that steps within the backward.

    Raises:
        OptionError: It says something else than yes or no.
    """
    asked = (given or {}).get(IN_BACKWARD)
    if not isinstance(asked, bool | None):
        raise OptionError(f"fastplug: {IN_BACKWARD} must be true or false, not {asked!r}")
    return bool(asked)
