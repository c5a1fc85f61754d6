"""A step of Muon by muon.cpp is the one of `optim.Muon` in plain torch, whatever the number of threads."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from gemlet.kernels import muon as kernel
from gemlet.kernels.build import library
from gemlet.optim import POLYNOMIALS, SQUARES, Muon

found = library("muon")
pytestmark = pytest.mark.skipif(
    found is None or not found.can_multiply(), reason="no products in bf16 or no C++ compiler here: torch computes it"
)
SHAPES = [(32, 32), (32, 96), (96, 32), (64, 192), (192, 64), (256, 160), (64, 64), (32, 96)]
STEPS, RATE, MOMENTUM, DECAY = 3, 0.02, 0.85, 0.1


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def numbers(count: int, shape: tuple[int, ...], seed: int) -> list[Tensor]:
    """Whose vectors differ in length, on either side."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.linspace(0.1, 2, shape[0])[:, None] * torch.linspace(1, 3, shape[1])
    return [torch.randn(shape, generator=random) * lengths for _ in range(count)]


def trained(shapes: list[tuple[int, int]], decay: float = DECAY) -> tuple[list[Tensor], Muon]:
    """Matrices after some steps, each with gradients of its own, and who moved them."""
    everything = [numbers(STEPS + 1, shape, seed) for seed, shape in enumerate(shapes)]
    matrices = [nn.Parameter(x[0].clone()) for x in everything]
    muon = Muon(matrices, RATE, MOMENTUM, decay)
    for step in range(STEPS):
        for p, x in zip(matrices, everything, strict=True):
            p.grad = x[step + 1].clone()
        muon.step()
    return [p.detach() for p in matrices], muon


def exact(shape: tuple[int, int], seed: int) -> Tensor:
    """What a matrix of `trained` becomes, in float64, as the papers write it."""
    p, *grads = (x.double() for x in numbers(STEPS + 1, shape, seed))
    momentum, squares = torch.zeros_like(p), None
    for grad in grads:
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * grad
        y = MOMENTUM * momentum + (1 - MOMENTUM) * grad
        y = y / y.norm()
        for a, b, c in POLYNOMIALS:
            y = a * y + (b * y @ y.T + c * y @ y.T @ y @ y.T) @ y
        now = y.square().mean(1 if shape[0] >= shape[1] else 0, keepdim=True)
        squares = now if squares is None else SQUARES * squares + (1 - SQUARES) * now
        even = y / squares.sqrt()
        p = (1 - RATE * DECAY) * p - RATE * max(1, shape[0] / shape[1]) ** 0.5 * y.norm() / even.norm() * even
    return p


def test_it_is_as_exact_as_plain_torch(monkeypatch):
    ours, _ = trained(SHAPES)
    assert all(kernel.available(p) for p in ours)
    monkeypatch.setattr(kernel, "available", lambda x: False)
    plain, _ = trained(SHAPES)
    for seed, (shape, mine, torchs) in enumerate(zip(SHAPES, ours, plain, strict=True)):
        expected, begin = exact(shape, seed), numbers(1, shape, seed)[0]
        moved = (expected - begin).norm()
        off = (mine - expected).norm() / moved
        assert off < 0.02 and off < 1.1 * (torchs - expected).norm() / moved


def test_its_state_is_that_of_plain_torch(monkeypatch):
    _, ours = trained(SHAPES)
    monkeypatch.setattr(kernel, "available", lambda x: False)
    _, plain = trained(SHAPES)
    for p, q in zip(ours.param_groups[0]["params"], plain.param_groups[0]["params"], strict=True):
        assert ours.state[p].keys() == plain.state[q].keys() == {"momentum", "squares"}
        torch.testing.assert_close(ours.state[p]["momentum"], plain.state[q]["momentum"])
        torch.testing.assert_close(ours.state[p]["squares"], plain.state[q]["squares"], rtol=0.05, atol=0)


def test_a_matrix_depends_on_nothing_beside_it_and_on_no_number_of_threads(threads):
    threads(1)
    whole, _ = trained(SHAPES)
    for count in (2, 3, 8):
        threads(count)
        again, _ = trained(SHAPES)
        fewer, _ = trained(SHAPES[:3])
        assert all(map(torch.equal, whole, again)) and all(map(torch.equal, whole, fewer))


def test_without_decay_only_what_has_a_gradient_moves():
    p, alone = (nn.Parameter(torch.ones(32, 64)) for _ in range(2))
    muon = Muon([p, alone], RATE, MOMENTUM, 0)
    p.grad = torch.zeros(32, 64)
    muon.step()
    assert p.equal(torch.ones(32, 64)) and alone.equal(p) and "momentum" not in muon.state[alone]


def test_what_is_no_number_shows_where_it_is():
    good, bad = (nn.Parameter(torch.ones(32, 64)) for _ in range(2))
    good.grad, bad.grad = torch.ones(32, 64), torch.ones(32, 64)
    bad.grad[5, 7] = torch.nan
    Muon([bad, good], RATE, MOMENTUM, DECAY).step()
    assert bad.isnan().all() and good.isfinite().all()


def test_gradients_may_lie_in_any_way():
    (x,) = numbers(1, (32, 96), 0)
    moved = []
    for grad in (x, x.T.contiguous().T):
        p = nn.Parameter(torch.zeros(32, 96))
        p.grad = grad
        Muon([p], RATE, MOMENTUM, DECAY).step()
        moved.append(p.detach())
    assert torch.equal(*moved)


@pytest.mark.parametrize("x", [torch.ones(32, 48), torch.ones(32, 32, dtype=torch.float64), torch.ones(64, 32).T])
def test_what_it_cannot_do_torch_does(x):
    p = nn.Parameter(x)
    p.grad = torch.ones_like(x)
    Muon([p], RATE, MOMENTUM, DECAY).step()
    assert not kernel.available(p) and (p != 1).all()
