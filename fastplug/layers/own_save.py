"""``model.save_pretrained`` of a model with ``QuantLinear`` layers: an error instead of a folder that nothing loads.

transformers writes whatever a model's ``state_dict`` holds, packed bytes as well, and says that it went well. So the
model gets a ``save_pretrained`` of its own, an attribute of this one instance.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

from torch import nn

from fastplug.errors import ModelError
from fastplug.layers.linear import QuantLinear

CHECKPOINT = "checkpoint-"  # how the Trainer's folders begin, from which it resumes by the same state_dict


class OwnSave:
    """``save_pretrained`` of ``model``: that of its class, unless this would write packed bytes as a finished model.

    It holds the model weakly, for a model that held itself would outlive its last user. A copy of it belongs to the
    copy of the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """As transformers has it.

        Raises:
            ModelError: The model holds ``QuantLinear`` layers, and the folder is no checkpoint of the Trainer.
        """
        model: Any = self._model()
        packed = next((name for name, part in model.named_modules() if isinstance(part, QuantLinear)), None)
        if packed is not None and not Path(save_directory).name.startswith(CHECKPOINT):
            raise ModelError(
                f"fastplug.layers: save_pretrained would write {packed} as packed bytes, which from_pretrained cannot "
                "load; fastplug.layers.save(model, path) writes 4-bit bitsandbytes layers as they are, and with "
                "dequantize=True any format as a plain model"
            )
        return type(model).save_pretrained(model, save_directory, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnSave:
        model: Any = self._model()
        return OwnSave(memo.get(id(model), model))

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnSave, (self._model(),)


def guard(model: Any) -> None:
    """Give ``model``, or the base inside of a PEFT model, a ``save_pretrained`` of its own."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(base, nn.Module) and hasattr(base, "save_pretrained"):
        base.__dict__["save_pretrained"] = OwnSave(base)
