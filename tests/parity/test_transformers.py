"""gemlet against transformers: the model, its gradients, greedy text, folders, and the steps of sampling."""

from typing import Any

import pytest
import torch
from torch import FloatTensor, LongTensor

pytest.importorskip("transformers", reason="transformers, the oracle, is not installed (the extra `dev`)")

from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gemlet.checkpoint import save_model
from gemlet.config import FULL, SLIDING, layer_pattern
from gemlet.eager import generate_uncached, penalise, probabilities
from gemlet.generate import generate
from gemlet.lm import load
from gemlet.model import Gemma
from gemlet.sampling import SamplingParams
from gemlet.testing import tiny_config, tiny_model, tiny_tokenizer

LENGTH = 50  # more than twice every window below
SHAPES = {
    "multi-query": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8},
    "grouped, other query scale": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 5,
        "query_pre_attn_scalar": 12,
        "num_hidden_layers": 7,
    },
    "untied, wide heads": {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": 16,
        "tie_word_embeddings": False,
        "num_hidden_layers": 3,
    },
    # transformers' own cache goes wrong at a window of 1 (it keeps the last `window - 1` = "all" keys)
    "window 2, alternating": {"sliding_window": 2, "num_hidden_layers": 4, "layer_types": layer_pattern(4, 2)},
    "no rule, other bases": {
        "num_hidden_layers": 3,
        "layer_types": (FULL, SLIDING, SLIDING),
        "rope_theta": 5e4,
        "rope_local_base_freq": 100.0,
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": False,
    },
}


def oracle(model):
    """transformers' model with the same configuration and weights."""
    config = {k: v for k, v in model.config.to_hf().items() if k != "torch_dtype"}
    theirs = Gemma3ForCausalLM(Gemma3TextConfig(**config)).eval()
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state, strict=True)
    return theirs


def with_config(model, **changes):
    """The same weights under a changed configuration."""
    other = Gemma(model.config.replace(**changes))
    other.load_state_dict(model.state_dict())
    return other


@pytest.fixture(scope="module", params=SHAPES, ids=lambda name: name.replace(", ", "-").replace(" ", "-"))
def pair(request):
    model = tiny_model(3, **SHAPES[request.param])
    return model, oracle(model)


def ids(model):
    return torch.randint(0, model.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def test_logits(pair):
    ours, theirs = pair
    assert 2 * ours.config.sliding_window < LENGTH
    with torch.no_grad():
        expected = theirs(ids(ours)).logits
        torch.testing.assert_close(ours(ids(ours)), expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.5  # so that 1e-4 is little


def test_gradients_of_every_parameter(pair):
    ours, theirs = pair
    x = ids(ours)
    for model in pair:
        model.zero_grad()
    for logits in (ours(x), theirs(x).logits):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        assert p.grad is not None
        assert (p.grad - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


@pytest.mark.parametrize("penalty", [1.0, 3.0])
def test_64_greedy_tokens(pair, penalty):
    """With a repetition penalty, too: without one, a random model soon repeats itself and little is compared."""
    ours, theirs = pair
    ours = with_config(ours, eos_token_id=None)
    prompt = ids(ours)[:1, :7]
    greedy = {"do_sample": False, "repetition_penalty": penalty, "min_new_tokens": 64, "max_new_tokens": 64}
    expected = theirs.generate(prompt, **greedy, eos_token_id=None, pad_token_id=0)[0, 7:].tolist()
    params = SamplingParams(temperature=0, max_new_tokens=64, repetition_penalty=penalty)
    assert list(generate(ours, prompt[0].tolist(), params)) == expected
    assert list(generate_uncached(ours, prompt[0].tolist(), params)) == expected
    assert len(expected) == 64 and (penalty == 1 or len(set(expected)) > 30)


def test_512_greedy_tokens_beyond_many_windows():
    """On the way that text is written; the penalty keeps a random model from repeating itself."""
    ours = tiny_model(3, max_position_embeddings=600, eos_token_id=None)
    prompt = ids(ours)[:1, :7]
    greedy = {"do_sample": False, "repetition_penalty": 1.5, "min_new_tokens": 512, "max_new_tokens": 512}
    theirs: Any = oracle(ours)  # its generate has a type of its own
    expected = theirs.generate(prompt, **greedy, eos_token_id=None, pad_token_id=0)[0, 7:].tolist()
    params = SamplingParams(temperature=0, max_new_tokens=512, repetition_penalty=1.5)
    assert list(generate(ours, prompt[0].tolist(), params)) == expected
    assert len(expected) == 512 and len(set(expected)) > 100


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 9},
        {"rope_theta": 10_000.0, "rope_local_base_freq": 1_000_000.0},
        {"query_pre_attn_scalar": 17},
        {"num_key_value_heads": 2, "layer_types": layer_pattern(6, 6)},
    ],
    ids=["window", "bases-swapped", "query-scale", "pattern"],
)
def test_a_slip_would_show(change):
    """The tolerance of `test_logits` tells the model from one with a single mistake."""
    right, wrong = tiny_model(3), tiny_model(3, **change)
    with torch.no_grad():
        assert (oracle(right)(ids(right)).logits - wrong(ids(right))).abs().max() > 1e-2


def test_names_and_tying_are_theirs():
    for tied in (True, False):
        model = tiny_model(0, tie_word_embeddings=tied)
        assert {n: p.shape for n, p in model.named_parameters()} == {
            n: p.shape for n, p in oracle(model).named_parameters()
        }


def test_config_both_ways():
    """Their configuration, read from ours and written by them, is ours again."""
    for changes in SHAPES.values():
        config = tiny_config(**changes)
        theirs = Gemma3TextConfig(**config.to_hf()).to_dict()
        assert type(config).from_hf(theirs).layers == config.layers
        back, same = type(config).from_hf(theirs).model_dump(), config.model_dump()
        for derived in ("layer_types", "query_pre_attn_scalar"):
            del back[derived], same[derived]
        assert back == same
        assert type(config).from_hf(theirs).query_scale == config.query_scale


def test_our_folder_in_transformers(tmp_path):
    """A saved folder, loaded as it lies by their Auto classes: the same ids and logits, and their text is ours."""
    save_model(tmp_path / "tiny", tiny_model(3), tiny_tokenizer())
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    ours = load(tmp_path / "tiny")
    text = 'Zoë  asked:\n\n "Have you <|endoftext|> seen it?"'
    expected = [0, *ours.tokenizer.encode(text)]
    assert tokenizer(text, split_special_tokens=True).input_ids == expected
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(expected), theirs(torch.tensor([expected])).logits, atol=1e-4, rtol=0)
    continued = theirs.generate(torch.tensor([expected]), max_new_tokens=30, do_sample=False)[0, len(expected) :]
    assert ours.generate(text, max_new_tokens=30, temperature=0) == tokenizer.decode(
        continued, skip_special_tokens=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_their_folder_in_gemlet(tmp_path, dtype):
    """A folder that transformers wrote, in several files, its weights as they are."""
    folder = tmp_path / "theirs"
    oracle(tiny_model(3)).to(dtype).save_pretrained(folder, max_shard_size="50KB")
    assert (folder / "model.safetensors.index.json").is_file()
    tiny_tokenizer().save(folder, 128)
    ours, theirs = load(folder, dtype="fp32"), Gemma3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    x = ids(ours.model)
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(x), theirs(x).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("top_k", [None, 1, 5, 40, 10_000])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.5])
def test_probabilities(top_p, top_k, min_p):
    """The same distribution as their processors in their order, on peaked and on flat logits."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([[0.01], [1.0], [3.0], [10.0]])
    logits = torch.randn(4, 100, generator=generator) * scales
    history = torch.randint(0, 100, (4, 20), generator=generator)
    seen = torch.zeros(4, 100, dtype=torch.bool).scatter(1, history, True)
    for temperature, penalty in ((1.0, 1.0), (0.7, 1.3), (1.9, 0.8)):
        steps = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
        if top_k:
            steps.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            steps.append(TopPLogitsWarper(top_p))
        if min_p:
            steps.append(MinPLogitsWarper(min_p))
        expected = steps(LongTensor(history), FloatTensor(logits)).softmax(-1)
        params = SamplingParams(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
        )
        got = probabilities(penalise(logits, seen, penalty), params)
        assert torch.equal(got > 0, expected > 0)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
