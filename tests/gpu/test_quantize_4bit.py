"""The quantizer on a real GPU: bit for bit what bitsandbytes' CUDA code makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastplug.layers.encoding import BlocksOf4Bits
from fastplug.ops.quantize_4bit import codes, implementation, kernel

bnb = pytest.importorskip("bitsandbytes.functional")

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (1, 63), (5, 77), (33, 64), (127, 333), (1024, 1024), (1536, 4100)]
DEVICE = torch.device("cuda")


def compare(weight: torch.Tensor, kind: str, blocksize: int, double: bool) -> None:
    packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double, quant_type=kind)
    parts: list[Any] = [packed.flatten(), state.absmax, state.code]
    if double:
        parts += [state.state2.code, state.state2.absmax, state.offset]
    ours = BlocksOf4Bits(kind, blocksize, double)(weight)
    assert len(ours.tensors) == len(parts)
    for name, mine, theirs in zip(("packed", "absmax", "code", "code2", "absmax2", "offset"), ours.tensors, parts):
        assert mine.dtype == theirs.dtype, name
        different = (mine != theirs).nonzero().flatten().tolist()
        shown = [(i, mine.flatten()[i].item(), theirs.flatten()[i].item()) for i in different[:6]]
        said = f"{name}: {len(different)} of {mine.numel()} differ, {tuple(weight.shape)}, double={double}: {shown}"
        assert not different, said


@pytest.mark.parametrize("blocksize", [64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", codes.KINDS)
def test_random_weights(kind: str, dtype: torch.dtype, blocksize: int) -> None:
    assert implementation(DEVICE) is kernel  # not the reference
    generator = torch.Generator(DEVICE).manual_seed(blocksize)
    for shape in SHAPES:
        weight = (torch.randn(shape, device=DEVICE, generator=generator) * 0.02).to(dtype)
        for double in (True, False):
            compare(weight, kind, blocksize, double)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", codes.KINDS)
def test_all_values_of_a_large_matrix(kind: str, dtype: torch.dtype) -> None:
    """An exact division instead of the approximate reciprocal would show in a few of these values."""
    generator = torch.Generator(DEVICE).manual_seed(7)
    compare(torch.randn(4096, 14336, device=DEVICE, generator=generator).to(dtype), kind, 64, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", codes.KINDS)
def test_unusual_values(kind: str, dtype: torch.dtype) -> None:
    """Blocks of zeros, one value among zeros, equal values, both signs of zero, very small and very large ones."""
    weight = torch.randn(16, 256, device=DEVICE)
    weight[0] = 0
    weight[1, 1:] = 0
    weight[2] = 0.37
    weight[3, ::2] = -0.0
    weight[4] *= 1e-5
    weight[5] *= 6e4 / weight[5].abs().max()
    weight[6, 0] = 1000
    weight[7] = torch.linspace(-1, 1, 256, device=DEVICE)
    for blocksize in (64, 256):
        for double in (True, False):
            compare(weight.to(dtype), kind, blocksize, double)


@pytest.mark.parametrize("kind", codes.KINDS)
def test_values_halfway_between_two_codes(kind: str) -> None:
    """And their neighbours in fp32: the side on which each falls."""
    values = codes.values(kind, DEVICE).sort().values.double()
    middles = ((values[:-1] + values[1:]) / 2).float()
    one = torch.ones(1, device=DEVICE)
    around = [middles, torch.nextafter(middles, one), torch.nextafter(middles, -one)]
    weight = torch.cat([one, *around, torch.zeros(64 - 1 - 3 * len(middles), device=DEVICE)])[None]
    for scale in (1.0, 0.5, 0.3, 1.7e-3):
        compare((weight * scale).repeat(3, 1), kind, 64, False)


def test_a_transposed_matrix() -> None:
    compare(torch.randn(96, 200, device=DEVICE, dtype=torch.bfloat16).t(), "nf4", 64, True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_loaded_model_holds_what_transformers_makes(tmp_path: Path, dtype: str) -> None:
    """Through the pinned buffers, over several files, and not in one go."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from fastplug.layers import QuantLinear, load

    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=16,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    with DEVICE:
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="50MB")
    del model
    kind = getattr(torch, dtype)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=kind, device_map={"": 0}, quantization_config=quantization
    )
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ours = load(tmp_path, "nf4", device="cuda", dtype=kind)
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    largest = 2048 * 8192 * 2
    assert peak <= held + 2 * largest + (8 << 20)  # in the files' dtype and in the one asked for
    names = [name for name, module in ours.named_modules() if isinstance(module, QuantLinear)]
    assert len(names) == 14
    for name in names:
        mine, weight = ours.get_submodule(name), theirs.get_submodule(name).weight
        state = weight.quant_state
        assert torch.equal(mine.weight, weight.data.flatten()), name
        assert torch.equal(mine.absmax, state.absmax), name
        assert torch.equal(mine.nested_absmax, state.state2.absmax), name
        assert torch.equal(mine.nested_offset.view(()), state.offset), name
    for name in ("lm_head", "model.embed_tokens", "model.norm"):
        assert torch.equal(ours.get_submodule(name).weight, theirs.get_submodule(name).weight), name
