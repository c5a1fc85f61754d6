import math
from itertools import pairwise

import pytest
import torch

from gemlet.config import TrainConfig
from gemlet.optim import (
    POLYNOMIALS,
    Muon,
    clip,
    export_state,
    import_state,
    lr_at,
    make_optimizers,
    orthogonalise,
    set_lr,
)
from gemlet.testing import tiny_model


def rates(**changes) -> list[float]:
    config = TrainConfig(**{"max_steps": 100, "warmup_steps": 10, "lr": 1e-2, "min_lr": 1e-3, **changes})
    return [config.lr * lr_at(step, config) for step in range(config.max_steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_rate_rises_to_the_peak_and_falls_to_min_lr(schedule):
    lr = rates(schedule=schedule)
    assert lr[0] == pytest.approx(1e-3)
    assert lr[9] == pytest.approx(1e-2) == max(lr)
    assert all(a < b for a, b in pairwise(lr[:10]))
    assert all(a >= b for a, b in pairwise(lr[10:]))
    assert lr[-1] == pytest.approx(1e-3)


def test_the_shapes_of_the_fall():
    middle = 10 + (99 - 10) // 3
    part = 1 - (99 - middle) / 89
    assert rates(schedule="linear")[middle] == pytest.approx(1e-3 + 9e-3 * (1 - part))
    assert rates(schedule="cosine")[middle] == pytest.approx(1e-3 + 9e-3 * (1 + math.cos(math.pi * part)) / 2)


def test_a_plateau_before_the_fall():
    lr = rates(schedule="linear", decay_fraction=0.5, min_lr=0.0)
    assert lr[10:55] == [pytest.approx(1e-2)] * 45
    assert lr[60] < 1e-2 and lr[-1] == 0


def test_decay_groups_and_rates_by_kind_of_parameter():
    model = tiny_model(tie_word_embeddings=False)
    names = {p: name for name, p in model.named_parameters()}
    (adamw,) = make_optimizers(model, TrainConfig(weight_decay=0.1))
    decayed = {names[p] for group in adamw.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {name for name in names.values() if "_proj" in name}
    muon, adamw = make_optimizers(model, TrainConfig(optimizer="muon", lr=3e-3, muon_lr=2e-2))
    assert {names[p] for group in muon.param_groups for p in group["params"]} == decayed
    assert {names[p] for group in adamw.param_groups for p in group["params"]} == set(names.values()) - decayed
    set_lr([muon, adamw], 0.5)
    assert muon.param_groups[0]["lr"] == pytest.approx(1e-2) and adamw.param_groups[0]["lr"] == pytest.approx(1.5e-3)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 16, 64), (2, 64, 16)])
def test_orthogonalised_matrices_keep_their_directions_with_singular_values_near_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    x = u * torch.linspace(0.05, 1, u.shape[-1]) @ vh
    y = orthogonalise(x).float()
    assert y.shape == x.shape
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.65 and values.max() < 1.35
    # in the basis of x's singular vectors, y is diagonal
    inside = u.mT @ y @ vh.mT
    assert (inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))).abs().max() < 0.1


def test_the_polynomials_bring_singular_values_near_one():
    def brought(x: torch.Tensor) -> torch.Tensor:
        for a, b, c in POLYNOMIALS:
            x = a * x + b * x**3 + c * x**5
        return x

    near = brought(torch.linspace(0.01, 1.01, 100_001, dtype=torch.float64))
    assert near.min() > 0.71 and near.max() < 1.29
    smaller = brought(torch.linspace(0, 0.01, 1001, dtype=torch.float64))
    assert (smaller.diff() > 0).all()


@pytest.mark.parametrize("scale", [1e-4, 1, 1e12])
def test_a_matrix_of_one_direction_keeps_it(scale):
    """All of its norm is one singular value, the largest there can be, where the polynomials are steep."""
    x = scale * torch.tensor([1.0, -1]).repeat(24)[:, None] * torch.linspace(1, 1.5, 16)
    for matrix in (x, x.T, torch.full((24, 16), scale)):
        values = torch.linalg.svdvals(orthogonalise(matrix[None]).float()[0])
        assert 0.65 < values[0] < 1.35 and values[1] < 0.1


def test_muon_is_torchs_muon_with_the_longer_side_evened_out(monkeypatch):
    monkeypatch.setattr("gemlet.optim.POLYNOMIALS", 3 * ((3.4445, -4.7750, 2.0315),))  # torch's
    torch.manual_seed(0)
    rate, decay = 0.02, 0.1
    ours = [torch.nn.Parameter(torch.randn(s)) for s in ((24, 12), (24, 12), (12, 24), (12, 12))]
    expected = [p.detach().clone() for p in ours]
    theirs = [torch.nn.Parameter(torch.zeros_like(p)) for p in ours]
    mine = Muon(ours, lr=rate, momentum=0.9, weight_decay=decay)
    torchs = torch.optim.Muon(theirs, lr=rate, momentum=0.9, weight_decay=0, ns_steps=3)
    squares: list[torch.Tensor] = []
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a) * torch.linspace(0.1, 2, len(a))[:, None]
            b.grad = a.grad.clone()
            b.data.zero_()
        mine.step()
        torchs.step()
        for i, (p, b) in enumerate(zip(expected, theirs, strict=True)):
            update = b.detach()
            now = update.square().mean(1 if len(p) >= p.shape[1] else 0, keepdim=True)
            if step == 0:
                squares.append(now)
            squares[i] = 0.95 * squares[i] + 0.05 * now
            even = update / squares[i].sqrt()
            p.mul_(1 - rate * decay).add_(even * update.norm() / even.norm())
    for p, q in zip(ours, expected, strict=True):
        assert (p - q).abs().max() < 2e-3  # bfloat16 inside, stacked here and alone there; an update moves by 0.08


def test_muon_moves_what_has_no_gradient_by_nothing():
    p = torch.nn.Parameter(torch.ones(8, 4))
    muon = Muon([p], lr=0.1, momentum=0.9, weight_decay=0)
    p.grad = torch.zeros_like(p)
    muon.step()
    assert p.equal(torch.ones(8, 4))
    p.grad[0] = torch.tensor([1.0, -2, 3, -4])
    muon.step()
    assert p[1:].equal(torch.ones(7, 4)) and (p[0] != 1).all()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_exported_state_goes_on_as_if_never_interrupted(optimizer):
    def steps(model, optimizers, first, last):
        for i in range(first, last):
            ids = torch.randint(0, model.config.vocab_size, (2, 8), generator=torch.Generator().manual_seed(i))
            model(ids).logsumexp(-1).mean().backward()
            for o in optimizers:
                o.step()
                o.zero_grad()

    config = TrainConfig(optimizer=optimizer)
    straight, halved, fresh = tiny_model(), tiny_model(), tiny_model(seed=1)
    a, b, c = (make_optimizers(m, config) for m in (straight, halved, fresh))
    steps(straight, a, 0, 6)
    steps(halved, b, 0, 3)
    state = {name: t.clone() for name, t in export_state(b, halved).items()}
    assert any(name.endswith("exp_avg_sq") for name in state)
    fresh.load_state_dict(halved.state_dict())
    import_state(c, fresh, state)
    steps(fresh, c, 3, 6)
    for (name, p), (_, q) in zip(straight.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("with_kernel", [False, True])
def test_clipping_is_that_of_torch_and_leaves_what_is_not_finite(monkeypatch, with_kernel):
    if not with_kernel:
        monkeypatch.setattr("gemlet.kernels.train.norm_available", lambda tensors: False)
    off = 1e-6 if with_kernel else 0  # torch sums up in another order
    gradients = [torch.randn(3, 5), torch.randn(7)]
    expected = [torch.nn.Parameter(g.clone()) for g in gradients]
    for p, g in zip(expected, gradients, strict=True):
        p.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(expected, 0.5)
    torch.testing.assert_close(clip(gradients, 0.5), norm, rtol=off, atol=0)
    torch.testing.assert_close(gradients, [p.grad for p in expected], rtol=off, atol=0)
    broken = [torch.tensor([2.0, torch.inf]), torch.tensor([3.0])]
    assert clip(broken, 0.5) == torch.inf
    assert broken[0].tolist() == [2, torch.inf] and broken[1].tolist() == [3], "so that one can tell where it began"
