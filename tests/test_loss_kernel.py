"""What loss.cpp computes is plain cross-entropy with its gradients, by however many threads."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gemlet.kernels import loss as kernel
from gemlet.loss import IGNORE, linear_cross_entropy

pytestmark = pytest.mark.skipif(
    not kernel.available("cpu", torch.bfloat16, 64), reason="no C++ compiler, or no products in bf16"
)

SHAPES = [(1, 2, 32), (5, 33, 32), (32, 128, 64), (33, 129, 96), (100, 1301, 64), (700, 513, 128)]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def case(tokens: int, vocabulary: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(tokens)
    hidden, weight = torch.randn(tokens, width, generator=g), torch.randn(vocabulary, width, generator=g)
    targets = torch.randint(0, vocabulary, (tokens,), generator=g)
    targets[3::7] = IGNORE
    return hidden.bfloat16(), (weight * width**-0.5).bfloat16(), targets


def computed(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    """The loss and the gradients of hidden and weight."""
    hidden, weight = hidden.detach().requires_grad_(), weight.float().requires_grad_()
    value = linear_cross_entropy(hidden, weight, targets)
    return [value.detach(), *torch.autograd.grad(value, (hidden, weight))]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    value = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="sum")
    return [value.detach(), *torch.autograd.grad(value, (hidden, weight))]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs, bound in zip(found, expected, (1e-6, 0.004, 0.004), strict=True):
        assert (ours.double() - theirs).norm() <= bound * theirs.norm()
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ((ours.double() - theirs).norm(dim=1) <= 0.02 * theirs.norm(dim=1) + 1e-3 * theirs.norm()).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_plain_cross_entropy(shape):
    tensors = case(*shape)
    found = computed(*tensors)
    assert [x.dtype for x in found] == [torch.float32, torch.bfloat16, torch.float32]
    assert_same(found, plain(*tensors))


def test_it_is_what_the_loss_takes(monkeypatch):
    """Else nothing here would be tested."""

    def called(*_):
        raise InterruptedError

    monkeypatch.setattr(kernel, "cross_entropy", called)
    with pytest.raises(InterruptedError):
        computed(*case(5, 33, 32))


def test_chunks_add_up(monkeypatch):
    """The gradient of the head is set by the first chunk, and added to by the others."""
    tensors = case(100, 1301, 64)
    monkeypatch.setattr("gemlet.loss.CHUNK_BYTES", 1)
    monkeypatch.setattr("gemlet.loss.CHUNK_TOKENS", 37)
    assert_same(computed(*tensors), plain(*tensors))


@pytest.mark.parametrize("shape", [(100, 1301, 64), (5, 33, 32)], ids=str)
def test_the_number_of_threads_changes_no_bit(threads, shape):
    tensors = case(*shape)
    results = []
    for n in (1, 2, 5):
        threads(n)
        results.append(computed(*tensors))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_without_gradients_the_loss_is_the_same():
    tensors = case(100, 1301, 64)
    with torch.no_grad():
        alone = linear_cross_entropy(*tensors)
    assert torch.equal(alone, computed(*tensors)[0])


def test_what_is_not_scored_has_no_gradient_and_nothing_scored_is_0():
    hidden, weight, targets = case(40, 65, 32)
    _, of_hidden, _ = computed(hidden, weight, targets)
    assert not of_hidden[targets == IGNORE].any() and of_hidden[targets != IGNORE].any(1).all()
    assert all(not x.any() for x in computed(hidden, weight, torch.full_like(targets, IGNORE)))


def test_logits_far_apart_and_no_numbers():
    """No power overflows or is lost, whichever part of the head has the largest logit, and a NaN shows."""
    hidden, weight, targets = case(40, 300, 32)
    hidden *= 50
    assert_same(computed(hidden, weight, targets), plain(hidden, weight, targets))
    hidden[5] = torch.nan
    assert computed(hidden, weight, targets)[0].isnan()


@pytest.mark.parametrize("target", [-1, 33])
def test_a_target_that_is_no_token_is_an_error(target):
    hidden, weight, targets = case(5, 33, 32)
    targets[2] = target
    with pytest.raises(IndexError, match="33"):
        computed(hidden, weight, targets)


def test_torch_knows_what_it_does():
    hidden, weight, targets = case(40, 300, 32)
    buffer = kernel.buffer_for(40, weight).zero_()
    gradients = torch.zeros_like(hidden), torch.zeros(weight.shape)
    torch.library.opcheck(kernel.cross_entropy, (hidden, weight, targets, IGNORE, buffer, *gradients, False))
    torch.library.opcheck(kernel.cross_entropy, (hidden, weight, targets, IGNORE, buffer, None, None, True))
