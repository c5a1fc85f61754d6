"""How long a training step takes here, from its parts: each measured at its real shapes, for a second or so.

One block of each kind, the head with its loss, and the optimizers, times how often the step does each.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemlet.config import ModelConfig, RunConfig, TrainConfig
from gemlet.device import DTYPES
from gemlet.footprint import kinds_of_layers
from gemlet.loss import linear_cross_entropy
from gemlet.metrics import flops_per_token, peak_flops
from gemlet.optim import clip, make_optimizers, update
from gemlet.train import new_state

SAMPLE_SECONDS = 0.7
"""About how long one measured piece may take; larger ones are measured on fewer sequences."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    blocks: float
    """Forward and backward passes of all blocks."""
    head: float
    """Embedding, head and loss, forwards and backwards."""
    update: float
    """Clipping and the optimizers."""

    @property
    def total(self) -> float:
        """The whole step."""
        return self.blocks + self.head + self.update


def step_time(
    config: RunConfig, device: torch.device, compiled: bool
) -> tuple[StepTime, float, dict[str, float] | None]:
    """The time of a step, from pieces of it that are measured at their real shapes.

    Beside it the seconds that compiling took, and what compiled blocks keep, see `step_memory`.
    """
    m, t = config.model, config.train
    rate = peak_flops(device, t.precision) or 1e13
    affordable = SAMPLE_SECONDS * rate / 3  # FLOPs of a measured piece; they do not enter the result
    blocks = update = compiling = 0.0
    kept = {}
    for kind, count in kinds_of_layers(config).items():
        one = m.replace(vocab_size=2, num_hidden_layers=1, layer_types=(kind,), **_NO_IDS)
        work = flops_per_token(one, t.sequence_length) * t.sequence_length
        sequences = max(1, min(t.micro_batch, int(affordable / work)))
        layers = max(1, min(count, int(affordable / work / sequences)))
        state = new_state(
            config.replace(model=one.replace(num_hidden_layers=layers, layer_types=(kind,) * layers)), device
        )
        model = state.model.model
        ids = torch.zeros(sequences, t.sequence_length, dtype=torch.int64, device=device)
        gradient = torch.ones(sequences, t.sequence_length, m.hidden_size, device=device, dtype=state.model.dtype)
        run = functools.partial(_forward_backward, model, ids, gradient, t.batch_size == t.micro_batch)
        if compiled:
            for block in model.layers:
                block.compile(dynamic=False)
            began = time.perf_counter()
            run()
            compiling += time.perf_counter() - began
            kept[kind] = _kept_bytes(model, ids) / layers / sequences
        blocks += _seconds(run, device) * count / layers * t.micro_batch / sequences
        update += _update_seconds(state.model, state.optimizers, t, device) * count / layers
    head = _head_seconds(config, device, affordable)
    micro_batches = t.batch_size // t.micro_batch
    step = StepTime(micro_batches * blocks, micro_batches * head, update + _embedding_update(m, t, device))
    return step, compiling, kept or None


def _kept_bytes(model: nn.Module, ids: Tensor) -> int:
    """What a forward pass keeps for the backward pass, the weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        hidden = model(ids)
    del hidden
    return sum(size for place, size in storages.items() if place not in weights)


def _forward_backward(model: nn.Module, ids: Tensor, gradient: Tensor, alone: bool) -> None:
    """`alone`: as the only micro-batch of a step, which finds no gradients to add to."""
    if alone:
        model.zero_grad()
    model(ids).backward(gradient)


_NO_IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _head_seconds(config: RunConfig, device: torch.device, affordable: float) -> float:
    """Embedding, head and loss of one micro-batch, forwards and backwards.

    Where all its tokens would take too long, two smaller numbers of tokens give the line: a part of the cost, that of
    the gradient of the whole embedding, does not grow with the tokens.
    """
    m, t = config.model, config.train
    dtype = DTYPES[t.precision]
    embedding = nn.Parameter(torch.zeros(m.vocab_size, m.hidden_size, device=device))
    head = embedding if m.tie_word_embeddings else nn.Parameter(torch.zeros_like(embedding))

    def seconds(tokens: int) -> float:
        ids = torch.zeros(tokens, dtype=torch.int64, device=device)

        def run() -> None:
            if t.batch_size == t.micro_batch:
                embedding.grad = head.grad = None
            linear_cross_entropy(nn.functional.embedding(ids, embedding).to(dtype), head, ids).backward()

        return _seconds(run, device)

    tokens = t.micro_batch * t.sequence_length
    some = int(affordable / (6 * m.vocab_size * m.hidden_size)) // 64 * 64
    if some >= tokens:
        return seconds(tokens)
    some = min(tokens, max(128, some))
    few = some // 4
    base, more = seconds(few), seconds(some)
    return more + (more - base) / (some - few) * (tokens - some)


def _update_seconds(model: nn.Module, optimizers: list, train: TrainConfig, device: torch.device) -> float:
    """Norm, clipping and the optimizers' step for the parameters of a model."""

    def run() -> None:
        clip([p.grad for p in model.parameters() if p.grad is not None], train.grad_clip)
        update(optimizers)

    return _seconds(run, device)


def _embedding_update(m: ModelConfig, train: TrainConfig, device: torch.device) -> float:
    """The same for the embedding and an untied head, of which AdamW takes care: measured on a part, all rows alike."""
    elements = m.vocab_size * m.hidden_size * (1 if m.tie_word_embeddings else 2)
    rows = max(1, min(elements, 2**24) // m.hidden_size)
    part = nn.Embedding(rows, m.hidden_size, device=device)
    part.weight.grad = torch.ones_like(part.weight)
    adamw = train.replace(optimizer="adamw")
    return _update_seconds(part, make_optimizers(part, adamw), adamw, device) * elements / part.weight.numel()


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The median time of a call, after two that do not count: the first ones also teach the allocator its sizes."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    call()
    call()
    wait()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < SAMPLE_SECONDS and len(times) < 20):
        began = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
