"""What the demo asks the trained model: an answer, and whether the merged copy of it is the same model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastplug.demo.config import LogitCheck
from fastplug.demo.data import Collator, Example, starting_ids

# Every merged weight is rounded once to bf16, by 2^-9 of its size at most, and the layers add that up. Measured on
# SmolLM2-135M: 0.007 to 0.010, where three training steps move the same measure by 0.3.
LOGIT_BOUND = 0.03
CHECKED = 8  # examples


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """The most likely continuation of ``prompt``, token by token.

    The model stays in training mode, which computes the same since there is no dropout: on some CPUs bitsandbytes
    rounds the scales of the 4-bit weights for good the first time that a model runs in evaluation mode.
    """
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not getattr(tokenizer, "chat_template", None):
        ids = starting_ids(tokenizer) + ids
    inputs = torch.tensor([ids], device=model.device)
    end = tokenizer.eos_token_id
    written = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = written[0, inputs.shape[1] :].tolist()
    cut = end is None or end not in new
    return tokenizer.decode(new, skip_special_tokens=True).strip() + (" ..." if cut and len(new) >= new_tokens else "")


def compare_logits(model: Any, merged: Any, examples: Sequence[Example], pad_id: int) -> LogitCheck:
    """Compare a merged model with the PEFT model it came from, on the first examples.

    Both compute in fp32, so that what differs is the weights: the merge's one rounding to 16 bits.

    Args:
        model: The PEFT model with its adapter active.
        merged: The reloaded merged model, in fp32.
    """
    device = model.device
    batch = {k: v.to(device) for k, v in Collator(pad_id)(examples[:CHECKED]).items() if k != "labels"}
    real = batch["attention_mask"].bool()

    @torch.no_grad()
    def logits(network: Any) -> torch.Tensor:
        return network(**batch).logits[real].double()

    with _computing_in_fp32(model):
        adapted = logits(model)
        with model.disable_adapter():
            base = logits(model)
    found = logits(merged)
    scale = adapted.norm()
    return LogitCheck(
        error=float((found - adapted).norm() / scale),
        bound=LOGIT_BOUND,
        trained=float((adapted - base).norm() / scale),
        agreement=float((found.argmax(-1) == adapted.argmax(-1)).double().mean()),
        tokens=int(real.sum()),
    )


@contextmanager
def _computing_in_fp32(model: torch.nn.Module) -> Iterator[None]:
    """Let the 4-bit layers multiply in fp32 inside of the block."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "quant_state") and hasattr(m, "compute_dtype")]
    before = [layer.compute_dtype for layer in layers]
    try:
        for layer in layers:
            layer.compute_dtype = torch.float32
        yield
    finally:
        for layer, dtype in zip(layers, before):
            layer.compute_dtype = dtype
