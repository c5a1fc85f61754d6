"""The model's parts against their formulas. The whole against transformers: tests/parity/test_transformers.py."""

import math

import pytest
import torch

from gemlet.config import ModelConfig, layer_pattern
from gemlet.loss import linear_cross_entropy
from gemlet.model import Gemma, RMSNorm, init_weights, rope, rotate
from gemlet.testing import tiny_config, tiny_model

IDS = torch.randint(0, 320, (2, 30), generator=torch.Generator().manual_seed(0))


def test_rms_norm_has_the_gain_one_plus_w():
    norm = RMSNorm(3, eps=0.5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.0, 1.0, -0.5]))
    x = torch.tensor([1.0, 2.0, -4.0])
    rms = math.sqrt((1 + 4 + 16) / 3 + 0.5)
    torch.testing.assert_close(norm(x), torch.tensor([1 / rms, 2 * 2 / rms, -4 * 0.5 / rms]))


def test_rms_norm_computes_in_float32():
    norm = RMSNorm(512, eps=1e-6)
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).bfloat16() * 1000
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), norm(x.float()).bfloat16(), atol=0, rtol=0)


def test_rope_turns_pairs_by_position_times_frequency():
    H, base, position = 4, 100.0, 3
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    got = rotate(x.view(1, 1, 1, H), rope(torch.tensor([position]), H, base)).flatten()
    for i, frequency in enumerate((1.0, base**-0.5)):
        turned = complex(x[i], x[i + 2]) * complex(math.cos(position * frequency), math.sin(position * frequency))
        assert got[i].item() == pytest.approx(turned.real) and got[i + 2].item() == pytest.approx(turned.imag)


def test_rope_makes_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))

    def score(i, j):
        return (
            rotate(q, rope(torch.tensor([i]), 16, 1e4)).flatten()
            @ rotate(k, rope(torch.tensor([j]), 16, 1e4)).flatten()
        )

    torch.testing.assert_close(score(7, 3), score(104, 100), atol=1e-5, rtol=1e-4)
    assert (score(7, 3) - score(8, 3)).abs() > 1e-3


def test_the_embedding_is_scaled_by_the_root_of_the_width():
    """With every block silenced, the logits are the normalised embedding times the head."""
    model = tiny_model(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "post_" in name:
                p.fill_(-1)  # a gain of zero
        inputs = []
        model.model.norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        model(IDS)
    embedding = model.model.embed_tokens.weight
    torch.testing.assert_close(inputs[0], embedding[IDS] * math.sqrt(32), atol=1e-6, rtol=1e-6)


def test_no_token_sees_its_future():
    model = tiny_model(0)
    changed = IDS.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 320
    with torch.no_grad():
        before, after = model(IDS), model(changed)
    torch.testing.assert_close(after[:, :20], before[:, :20], atol=0, rtol=0)
    assert ((after - before)[:, 20:].abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("what", ["rope_theta", "rope_local_base_freq", "sliding_window", "query_pre_attn_scalar"])
def test_every_number_of_the_config_matters(what):
    """Two models with the same weights differ where one number of their configurations does."""
    value = {"sliding_window": 9, "query_pre_attn_scalar": 24}.get(what, 50_000.0)
    with torch.no_grad():
        assert (tiny_model(0)(IDS) - tiny_model(0, **{what: value})(IDS)).abs().max() > 1e-3


def test_tied_and_untied():
    tied, untied = Gemma(tiny_config()), Gemma(tiny_config(tie_word_embeddings=False))
    assert tied.lm_head is None and tied.head_weight is tied.model.embed_tokens.weight
    assert untied.lm_head is not None and untied.head_weight is untied.lm_head.weight
    assert set(untied.state_dict()) - set(tied.state_dict()) == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({"vocab_size": 50_257}, 132_490_496),
        ({"vocab_size": 50_257, "tie_word_embeddings": False}, 164_654_976),
        ({}, 268_098_176),
    ],
)
def test_parameter_counts_of_the_270m_shape(changes, parameters):
    config = ModelConfig(**changes)
    with torch.device("meta"):
        model = Gemma(config)
    assert sum(p.numel() for p in model.parameters()) == parameters == config.num_parameters


def test_a_deep_model_begins_near_the_identity():
    model = init_weights(Gemma(tiny_config(num_hidden_layers=18, layer_types=None)))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            torch.testing.assert_close(p, torch.full_like(p, -0.8 if "post_" in name else 0.0))


def test_init_draws_every_weight_as_its_table_says():
    config = tiny_config(vocab_size=4096, hidden_size=64, intermediate_size=256, tie_word_embeddings=False)
    model = Gemma(config)
    for p in model.parameters():
        torch.nn.init.constant_(p, torch.nan)
    init_weights(model, seed=1)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == 0).all()
        else:
            assert p.std().item() == pytest.approx(p.shape[1] ** -0.5, rel=0.05), name
            assert p.mean().item() == pytest.approx(0, abs=0.01)
    again, other = (init_weights(Gemma(config), seed) for seed in (1, 2))
    for a, b, c in zip(model.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and (a.ndim == 1 or not torch.equal(a, c))


def test_init_starts_near_the_uniform_distribution():
    model = init_weights(Gemma(tiny_config()), 0)
    loss = torch.nn.functional.cross_entropy(model(IDS)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(320), abs=1.0)


def test_every_parameter_has_a_gradient():
    model = tiny_model(0, tie_word_embeddings=False)
    model(IDS).logsumexp(-1).sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name


def test_computing_in_bfloat16_keeps_weights_and_logits_in_float32():
    model = tiny_model(0)
    with torch.no_grad():
        exact = model(IDS)
        model.compute_in(torch.bfloat16)
        rough = model(IDS)
        assert model.model(IDS).dtype == torch.bfloat16
    assert rough.dtype == torch.float32 and all(p.dtype == torch.float32 for p in model.parameters())
    difference = (rough - exact).abs().max() / exact.std()
    assert 1e-4 < difference < 0.3
    model.compute_in(None)
    with torch.no_grad():
        assert torch.equal(model(IDS), exact)


@pytest.mark.parametrize("unrolled", [0, 2**20])
@pytest.mark.parametrize("window", [2, 8, 100])
def test_packed_documents_are_separate_passes(monkeypatch, unrolled, window):
    """Logits, loss and every gradient of a row of documents are those of each alone, whatever the window.

    RoPE goes on counting in the row and begins anew in the documents alone, which is the same up to rounding.
    """
    monkeypatch.setattr("gemlet.attention.UNROLLED", unrolled)
    lengths = (5, 1, 12, 3, 9)
    ids, targets = IDS[:1], IDS[:1].roll(-1)
    begins = torch.tensor([sum(lengths[:n]) for n in range(len(lengths))])
    starts = begins.repeat_interleave(torch.tensor(lengths))[None]
    packed, apart = tiny_model(0, sliding_window=window), tiny_model(0, sliding_window=window)
    logits = packed(ids, starts=starts)
    alone = torch.cat([apart(piece) for piece in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(logits, alone, atol=2e-5, rtol=1e-5)
    loss = linear_cross_entropy(packed.model(ids, starts=starts), packed.head_weight, targets)
    pieces = zip(ids.split(lengths, 1), targets.split(lengths, 1), strict=True)
    expected = torch.stack([linear_cross_entropy(apart.model(i), apart.head_weight, t) for i, t in pieces]).sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for (name, a), b in zip(packed.named_parameters(), apart.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad).norm() < 1e-4 * b.grad.norm(), name
    assert (packed(ids) - alone).abs().max() > 1e-2  # without starts it is another thing


def test_other_patterns_of_layers():
    """All sliding, all full, and a pattern with no rule are models too, and not the same one."""
    outputs = []
    for types in (layer_pattern(3, 1), layer_pattern(3, 9), ("full_attention", "sliding_attention", "full_attention")):
        with torch.no_grad():
            outputs.append(tiny_model(0, num_hidden_layers=3, layer_types=types)(IDS))
    assert all((a - b).abs().max() > 1e-3 for a, b in ((outputs[0], outputs[1]), (outputs[0], outputs[2])))


def test_mlps_computed_again_change_nothing():
    ids = torch.arange(2, 42)[None]
    gradients = []
    for again in (False, True):
        model = tiny_model()
        model.model.recompute_mlps(again)
        model(ids).logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
