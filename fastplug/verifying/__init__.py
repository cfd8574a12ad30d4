"""Compare a patched model with its original on the user's own model: loss, layer outputs, every gradient.

The whole model runs twice, patched and original. Then every decoder layer and the head run on their own, patched and
original, from the inputs and the upstream gradients that the original run had, so that one layer's error is not hidden
in the accumulated rounding of all others. In a 16-bit model a copy of that one layer in fp32, with decoded weights,
judges both: fastplug passes where its error to fp32 is at most ``tolerance`` times the original's.

``run.py`` is the procedure, ``stages.py`` a layer (or the head) as a function of its input, ``judge.py`` its fp32 copy,
``compare.py`` the measure, ``restore.py`` what is put back afterwards.
"""

from __future__ import annotations

from fastplug.verifying.result import Row, VerifyError, VerifyResult
from fastplug.verifying.run import verify

__all__ = ["Row", "VerifyError", "VerifyResult", "verify"]
