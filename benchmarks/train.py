"""How fast a training step is, beside transformers and litgpt: `python -m benchmarks.train` prints a table.

One step is forward, backward, clipping and AdamW on float32 weights, the same shape and the same tokens for all, in
bfloat16 where the machine multiplies it (autocast for the peers, as they are used), else in float32. Everyone is built
once and warmed up in a process of its own, whose memory is set up as its users have it; then they take turns, so that a
slow minute of the machine falls on all of them. The first step of a turn is not timed: memory and caches are another's
then, whose threads may still be waiting for work. Those that follow are, for half a second, and one in any case.
The machine takes its turn, too, with nothing but square matrix products: a step that does what it must compute at their
rate would be at the floor, and a contender's part of it is the median of the rounds.
On a machine that others use all the time `--own-time` helps: one thread, and what the processor did for it alone.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemlet.config import ModelConfig, TrainConfig, preset
from gemlet.data import document_starts
from gemlet.device import DTYPES, pick_precision
from gemlet.errors import GemletError
from gemlet.host import reuse_memory
from gemlet.loss import linear_cross_entropy
from gemlet.metrics import flops_per_token
from gemlet.model import Gemma, init_weights
from gemlet.optim import clip, make_optimizers

Step = Callable[[Tensor, Tensor], None]
Clock = Callable[[], float]
CPU = torch.device("cpu")
TURN_SECONDS = 0.5
"""A turn has as many steps as begin within this time."""


def clock(own: bool) -> Clock:
    """Seconds on the wall; or those that a processor spent on this process, which then has one thread."""
    if own:
        torch.set_num_threads(1)
    return time.process_time if own else time.perf_counter


def gemlet(
    config: ModelConfig,
    dtype: torch.dtype,
    compiled: bool,
    optimizer: Literal["adamw", "muon"] = "adamw",
    begin: int | None = None,
) -> Step:
    """`begin` is the token that begins a document; with it the documents of a row do not see each other."""
    reuse_memory()
    model = init_weights(Gemma(config))
    model.compute_in(dtype)
    if compiled:
        for block in model.model.layers:
            block.compile(dynamic=False)
    optimizers = make_optimizers(model, TrainConfig(optimizer=optimizer))

    def step(x: Tensor, y: Tensor) -> None:
        starts = None if begin is None else document_starts(x, begin)
        (linear_cross_entropy(model.model(x, starts=starts), model.head_weight, y) / y.numel()).backward()
        clip([p.grad for p in model.parameters() if p.grad is not None], 1.0)
        for each in optimizers:
            each.step()
            each.zero_grad()

    return step


def peer(model: nn.Module, logits: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, fused=True)

    def step(x: Tensor, y: Tensor) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(logits(x).flatten(0, 1).float(), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformers(config: ModelConfig, dtype: torch.dtype, compiled: bool, attention: str = "sdpa") -> Step:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    shape: dict[str, Any] = {**config.to_hf(), "attn_implementation": attention}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**shape)).train()
    forward = torch.compile(model, dynamic=False) if compiled else model
    return peer(model, lambda x: forward(input_ids=x, use_cache=False).logits, dtype)


def litgpt(config: ModelConfig, dtype: torch.dtype, compiled: bool) -> Step:
    from litgpt.config import Config  # pyright: ignore[reportMissingImports]
    from litgpt.model import GPT  # pyright: ignore[reportMissingImports]

    c, every = config, [int(kind == "sliding_attention") for kind in config.layers]
    model = GPT(
        Config.from_name(
            "Gemma-3-1b-it",
            n_layer=c.num_hidden_layers,
            n_embd=c.hidden_size,
            n_head=c.num_attention_heads,
            n_query_groups=c.num_key_value_heads,
            head_size=c.head_dim,
            intermediate_size=c.intermediate_size,
            vocab_size=c.vocab_size,
            padded_vocab_size=c.vocab_size,
            block_size=c.max_position_embeddings,
            sliding_window_size=c.sliding_window,
            sliding_window_indices=every,
            rope_indices=every,
        )
    ).train()
    model.lm_head.weight = model.transformer.wte.weight  # tied, as its configuration for Gemma leaves to its user
    forward = torch.compile(model, dynamic=False) if compiled else model
    return peer(model, lambda x: forward(x), dtype)


def known(name: str) -> str:
    """A preset's name or file as a flag; one that is none ends the program with a line and exit code 2."""
    try:
        preset(name)
    except GemletError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def machine(dtype: torch.dtype) -> Step:
    """Not a step but a product of two matrices."""
    matrix = torch.rand(SIZE, SIZE).to(dtype)
    product = torch.empty_like(matrix)

    def step(x: Tensor, y: Tensor) -> None:
        torch.mm(matrix, matrix, out=product)

    return step


MACHINE, SIZE = "the machine", 2048
"""How it is called among the contenders, and the size of its matrices."""

CONTENDERS: dict[str, Callable[[ModelConfig, torch.dtype], Step]] = {
    "gemlet": lambda c, d: gemlet(c, d, False),
    "gemlet, compiled": lambda c, d: gemlet(c, d, True),
    "gemlet, compiled, Muon": lambda c, d: gemlet(c, d, True, "muon"),
    "gemlet, compiled, documents": lambda c, d: gemlet(c, d, True, begin=0),
    "transformers": lambda c, d: transformers(c, d, False),
    "transformers, eager attention": lambda c, d: transformers(c, d, False, "eager"),
    "transformers, compiled": lambda c, d: transformers(c, d, True),
    "litgpt": lambda c, d: litgpt(c, d, False),
    "litgpt, compiled": lambda c, d: litgpt(c, d, True),
}


def turns(name: str, config: ModelConfig, precision: str, shape: tuple[int, int], own: bool, turn: Connection) -> None:
    """A process of one contender: when told True it takes its turn, and answers with the seconds of a step."""
    now = clock(own)
    torch.manual_seed(0)
    dtype = DTYPES[precision]
    step = machine(dtype) if name == MACHINE else CONTENDERS[name](config, dtype)
    ids = torch.randint(0, config.vocab_size, (shape[0], shape[1] + 1), generator=torch.Generator().manual_seed(0))
    ids[:, ::200] = 0  # where a document begins, for the contender that minds
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    while turn.recv():
        step(x, y)
        began, steps, seconds = now(), 0, 0.0
        while seconds < TURN_SECONDS:
            step(x, y)
            steps, seconds = steps + 1, now() - began
        turn.send(seconds / steps)


def take_turn(name: str, turn: Connection) -> float:
    """The seconds of a step of one contender."""
    try:
        turn.send(True)
        return turn.recv()
    except (BrokenPipeError, EOFError):
        sys.exit(f"the process of {name} has ended, perhaps for want of memory: all contenders are in it; --only some")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", type=known, default="gemma3-270m-gpt2")
    parser.add_argument("--layers", type=int, help="fewer layers, for a quick look")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--own-time", action="store_true", help="processor time of one thread, not time on the wall")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    config = preset(options.preset).model
    if options.layers:
        config = config.replace(num_hidden_layers=options.layers, layer_types=None)
    precision = pick_precision("auto", CPU)
    shape = (options.batch_size, options.length)
    context, contenders = get_context("spawn"), {}
    for name in (MACHINE, *options.only):
        began = time.perf_counter()
        contenders[name], theirs = context.Pipe()
        arguments = (name, config, precision, shape, options.own_time, theirs)
        context.Process(target=turns, args=arguments, daemon=True).start()
        theirs.close()  # so that it is closed when the process ends
        take_turn(name, contenders[name])
        print(f"{name}: first turn after {time.perf_counter() - began:.0f} s", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, turn in contenders.items():
            seconds[name].append(take_turn(name, turn))
    for turn in contenders.values():
        turn.send(False)
    flops = [2 * SIZE**3 / s for s in seconds.pop(MACHINE)]
    floors = [each / flops_per_token(config, options.length) for each in flops]
    rates = {name: [shape[0] * shape[1] / s for s in values] for name, values in seconds.items()}
    if options.json:
        print(json.dumps({"precision": precision, "flops": flops, "floors": floors, "tokens_per_second": rates}))
        return
    print(f"{options.preset}, {config.num_hidden_layers} layers, {shape[0]} x {shape[1]} tokens, {precision}")
    print(f"{'':<32}{'tokens/s':>10}{'range':>18}{'of the floor':>14}")
    rates[f"floor at {statistics.median(flops) / 1e9:.0f} GFLOP/s"] = floors
    for name, values in rates.items():
        spread = f"{min(values):.0f} to {max(values):.0f}"
        part = statistics.median(rate / floor for rate, floor in zip(values, floors, strict=True))
        print(f"{name:<32}{statistics.median(values):>10.0f}{spread:>18}{part:>14.2f}")


if __name__ == "__main__":
    main()
