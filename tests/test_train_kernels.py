"""What train.cpp computes is what plain torch computes, whatever the size and the number of threads."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gemlet import attention
from gemlet import geglu as activation
from gemlet.geglu import geglu
from gemlet.kernels import train
from gemlet.kernels.build import library
from gemlet.loss import IGNORE, _softmax, _to_gradient
from gemlet.testing import tiny_model

BOUND = {torch.float32: 1e-6, torch.bfloat16: 3e-3}
compiler = pytest.mark.skipif(library("train") is None, reason="no C++ compiler here, without which torch computes it")
each_dtype = pytest.mark.parametrize("dtype", train.DTYPES, ids=str)


@pytest.fixture(params=[True, False], ids=["C++", "torch"])
def kernels(request, monkeypatch) -> bool:
    """With the kernels and, as where there is no compiler, without."""
    if request.param and library("train") is None:
        pytest.skip("no C++ compiler here")
    if not request.param:
        monkeypatch.setattr(train, "library", lambda name: None)
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def off(found: Tensor, expected: Tensor) -> float:
    """How far, as a part of the whole."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def activated(function: Callable[[Tensor, Tensor], Tensor], size: int, dtype: torch.dtype) -> list[Tensor]:
    """The result, and the gradients of gate and up."""
    g = torch.Generator().manual_seed(size)
    gate, up, grad = (4 * torch.randn(3, size, generator=g) for _ in range(3))
    gate, up = (x.to(dtype).requires_grad_() for x in (gate, up))
    result = function(gate, up)
    result.backward(grad.to(result.dtype))
    assert gate.grad is not None and up.grad is not None
    return [result.detach(), gate.grad, up.grad]


def exact(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.gelu(gate.double(), approximate="tanh") * up.double()


@each_dtype
@pytest.mark.parametrize("size", [1, 5, 16, 33, 1000])
def test_geglu_and_its_gradients_are_exact(kernels, dtype, size):
    for found, expected in zip(activated(geglu, size, dtype), activated(exact, size, dtype), strict=True):
        assert found.dtype == dtype and off(found, expected) < (2 if kernels else 4) * BOUND[dtype]


@compiler
def test_geglu_of_what_is_large_or_no_number():
    """Nothing overflows, and a NaN shows."""
    gate = torch.tensor([-1e4, -100.0, -9.0, 0.0, 9.0, 100.0, 1e4]).requires_grad_()
    result = geglu(gate, torch.ones(7))
    result.sum().backward()
    assert torch.allclose(result.detach(), torch.tensor([0, 0, 0, 0, 9, 100, 1e4]))
    assert gate.grad is not None and torch.allclose(gate.grad, torch.tensor([0, 0, 0, 0.5, 1, 1, 1]))
    assert geglu(torch.tensor([1.0, torch.nan]), torch.ones(2)).isnan().tolist() == [False, True]


def test_geglu_is_the_same_function_where_it_is_compiled_without_a_kernel(monkeypatch):
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    expected = activation._gelu(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.allclose(activation._gelu(x), expected, rtol=1e-9, atol=1e-12)


def scored(rows: int, vocabulary: int, dtype: torch.dtype, more: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows)
    logits = 3 * torch.randn(rows, vocabulary + more, generator=g)
    targets = torch.randint(0, vocabulary, (rows,), generator=g)
    targets[1::3] = IGNORE
    return logits.to(dtype), targets


@compiler
@each_dtype
@pytest.mark.parametrize(("rows", "vocabulary", "more"), [(1, 2, 0), (7, 301, 0), (40, 5001, 63)])
def test_the_softmax_of_the_loss_is_its_reference(dtype, rows, vocabulary, more):
    logits, targets = scored(rows, vocabulary, dtype, more)
    found, expected = logits.clone(), logits.clone()
    loss = _softmax("cpu", dtype)(found, targets, vocabulary, IGNORE)
    assert loss.item() == pytest.approx(_to_gradient(expected, targets, vocabulary, IGNORE).item(), rel=1e-6)
    assert off(found, expected) < BOUND[dtype]
    assert not found[:, vocabulary:].any() and not found[targets == IGNORE].any()


@compiler
@each_dtype
@pytest.mark.parametrize("rows", [1, 3], ids="{} rows of first keys".format)
def test_the_softmax_of_attention_is_its_reference(monkeypatch, dtype, rows):
    """Queries that see all keys up to their own, and some that do not see the first ones."""
    scores = (3 * torch.randn(3, 2, 20, 57)).to(dtype)
    first = torch.arange(20).clamp(min=4).expand(rows, 20) - 10 + torch.arange(rows)[:, None]
    found, expected = scores.clone(), scores.clone()
    attention._softmax(found, first, 11)
    monkeypatch.setattr(train, "library", lambda name: None)
    attention._softmax(expected, first, 11)
    assert off(found, expected) < BOUND[dtype] and torch.equal(found == 0, expected == 0)


@compiler
def test_a_probability_of_zero_has_a_loss_and_a_gradient():
    logits = torch.tensor([[0.0, -1000.0, -torch.inf], [5.0, 5.0, 5.0]])
    loss = train.softmax_to_gradient(logits, torch.tensor([1, 2]), 3, IGNORE)
    assert loss.item() == pytest.approx(1000 + torch.log(torch.tensor(3.0)).item())
    assert torch.allclose(logits, torch.tensor([[1.0, -1, 0], [1 / 3, 1 / 3, -2 / 3]]))


@compiler
def test_a_logit_that_is_no_number_shows_in_the_loss():
    logits = torch.zeros(2, 50)
    logits[1, 30] = torch.nan
    assert train.softmax_to_gradient(logits, torch.tensor([1, 2]), 50, IGNORE).isnan()


@compiler
@pytest.mark.parametrize("target", [-1, 50])
def test_a_target_outside_of_the_vocabulary_is_refused(target):
    with pytest.raises(IndexError, match="for a vocabulary of 50"):
        train.softmax_to_gradient(torch.zeros(2, 50), torch.tensor([1, target]), 50, IGNORE)


@compiler
@each_dtype
def test_the_number_of_threads_changes_no_bit(threads, dtype):
    results = []
    for number in (1, 2, 3, 5):
        threads(number)
        found = [x for size in (1, 31, 77, 1001) for x in activated(geglu, size, dtype)]
        logits, targets = scored(11, 333, dtype)
        scores = torch.linspace(-3, 3, 2 * 3 * 5 * 47).view(2, 3, 5, 47).to(dtype)
        train.softmax_between(scores, torch.arange(-2, 3)[None], 43)
        results.append([*found, scores, train.softmax_to_gradient(logits, targets, 333, IGNORE), logits])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@compiler
@each_dtype
def test_they_are_operations_as_torch_wants_them(dtype):
    gate, up, grad = torch.randn(3, 2, 5).to(dtype)
    logits, targets = scored(4, 9, dtype)
    operations: list[tuple[Any, tuple]] = [
        (train.geglu, (gate, up)),
        (train.geglu_backward, (grad, gate, up)),
        (train.softmax_to_gradient, (logits, targets, 9, IGNORE)),
    ]
    for operation, arguments in operations:
        torch.library.opcheck(operation, arguments)


@compiler
def test_a_compiled_block_is_the_block():
    """With the kernels of norms in it, too."""
    model, ids = tiny_model(head_dim=32), torch.arange(40)[None]
    gradients = []
    for compiled in (False, True):
        if compiled:
            for block in model.model.layers:
                block.compile(dynamic=False)
        model.zero_grad()
        model(ids).logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(off(a, b) < 1e-4 for a, b in zip(*gradients, strict=True))


def test_the_norm_of_gradients_is_exact_whatever_the_number_of_threads(threads):
    random = torch.Generator().manual_seed(0)
    shapes = [(3,), (0,), (16385,), (300, 500), (64,), (1,)]
    gradients = [torch.randn(shape, generator=random) for shape in shapes]
    assert train.norm_available(gradients)
    expected = sum(g.double().square().sum() for g in gradients) ** 0.5
    found = set()
    for count in (1, 2, 3, 8):
        threads(count)
        found.add(train.norm(gradients).item())
    assert len(found) == 1 and found.pop() == pytest.approx(float(expected), rel=1e-6)
    gradients[3][7, 5] = torch.nan
    assert train.norm(gradients).isnan()


@pytest.mark.parametrize("gradient", [torch.ones(4, 6).T, torch.ones(3, dtype=torch.bfloat16)])
def test_a_norm_of_other_gradients_is_torchs(gradient):
    assert not train.norm_available([torch.ones(2), gradient])
