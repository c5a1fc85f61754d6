"""Matrices in fewer bits: how far the values are from what they were, and what is shared."""

import numpy as np
import pytest
import torch

from gemlet.quantise import narrowed, pack, widened

W = np.random.default_rng(0).standard_normal((300, 96), np.float32)
W[3] = 0
W[4, :32] = 0
W[5] *= 1e-20
W[6, 7] = 40


@pytest.mark.parametrize(("format", "bits"), [("fp32", 32), ("bf16", 16), ("int8", 8), ("int4", 4.5)])
def test_values_come_back_nearly(format, bits):
    """Within half a step; in int4 what is as large as the largest of its group may be cut, from 9 steps to 7."""
    packed = pack(W, format)
    assert packed.values.nbytes * 8 == bits * W.size
    groups, back = W.reshape(300, -1, 32), packed.unpack().reshape(300, -1, 32)
    largest = np.abs(W).max(1)[:, None, None] if format == "int8" else np.abs(groups).max(-1, keepdims=True)
    step = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.5 / 127, "int4": 2.0 / 9}[format]
    assert (np.abs(groups - back) <= largest * step * 1.001).all()
    assert (back[3] == 0).all() and (back[4, 0] == 0).all()


def test_int4_is_better_than_a_scale_from_the_largest_value():
    groups = W.reshape(300, -1, 32)
    scale = np.abs(groups).max(-1, keepdims=True) / 7
    plain = np.rint(groups / np.maximum(scale, 1e-30)) * scale
    back = pack(W, "int4").unpack().reshape(groups.shape)
    assert np.square(groups - back).mean() < 0.85 * np.square(groups - plain).mean()


def test_sixteen_bits_are_rounded_as_torch_rounds():
    values = np.concatenate((W.ravel(), W.ravel() * 1e-38, np.array([0.0, -0.0, 3e38, 1 + 2**-8, 1 + 3 * 2**-8])))
    bits = narrowed(values.astype(np.float32))
    expected = torch.from_numpy(values).float().bfloat16()
    assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16), expected)
    assert np.array_equal(widened(bits), expected.float().numpy())


def test_bits_are_packed_as_the_values_they_are():
    for format in ("fp32", "int8", "int4"):
        assert np.array_equal(pack(narrowed(W), format).unpack(), pack(widened(narrowed(W)), format).unpack())


def test_own_values_are_shared_and_odd_columns_fall_back():
    assert np.shares_memory(pack(W, "fp32").values, W)
    bits = narrowed(W)
    assert np.shares_memory(pack(bits, "bf16").values, bits)
    assert pack(W[:, :50], "int4").format == "int8"
