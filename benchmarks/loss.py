"""Memory and time of the loss over a large vocabulary: `python -m benchmarks.loss` (about three minutes).

The output head and the cross-entropy, forwards and backwards, in three ways: gemlet's, plain cross-entropy on all
logits, and torch's own `F.linear_cross_entropy` in chunks (torch 2.13 and later). The ways take turns; every
measurement is a process of its own, and its memory the most it held beyond the imports: head, gradients, and logits.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.train import Clock, clock
from gemlet.device import DTYPES
from gemlet.loss import linear_cross_entropy


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    return F.cross_entropy(logits, targets, reduction="sum")


def of_torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # without them it is plain cross-entropy
    return F.linear_cross_entropy(hidden, weight.to(hidden.dtype), targets, reduction="sum", options=options)


WAYS = {"gemlet": linear_cross_entropy, "plain": plain, "torch": of_torch}


def measure(
    way: str, vocabulary: int, tokens: int, width: int, precision: str, steps: int, now: Clock
) -> dict[str, float]:
    """Seconds of the fastest step, and peak memory in MiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(vocabulary, width).normal_(0, width**-0.5, generator=generator).requires_grad_()
    hidden = torch.randn(tokens, width, generator=generator).to(DTYPES[precision]).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    seconds = []
    for _ in range(steps):
        weight.grad = hidden.grad = None
        start = now()
        (WAYS[way](hidden, weight, targets) / tokens).backward()
        seconds.append(now() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB on Linux
    return {"seconds": min(seconds), "mib": peak / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=262_144)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each way")
    parser.add_argument("--steps", type=int, default=2, help="in each measurement; the fastest counts")
    parser.add_argument("--own-time", action="store_true", help="processor time of one thread, not time on the wall")
    parser.add_argument("--way", choices=list(WAYS), help="only this one, in this process, as JSON")
    args = parser.parse_args()
    if args.way:
        shape = (args.vocabulary, args.tokens, args.width)
        print(json.dumps(measure(args.way, *shape, args.precision, args.steps, clock(args.own_time))))
        return
    ways = [way for way in WAYS if way != "torch" or hasattr(F, "linear_cross_entropy")]
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(args.rounds):
        for way in ways:
            command = [sys.executable, "-m", "benchmarks.loss", *sys.argv[1:], "--way", way]
            results[way].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    print(f"{args.tokens} tokens, width {args.width}, vocabulary {args.vocabulary}, {args.precision}")
    base = results["plain"]
    for way, runs in results.items():
        seconds, mib = ([run[key] for run in runs] for key in ("seconds", "mib"))
        ratio = statistics.median(a / b["seconds"] for a, b in zip(seconds, base, strict=True))
        less = max(run["mib"] for run in base) / max(mib)
        print(
            f"{way:<7} {statistics.median(seconds):7.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), "
            f"{ratio:.2f} of plain's time; {max(mib):6.0f} MiB, {less:.1f} times less than plain"
        )


if __name__ == "__main__":
    main()
