"""The fast forwards, one module per role."""

from __future__ import annotations

from fastplug.manager import hookimpl
from fastplug.patching.sites import Implementation


@hookimpl
def fastplug_implementations() -> list[Implementation]:
    from fastplug.patching.forwards import (
        attention,
        decoder_layer,
        layer_by_row,
        lm_head_loss,
        mlp,
        norm,
        shared_input,
        traced_loss,
        trl_head,
    )

    parts = (decoder_layer, layer_by_row, attention, mlp, norm, shared_input, lm_head_loss, traced_loss, trl_head)
    return [part.IMPLEMENTATION for part in parts]
