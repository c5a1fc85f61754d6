"""How far `gemlet plan` is from what is then measured: `python -m benchmarks.plan`, on an idle machine.

Each configuration is planned in one process and trained in another: some steps of the trainer on random tokens. The
plan's memory is held against the peak of that process's resident memory, its tokens/s against the median step. Both
take turns, whose medians are compared: a machine that others use has another speed in the next minute.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from gemlet.config import RunConfig, preset

# name: preset, changes of the model, changes of the training
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tales, 8 x 256, Muon": ("tales", {}, {}),
    "tales, 32 x 512, AdamW": ("tales", {}, {"batch_size": 32, "sequence_length": 512, "optimizer": "adamw"}),
    "10min, 16 x 256, Muon": ("tinystories-10min", {}, {"batch_size": 16}),
    "10min, 4 micro-batches of 8 x 256": ("tinystories-10min", {}, {"batch_size": 32, "micro_batch_size": 8}),
    "15m, 8 x 512, Muon": ("stories-15m", {}, {"batch_size": 8}),
    "15m, V 50,257, 4 x 256, AdamW": (
        "stories-15m",
        {"vocab_size": 50_257},
        {"batch_size": 4, "sequence_length": 256, "optimizer": "adamw"},
    ),
    "42m, 1 x 2,048, Muon": ("stories-42m", {}, {"batch_size": 1, "sequence_length": 2048}),
    "270m, V 50,257, 1 x 512, AdamW": (
        "gemma3-270m-gpt2",
        {},
        {"batch_size": 1, "micro_batch_size": 1, "optimizer": "adamw"},
    ),
    "10min, 12 x 512, AdamW": (
        "tinystories-10min",
        {},
        {"batch_size": 12, "sequence_length": 512, "optimizer": "adamw"},
    ),
    "42m, 3 micro-batches of 1 x 512, AdamW": (
        "stories-42m",
        {},
        {"batch_size": 3, "micro_batch_size": 1, "optimizer": "adamw"},
    ),
    "tales, 8 x 256, Muon, compiled": ("tales", {}, {"compile": "on"}),
}


def run_of(name: str) -> RunConfig:
    """A case as a run on the CPU."""
    base, model, training = CASES[name]
    run = preset(base)
    train = run.train.replace(**{"device": "cpu", "compile": "off", **training})
    return run.replace(model=run.model.replace(**model), train=train)


def planned(run: RunConfig) -> dict[str, float]:
    """In a process of its own: what the plan says, and how long it takes to say it."""
    from gemlet.plan import plan

    began = time.perf_counter()
    found = plan(run)
    return {
        "memory": found.memory.total,
        "rate": found.tokens_per_second,
        "seconds": time.perf_counter() - began - found.compile_seconds,
    }


def measured(run: RunConfig) -> dict[str, float]:
    """In a process of its own: two steps to warm up, then steps for six seconds, at least three."""
    from gemlet.data import TokenStream
    from gemlet.device import pick_device
    from gemlet.host import reuse_memory
    from gemlet.metrics import peak_memory_gib
    from gemlet.train import new_state, train_step

    reuse_memory()
    random = np.random.default_rng(0)
    stream = TokenStream([random.integers(0, run.model.vocab_size, 1_000_000).astype(np.uint32)], 0)
    state = new_state(run, pick_device("cpu"))
    if run.train.compile == "on":
        for block in state.model.model.layers:
            block.compile(dynamic=False)
    for _ in range(2):
        train_step(state, stream, run)
    times: list[float] = []
    while len(times) < 3 or sum(times) < 6:
        began = time.perf_counter()
        train_step(state, stream, run)
        times.append(time.perf_counter() - began)
    return {
        "memory": peak_memory_gib("cpu") * 2**30,
        "rate": run.train.tokens_per_step / statistics.median(times),
        "fastest": run.train.tokens_per_step / min(times),
        "slowest": run.train.tokens_per_step / max(times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=CASES, help="a configuration; may be repeated")
    parser.add_argument("--rounds", type=int, default=3, help="turns of planning and training (default: 3)")
    parser.add_argument("--json", action="store_true", help="one line of JSON a configuration")
    parser.add_argument("--ask", nargs=2, help=argparse.SUPPRESS)  # in the process of one answer
    args = parser.parse_args()
    if args.ask:
        what, name = args.ask
        print(json.dumps({"plan": planned, "run": measured}[what](run_of(name))))
        return
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}: it is at least 1")
    if not args.json:
        print("| configuration | memory, planned | measured | off | tokens/s, planned | measured | off | planning |")
        print("|---|---|---|---|---|---|---|---|")
    for name in args.only or CASES:
        turns = [(_ask("plan", name), _ask("run", name)) for _ in range(args.rounds)]
        said, found = (_medians(answers) for answers in zip(*turns, strict=True))
        off = {key: said[key] / found[key] - 1 for key in ("memory", "rate")}
        if args.json:
            print(json.dumps({"configuration": name, "planned": said, "measured": found, "off": off}), flush=True)
        else:
            print(
                f"| {name} | {said['memory'] / 2**30:.2f} GiB | {found['memory'] / 2**30:.2f} GiB | "
                f"{off['memory']:+.0%} | {said['rate']:,.0f} | {found['rate']:,.0f} | {off['rate']:+.0%} | "
                f"{said['seconds']:.0f} s |",
                flush=True,
            )


def _medians(answers: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(answer[key] for answer in answers) for key in answers[0]}


def _ask(what: str, name: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.plan", "--ask", what, name]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
