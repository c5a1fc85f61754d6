"""Matrices in fewer bits: how far the values are from what they were, and what is shared."""

import pytest
import torch

from gemlet.quantise import pack

W = torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
W[3] = 0
W[4, :32] = 0
W[5] *= 1e-20
W[6, 7] = 40


@pytest.mark.parametrize(("format", "bits"), [("fp32", 32), ("bf16", 16), ("int8", 8), ("int4", 4.5)])
def test_values_come_back_within_half_a_step(format, bits):
    packed = pack(W, format)
    assert packed.values.nbytes * 8 == bits * W.numel()
    groups, back = W.view(50, -1, 32), packed.unpack().view(50, -1, 32)
    largest = W.abs().amax(1)[:, None, None] if format == "int8" else groups.abs().amax(-1, keepdim=True)
    step = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.5 / 127, "int4": 1.0 / 8}[format]
    assert ((groups - back).abs() <= largest * step * 1.001).all()
    assert (back[3] == 0).all() and (back[4, 0] == 0).all()


def test_int4_is_better_than_a_scale_from_the_largest_value():
    groups = W.view(50, -1, 32)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    plain = (groups / scale.clamp_min(1e-30)).round() * scale
    back = pack(W, "int4").unpack().view_as(groups)
    assert (groups - back).square().mean() < 0.85 * (groups - plain).square().mean()


def test_own_values_are_shared_and_odd_columns_fall_back():
    assert pack(W, "fp32").values.data_ptr() == W.data_ptr()
    assert pack(W[:, :50], "int4").format == "int8"
