"""What norm.cpp computes is what plain torch computes, whatever the shape and the number of threads."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from gemlet.kernels import norm as kernel
from gemlet.kernels.build import library
from gemlet.model import HeadNorm, RMSNorm, rope

pytestmark = pytest.mark.skipif(library("norm") is None, reason="no C++ compiler here, without which torch computes it")
BOUND = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
each_dtype = pytest.mark.parametrize("dtype", kernel.DTYPES, ids=str)
EPS = 1e-3


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def computed(way: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The result, and the gradients of the tensors it is made of."""
    tensors = [x.detach().requires_grad_() for x in tensors]
    result = way(*tensors)
    result.backward(grad.to(result.dtype))
    gradients = [x.grad for x in tensors if x.grad is not None]
    assert len(gradients) == len(tensors)
    return [result.detach(), *gradients]


def plain_norm(x: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    y = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (1 + weight)
    return y if onto is None else onto + y


def plain_turned(x: Tensor, weight: Tensor) -> Tensor:
    angles = [y.double() for y in rope(torch.arange(x.shape[1]), x.shape[-1], 100.0)]
    left, right = plain_norm(x, weight).transpose(1, 2).chunk(2, -1)
    return torch.cat((left, right), -1) * angles[0] + torch.cat((right, left), -1) * angles[1]


def norm(x: Tensor, weight: Tensor, onto: Tensor | None = None) -> Tensor:
    return kernel.rms_norm(x, weight, onto, EPS)


def turned(x: Tensor, weight: Tensor) -> Tensor:
    return kernel.norm_and_turn(x, weight, *rope(torch.arange(x.shape[1]), x.shape[-1], 100.0), EPS)


def off(found: Tensor, expected: Tensor) -> float:
    """How far, as a part of the whole."""
    return float((found.double() - expected).norm() / expected.norm())


def agree(way: Callable[..., Tensor], plain: Callable[..., Tensor], tensors: list[Tensor], grad: Tensor) -> None:
    dtype = tensors[0].dtype
    found, expected = computed(way, tensors, grad), computed(plain, [x.double() for x in tensors], grad.double())
    assert all(off(a, b) < BOUND[dtype] for a, b in zip(found, expected, strict=True))
    assert [x.dtype for x in found[1:]] == [x.dtype for x in tensors]


@each_dtype
@pytest.mark.parametrize("rows, size", [(1, 16), (7, 48), (8, 640), (130, 32), (1000, 128)])
def test_a_norm_and_its_gradients_are_exact(dtype, rows, size):
    x, onto, grad = numbers(3, rows, size).to(dtype)
    weight = 0.3 * numbers(size)
    agree(norm, plain_norm, [x, weight], grad)
    agree(norm, plain_norm, [x, weight, onto], grad)


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1, 32), (2, 13, 3, 32), (3, 50, 1, 64), (1, 5, 4, 256)])
def test_turned_heads_and_their_gradients_are_exact(dtype, shape):
    x, grad = numbers(2, *shape).to(dtype)
    agree(turned, plain_turned, [x, 0.3 * numbers(shape[-1])], grad.transpose(1, 2))


@each_dtype
def test_weights_may_have_sixteen_bits(dtype):
    x, grad = numbers(2, 20, 32).to(dtype)
    found = computed(norm, [x, (0.3 * numbers(32)).bfloat16()], grad)
    expected = computed(norm, [x, (0.3 * numbers(32)).bfloat16().float()], grad)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2].bfloat16())


@each_dtype
def test_tensors_may_lie_in_any_way(dtype):
    x, onto, grad = numbers(3, 6, 8, 32).to(dtype)
    weight = 0.3 * numbers(32)
    expected = computed(norm, [x, weight, onto], grad)
    x, onto, grad = (y.permute(2, 1, 0).contiguous().permute(2, 1, 0) for y in (x, onto, grad))
    assert all(map(torch.equal, computed(norm, [x, weight, onto], grad), expected))
    heads, grad = numbers(2, 2, 5, 3, 32).to(dtype)
    expected = computed(turned, [heads, weight], grad.transpose(1, 2))
    heads, grad = torch.cat((heads, heads), -1)[..., 32:], grad.transpose(1, 2).contiguous()
    assert all(map(torch.equal, computed(turned, [heads, weight], grad), expected))


@each_dtype
def test_no_bit_depends_on_the_number_of_threads(threads, dtype):
    x, grad = numbers(2, 300, 48).to(dtype)
    heads, grad_heads = numbers(2, 3, 50, 3, 32).to(dtype)
    results = []
    for count in (1, 2, 3, 8):
        threads(count)
        of_heads = computed(turned, [heads, numbers(32)], grad_heads.transpose(1, 2))
        results.append([*computed(norm, [x, numbers(48)], grad), *of_heads])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@each_dtype
def test_a_row_depends_on_nothing_beside_it(dtype):
    x, grad = numbers(2, 2, 50, 3, 32).to(dtype)
    weight, grad = numbers(32), grad.transpose(1, 2)
    for way, of in ((norm, lambda y: y[1:, :7]), (turned, lambda y: y[1:, :, :7])):
        at = grad.transpose(1, 2) if way is norm else grad
        out, grad_x, _ = computed(way, [x, weight], at)
        some, grad_some, _ = computed(way, [x[1:, :7], weight], of(at))
        assert torch.equal(some, of(out)) and torch.equal(grad_some, grad_x[1:, :7])


def test_what_is_no_number_shows():
    x = numbers(3, 32)
    x[1, 5] = torch.nan
    assert norm(x, torch.zeros(32)).isnan().any(-1).tolist() == [False, True, False]
    assert norm(x.bfloat16(), torch.zeros(32)).isnan().any(-1).tolist() == [False, True, False]


@each_dtype
def test_the_modules_are_the_same_with_it_and_without(monkeypatch, dtype):
    """Also where a size is not one of its own."""
    results = []
    for with_it in (True, False):
        if not with_it:
            monkeypatch.setattr(kernel, "library", lambda name: None)
        found = []
        for size in (32, 20):
            assert kernel.available("cpu", dtype, size) == (with_it and size == 32)
            norms = RMSNorm(size, EPS), HeadNorm(size, EPS)
            for each in norms:
                each.weight.data = 0.3 * numbers(size)
            x, grad = numbers(2, 2, 9, 3, size).to(dtype)
            angles = rope(torch.arange(9), size, 100.0)
            found += computed(lambda x, norms=norms: norms[0](x, onto=x), [x], grad)
            found += computed(lambda x, norms=norms, at=angles: norms[1](x, at), [x], grad.transpose(1, 2))
        results.append(found)
    assert all(off(a, b.double()) < 2 * BOUND[dtype] for a, b in zip(*results, strict=True))


@each_dtype
def test_they_are_operations_as_torch_wants_them(dtype):
    x, onto, grad = numbers(3, 9, 32).to(dtype)
    weight = numbers(32)
    given = [y.requires_grad_() for y in (x, weight, onto)]
    torch.library.opcheck(kernel.rms_norm, (*given, EPS))
    torch.library.opcheck(kernel.rms_norm, (*given[:2], None, EPS))
    torch.library.opcheck(kernel.rms_norm_backward, (grad, x.detach(), weight.detach(), EPS))
    heads, grad = numbers(2, 2, 5, 3, 32).to(dtype)
    angles, weight = rope(torch.arange(5), 32, 100.0), weight.detach()
    torch.library.opcheck(kernel.norm_and_turn, (heads.requires_grad_(), weight.requires_grad_(), *angles, EPS))
    back = (grad.transpose(1, 2), heads.detach(), weight.detach(), *angles, EPS)
    torch.library.opcheck(kernel.norm_and_turn_backward, back)
