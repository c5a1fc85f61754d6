"""A step in Triton is the step in plain torch: the same logits and the same rings, up to the rounding of 16 bits."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from gemlet.config import FULL, SLIDING
from gemlet.eager import BatchDecoder
from gemlet.model import Gemma
from gemlet.testing import tiny_model

pytest.importorskip("triton", reason="Triton is not here")

from gemlet.kernels import step as kernels

LENGTH = 100
SHAPES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "the real head_dim": {"head_dim": 256, "num_key_value_heads": 1},
    "odd sizes": {"hidden_size": 44, "intermediate_size": 51, "head_dim": 20, "vocab_size": 323},
    "five queries a key head": {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 50},
    "sixteen queries a key head": {"num_attention_heads": 16, "num_key_value_heads": 1},
    "own key heads": {"num_key_value_heads": 4},
    "the real width": {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 2},
    "full only": {"layer_types": ("full_attention",) * 6},
    "untied": {"tie_word_embeddings": False},
}
STARTS = {1: [0], 3: [7, None, 0], 16: [0, 40, *range(14)]}  # where slots begin; None: a slot that never has a row


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def _written(decoder: BatchDecoder, starts: list[int | None], steps: int) -> Tensor:
    """The logits of all steps: [steps, slots with a row, V]."""
    on = [slot for slot, start in enumerate(starts) if start is not None]
    tokens = torch.randint(0, decoder.config.vocab_size, (steps, len(on)), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([start for start in starts if start is not None])
    return torch.stack([decoder.step(row.tolist(), on, (positions + i).tolist()) for i, row in enumerate(tokens)])


def _in_torch(model: Gemma, slots: int) -> BatchDecoder:
    decoder = BatchDecoder(model, slots, LENGTH)
    decoder._kernels = None
    return decoder


@pytest.mark.parametrize("few", [0, 16], ids=["for many", "for few"])
@pytest.mark.parametrize("slots", STARTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_are_the_step_in_torch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, shape: str, slots: int, few: int
) -> None:
    """Beyond the end of a ring. The step in float32 says how much is rounding: either may be the closer one to it."""
    if device.type == "cpu":
        pytest.skip("the kernels are for NVIDIA's GPUs")
    monkeypatch.setattr(kernels, "FEW", few)
    _compare(device, SHAPES[shape], slots)


@pytest.mark.parametrize("splits", [1, 2])
def test_a_program_takes_several_blocks_of_a_ring(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, splits: int
) -> None:
    if device.type == "cpu":
        pytest.skip("the kernels are for NVIDIA's GPUs")
    monkeypatch.setattr(kernels, "SPLITS", splits)
    _compare(device, {"sliding_window": 20}, 3)


def _compare(device: torch.device, shape: dict[str, Any], slots: int) -> None:
    model = tiny_model(3, **shape).to(device, torch.bfloat16)
    starts = STARTS[slots]
    steps = LENGTH - max(start or 0 for start in starts)
    found, expected = BatchDecoder(model, slots, LENGTH), _in_torch(model, slots)
    assert found._kernels is not None
    exact = _in_torch(copy.deepcopy(model).float(), slots)
    idle = [slot for slot, start in enumerate(starts) if start is None]
    for k, v in found.rings:
        k[idle], v[idle] = 3, 4
    logits, plain, precise = (_written(decoder, starts, steps) for decoder in (found, expected, exact))
    assert _relative(logits, precise) < max(1.2e-2, 1.2 * _relative(plain, precise))
    assert _relative(logits, plain) < 4e-2
    _same_rings(found, expected, starts, 3e-2)


def _same_rings(found: BatchDecoder, expected: BatchDecoder, starts: list[int | None], bound: float) -> None:
    """Those of slots with rows; in `found` those of the others were filled with 3 and 4 before."""
    idle = [slot for slot, start in enumerate(starts) if start is None]
    busy = [slot for slot, start in enumerate(starts) if start is not None]
    for ring, other in zip(found.rings, expected.rings, strict=True):
        for memory, reference, untouched in zip(ring, other, (3, 4), strict=True):
            assert _relative(memory[busy], reference[busy]) < bound
            assert (memory[idle] == untouched).all(), "a slot without a row has kept what it had"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves are tested here")
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("step", ["Step", "ManyStep"])
def test_the_interpreted_kernels_are_the_step_in_torch(step: str, slots: int) -> None:
    """In float32, from before to behind the end of a ring, where places are still empty, too."""
    starts: list[int | None] = [[70], [70, None, 3]][slots > 1]
    model = tiny_model(3, **SHAPES["odd sizes"], num_hidden_layers=2, layer_types=(SLIDING, FULL))
    found, expected = (_in_torch(model, slots) for _ in range(2))
    found._kernels = getattr(kernels, step)(model, found.cache, found._inputs)
    for decoder in (found, expected):
        for k, v in decoder.rings:
            k.fill_(3)
            v.fill_(4)
    assert found.rings[0][0].shape[2] < 70 + 6
    logits, plain = (_written(decoder, starts, 6) for decoder in (found, expected))
    assert _relative(logits, plain) < 2e-6
    _same_rings(found, expected, starts, 2e-6)


def test_what_is_too_wide_is_for_torch(device: torch.device) -> None:
    model = tiny_model(head_dim=258).to(device, torch.bfloat16)
    decoder = BatchDecoder(model, 1, 4)
    assert decoder._kernels is None and kernels.step_of(model, decoder.cache, decoder._inputs) is None
    model = tiny_model().to(device)
    decoder = BatchDecoder(model, 1, 4)
    assert kernels.step_of(model, decoder.cache, decoder._inputs) is None, "of weights in float32"
