"""The bytes that a training step holds, before there are any.

The trainer's own step runs on tensors that have shapes but no data (torch's FakeTensorMode; for a GPU, the device
`meta`), and every storage that it makes is added up while it lives. What a CPU's heap takes on top is a fit.
"""

import contextlib
import dataclasses
import weakref
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gemlet.config import RunConfig
from gemlet.data import TokenStream
from gemlet.device import DTYPES
from gemlet.kernels import linear
from gemlet.loss import ALIGNED
from gemlet.model import Gemma
from gemlet.optim import make_optimizers
from gemlet.train import TrainState, train_step

HEAP = 60 * 2**20, 0.85, 1.0
HEAP_OF_KERNELS = 40 * 2**20, 0.6, 0.7
"""What glibc's heap takes beyond the tensors: bytes, and a part of the activations, which come and go within a step;
the third is that part where micro-batches add to gradients, which stay and lie between them. Where kernels compute the
products, too, less comes and goes. Each is between what several models and machines take (benchmarks/RESULTS.md)."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes in the moment of a step that needs the most."""

    weights: int
    gradients: int
    optimizer: int
    """The optimizers' state."""
    logits: int
    """Of the chunk at hand."""
    activations: int
    """All else: what the backward pass needs of the forward pass, and what is computed with in passing."""
    heap: int
    """Freed memory that the C library cannot use or give back, estimated from the above; 0 on a GPU."""
    process: int
    """Python, torch and the trainer's code; 0 on a GPU, where they are outside."""

    @property
    def total(self) -> int:
        """The peak."""
        return sum(dataclasses.astuple(self))


def step_memory(
    config: RunConfig, device: torch.device, process: int = 0, kept: dict[str, float] | None = None
) -> Memory:
    """The peak of a training step: the trainer's own step on tensors that have shapes but no data.

    `device` is the CPU, or "meta", which stands for any GPU. A deep model is counted with few layers, and with one
    more of each kind: each phase of the step grows by the same for every further layer. `process` is what the process
    takes without any tensor. `kept` says, for each kind of layer, how many bytes of a sequence a compiled block keeps
    for its backward pass, where they are not those of the block as it is written.
    """
    layers = kinds_of_layers(config)
    few = tuple(kind for kind, count in layers.items() for _ in range(min(count, 2)))
    peaks = _peaks(config, few, device)
    phases = {phase: peak.copy() for phase, peak in peaks.items()}
    for kind, count in layers.items():
        further = count - few.count(kind)
        if not further and kept is None:
            continue
        more = _peaks(config, (*few, kind), device)
        for phase, peak in phases.items():
            for what in _HELD:
                peak[what] += further * (more[phase][what] - peaks[phase][what])
            if kept is not None and phase != "update":
                written = more["loss"]["activations"] - peaks["loss"]["activations"]
                peak["activations"] += count * (int(kept[kind] * config.train.micro_batch) - written)
    most = max(phases.values(), key=Counter.total)
    heap = 0
    if device.type == "cpu":
        has_kernels = linear.available("cpu", DTYPES[config.train.precision])
        constant, share, share_accumulating = HEAP_OF_KERNELS if has_kernels else HEAP
        accumulates = config.train.micro_batch < config.train.batch_size
        heap = int(constant + (share_accumulating if accumulates else share) * most["activations"])
    return Memory(**{what: most[what] for what in _HELD}, heap=heap, process=process)


_HELD = ("weights", "gradients", "optimizer", "logits", "activations")


def kinds_of_layers(config: RunConfig) -> Counter[str]:
    """How many layers there are of each kind; where a window holds the whole sequence, all are of one."""
    m = config.model
    return Counter(m.layers if config.train.sequence_length > m.sliding_window else [m.layers[0]] * len(m.layers))


def with_training(config: RunConfig, **changes: Any) -> RunConfig:
    """The run with other training."""
    return config.replace(train=config.train.replace(**changes))


def _peaks(config: RunConfig, layers: tuple[str, ...], device: torch.device) -> dict[str, Counter[str]]:
    """What is held at the peak of each phase of a training step of a model of these layers."""
    t = config.train
    micro_batches = min(2, t.batch_size // t.micro_batch)  # the second finds gradients there; a third changes nothing
    run = with_training(config, batch_size=micro_batches * t.micro_batch, micro_batch_size=t.micro_batch).replace(
        model=config.model.replace(num_hidden_layers=len(layers), layer_types=layers)
    )
    stream = TokenStream([np.zeros(4 * t.sequence_length, np.uint16)], 0)
    without_data = FakeTensorMode(allow_non_fake_inputs=True) if device.type == "cpu" else contextlib.nullcontext()
    with without_data, _Storages(run.model.vocab_size) as storages, device:
        model = Gemma(run.model)
        model.compute_in(DTYPES[t.precision])
        model.model.recompute_mlps(t.gradient_checkpointing)
        state = TrainState(model, make_optimizers(model, run.train), torch.amp.GradScaler("cpu", enabled=False))
        for p in model.parameters():
            storages.hold(p, "weights")
            p.grad = torch.empty_like(p)
            p.register_post_accumulate_grad_hook(storages.gradient)
        for optimizer in state.optimizers:  # the first step makes the state, which all others find there
            for group in optimizer.param_groups:
                group["fused"] = group.get("fused") and device.type == "cpu"  # a kernel that is not there for meta
            optimizer.step()
            for x in tree_leaves(list(optimizer.state.values())):
                if isinstance(x, Tensor):
                    storages.hold(x, "optimizer")
            optimizer.zero_grad()
            optimizer.register_step_pre_hook(lambda *_: storages.enter("update"))
        model.model.register_forward_pre_hook(lambda *_: storages.enter("forward"))
        model.model.register_forward_hook(lambda *_: storages.enter("loss"))
        storages.peaks.clear()
        train_step(state, stream, run)
    return storages.peaks


class _Storages(TorchDispatchMode):
    """Adds up the storages that are alive, by what they hold, and remembers the most of each phase."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.phase = "forward"
        self.kinds: dict[int, str] = {}  # of the storages alive
        self.alive: Counter[str] = Counter()
        self.peaks: dict[str, Counter[str]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0  # the loss, the norm, AdamW's count of steps: a number that will do where there is no data
        if func is torch.ops.aten._fused_sdp_choice.default and args[0].is_meta:
            return _flash_or_efficient(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.kinds:
                is_logits = x.ndim == 2 and self.vocab_size <= x.shape[1] < self.vocab_size + ALIGNED
                self._add(x, "logits" if is_logits else "activations")
        if self.alive.total() > self.peaks.setdefault(self.phase, Counter()).total():
            self.peaks[self.phase] = self.alive.copy()
        return out

    def _add(self, x: Tensor, kind: str) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self.kinds[key] = kind
        self.alive[kind] += size

        def free() -> None:
            self.alive[self.kinds.pop(key)] -= size

        weakref.finalize(storage, free)

    def hold(self, x: Tensor, kind: str) -> None:
        """Say what a tensor's storage holds."""
        storage = x.untyped_storage()
        self.alive[self.kinds[storage._cdata]] -= storage.nbytes()
        self.kinds[storage._cdata] = kind
        self.alive[kind] += storage.nbytes()

    def gradient(self, p: Tensor) -> None:
        """A parameter has got its gradient."""
        assert p.grad is not None, "the hook is called behind it"
        self.enter("backward")
        self.hold(p.grad, "gradients")

    def enter(self, phase: str) -> None:
        """From now on the step is in this phase."""
        self.phase = phase


def _flash_or_efficient(query, key, value, attn_mask=None, *_, **__) -> int:
    """Which of torch's attention kernels a GPU would take; on "meta" it would be the one that makes all scores."""
    return (SDPBackend.FLASH_ATTENTION if attn_mask is None else SDPBackend.EFFICIENT_ATTENTION).value
