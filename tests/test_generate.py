"""Generation by equivalences: cached and uncached, one sample and many, drawn and computed, limits and damage."""

import math
from itertools import islice

import pytest
import torch

import gemlet.ready
from gemlet import eager, sampling
from gemlet.eager import TorchDecoder, generate_uncached
from gemlet.errors import GemletError
from gemlet.generate import Lookup, generate, generate_samples
from gemlet.sampling import Draws, SamplingParams
from gemlet.testing import tiny_model

PROMPT = [0, 17, 301, 44, 5]
NO_END = tiny_model(5, eos_token_id=None)
LONG = 60  # beyond seven windows


def params(**changes):
    return SamplingParams(**{"max_new_tokens": LONG, "seed": 0, **changes})


def random_logits(rows=1, size=320, seed=0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * 3


class Numpy:
    """`gemlet.sampling` with the signatures of `gemlet.eager`, whose rows are batches."""

    @staticmethod
    def penalise(logits, seen, penalty):
        rows = zip(logits, seen, strict=True)
        return torch.stack(
            [torch.from_numpy(sampling.penalise(r.numpy(), s.nonzero().flatten().tolist(), penalty)) for r, s in rows]
        )

    @staticmethod
    def probabilities(logits, params):
        return torch.stack([torch.from_numpy(sampling.probabilities(row.numpy(), params)) for row in logits])

    @staticmethod
    def sample(logits, params, draws, seen=None):
        texts = [()] * len(draws) if seen is None else [row.nonzero().flatten().tolist() for row in seen]
        rows = zip(logits, draws, texts, strict=True)
        return torch.tensor([sampling.sample(row.numpy(), params, draw, text) for row, draw, text in rows])


both = pytest.mark.parametrize("way", [eager, Numpy], ids=["torch", "numpy"])


# ---- what is allowed


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("temperature", (-0.1, math.nan, math.inf, 10**400, "1", None, True)),
        ("top_k", (-1, 2.5, "3", True)),
        ("top_p", (0, 0.0, -0.5, 1.1, math.nan, None)),
        ("min_p", (-0.1, 1.1, math.nan)),
        ("repetition_penalty", (0, -1.0, math.inf, math.nan)),
        ("max_new_tokens", (-1, 1.5, None)),
        ("seed", (-1, 2**63, 0.5)),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, wrong):
    for value in wrong:
        with pytest.raises(GemletError, match=f"^{name} is .*, but must be ") as error:
            SamplingParams(**{name: value})
        assert len(str(error.value)) < 300


def test_all_problems_are_reported_together():
    with pytest.raises(GemletError, match=r"temperature is -1.*top_p is 2"):
        SamplingParams(temperature=-1, top_p=2)


def test_the_ends_of_the_ranges_are_allowed():
    SamplingParams(temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1e-300, max_new_tokens=0, seed=0)
    SamplingParams(temperature=1e308, top_k=10**9, top_p=1e-300, min_p=1, repetition_penalty=1e308, seed=2**62)


# ---- one token


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32 + 5, 2**62])
def test_a_seed_draws_what_torch_draws(seed):
    generator, draw = torch.Generator().manual_seed(seed), Draws(seed)
    assert [draw() for _ in range(1000)] == [torch.rand(1, generator=generator).item() for _ in range(1000)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0},
        {"temperature": 1.3, "top_p": 1.0},
        {"top_k": 7, "top_p": 1.0},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.3},
        {"temperature": 3.0, "top_p": 0.4},
    ],
    ids=str,
)
def test_numpy_draws_what_torch_draws(changes):
    how, logits = params(**changes), random_logits(200, size=5000)
    seen = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)) < 0.1
    numbers = [[Draws(i) for i in range(200)] for _ in range(2)]
    assert torch.equal(eager.sample(logits, how, numbers[0], seen), Numpy.sample(logits, how, numbers[1], seen))
    if how.temperature:
        expected = eager.probabilities(logits, how)
        torch.testing.assert_close(Numpy.probabilities(logits, how), expected, atol=1e-7, rtol=1e-4)


@both
def test_extreme_values_still_give_a_distribution(way):
    logits = torch.cat((random_logits(), torch.full((1, 320), -50.0), 1e30 * random_logits(seed=1)))
    seen = torch.rand(logits.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    for temperature in (1e-320, 1e-10, 1.0, 1e9, 1e308):
        for penalty in (1e-300, 1.0, 1e308):
            for top_k, top_p, min_p in ((None, 1.0, 0.0), (10**9, 1e-300, 1.0), (1, 0.5, 0.5)):
                p = way.probabilities(
                    way.penalise(logits, seen, penalty),
                    SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p),
                )
                torch.testing.assert_close(p.sum(-1), torch.ones(3))
                assert (p >= 0).all()


@both
def test_tiny_temperatures_are_greedy_and_huge_ones_uniform(way):
    logits = random_logits(4)
    for temperature in (0, 1e-320, 1e-10, 1e-3):
        drawn = way.sample(logits, params(temperature=temperature), [Draws(i) for i in range(4)])
        assert torch.equal(drawn, logits.argmax(-1))
    p = way.probabilities(logits, params(temperature=1e9, top_p=1.0))
    torch.testing.assert_close(p, torch.full_like(p, 1 / 320), atol=1e-9, rtol=1e-4)


@both
def test_each_step_keeps_what_its_definition_says(way):
    p = torch.tensor([[0.4, 0.05, 0.3, 0.25]])
    for changes, kept in (
        ({"top_k": 2}, [0, 2]),
        ({"top_k": 0}, [0, 1, 2, 3]),
        ({"top_p": 0.69}, [0, 2]),  # the token that crosses the border belongs to it
        ({"top_p": 0.71}, [0, 2, 3]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.63}, [0, 2]),
        ({"min_p": 0.76}, [0]),
        ({"top_k": 3, "top_p": 0.72}, [0, 2]),  # top-p counts among what top-k left: 0.4 and 0.3 of 0.95
    ):
        got = way.probabilities(p.log(), SamplingParams(**{"temperature": 1, "top_p": 1.0, **changes}))[0]
        assert got.nonzero().flatten().tolist() == kept, changes
        torch.testing.assert_close(got[kept], p[0, kept] / p[0, kept].sum())


@both
def test_equally_likely_tokens_are_all_kept(way):
    p = way.probabilities(torch.zeros(1, 50), SamplingParams(temperature=1, top_p=0.49))
    assert (p > 0).sum() == 25
    assert (way.probabilities(torch.zeros(1, 50), SamplingParams(top_k=3, top_p=1.0)) > 0).all()


@both
def test_the_penalty_touches_only_what_was_seen(way):
    logits = torch.tensor([[2.0, -2.0, 3.0, -3.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert way.penalise(logits, seen, 2.0).tolist() == [[1.0, -4.0, 3.0, -3.0]]
    greedy = params(temperature=0, repetition_penalty=1.6)
    assert way.sample(torch.tensor([[2.0, 1.5]]), greedy, [Draws(0)], torch.tensor([[True, False]])).item() == 1


@both
def test_draws_follow_the_probabilities(way):
    """10,000 draws: every token within five standard deviations of its probability, none of probability zero."""
    logits, n = random_logits(size=20), 10_000
    how = SamplingParams(temperature=1.3, top_k=15, top_p=0.97)
    p = way.probabilities(logits, how)[0]
    assert 3 < (p > 0).sum() < 16
    one = Draws(0)
    drawn = way.sample(logits.expand(n, -1), how, [one] * n)
    frequency = drawn.bincount(minlength=20) / n
    assert (frequency[p == 0] == 0).all()
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


@both
def test_the_ends_of_the_unit_interval_draw_possible_tokens(way):
    """Whatever the uniform number is, the token drawn has a probability above zero."""
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.5, -math.inf]])
    for uniform, token in ((0.0, 3), (1 - 2**-24, 1)):
        assert way.sample(logits, SamplingParams(temperature=1, top_p=1.0), [lambda u=uniform: u]).item() == token


# ---- the loop


SETTINGS = {
    "greedy": {"temperature": 0},
    "greedy-penalised": {"temperature": 0, "repetition_penalty": 1.5},
    "sampled": {"temperature": 1.0, "top_p": 1.0},
    "all-steps": {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_cached_equals_uncached(setting):
    for seed in range(3):
        how = params(**SETTINGS[setting], seed=seed)
        expected = list(generate_uncached(NO_END, PROMPT, how))
        assert list(generate(NO_END, PROMPT, how)) == expected
        assert len(expected) == LONG


def test_a_seed_gives_the_same_tokens_and_another_seed_others():
    how = params(temperature=1.0)
    first = list(generate(NO_END, PROMPT, how))
    torch.rand(7)  # the global generator has no part in it
    assert list(generate(NO_END, PROMPT, how)) == first
    assert list(generate(NO_END, PROMPT, params(temperature=1.0, seed=1))) != first
    unseeded = params(temperature=1.0, seed=None)
    assert list(generate(NO_END, PROMPT, unseeded)) != list(generate(NO_END, PROMPT, unseeded))


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    list(generate(NO_END, PROMPT, params(temperature=1.0)))
    assert torch.equal(torch.random.get_rng_state(), before)


def collected(pairs, n):
    samples = [[] for _ in range(n)]
    for i, token in pairs:
        samples[i].append(token)
    return samples


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_sample_is_the_same_alone_and_among_others(setting):
    """The end tokens end the samples at different times, and the others go on undisturbed."""
    model = tiny_model(5, eos_token_id=tuple(range(0, 320, 25)))
    n = 5
    alone = [list(generate(model, PROMPT, params(**SETTINGS[setting], seed=7 + i))) for i in range(n)]
    assert collected(generate_samples(model, PROMPT, params(**SETTINGS[setting], seed=7), n), n) == alone
    assert not {token for tokens in alone for token in tokens} & model.config.stop_ids
    if "temperature" in SETTINGS[setting] and SETTINGS[setting]["temperature"]:
        assert len({len(tokens) for tokens in alone}) > 2


def test_a_sample_can_be_ended_from_outside():
    """Each sample ends where its reader says, and none is asked for once it has ended."""
    n, whole = 3, collected(generate_samples(NO_END, PROMPT, params(temperature=1.0), 3), 3)
    wanted, got = [4, 1, 9], [[] for _ in range(n)]
    pairs = generate_samples(NO_END, PROMPT, params(temperature=1.0), n, ended=lambda i: len(got[i]) == wanted[i])
    for i, token in pairs:
        got[i].append(token)
    assert got == [tokens[:k] for tokens, k in zip(whole, wanted, strict=True)]


def test_the_end_token_ends_and_is_not_given():
    how = params(temperature=0)
    free = list(generate(NO_END, PROMPT, how))
    end = next(token for token in free if token != free[0])
    model = tiny_model(5, eos_token_id=end)
    assert list(generate(model, PROMPT, how)) == free[: free.index(end)] == list(generate_uncached(model, PROMPT, how))
    assert list(generate(tiny_model(5, eos_token_id=free[0]), PROMPT, how)) == []


def test_a_prompt_longer_than_a_chunk():
    model = tiny_model(5, eos_token_id=None, max_position_embeddings=2000)
    prompt = torch.randint(0, 320, (1300,), generator=torch.Generator().manual_seed(0)).tolist()
    how = params(temperature=0, max_new_tokens=3)
    assert list(generate(model, prompt, how)) == list(generate_uncached(model, prompt, how))


def test_it_builds_no_graph_and_disturbs_no_training(monkeypatch):
    """Nothing of autograd inside, all of it outside, before, between and after."""
    model, inside = tiny_model(5), []

    def watched(*arguments):
        inside.append(torch.is_inference_mode_enabled())
        return draw(*arguments)

    draw = eager.sample
    monkeypatch.setattr(eager, "sample", watched)
    monkeypatch.setattr(gemlet.ready, "library", lambda name, wait: None)
    for way in (generate, generate_uncached):
        tokens = way(model, PROMPT, params())
        assert len(list(islice(tokens, 2))) == 2
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert len(inside) == 4 and all(inside)
    model(torch.tensor([PROMPT])).sum().backward()
    assert next(tokens) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision(dtype):
    """Weights in half precision, or computing in it, draw possible tokens and end in time."""
    for model in (tiny_model(5, eos_token_id=None).to(dtype), tiny_model(5, eos_token_id=None)):
        model.compute_in(dtype)
        tokens = list(generate(model, PROMPT, params(temperature=0)))
        assert len(tokens) == LONG and all(0 <= token < 320 for token in tokens)
        assert tokens[0] == next(generate(NO_END, PROMPT, params(temperature=0)))


# ---- limits


def test_no_tokens_asked_for():
    assert list(generate(NO_END, PROMPT, params(max_new_tokens=0))) == []
    assert list(generate_uncached(NO_END, PROMPT, params(max_new_tokens=0))) == []


def test_the_context_limits_the_continuation():
    model = tiny_model(5, eos_token_id=None, max_position_embeddings=20)
    for length, new in ((5, 15), (18, 2), (19, 1)):
        prompt = [3] * length
        assert len(list(generate(model, prompt, params()))) == new
        assert len(list(generate_uncached(model, prompt, params()))) == new
    assert len(list(generate(model, [3] * 5, params(max_new_tokens=10**12)))) == 15
    assert list(generate(model, [3] * 20, params(max_new_tokens=0))) == []


@pytest.mark.parametrize("length", [20, 21, 500])
def test_a_prompt_that_leaves_no_room_is_refused_at_once(length):
    model = tiny_model(5, max_position_embeddings=20)
    for way in (generate, generate_uncached):
        with pytest.raises(GemletError, match=f"{length} tokens and up to 60 .* context is 20; .* 19 tokens"):
            list(way(model, [3] * length, params()))
    with pytest.raises(GemletError):
        generate(model, [3] * length, params())  # before the first token is asked for


@pytest.mark.parametrize(("prompt", "message"), [([], "no tokens"), ([3, 320], "token 320"), ([-1], "token -1")])
def test_prompts_that_are_none(prompt, message):
    with pytest.raises(GemletError, match=message):
        generate(NO_END, prompt, params())


# ---- damage


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_damaged_weight_is_named(value):
    model = tiny_model(5)
    with torch.no_grad():
        model.get_parameter("model.layers.3.mlp.down_proj.weight")[0, 0] = value
    for way in (generate, generate_uncached):
        with pytest.raises(GemletError, match=r"model\.layers\.3\.mlp\.down_proj\.weight") as error:
            list(way(model, PROMPT, params(temperature=0)))
        assert len(str(error.value)) < 300


def test_an_overflow_is_named_by_its_first_layer():
    model = tiny_model(5)
    with torch.no_grad():
        model.get_parameter("model.layers.2.mlp.up_proj.weight").fill_(3e38)
    with pytest.raises(GemletError, match=r"come out of model\.layers\.2\.mlp\.up_proj, .*float32, after 5 tokens"):
        list(generate(model, PROMPT, params()))
    assert not any(module._forward_hooks for module in model.modules())


def test_an_overflow_in_the_head_is_named():
    for tied in (True, False):
        model = tiny_model(5, tie_word_embeddings=tied)
        with torch.no_grad():
            model.head_weight[7] = 3e38
        with pytest.raises(GemletError, match="come out of the output head, "):
            list(generate(model, PROMPT, params()))


def test_damage_in_one_sample_only():
    """A weight that one sample reaches and the others do not."""
    model = tiny_model(5, eos_token_id=None, tie_word_embeddings=False)
    first = [next(generate(model, PROMPT, params(temperature=1.5, seed=i))) for i in range(3)]
    assert first[1] not in (first[0], first[2], *PROMPT)
    with torch.no_grad():
        model.model.embed_tokens.weight[first[1]] = 3e38
    pairs = generate_samples(model, PROMPT, params(temperature=1.5), 3)
    assert [next(pairs)[1] for _ in range(3)] == first
    with pytest.raises(GemletError, match=r"come out of .*after 6 tokens"):
        next(pairs)


# ---- guessing ahead


def steps_of(monkeypatch, guesses):
    """Make decoders guess so many tokens at a time; the rows of every step taken from now on."""
    rows, step = [], TorchDecoder.step

    def counted(self, tokens, *arguments):
        rows.append(len(tokens))
        return step(self, tokens, *arguments)

    monkeypatch.setattr(gemlet.ready, "library", lambda name, wait: None)
    monkeypatch.setattr(TorchDecoder, "guesses", guesses)
    monkeypatch.setattr(TorchDecoder, "step", counted)
    return rows


@pytest.mark.parametrize("temperature", [0, 0.05, 0.3, 1.0])
def test_guessing_changes_no_text(monkeypatch, temperature):
    penalty = 1.1 if temperature else 1.0  # without one, a random model soon goes round in circles
    how = [params(temperature=temperature, seed=seed, repetition_penalty=penalty) for seed in range(4)]
    steps_of(monkeypatch, 0)
    plain = [list(generate(NO_END, PROMPT * 3, each)) for each in how]
    monkeypatch.setattr(Lookup, "_pays", lambda self: True)
    rows = steps_of(monkeypatch, 3)
    assert [list(generate(NO_END, PROMPT * 3, each)) for each in how] == plain
    assert max(rows) == 4 or temperature


def test_a_text_that_repeats_itself_takes_fewer_steps(monkeypatch):
    model = tiny_model(5, eos_token_id=None)
    monkeypatch.setattr(Lookup, "_pays", lambda self: True)
    monkeypatch.setattr(TorchDecoder, "sample", lambda *_: [7])
    rows = steps_of(monkeypatch, 3)
    assert list(generate(model, PROMPT, params())) == [7] * LONG
    assert rows == [1] * 3 + [4] * 14


def test_guesses_are_what_followed_before():
    lookup = Lookup(3)
    assert lookup.guess([1, 2, 3, 4, 5], now=1.0) == []
    assert lookup.guess([1, 2, 3, 4, 5, 1, 2, 3], now=2.0) == [4, 5, 1]
    assert Lookup(2).guess([9, 9, 9, 9]) == [9, 9]
    assert Lookup(0).guess([9, 9, 9, 9, 9]) == []


def test_guessing_is_left_off_while_it_does_not_pay_and_tried_again():
    """Steps of a second; with a guess they take 1.4, and at first no guess is right."""
    lookup, text, now, guessed = Lookup(3), [1, 2, 3], 0.0, []
    for _ in range(200):
        guessed.append(bool(lookup.guess(text, now=now)))
        text.append((1, 2, 3)[len(text) % 3])
        now += 1.4 if guessed[-1] else 1
    assert 5 < sum(guessed[20:]) < 15
    for _ in range(200):  # now they are
        guessed.append(bool(lookup.guess(text, now=now)))
        text += [(1, 2, 3)[(len(text) + i) % 3] for i in range(4 if guessed[-1] else 1)]
        now += 1.4 if guessed[-1] else 1
    assert sum(guessed[-50:]) == 50


class OnGPU(gemlet.ready.Ready):
    """Writes on a CPU as on a GPU, and counts the decoders it makes."""

    made = 0

    @property
    def _on_cpu(self):
        return False

    def decoder(self, slots, max_length):
        self.made += 1
        return super().decoder(slots, max_length)


def test_a_gpu_writes_text_after_text_with_one_decoder():
    ready = OnGPU(NO_END)
    for prompt, seed in (PROMPT, 0), (PROMPT[:2], 1), ([*PROMPT, 9], 2):
        assert list(generate(ready, prompt, params(seed=seed))) == list(generate(NO_END, prompt, params(seed=seed)))
    assert ready.made == 1
    list(generate_samples(ready, PROMPT, params(), 2))
    assert ready.made == 2, "one for two texts"


def test_texts_written_at_once_have_decoders_of_their_own():
    ready = OnGPU(NO_END)
    first, second = generate(ready, PROMPT, params(seed=1)), generate(ready, PROMPT[:2], params(seed=2))
    pairs = list(zip(first, second, strict=True))
    assert [a for a, _ in pairs] == list(generate(NO_END, PROMPT, params(seed=1)))
    assert [b for _, b in pairs] == list(generate(NO_END, PROMPT[:2], params(seed=2)))
    assert ready.made == 2
    next(generate(ready, PROMPT, params()))  # a text that is given up
    assert len(list(generate(ready, PROMPT, params()))) == LONG
    assert ready.made == 2
