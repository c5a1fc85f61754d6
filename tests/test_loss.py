import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from gemlet.loss import IGNORE, cross_entropy, linear_cross_entropy


def plain(hidden, weight, targets):
    logits = hidden.float() @ weight.float().T
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def case(tokens=(3, 50), width=16, vocabulary=301, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*tokens, width, generator=g).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=g).requires_grad_()
    targets = torch.randint(0, vocabulary, tokens, generator=g)
    targets[0, :7] = IGNORE
    return hidden, weight, targets


@pytest.fixture(params=[1, 4 * 301 * 70, 2**30])
def chunks(request, monkeypatch):
    """Chunks of one token, of seventy, of all."""
    monkeypatch.setattr("gemlet.loss.CHUNK_BYTES", request.param)
    monkeypatch.setattr("gemlet.loss.CHUNK_TOKENS", 1)


def test_equals_plain_cross_entropy_forwards_and_backwards(chunks):
    hidden, weight, targets = case()
    ours = linear_cross_entropy(hidden, weight, targets)
    theirs = plain(hidden, weight, targets)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours * 0.37, (hidden, weight)),
        torch.autograd.grad(theirs * 0.37, (hidden, weight)),
        strict=True,
    ):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_half_precision_keeps_the_loss_in_float32_and_the_gradient_of_float32_weights(chunks):
    hidden, weight, targets = case()
    value = linear_cross_entropy(hidden.bfloat16(), weight, targets)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(plain(hidden, weight, targets).item(), rel=1e-2)
    gradient, _ = torch.autograd.grad(value, (weight, hidden))
    expected = torch.autograd.grad(plain(hidden, weight, targets), weight)[0]
    assert gradient.dtype == torch.float32
    assert (gradient - expected).norm() < 0.02 * expected.norm()


def test_a_second_backward_is_an_error():
    """The first one scales the gradients in place."""
    value = linear_cross_entropy(*case())
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_losses_of_single_targets_add_up():
    hidden, weight, targets = case()
    each = cross_entropy(hidden, weight, targets)
    assert each.shape == targets.shape
    assert (each[0, :7] == 0).all()
    assert each.sum().item() == pytest.approx(linear_cross_entropy(hidden, weight, targets).item(), rel=1e-6)


def test_never_more_logits_than_a_chunk(monkeypatch):
    monkeypatch.setattr("gemlet.loss.CHUNK_BYTES", 4 * 301 * 64)
    monkeypatch.setattr("gemlet.loss.CHUNK_TOKENS", 1)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    hidden, weight, targets = case(tokens=(8, 100))
    with Watch():
        linear_cross_entropy(hidden, weight, targets).backward()
    assert 0 < largest <= 301 * 64


@pytest.mark.parametrize("more_rows", [0, 3])
def test_the_gradient_of_a_tied_embedding_is_added_in_place(monkeypatch, more_rows):
    """A copy of the head's gradient would be made of a view of it; a GPU's head has more rows."""
    monkeypatch.setattr("gemlet.loss._aligned", lambda weight: F.pad(weight, (0, 0, 0, more_rows)))
    _, weight, targets = case()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        linear_cross_entropy(F.embedding(targets.clamp(min=0), weight), weight, targets).backward()
    shape = list(weight.shape)
    sums = {e.key for e in found.key_averages(group_by_input_shape=True) if e.input_shapes[:2] == [shape, shape]}
    assert "aten::add_" in sums and "aten::add" not in sums
