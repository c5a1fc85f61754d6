"""Time and memory of a training step against its length, beside transformers and litgpt: `python -m benchmarks.length`.

One step is forward, backward, clipping and AdamW on one sequence, the shape and the tokens the same for all, products
in bfloat16 where the machine multiplies it, else in float32. gemlet's blocks are compiled, as in training, and the
peers are as they come; gemlet once more with documents that do not see each other. Every measurement is a process of
its own: two steps to warm up, since the third is the first that finds the memory it needs, the timed one, and the most
memory that the process ever held. With `--rounds` all take turns, and their medians count. A peer is left out of the
lengths at which its step would take longer than `--patience`, going by the length before. Results join those that the
JSON file holds already; the plot is drawn from it. `--own-time` is for a machine that others use all the time.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.train import CPU, Clock, Step, clock, gemlet, known, litgpt, transformers
from gemlet.config import ModelConfig, preset
from gemlet.device import DTYPES, pick_precision

WAYS: dict[str, Callable[[ModelConfig, torch.dtype], Step]] = {
    "gemlet": partial(gemlet, compiled=True),
    "gemlet, separate documents": partial(gemlet, compiled=True, begin=0),
    "transformers": partial(transformers, compiled=False),
    "litgpt": partial(litgpt, compiled=False),
}
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
WARM_UPS = 2
DOCUMENT = 200
"""Tokens in a document; a story of TinyStories has about as many."""

Results = dict[str, dict[str, dict[str, float]]]


def measure(way: str, config: ModelConfig, length: int, precision: str, now: Clock) -> dict[str, float]:
    """Seconds of a step on one sequence, and the peak memory of this process in GiB."""
    torch.manual_seed(0)
    step = WAYS[way](config, DTYPES[precision])
    ids = torch.randint(1, config.vocab_size, (1, length + 1))
    ids[:, ::DOCUMENT] = 0
    for _ in range(WARM_UPS):
        step(ids[:, :-1], ids[:, 1:])
    began = now()
    step(ids[:, :-1], ids[:, 1:])
    seconds = now() - began
    return {"seconds": seconds, "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def plot(results: Results, file: Path, title: str, own: bool) -> None:
    """Time per token (`own`: of the processor, one thread) and peak memory against the length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    time_per_token, memory = figure.subplots(1, 2)
    for way, by_length in results.items():
        lengths = sorted(map(int, by_length))
        measured = [by_length[str(length)] for length in lengths]
        style: dict[str, Any] = {"marker": "o", "label": way, "linestyle": "--" if "documents" in way else "-"}
        time_per_token.plot(lengths, [m["seconds"] / n * 1e3 for m, n in zip(measured, lengths, strict=True)], **style)
        memory.plot(lengths, [m["gib"] for m in measured], **style)
    time_per_token.set_title("processor time per token, one thread (ms)" if own else "time per token (ms)")
    memory.set_title("peak memory of the process (GiB)")
    longest = max(int(n) for by_length in results.values() for n in by_length)
    ticks = [n for n in LENGTHS[2:] if n <= longest]
    for axes in (time_per_token, memory):
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.set_xlim(left=0)
        axes.set_xlabel("tokens in the sequence")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=len(results))
    figure.suptitle(title)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", type=known, default="gemma3-270m-gpt2")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS, help="none: only draw the plot")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="of the products (the faster one)")
    parser.add_argument("--patience", type=float, default=90, help="seconds that a step of a peer may take")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each")
    parser.add_argument("--own-time", action="store_true", help="processor time of one thread, not time on the wall")
    parser.add_argument("--results", type=Path, default=Path("length.json"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--child", action="store_true", help="measure the first way and length here, as JSON")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}: it is at least 1")
    config = preset(args.preset).model.replace(num_hidden_layers=args.layers, layer_types=None)
    args.precision = args.precision or pick_precision("auto", CPU)
    if args.child:
        print(json.dumps(measure(args.ways[0], config, args.lengths[0], args.precision, clock(args.own_time))))
        return
    results: Results = json.loads(args.results.read_text()) if args.results.exists() else {}
    for length in args.lengths:
        ways = []
        for way in args.ways:
            done = {int(n): r["seconds"] for n, r in results.get(way, {}).items() if int(n) < length}
            expected = done[max(done)] * (length / max(done)) ** 2 if done else 0
            if way in ("transformers", "litgpt") and expected > args.patience:
                print(f"{way:<28}{length:>7} tokens: left out, it might take {expected:.0f} s", flush=True)
            else:
                ways.append(way)
        turns: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for turn in range(1, args.rounds + 1):
            for way in ways:
                options = ["--preset", args.preset, "--layers", str(args.layers), "--ways", way]
                options += ["--lengths", str(length), "--precision", args.precision]
                options += ["--own-time"] * args.own_time
                command = [sys.executable, "-m", "benchmarks.length", *options, "--child"]
                run = subprocess.run(command, check=True, stdout=subprocess.PIPE)
                turns[way].append(json.loads(run.stdout.splitlines()[-1]))
                if args.rounds > 1:
                    print(f"{way:<28}turn {turn}: {length / turns[way][-1]['seconds']:.1f} tokens/s", flush=True)
        for way, measured in turns.items():
            seconds = [one["seconds"] for one in measured]
            result = {"seconds": median(seconds), "gib": max(one["gib"] for one in measured)}
            results.setdefault(way, {})[str(length)] = result
            args.results.write_text(json.dumps(results, indent=1))
            rate, least, most = (length / x for x in (result["seconds"], max(seconds), min(seconds)))
            spread = f" ({least:.1f} to {most:.1f})" if args.rounds > 1 else ""
            print(f"{way:<28}{length:>7} tokens: {rate:7.1f} tokens/s{spread}, {result['gib']:5.2f} GiB", flush=True)
    if args.plot:
        title = f"{args.preset}, {args.layers} layers: one training step on one sequence, {args.precision}"
        plot(results, args.plot, title, args.own_time)


if __name__ == "__main__":
    main()
