"""The fast forwards, one module per role."""

from __future__ import annotations

from fastplug.manager import hookimpl
from fastplug.patching.sites import Implementation


@hookimpl
def fastplug_implementations() -> list[Implementation]:
    from fastplug.patching.forwards import attention, decoder_layer, lm_head_loss, mlp, norm

    return [part.IMPLEMENTATION for part in (decoder_layer, attention, mlp, norm, lm_head_loss)]
