"""Where the time of a training step goes: `python -m benchmarks.profile` prints a table of a profile on the CPU.

The step is that of `benchmarks.train`. Kernels are counted by their own time, so that the shares add up; what one
compiled kernel does at once (norms, rotation, GeGLU, residuals) cannot be told apart in it.
"""

import argparse
from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.train import CONTENDERS, CPU, known
from gemlet.config import preset
from gemlet.device import DTYPES, pick_precision
from gemlet.host import reuse_memory

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "gemlet::cross_entropy"),
    "attention": ("aten::bmm", "flash_attention", "gemlet::attention"),
    "softmax of the loss": ("softmax_to_gradient", "log_softmax", "aten::exp_", "aten::gather", "aten::scatter_add_"),
    "update": ("aten::_fused_adam", "Optimizer.step", "aten::_foreach", "aten::linalg_vector_norm", "aten::lerp_"),
    "compiled kernels": ("CompiledFxGraph", "Torch-Compiled Region", "CompiledFunction", "gemlet::geglu"),
}
"""A kind, and parts of the names of its kernels; the first that fits counts. Where head and loss are one kernel, a
tenth of it is softmax, which cannot be told from its products."""


def shares(name: str, preset_name: str, batch_size: int, length: int) -> tuple[float, Counter[str]]:
    """Seconds of a step of one of `benchmarks.train`'s contenders, and the part that each kind takes."""
    config = preset(preset_name).model
    torch.manual_seed(0)
    step = CONTENDERS[name](config, DTYPES[pick_precision("auto", CPU)])
    ids = torch.randint(0, config.vocab_size, (batch_size, length + 1))
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    for _ in range(3):
        step(x, y)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step(x, y)
    times: Counter[str] = Counter()
    for event in found.key_averages():
        kind = next((kind for kind, names in KINDS.items() if any(n in event.key for n in names)), "all else")
        times[kind] += event.self_cpu_time_total
    total = times.total()
    return total / 1e6, Counter({kind: time / total for kind, time in times.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", type=known, default="gemma3-270m-gpt2")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--only", nargs="+", default=["gemlet", "gemlet, compiled"], choices=list(CONTENDERS))
    options = parser.parse_args()
    reuse_memory()
    kinds = (*KINDS, "all else")
    print("| | seconds |", " | ".join(kinds), "|")
    print("|---" * (len(kinds) + 2) + "|")
    for name in options.only:
        seconds, found = shares(name, options.preset, options.batch_size, options.length)
        print(f"| {name} | {seconds:.3g} |", " | ".join(f"{found[kind]:.0%}" for kind in kinds), "|", flush=True)


if __name__ == "__main__":
    main()
