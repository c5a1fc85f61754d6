"""A step in Triton is the step in plain torch: the same logits and the same rings, up to the rounding of 16 bits."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from gemlet.eager import BatchDecoder
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


def _written(decoder: BatchDecoder, starts: list[int | None], steps: int, in_torch: bool) -> Tensor:
    """The logits of all steps: [steps, slots with a row, V]."""
    if in_torch:
        decoder._kernels = None
    else:
        assert decoder._kernels is not None
    on = [slot for slot, start in enumerate(starts) if start is not None]
    tokens = torch.randint(0, decoder.config.vocab_size, (steps, len(on)), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([start for start in starts if start is not None])
    return torch.stack([decoder.step(row.tolist(), on, (positions + i).tolist()) for i, row in enumerate(tokens)])


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
    found, expected = (BatchDecoder(model, slots, LENGTH) for _ in range(2))
    exact = BatchDecoder(copy.deepcopy(model).float(), slots, LENGTH)
    idle = [slot for slot, start in enumerate(starts) if start is None]
    for k, v in found.rings:
        k[idle], v[idle] = 3, 4
    logits = _written(found, starts, steps, in_torch=False)
    plain = _written(expected, starts, steps, in_torch=True)
    precise = _written(exact, starts, steps, in_torch=True)
    assert _relative(logits, precise) < max(1.2e-2, 1.2 * _relative(plain, precise))
    assert _relative(logits, plain) < 4e-2
    busy = [slot for slot, start in enumerate(starts) if start is not None]
    for ring, other in zip(found.rings, expected.rings, strict=True):
        for memory, reference, untouched in zip(ring, other, (3, 4), strict=True):
            assert _relative(memory[busy], reference[busy]) < 3e-2
            assert (memory[idle] == untouched).all(), "a slot without a row has kept what it had"


def test_what_is_too_wide_is_for_torch(device: torch.device) -> None:
    model = tiny_model(head_dim=258).to(device, torch.bfloat16)
    assert BatchDecoder(model, 1, 4)._kernels is None
    assert BatchDecoder(tiny_model().to(device), 1, 4)._kernels is None, "weights in float32"
