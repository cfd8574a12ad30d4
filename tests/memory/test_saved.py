"""What a layer holds from its forward to its backward, measured, against the formulas of ``saved.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastplug
from fastplug.memory import offload
from fastplug.memory.host_memory import PIECE
from fastplug.memory.policy import Policy
from fastplug.memory.saved import Rank, Widths, host, saved, tensors
from tests import models
from tests.memory.under import layers, left_behind, under

pytest.importorskip("peft")

LENGTH = 512
HIDDEN, QUERIES, KEYS, HEADS, WIDTH, RANK = 64, 128, 64, 4, 192, 4
SLACK = 16384  # bytes: random states, masks of attention, allocations of a few bytes


def dtype_on(device: torch.device) -> torch.dtype:
    """One for which the device has a kernel of attention with grouped heads."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def widths(size: int = 4, dropping: bool = False, head_norm: bool = True) -> Widths:
    def rank(count: int) -> Rank:
        return Rank(count * RANK, count if dropping else 0, copied=count > 1)

    return Widths(
        HIDDEN, WIDTH, QUERIES, KEYS, HEADS, size, size, rank(3), rank(1), rank(2), rank(1), head_norm=head_norm
    )  # fmt: skip


def measured(device: torch.device, policy: Policy, dropout: float = 0.0, tile_rows: int | None = None) -> int:
    """Bytes that a forward of one layer leaves on the device, its input counted and its output not."""
    dtype = dtype_on(device)
    config: dict[str, Any] = {"num_hidden_layers": 1, "head_dim": 32, "intermediate_size": WIDTH}
    model = models.lora(models.plain("qwen3", **config), lora_dropout=dropout).to(device, dtype)
    fastplug.apply(model, graphs="off")
    (layer,) = layers(under(model, policy, tile_rows))
    base: Any = model.get_base_model().model
    position = torch.arange(LENGTH, device=device)[None]

    def forward() -> Any:
        x = torch.randn(1, LENGTH, HIDDEN, device=device, dtype=dtype)
        return layer(x.requires_grad_(), position_embeddings=positions, attention_mask=None)

    positions = base.rotary_emb(torch.zeros(1, LENGTH, HIDDEN, device=device, dtype=dtype), position)
    forward()  # lazily made things
    return left_behind(forward, device) - LENGTH * HIDDEN * dtype.itemsize


CASES: list[tuple[Policy, float, int | None]] = [(policy, 0.0, None) for policy in Policy if not policy.offloads]
CASES += [(Policy.DROP_GATE_UP, 0.0, 128), (Policy.KEEP, 0.2, None), (Policy.DROP_GATE_UP, 0.2, None)]
CASES += [(Policy.DROP_GATE_UP, 0.2, 256), (Policy.RESIDUAL, 0.0, 128)]


@pytest.mark.parametrize(("policy", "dropout", "tile_rows"), CASES)
def test_bytes_are_as_predicted(device: torch.device, policy: Policy, dropout: float, tile_rows: int | None) -> None:
    if device.type == "cuda" and dropout:
        pytest.skip("on a GPU one product serves all adapters only without dropout")
    predicted = saved(policy, widths(dtype_on(device).itemsize, dropout > 0), LENGTH, tile_rows)
    assert measured(device, policy, dropout, tile_rows) == pytest.approx(predicted, abs=SLACK)


def test_policies_keep_less_and_less() -> None:
    sizes = [saved(policy, widths(), LENGTH) for policy in (Policy.KEEP, Policy.DROP_GATE_UP, Policy.KEEP_ATTENTION)]
    sizes.append(saved(Policy.RESIDUAL, widths(), LENGTH))
    assert sizes == sorted(set(sizes), reverse=True)
    assert saved(Policy.OFFLOAD, widths(), LENGTH) == LENGTH * (HIDDEN + RANK) * 4
    assert host(Policy.OFFLOAD, widths(), LENGTH) == PIECE
    assert host(Policy.RESIDUAL, widths(), LENGTH) == 0


def test_a_layer_of_llama_8b() -> None:
    """0.72 GiB to recompute no GEMM, 0.28 without gate and up, 0.06 for the input alone, at 8,192 tokens."""
    llama = Widths(4096, 14336, 4096, 1024, 32)
    found = [saved(policy, llama, 8192) / 2**30 for policy in (Policy.KEEP, Policy.DROP_GATE_UP, Policy.RESIDUAL)]
    assert found == pytest.approx([0.72, 0.28, 0.0625], abs=0.01)
    assert "gate, up" not in tensors(Policy.DROP_GATE_UP, llama, 8192)


@pytest.mark.parametrize("policy", [Policy.OFFLOAD, Policy.OFFLOAD_ATTENTION])
def test_offloaded_layers_leave_the_device(
    device: torch.device, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six layers the tensors of two are on the device when the forward is over."""
    monkeypatch.setattr(offload, "SMALLEST", 1)
    model = models.lora(models.plain("llama", num_hidden_layers=6)).to(device, dtype_on(device))
    fastplug.apply(model, graphs="off")
    under(model, policy)
    tokens = torch.randint(3, 200, (1, LENGTH), device=device)
    loss = model(input_ids=tokens, labels=tokens).loss
    found = layers(model)[0].__dict__["_fastplug"].runtime.offload
    groups = [reference() for reference in found._groups]
    resident = [any(handle.on_device is not None for handle in group.handles) for group in groups]
    del groups
    assert resident == [False] * 4 + [True] * 2
    each = 1  # x
    if policy is Policy.OFFLOAD_ATTENTION:  # its output and logsumexp; on a GPU the seed and offset of dropout too
        each = 5 if device.type == "cuda" else 3
    assert found.host_bytes == 6 * each * PIECE
    loss.backward()
    assert len(found.pool.free) == found.pool.pieces
    before = found.pool.pieces
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert found.pool.pieces == before, "the pieces of the first step serve the second"
