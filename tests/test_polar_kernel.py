"""What polar.cpp computes is what `optim.orthogonalise` computes in plain torch, whatever the number of threads."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from gemlet.kernels import polar as kernel
from gemlet.kernels.build import library
from gemlet.optim import POLYNOMIALS, orthogonalise

found = library("polar")
pytestmark = pytest.mark.skipif(
    found is None or not found.can_multiply(), reason="no products in bf16 or no C++ compiler here: torch computes it"
)
FACTORS = [factor for polynomial in POLYNOMIALS for factor in polynomial]
SHAPES = [(1, 32, 32), (3, 32, 96), (3, 96, 32), (2, 64, 192), (5, 192, 64), (2, 256, 160)]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def matrices(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))).to(dtype)


def exact(x: Tensor) -> Tensor:
    tall = x.shape[1] > x.shape[2]
    y = x.double().mT if tall else x.double()
    y = y / torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True)
    for a, b, c in POLYNOMIALS:
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.mT if tall else y


def off(x: Tensor, expected: Tensor) -> float:
    """How far, as a part of the whole."""
    return float((x.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", kernel.DTYPES, ids=str)
def test_it_is_as_exact_as_plain_torch(monkeypatch, dtype, shape):
    x = matrices(*shape, dtype=dtype)
    assert kernel.available(x)
    ours = orthogonalise(x)
    monkeypatch.setattr(kernel, "available", lambda x: False)
    expected = exact(x)
    assert ours.dtype == dtype and off(ours, expected) < min(0.02, 1.1 * off(orthogonalise(x), expected))


def test_a_matrix_depends_on_nothing_beside_it_and_on_no_number_of_threads(threads):
    x = matrices(5, 64, 96)
    threads(1)
    whole = kernel.polar(x, FACTORS)
    for count in (2, 3, 8):
        threads(count)
        assert torch.equal(kernel.polar(x, FACTORS), whole)
        assert torch.equal(kernel.polar(x[1:3], FACTORS), whole[1:3])


def test_matrices_may_lie_in_any_way():
    x = matrices(3, 64, 96)
    assert torch.equal(kernel.polar(x.mT.contiguous().mT, FACTORS), kernel.polar(x, FACTORS))


def test_of_nothing_comes_nothing_and_what_is_no_number_shows():
    x = matrices(3, 32, 64)
    x[0], x[1, 5, 7] = 0, torch.nan
    result = kernel.polar(x, FACTORS)
    assert not result[0].any() and result[1].isnan().all() and result[2].isfinite().all()


@pytest.mark.parametrize("x", [torch.zeros(1, 32, 48), torch.zeros(1, 32, 32, dtype=torch.float64)])
def test_what_it_cannot_do_torch_does(x):
    assert not kernel.available(x) and orthogonalise(x).shape == x.shape


def test_torch_knows_what_it_does():
    torch.library.opcheck(kernel.polar, (matrices(2, 32, 64), FACTORS))
