"""A plan is what a run then needs: bytes counted from shapes against bytes of real tensors, and what is said of it."""

import functools
import json

import pytest
import torch

from gemlet import footprint, pace
from gemlet import plan as planning
from gemlet.cli import main
from gemlet.config import FULL, SLIDING, RunConfig, preset
from gemlet.errors import GemletError
from gemlet.footprint import step_memory
from gemlet.plan import GPU_MEMORY_GIB, described, largest_micro_batch, plan
from gemlet.testing import tiny_config

CPU, META = torch.device("cpu"), torch.device("meta")
SHALLOW = {"num_hidden_layers": 2, "layer_types": (SLIDING, FULL)}
"""One layer of each kind: nothing is extrapolated, and a step is counted once instead of three times."""


@pytest.fixture
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan asks for the memory of the same step again and again; here it is counted the first time only."""
    monkeypatch.setattr(planning, "step_memory", functools.cache(step_memory))


def _run(model: dict | None = None, **train) -> RunConfig:
    shape = tiny_config(**{"sliding_window": 16, "max_position_embeddings": 256, **(model or {})})
    train = {"sequence_length": 32, "batch_size": 4, "precision": "fp32", "compile": "off", "device": "cpu", **train}
    return RunConfig(model=shape, train=RunConfig().train.replace(**train))


@pytest.mark.parametrize("device", [CPU, META], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_stays_is_counted_to_the_byte(optimizer: str, device: torch.device) -> None:
    run = _run(optimizer=optimizer, batch_size=64)
    memory = step_memory(run, device)
    assert memory.weights == 4 * run.model.num_parameters
    d, h, inner = run.model.hidden_size, run.model.head_dim, run.model.intermediate_size
    queries, keys = run.model.num_attention_heads * h, run.model.num_key_value_heads * h
    sides = [(queries, d), (keys, d), (keys, d), (d, queries), (inner, d), (inner, d), (d, inner)]
    numbers = run.model.num_parameters
    if optimizer == "adamw":
        numbers *= 2
    else:  # one for each weight of the blocks' matrices and for each vector of their longer side, two for the rest
        numbers = 2 * numbers - run.model.num_hidden_layers * sum(a * b - max(a, b) for a, b in sides)
    tensors = 8 * run.model.num_hidden_layers * 2 + 8  # AdamW's counters of steps, one float a parameter
    assert 0 <= memory.optimizer - 4 * numbers <= 4 * tensors


def test_few_layers_tell_the_deep_model() -> None:
    """Extrapolated from five layers, and counted with all twelve: the same bytes, of two kinds of layers."""
    deep = _run({"num_hidden_layers": 12, "layer_types": (SLIDING, SLIDING, FULL) * 4}, sequence_length=64)
    peaks = footprint._peaks(deep, deep.model.layers, CPU)
    memory = step_memory(deep, CPU)
    counted = memory.total - memory.heap
    assert counted == pytest.approx(max(peak.total() for peak in peaks.values()), rel=0.01)


def test_activations_grow_with_the_micro_batch_and_not_with_the_batch() -> None:
    small, twice = (step_memory(_run(SHALLOW, micro_batch_size=n, batch_size=32), CPU) for n in (4, 8))
    more = step_memory(_run(SHALLOW, micro_batch_size=4, batch_size=64), CPU)
    assert more == small
    assert twice.activations > 1.8 * small.activations - small.gradients
    assert small.gradients > 0, "the second micro-batch finds those of the first"


def test_the_process_is_part_of_the_total() -> None:
    run = _run(SHALLOW)
    assert step_memory(run, CPU, 1000).total == step_memory(run, CPU).total + 1000


@pytest.mark.usefixtures("counted_once")
def test_the_largest_micro_batch_is_the_largest_that_fits() -> None:
    run = _run(SHALLOW, batch_size=24, sequence_length=256)  # long enough for a sequence to be much beside the heap
    runs = {n: run.replace(train=run.train.replace(micro_batch_size=n)) for n in (1, 8, 24)}
    sizes = {n: planning.step_memory(one, CPU, 0, None).total for n, one in runs.items()}
    for size, expected in ((sizes[24], 24), (sizes[8], 8), (sizes[8] - 1, 6), (sizes[1], 1), (sizes[1] - 1, None)):
        limit = int(1.001 * size / planning.USABLE) if expected in (24, 8, 1) else int(0.98 * size / planning.USABLE)
        assert largest_micro_batch(run, CPU, limit) == expected


def test_a_step_is_its_parts() -> None:
    result = plan(_run(SHALLOW, max_steps=200, batch_size=8, micro_batch_size=4), price_per_hour=2.0)
    assert result.step is not None and min(result.step.blocks, result.step.head, result.step.update) > 0
    assert result.step_seconds == pytest.approx(result.step.blocks + result.step.head + result.step.update)
    assert result.tokens_per_second == pytest.approx(8 * 32 / result.step_seconds)
    assert result.seconds > 200 * result.step_seconds
    assert result.cost == pytest.approx(2.0 * result.seconds / 3600)
    assert result.memory.process > 2**20 and result.fits and result.largest_micro_batch == 8


def test_twice_the_micro_batches_take_twice_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "_seconds", lambda run, device: 1.0)
    one, _, _ = pace.step_time(_run(batch_size=4, micro_batch_size=4), CPU, False)
    two, _, _ = pace.step_time(_run(batch_size=8, micro_batch_size=4), CPU, False)
    assert (two.blocks, two.head, two.update) == (2 * one.blocks, 2 * one.head, one.update)


@pytest.mark.parametrize("name", GPU_MEMORY_GIB)
def test_every_gpu_of_the_table_has_a_peak(name: str) -> None:
    _, memory, peak = planning._named_gpu(name)
    assert memory > 2**33 and peak > 1e13


@pytest.mark.usefixtures("counted_once")
def test_a_named_gpu_follows_its_data_sheet() -> None:
    run = preset("gemma3-270m-gpt2")
    half, full = (plan(run, "h100", mfu=mfu) for mfu in (0.25, 0.5))
    assert full.device == "H100" and full.precision == "bf16" and full.memory.process == 0
    assert full.tokens_per_second == pytest.approx(0.5 * 989e12 / full.flops_per_token)
    assert half.step_seconds == pytest.approx(2 * full.step_seconds)
    assert full.fits and full.largest_micro_batch is not None
    assert "assuming 50% of the peak" in described(full)


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(GemletError, match="unknown GPU 'H10'; did you mean 'H100'"):
        plan(_run(), "H10")


@pytest.mark.usefixtures("counted_once")
def test_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["plan", "--gpu", "A100", "--train.max-steps", "500", "--price-per-hour", "2", "--out", "runs/x"]
    assert main(flags) == 0
    table = capsys.readouterr().out
    assert all(word in table for word in ("parameters", "memory", "micro-batch", "FLOPs", "speed", "time", "cost"))
    assert max(map(len, table.splitlines())) <= 120
    assert main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total"] == preset("tales").model.num_parameters
    assert found["memory"]["total"] == sum(v for k, v in found["memory"].items() if k not in ("total", "limit"))
    assert main(["plan", "--gpu", "A100", "--mfu", "2"]) == 2
    assert main(["plan", "--price-per-hour", "-1"]) == 2
