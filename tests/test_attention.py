"""Every way of computing attention against the reference, forwards and backwards, and the memory that it takes."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gemlet.attention
from gemlet.attention import attention, block_local, blocked, recomputed, reference, visible

HEADS = [(1, 1), (4, 2), (3, 1), (4, 4)]


@pytest.fixture(params=["short", "long", "elsewhere"])
def chosen(request, monkeypatch):
    """`attention` as it is on a CPU for short and for long sequences, and on another device."""
    if request.param == "long":
        monkeypatch.setattr(gemlet.attention, "UNROLLED", 0)
    if request.param == "elsewhere":
        monkeypatch.setattr(gemlet.attention, "_on_cpu", lambda _: False)
    return attention


def inputs(T, S, heads=(4, 2), H=8, B=2):
    N, K = heads
    generator = torch.Generator().manual_seed(T * 1000 + S)
    shapes = ((B, N, T, H), (B, K, S, H), (B, K, S, H))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def documents(T, B=2):
    """Where every position's document begins, [B, T]: short documents and long ones, other ones in every row."""
    cuts = torch.rand(B, T, generator=torch.Generator().manual_seed(T)) < 0.15
    return torch.where(cuts, torch.arange(T), 0).cummax(-1).values


def assert_same(way, qkv, window, starts=None):
    """Equal outputs and equal gradients, with a scale that is not the usual one."""
    expected, got = (f(*qkv, window=window, scale=0.3, starts=starts) for f in (reference, way))
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(
        torch.autograd.grad(got, qkv, upstream), torch.autograd.grad(expected, qkv, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def lengths(W):
    return sorted({T for T in (1, W - 1, W, W + 1, 2 * W, 2 * W + 1, 3 * W + 5) if T > 0})


OPAQUE = {
    torch.ops.gemlet.recomputed_attention.default: gemlet.attention._recomputed._init_fn,
    torch.ops.gemlet.recomputed_attention_backward.default: gemlet.attention._recomputed_backward._init_fn,
}


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made, inside our own ones, too."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in OPAQUE:
            with self:
                return OPAQUE[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


def test_reference_by_hand():
    """Two heads share one key head; the window counts the query itself; scores are scaled before the softmax."""
    T, W, scale = 5, 3, 0.7
    q, k, v = inputs(T, T, heads=(2, 1), H=2, B=1)
    got = reference(q, k, v, window=W, scale=scale)
    for n in range(2):
        for i in range(T):
            keys = range(max(0, i - W + 1), i + 1)
            weights = torch.stack([scale * (q[0, n, i] @ k[0, 0, j]) for j in keys]).softmax(0)
            expected = torch.stack([w * v[0, 0, j] for w, j in zip(weights, keys, strict=True)]).sum(0)
            torch.testing.assert_close(got[0, n, i], expected)


def test_reference_groups_neighbouring_heads():
    """With 4 query heads on 2 key heads, heads 0 and 1 read the first, 2 and 3 the second."""
    q, k, v = inputs(6, 6, heads=(4, 2))
    got = reference(q, k, v, window=None, scale=0.3)
    for n in range(4):
        one = slice(n // 2, n // 2 + 1)
        alone = reference(q[:, n : n + 1], k[:, one], v[:, one], window=None, scale=0.3)
        torch.testing.assert_close(got[:, n : n + 1], alone)


def test_visible():
    assert visible(2, 4, None).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert visible(2, 4, 2).tolist() == [[False, True, True, False], [False, False, True, True]]
    assert visible(3, 3, 1).tolist() == torch.eye(3).bool().tolist()


@pytest.mark.parametrize("window", [1, 2, 7, 16, None])
@pytest.mark.parametrize("heads", HEADS)
def test_self_attention_is_the_reference(chosen, window, heads):
    for T in lengths(window or 16):
        assert_same(chosen, inputs(T, T, heads), window)


@pytest.mark.parametrize("window", [1, 2, 7, None])
def test_with_earlier_keys_is_the_reference(chosen, window):
    """The last T of S positions: what a cache asks for; a single query sees the end of the keys."""
    for T, S in ((1, 2), (1, 7), (1, 30), (2, 8), (5, 11), (7, 13), (8, 30), (29, 30)):
        assert_same(chosen, inputs(T, S), window)


@pytest.mark.parametrize("window", [1, 2, 7, 16])
@pytest.mark.parametrize("heads", HEADS)
def test_block_local_is_the_reference(window, heads):
    for T in lengths(window):
        if window < T:
            assert_same(block_local, inputs(T, T, heads), window)
            assert_same(block_local, inputs(T, T, heads), window, documents(T))


@pytest.mark.parametrize("way", [blocked, recomputed])
@pytest.mark.parametrize("block", [1, 4, 7, 100])
@pytest.mark.parametrize("window", [1, 4, 7, 30, None])
def test_blocks_are_the_reference(way, window, block):
    for T, S in ((1, 1), (4, 4), (9, 9), (28, 28), (29, 29), (5, 12), (20, 33)):
        assert_same(partial(way, block=block), inputs(T, S), window)
        if T == S:
            assert_same(partial(way, block=block), inputs(T, S), window, documents(T))


@pytest.mark.parametrize("window", [1, 2, 7, 16, None])
@pytest.mark.parametrize("heads", HEADS)
def test_documents_are_the_reference(chosen, window, heads):
    for T in (1, 2, 16, 33, 70):
        assert_same(chosen, inputs(T, T, heads), window, documents(T))


@pytest.mark.parametrize("window", [3, 8, 30, None])
def test_packed_documents_are_documents_alone(chosen, window):
    """One row of documents, shorter and longer than the window: outputs and gradients of each one by itself."""
    lengths = (1, 5, 40, 2, 17, 8)
    qkv = inputs(sum(lengths), sum(lengths), B=1)
    begins = torch.tensor([sum(lengths[:n]) for n in range(len(lengths))])
    starts = begins.repeat_interleave(torch.tensor(lengths))[None]
    packed = chosen(*qkv, window=window, scale=0.3, starts=starts)
    pieces = [x.split(lengths, 2) for x in qkv]
    alone = torch.cat([reference(*piece, window=window, scale=0.3) for piece in zip(*pieces, strict=True)], 2)
    torch.testing.assert_close(packed, alone, atol=2e-6, rtol=1e-5)
    upstream = torch.randn(alone.shape, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(
        torch.autograd.grad(packed, qkv, upstream), torch.autograd.grad(alone, qkv, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("starts", [None, documents(40)])
def test_recomputed_compiles_and_keeps_half_precision(starts):
    """What torch.compile has to know of it is true, and in bfloat16 its gradients are near those in float32."""
    qkv = inputs(40, 40)
    i = torch.arange(40)[None]
    torch.library.opcheck(gemlet.attention._recomputed, (*qkv, i.clamp(max=9), 0.3, 16))
    half = [x.detach().bfloat16().requires_grad_() for x in qkv]
    got = recomputed(*half, window=8, scale=0.3, starts=starts, block=16)
    expected = reference(*qkv, window=8, scale=0.3, starts=starts)
    assert got.dtype == torch.bfloat16
    for ours, theirs in zip(
        torch.autograd.grad(got.float().square().sum(), half),
        torch.autograd.grad(expected.square().sum(), qkv),
        strict=True,
    ):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - theirs).norm() < 0.03 * theirs.norm()


def test_half_precision_keeps_its_dtype(chosen):
    q, k, v = (x.detach().bfloat16() for x in inputs(40, 40))
    for window in (None, 8):
        got = chosen(q, k, v, window=window, scale=0.3)
        assert got.dtype == torch.bfloat16
        expected = reference(q.float(), k.float(), v.float(), window=window, scale=0.3)
        torch.testing.assert_close(got.float(), expected, atol=0.03, rtol=0.03)


def assert_linear(way, window, starts):
    """Forwards and backwards, the largest thing made grows with T at most, and is far from T x T."""
    largest = []
    for T in (512, 1024):
        qkv = inputs(T, T, heads=(2, 1), H=4, B=1)
        with LargestTensor() as mode:
            way(*qkv, window=window, scale=0.3, starts=documents(T, B=1) if starts else None).sum().backward()
        largest.append(mode.largest)
    assert largest[1] <= 2.1 * largest[0]
    assert largest[1] < 1024 * 1024 / 2  # of two heads


@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("window", [8, 100])
def test_a_sliding_layer_makes_nothing_of_size_t_by_t(chosen, window, starts):
    assert_linear(chosen, window, starts)


@pytest.mark.parametrize("starts", [False, True])
def test_a_long_full_layer_makes_nothing_of_size_t_by_t(starts):
    assert_linear(recomputed, None, starts)


def test_something_of_size_t_by_t_would_be_seen():
    with LargestTensor() as mode:
        reference(*inputs(1024, 1024, heads=(2, 1), H=4, B=1), window=8, scale=0.3)
    assert mode.largest == 2 * 1024 * 1024
    with LargestTensor() as mode:
        recomputed(*inputs(1024, 1024, heads=(2, 1), H=4, B=1), window=8, scale=0.3, block=1024)
    assert mode.largest == 2 * 1024 * 1024


def test_a_query_depends_on_its_window_alone(chosen):
    """Keys outside the window have a gradient of exactly zero, those inside do not."""
    T, W = 37, 5
    q, k, v = inputs(T, T, heads=(1, 1), B=1)
    out = chosen(q, k, v, window=W, scale=0.3)
    for i in (0, 4, 5, 9, 10, 36):
        (grad,) = torch.autograd.grad(out[0, 0, i].sum(), v, retain_graph=True)
        seen = grad[0, 0].abs().sum(-1).nonzero().flatten().tolist()
        assert seen == list(range(max(0, i - W + 1), i + 1))
