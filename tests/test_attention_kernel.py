"""What attention.cpp computes is what the reference computes, forwards and backwards, by however many threads."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from gemlet.attention import attention, reference
from gemlet.kernels import attention as kernel

pytestmark = pytest.mark.skipif(
    not kernel.available("cpu", torch.bfloat16, 64),
    reason="no C++ compiler, or no products in bf16",
)

HEADS = [(1, 1), (4, 2), (3, 1), (2, 2), (4, 1), (300, 1)]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(T: int, S: int, heads: tuple[int, int] = (4, 2), H: int = 64, B: int = 2) -> list[Tensor]:
    """Queries, keys and values, and a gradient of the result."""
    N, K = heads
    g = torch.Generator().manual_seed(1000 * T + S)
    shapes = ((B, N, T, H), (B, K, S, H), (B, K, S, H), (B, N, T, H))
    return [torch.randn(shape, generator=g).bfloat16() for shape in shapes]


def documents(T: int, B: int = 2) -> Tensor:
    cuts = torch.rand(B, T, generator=torch.Generator().manual_seed(T)) < 0.1
    return torch.where(cuts, torch.arange(T), 0).cummax(-1).values


def computed(way: Callable[..., Tensor], tensors: list[Tensor], **options) -> list[Tensor]:
    """The result, and the gradients of q, k and v."""
    qkv, upstream = [x.detach().requires_grad_() for x in tensors[:3]], tensors[3]
    out = way(*qkv, **options)
    return [out.detach(), *torch.autograd.grad(out, qkv, upstream.to(out.dtype))]


def assert_same(tensors: list[Tensor], **options) -> None:
    """Within what bf16 can tell, and for more than a few queries, whose errors even out, within half of that."""
    found = computed(attention, tensors, **options)
    expected = computed(reference, [x.float() for x in tensors], **options)
    bound = 0.005 if tensors[0].shape[2] > 4 else 0.02
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, atol=4 * bound * float(theirs.abs().max()) + 1e-3, rtol=0.02)
        # a query that sees one key has no gradient, but for the rounding of what is subtracted
        assert (ours.float() - theirs).norm() < bound * theirs.norm() + 1e-3


def test_it_is_what_attention_takes(monkeypatch):
    """Else nothing here would be tested."""
    called = []
    monkeypatch.setattr(kernel, "_call", lambda name, *_: called.append(name))
    computed(attention, inputs(40, 40), window=8, scale=0.3)
    assert called == ["attention", "attention_backward"]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [1, 7, 32, 100, None])
def test_it_is_the_reference(window, heads):
    for T in (1, 2, 8, 33, 131):
        assert_same(inputs(T, T, heads), window=window, scale=0.2)


@pytest.mark.parametrize("H", [32, 96, 256])
@pytest.mark.parametrize("window", [60, None])
def test_other_widths(window, H):
    assert_same(inputs(150, 150, H=H), window=window, scale=H**-0.5)


@pytest.mark.parametrize("window", [50, 300, None])
def test_more_keys_than_are_held_at_a_time(window):
    """Forwards 256, backwards 1,024; and more rows than a block has."""
    assert_same(inputs(1300, 1300, (2, 1), 32, B=1), window=window, scale=0.3)
    assert_same(inputs(70, 1500, (8, 1), 32, B=1), window=window, scale=0.3)


@pytest.mark.parametrize("window", [1, 20, None])
def test_with_earlier_keys(window):
    for T, S in ((2, 3), (5, 64), (33, 100), (100, 333)):
        assert_same(inputs(T, S), window=window, scale=0.3)


@pytest.mark.parametrize("window", [1, 20, 100, None])
def test_documents_apart(window):
    for T in (1, 33, 200):
        assert_same(inputs(T, T), window=window, scale=0.3, starts=documents(T))


@pytest.mark.parametrize("window", [20, None])
def test_it_takes_tensors_as_they_lie(window):
    """Heads that lie side by side in a token, as the model makes them, an upstream gradient that is one number."""
    q, k, v, grad = inputs(70, 70)
    expected = computed(attention, [q, k, v, grad], window=window, scale=0.3)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, grad)]
    upright = [x.mT.contiguous().mT for x in (q, k, v, grad)]
    for tensors in (turned, upright):
        for ours, theirs in zip(computed(attention, tensors, window=window, scale=0.3), expected, strict=True):
            assert torch.equal(ours, theirs)
    one = grad.new_ones(()).expand_as(grad)
    for ours, theirs in zip(
        computed(attention, [q, k, v, one], window=window, scale=0.3),
        computed(attention, [q, k, v, one.contiguous()], window=window, scale=0.3),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("B", [1, 2, 3])
def test_the_number_of_threads_changes_no_bit(threads, B):
    """Threads that share a head, and threads that have heads of their own."""
    tensors = inputs(300, 300, (4, 1), B=B)
    results = []
    for n in (1, 2, 5):
        threads(n)
        results.append(computed(attention, tensors, window=90, scale=0.2))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_text_is_the_same_alone():
    tensors = inputs(150, 150, B=3)
    together = computed(attention, tensors, window=40, scale=0.2)
    alone = computed(attention, [x[1:2] for x in tensors], window=40, scale=0.2)
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone, strict=True))


def test_what_is_not_seen_has_no_gradient():
    T, W = 90, 40
    q, k, v, _ = inputs(T, T, (1, 1), 32, B=1)
    q, v = q.requires_grad_(), v.requires_grad_()
    out = attention(q, k, v, window=W, scale=0.3)
    for i in (0, 31, 39, 40, 71, 89):
        (grad,) = torch.autograd.grad(out[0, 0, i].sum(), v, retain_graph=True)
        assert grad[0, 0].abs().sum(-1).nonzero().flatten().tolist() == list(range(max(0, i - W + 1), i + 1))


def test_far_scores_and_no_numbers():
    """A key that wins by far has all the weight, and a query that is no number shows in its own result alone."""
    q, k, v, _ = inputs(600, 600, (1, 1), 32, B=1)
    for key, query in ((3, 40), (500, 550)):  # among the first keys that are held, among the last ones
        k[0, 0, key] = 200 * q[0, 0, query]
        torch.testing.assert_close(attention(q, k, v, window=None, scale=1.0)[0, 0, query], v[0, 0, key])
    q[0, 0, 20] = torch.nan
    out = attention(q, k, v, window=None, scale=1.0)
    assert out.isnan().any(-1).flatten().nonzero().flatten().tolist() == [20]


def test_torch_knows_what_it_does():
    tensors = [x.requires_grad_() for x in inputs(40, 40)[:3]]
    first = (torch.arange(40) - 9).clamp(min=0)[None]
    torch.library.opcheck(kernel.attention, (*tensors, first, 0.3), rtol=0.05, atol=0.05)
    q, k, v = tensors
    out, logsumexp = kernel.attention(q, k, v, first, 0.3)
    grad = torch.ones_like(out)
    qkv = [x.detach() for x in tensors]
    torch.library.opcheck(kernel.attention_backward, (grad, *qkv, first, out.detach(), logsumexp, 0.3))
    compiled = torch.compile(attention, backend="aot_eager")
    for ours, theirs in zip(
        computed(compiled, inputs(40, 40), window=10, scale=0.3),
        computed(attention, inputs(40, 40), window=10, scale=0.3),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
