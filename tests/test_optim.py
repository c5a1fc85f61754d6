import math
from itertools import pairwise

import pytest
import torch

from gemlet.config import TrainConfig
from gemlet.optim import Muon, clip, export_state, import_state, lr_at, make_optimizers, orthogonalise, set_lr
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
    x = u * torch.linspace(0.2, 1, u.shape[-1]) @ vh  # three steps bring up no singular value below a fiftieth
    y = orthogonalise(x).float()
    assert y.shape == x.shape
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.3 and values.max() < 1.35
    # in the basis of x's singular vectors, y is diagonal
    inside = u.mT @ y @ vh.mT
    assert (inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))).abs().max() < 0.1


def test_muon_is_torchs_muon():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s)) for s in ((24, 12), (24, 12), (12, 24))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine = Muon(ours, lr=0.02, momentum=0.9, weight_decay=0.1)
    torchs = torch.optim.Muon(theirs, lr=0.02, momentum=0.9, weight_decay=0.1, ns_steps=3)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        torchs.step()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 2e-3  # bfloat16 inside, stacked here and alone there; an update moves by 0.08


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


def test_clipping_is_that_of_torch_and_leaves_what_is_not_finite():
    gradients = [torch.randn(3, 5), torch.randn(7)]
    expected = [torch.nn.Parameter(g.clone()) for g in gradients]
    for p, g in zip(expected, gradients, strict=True):
        p.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(expected, 0.5)
    assert torch.equal(clip(gradients, 0.5), norm)
    assert all(p.grad is not None and torch.equal(p.grad, g) for p, g in zip(expected, gradients, strict=True))
    broken = [torch.tensor([2.0, torch.inf]), torch.tensor([3.0])]
    assert clip(broken, 0.5) == torch.inf
    assert broken[0].tolist() == [2, torch.inf] and broken[1].tolist() == [3], "so that one can tell where it began"
