"""What a run will need, before it runs: memory, FLOPs, speed, time, cost, and the largest micro-batch that fits.

Memory is counted on shapes (`footprint.py`), time is measured on parts of a step (`pace.py`). A GPU that is only named
cannot be measured: its time is the FLOPs over its peak at an assumed utilisation.
"""

import dataclasses
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

from gemlet.config import RunConfig
from gemlet.device import can_compile, pick_device, pick_precision
from gemlet.errors import GemletError, did_you_mean
from gemlet.footprint import Memory, step_memory, with_training
from gemlet.host import reuse_memory
from gemlet.metrics import flops_per_token, gpu_peak_flops
from gemlet.pace import StepTime, step_time
from gemlet.train import wants_compiling

GPU_MEMORY_GIB = {
    "T4": 15, "L4": 22, "A10": 22, "A10G": 22, "A30": 24, "RTX 3090": 24, "RTX 4090": 24, "RTX 5090": 32, "V100": 32,
    "A40": 45, "L40S": 45, "A6000": 48, "RTX 6000 Ada": 48, "A100": 80, "H100": 80, "H200": 141, "B200": 180,
    "MI300X": 192,
}  # fmt: skip
"""GPUs that can be named, with the memory of the larger model where there are two."""

MFU = 0.4
"""Part of its peak that a GPU that was only named is taken to reach: what a compiled, well-filled model does. Small
models reach less."""

USABLE = 0.9
"""Part of the memory that a run may fill: the rest is for the system, the allocator's gaps and a GPU's own context."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found out."""

    config: RunConfig
    device: str
    """The machine or GPU, in words."""
    precision: str
    compiled: bool
    memory: Memory
    memory_limit: int
    """Bytes that the device has."""
    largest_micro_batch: int | None
    """The largest divisor of the batch that fits, in sequences; None if not even one sequence does."""
    step: StepTime | None
    """None for a GPU that was only named."""
    step_seconds: float
    compile_seconds: float
    mfu: float
    """Assumed for a GPU that was only named."""
    price_per_hour: float | None

    @property
    def fits(self) -> bool:
        """Whether the run as it is configured fits into the usable part of the memory."""
        return self.memory.total <= USABLE * self.memory_limit

    @property
    def parameters(self) -> dict[str, int]:
        """Weights: in all, of the embedding (and an untied head), of the blocks (with the final norm)."""
        m = self.config.model
        embedding = m.vocab_size * m.hidden_size * (1 if m.tie_word_embeddings else 2)
        return {"total": m.num_parameters, "embedding": embedding, "blocks": m.num_parameters - embedding}

    @property
    def flops_per_token(self) -> float:
        """By the rule of `metrics.flops_per_token`."""
        return flops_per_token(self.config.model, self.config.train.sequence_length)

    @property
    def flops(self) -> float:
        """Of the whole training."""
        return self.flops_per_token * self.config.train.tokens_per_step * self.config.train.max_steps

    @property
    def tokens_per_second(self) -> float:
        """While training, as a run logs it."""
        return self.config.train.tokens_per_step / self.step_seconds

    @property
    def seconds(self) -> float:
        """The whole run: steps, compiling, and validations, which are a forward pass, a third of a step's work."""
        t = self.config.train
        validations = math.ceil(t.max_steps / t.eval_every) * t.eval_tokens / self.tokens_per_second / 3
        return self.compile_seconds + t.max_steps * self.step_seconds + validations

    @property
    def cost(self) -> float | None:
        """In the currency of the price."""
        return None if self.price_per_hour is None else self.price_per_hour * self.seconds / 3600

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON: bytes, seconds, FLOPs."""
        return {
            "device": self.device,
            "precision": self.precision,
            "compiled": self.compiled,
            "parameters": self.parameters,
            "memory": {**dataclasses.asdict(self.memory), "total": self.memory.total, "limit": self.memory_limit},
            "fits": self.fits,
            "largest_micro_batch": self.largest_micro_batch,
            "flops_per_token": self.flops_per_token,
            "flops": self.flops,
            "step": None if self.step is None else dataclasses.asdict(self.step),
            "step_seconds": self.step_seconds,
            "compile_seconds": self.compile_seconds,
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "cost": self.cost,
        }


def plan(config: RunConfig, gpu: str | None = None, *, mfu: float = MFU, price_per_hour: float | None = None) -> Plan:
    """Plan a run on this machine's device (`train.device`), which takes some seconds, or on a GPU that is named.

    `mfu` counts for a named GPU only.
    """
    if gpu is None:
        reuse_memory()  # as training does
        device = pick_device(config.train.device)
        config = with_training(config, device=str(device), precision=pick_precision(config.train.precision, device))
        compiled = wants_compiling(config, device.type) and can_compile(device.type)
        process = _resident() if device.type == "cpu" else 0  # with the compiler, if there is one
        name, limit = _this_machine(device)
        step, compiling, kept = step_time(config, device, compiled)
        seconds = step.total
    else:
        device = torch.device("meta")
        config = with_training(config, precision="bf16" if config.train.precision == "auto" else config.train.precision)
        name, limit, peak = _named_gpu(gpu)
        process, compiled, step, compiling, kept = 0, False, None, 0.0, None
        seconds = flops_per_token(config.model, config.train.sequence_length) * config.train.tokens_per_step
        seconds /= peak * mfu
    shapes = device if device.type == "cpu" else torch.device("meta")
    memory = step_memory(config, shapes, process, kept)
    return Plan(
        config=config,
        device=name,
        precision=config.train.precision,
        compiled=compiled,
        memory=memory,
        memory_limit=limit,
        largest_micro_batch=largest_micro_batch(config, shapes, limit, process, kept),
        step=step,
        step_seconds=seconds,
        compile_seconds=compiling,
        mfu=mfu,
        price_per_hour=price_per_hour,
    )


def described(plan: Plan) -> str:
    """A plan as a table for the terminal."""
    t, memory = plan.config.train, plan.memory
    parameters = plan.parameters
    micro_batches = t.batch_size // t.micro_batch
    how_split = f" in {micro_batches} micro-batches" if micro_batches > 1 else ""
    title = f"{t.max_steps:,} steps of {t.batch_size} x {t.sequence_length:,} tokens{how_split}, {t.optimizer}, "
    title += f"{t.precision}{', compiled' if plan.compiled else ''}, on {plan.device}"
    unit, bytes_ = ("GiB", 2**30) if memory.total >= 2**30 else ("MiB", 2**20)
    parts = {name: size / bytes_ for name, size in dataclasses.asdict(memory).items() if size >= bytes_ / 100}
    if plan.step is None:
        how = f"assuming {plan.mfu:.0%} of the peak; a small model reaches less"
    else:
        shares = {"blocks": plan.step.blocks, "head and loss": plan.step.head, "update": plan.step.update}
        how = ", ".join(f"{name} {seconds / plan.step.total:.0%}" for name, seconds in shares.items())
        how = f"{plan.step_seconds:.3g} s a step: {how}"
    digits = 2 if unit == "GiB" else 0
    best = plan.largest_micro_batch
    rows = {
        "parameters": (
            f"{parameters['total']:,}",
            f"embedding {parameters['embedding']:,}, blocks {parameters['blocks']:,}",
        ),
        "memory": (
            f"{memory.total / 2**30:.2f} of {plan.memory_limit / 2**30:.0f} GiB",
            ", ".join(f"{name} {size:,.{digits}f}" for name, size in parts.items()) + f" {unit}",
        ),
        "micro-batch": (
            "none fits" if best is None else f"at most {best:,}",
            f"sequences; {t.micro_batch} is chosen" + ("" if plan.fits else ", which does not fit"),
        ),
        "FLOPs": (f"{plan.flops:.3g}", f"{plan.flops_per_token / 1e6:,.1f} million per token"),
        "speed": (f"{plan.tokens_per_second:,.0f} tokens/s", how),
        "time": (_duration(plan.seconds), "with validation, without preparing data and saving"),
    }
    if plan.cost is not None:
        rows["cost"] = (f"{plan.cost:,.2f}", f"at {plan.price_per_hour:g} per hour")
    width = max(len(value) for value, _ in rows.values())
    return f"{title}\n\n" + "\n".join(f"{name:<13}{value:<{width + 2}}{told}" for name, (value, told) in rows.items())


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return f"{minutes // 60} h {minutes % 60:02d} min" if hours < 48 else f"{hours / 24:,.1f} days"


def largest_micro_batch(
    config: RunConfig, device: torch.device, limit: int, process: int = 0, kept: dict[str, float] | None = None
) -> int | None:
    """The largest divisor of the batch whose step fits into the usable part of `limit` bytes; None if none does.

    Below the whole batch, which needs no gradients of a micro-batch before it, the peak grows by the same for every
    sequence, so that two sizes tell it for all.
    """

    def needed(sequences: int) -> int:
        return step_memory(with_training(config, micro_batch_size=sequences), device, process, kept).total

    usable, batch = USABLE * limit, config.train.batch_size
    if needed(batch) <= usable:
        return batch
    divisors = [n for n in range(1, batch) if batch % n == 0]
    if not divisors:
        return None
    low, high = divisors[0], divisors[-1]
    first, last = needed(low), needed(high)
    slope = (last - first) / max(1, high - low)
    return max((n for n in divisors if first + (n - low) * slope <= usable), default=None)


def _resident() -> int:
    """Bytes of memory that this process holds now."""
    if Path("/proc/self/statm").exists():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _this_machine(device: torch.device) -> tuple[str, int]:
    """A device in words, and its memory in bytes."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.name, properties.total_memory
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container may have less than the machine
    if limit.exists() and limit.read_text().strip().isdigit():
        memory = min(memory, int(limit.read_text()))
    kind = "this machine's GPU" if device.type == "mps" else f"this machine, {torch.get_num_threads()} threads"
    return kind, memory


def _named_gpu(name: str) -> tuple[str, int, float]:
    """The table's name of a GPU, its memory in bytes, its peak in FLOP/s."""
    known = {key.lower(): key for key in GPU_MEMORY_GIB}
    key = known.get(name.lower())
    peak = None if key is None else gpu_peak_flops(key)
    if key is None or peak is None:
        raise GemletError(
            f"unknown GPU {name!r}{did_you_mean(name, GPU_MEMORY_GIB)} (known are {', '.join(GPU_MEMORY_GIB)})"
        )
    return key, GPU_MEMORY_GIB[key] * 2**30, peak
