"""Training: from a configuration to checkpoints, in one loop.

A run's state is the weights, the optimizers' tensors and the number of the step. Batches and learning rates are
pure functions of the step, so a run that is resumed goes on as if it had never stopped.
"""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemlet.capture import Captured
from gemlet.checkpoint import Checkpoints, run_lock
from gemlet.config import RunConfig, TrainConfig
from gemlet.data import TokenStream, batch, document_starts
from gemlet.device import DTYPES, can_compile, flush_denormals, pick_device, pick_precision
from gemlet.errors import GemletError, TrainingError
from gemlet.evaluate import Evaluation, eager, evaluate_tokens
from gemlet.files import write_text
from gemlet.generate import generate
from gemlet.host import reuse_memory
from gemlet.loss import linear_cross_entropy
from gemlet.metrics import RunLog, draw_loss, flops_per_token, peak_flops, peak_memory_gib, preparation
from gemlet.model import Gemma, init_weights
from gemlet.optim import clip, export_state, import_state, lr_at, make_optimizers, set_lr, update
from gemlet.prepare import Meta, load_meta, prepare, verify
from gemlet.sampling import SamplingParams
from gemlet.tokenizer import Tokenizer

COMPILE_PAYS = {"cpu": 2e13, "cuda": 1e16}
"""FLOPs of a run from which compiling, half a minute or more, is won back: about a minute of training.

Whether to compile depends on the configuration alone, not on the speed of the day or the steps that are left: the
compiled and the uncompiled model differ in the last bits, and a resumed run must not.
"""


@dataclass(frozen=True)
class TrainResult:
    """Where a run stands when `train` returns."""

    out: Path
    """The run's folder."""
    step: int
    """Optimizer updates done."""
    checkpoint: Path
    """The checkpoint with the lowest validation loss: a Hugging Face folder."""
    val_loss: float
    """Its validation loss in nats per token."""
    val_bpb: float
    """Its validation loss in bits per byte."""
    seconds: float
    """Time of this call, preparation of the data left out."""


@dataclass
class TrainState:
    """What changes while a run goes on; the first five fields are all that a checkpoint keeps."""

    model: Gemma
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    step: int = 0
    best: dict[str, float] = field(default_factory=lambda: {"step": 0, "loss": math.inf, "bpb": math.inf})
    passes: Captured | None = None
    """On an NVIDIA GPU, what launches the passes of a step at once."""
    update: Captured | None = None
    """The same for what the optimizers do."""
    ahead: tuple[tuple, tuple[Tensor, ...]] = ((), ())
    """A batch made while the GPU computed, and whose it is."""


@flush_denormals()
def train(
    config: RunConfig | None = None,
    out: str | Path = "runs/model",
    *,
    resume: bool = False,
    quiet: bool = False,
) -> TrainResult:
    """Train a model as `config` says, into the folder `out`; prepare its data first where that is not done.

    With `resume`, go on from the newest whole checkpoint in `out`; `config` may then be None (the run's own), and one
    that differs from it in model or data is refused. Ctrl-C and SIGTERM finish the step, save, and then raise
    KeyboardInterrupt and SystemExit(143).
    """
    reuse_memory()
    out = Path(out)
    config = _agree(config, out, resume)
    device = pick_device(config.train.device)
    with run_lock(out):
        with preparation(quiet) as progress:
            tokens = prepare(config.data, out / "tokens", vocab_size=config.model.vocab_size, progress=progress)
        config, tokenizer = with_tokenizer(config, tokens)
        write_text(out / "config.toml", config.to_toml())
        verify(tokens)
        meta = load_meta(tokens)
        state = new_state(config, device)
        checkpoints = Checkpoints(out / "checkpoints", config.train.keep_checkpoints)
        if resume:
            _restore(state, checkpoints, meta)
        return _Run(config, out, tokens, meta, tokenizer, state, checkpoints, quiet).go()


def train_step(state: TrainState, stream: TokenStream, config: RunConfig) -> tuple[float, float]:
    """One optimizer update. Returns the mean loss in nats per token and the gradient norm before clipping.

    The loss is normalised by the tokens of the whole batch, so micro-batches add up to it exactly. A loss or a norm
    that is not finite raises a TrainingError, with the weights as they were.
    """
    c, model, scaler = config.train, state.model, state.scaler
    inputs, targets = (x.to(model.device, non_blocking=True) for x in _batch(state, stream, c))
    compute = partial(_gradients, model, scaler, c.micro_batch, stream.begin_token_id if c.separate_documents else None)
    loss = state.passes(compute, inputs, targets) if state.passes else compute(inputs, targets)
    for optimizer in state.optimizers:
        scaler.unscale_(optimizer)
    norm = clip([p.grad for p in model.parameters() if p.grad is not None], c.grad_clip)
    set_lr(state.optimizers, lr_at(state.step, c))
    if model.device.type == "cuda":  # it computes all that meanwhile
        state.ahead = (stream, c, state.step + 1), tuple(x.pin_memory() for x in batch(stream, c, state.step + 1))
    loss, norm = loss.item(), norm.item()  # here it is waited for, and nowhere else
    if math.isfinite(norm) and math.isfinite(loss):
        if state.update:
            state.update(partial(update, state.optimizers))
        else:
            for optimizer in state.optimizers:
                scaler.step(optimizer)
    elif not scaler.is_enabled() or not math.isfinite(loss) or scaler.get_scale() < 1:
        raise TrainingError(_non_finite(state, loss, norm, c.lr * lr_at(state.step, c)))
    scaler.update()  # in fp16 an overflow skips the update and halves the scale
    for optimizer in state.optimizers:
        optimizer.zero_grad()
    state.step += 1
    return loss, norm


def _batch(state: TrainState, stream: TokenStream, config: TrainConfig) -> tuple[Tensor, ...]:
    """The step's batch, which may have been made ahead."""
    made_for, rows = state.ahead
    return rows if made_for == (stream, config, state.step) else batch(stream, config, state.step)


def _gradients(
    model: Gemma, scaler: torch.amp.GradScaler, rows: int, begin_token_id: int | None, inputs: Tensor, targets: Tensor
) -> Tensor:
    """Add the gradients of the mean loss to those of the weights, in micro-batches of `rows`; the mean loss.

    Documents are kept apart where the token that begins them is given.
    """
    loss = torch.zeros((), device=model.device)
    for x, y in zip(inputs.split(rows), targets.split(rows), strict=True):
        starts = None if begin_token_id is None else document_starts(x, begin_token_id)
        part = linear_cross_entropy(model.model(x, starts=starts), model.head_weight, y) / targets.numel()
        scaler.scale(part).backward()
        loss += part.detach()
    return loss


def with_tokenizer(config: RunConfig, tokens: Path) -> tuple[RunConfig, Tokenizer]:
    """The tokenizer of a folder of tokens, and the configuration with its vocabulary and special ids."""
    tokenizer = Tokenizer.load(tokens)
    model = config.model.replace(
        vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    return config.replace(model=model), tokenizer


def _agree(config: RunConfig | None, out: Path, resume: bool) -> RunConfig:
    """The run's configuration, after checking that `out` holds this run, or none."""
    file = out / "config.toml"
    if not resume:
        if config is None:
            raise GemletError("no configuration to train with; give one, or resume a run that has its own")
        if (out / "checkpoints").is_dir() and any((out / "checkpoints").iterdir()):
            raise GemletError(f"{out} holds a run already; go on with it by --resume, or choose another --out")
        return config
    if not file.is_file():
        raise GemletError(f"nothing to resume: {file} does not exist; give the folder of a run as --out")
    stored = RunConfig.from_toml(file.read_text(encoding="utf-8"), str(file))
    if config is None:
        return stored
    # the vocabulary and the special ids are the tokenizer's, which is compared by the fingerprint of the tokens
    derived = ("vocab_size", "bos_token_id", "eos_token_id")
    changed = []
    for section, old, new in (("model", stored.model, config.model), ("data", stored.data, config.data)):
        for key, value in old.model_dump().items():
            given = getattr(new, key)
            if given != value and key not in derived:
                changed.append(f"{section}.{key} was {value!r} and is now {given!r}")
    if stored.train.optimizer != config.train.optimizer:
        changed.append(f"train.optimizer was {stored.train.optimizer!r} and is now {config.train.optimizer!r}")
    if changed:
        raise GemletError(f"{out} cannot be resumed with another model or data: {'; '.join(changed)}")
    return config


def new_state(config: RunConfig, device: torch.device) -> TrainState:
    """A model with its initial weights, its optimizers and the scaler, which does nothing but in fp16."""
    model = init_weights(Gemma(config.model), config.train.seed).to(device)
    dtype = DTYPES[pick_precision(config.train.precision, device)]
    model.compute_in(dtype)
    model.model.recompute_mlps(config.train.gradient_checkpointing)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return TrainState(model, make_optimizers(model, config.train), scaler)


def wants_compiling(config: RunConfig, device_type: str) -> bool:
    """Whether a run on this kind of device is to be compiled, if that works there."""
    c = config.train
    flops = c.max_steps * c.tokens_per_step * flops_per_token(config.model, c.sequence_length)
    return c.compile == "on" or (c.compile == "auto" and flops > COMPILE_PAYS.get(device_type, math.inf))


def speed_up(state: TrainState, config: TrainConfig) -> None:
    """Compile the blocks, which are all alike, so that it is done once; an NVIDIA GPU launches a step's passes at once.

    Attention that keeps documents apart asks the GPU where they begin, so that it cannot be launched unseen.
    """
    model = state.model
    for block in model.model.layers:
        block.compile(dynamic=False)
    if model.device.type != "cuda" or config.separate_documents:
        return
    pool = torch.cuda.graph_pool_handle()
    state.passes = Captured(pool, list(model.parameters()))
    if not state.scaler.is_enabled():  # which asks for each optimizer whether to skip it
        state.update = Captured(pool)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"], device=model.device)


def _restore(state: TrainState, checkpoints: Checkpoints, meta: Meta) -> None:
    """Bring the state to that of the newest whole checkpoint; without one the run starts anew."""
    folder = checkpoints.latest()
    if folder is None:
        return
    tensors, saved = checkpoints.load(folder, state.model)
    if saved["data"] != meta.fingerprint:
        raise GemletError(f"the tokens of the run are not those of its checkpoint {folder}; put the old ones back")
    import_state(state.optimizers, state.model, tensors)
    state.scaler.load_state_dict(saved["scaler"])
    state.step, state.best = saved["step"], saved["best"]
    if state.best["step"] == state.step:  # in case the run was killed between saving it and pointing to it
        checkpoints.point("best", folder)


class _Run:
    """One call of `train`: the loop, and what is due at its steps."""

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        tokens: Path,
        meta: Meta,
        tokenizer: Tokenizer,
        state: TrainState,
        checkpoints: Checkpoints,
        quiet: bool,
    ):
        self.config, self.out, self.tokenizer, self.state, self.checkpoints = config, out, tokenizer, state, checkpoints
        self.fingerprint = meta.fingerprint
        self.stream = TokenStream.open(tokens, "train")
        self.stream.require(config.train.sequence_length)
        self.validation = _validation(TokenStream.open(tokens, "validation"), tokenizer, config.train.eval_tokens)
        self.log = RunLog(out, config.train.max_steps, config.train.tokens_per_step, quiet)
        self.device = state.model.device
        self.flops = flops_per_token(config.model, config.train.sequence_length)
        self.peak = peak_flops(self.device, pick_precision(config.train.precision, self.device))

    def go(self) -> TrainResult:
        """From the state's step to the last one."""
        c, state, log = self.config.train, self.state, self.log
        began = time.perf_counter()
        log.resume(state.step)
        self._compile()
        with log, _stop_signals() as stopped:
            seconds, steps = 0.0, 0  # of training since the last line of metrics
            while state.step < c.max_steps and not stopped:
                started = time.perf_counter()
                loss, norm = train_step(state, self.stream, self.config)
                seconds, steps = seconds + time.perf_counter() - started, steps + 1
                step, last = state.step, state.step == c.max_steps
                values: dict[str, Any] = {}
                if step % c.log_every == 0 or last:
                    rate = steps * c.tokens_per_step / seconds
                    values = self._figures(loss, norm, rate)
                    seconds, steps = 0.0, 0
                improved = False
                if step % c.eval_every == 0 or last:
                    result = self._validate()
                    values |= result
                    improved = result["val/loss"] < state.best["loss"]
                    if improved:
                        state.best = {"step": step, "loss": result["val/loss"], "bpb": result["val/bpb"]}
                if values:
                    log.log(step, values)
                if improved or step % c.save_every == 0 or last or stopped:
                    self._save(improved)
                if step % c.eval_every == 0 or last:
                    draw_loss(log.path, self.out / "loss.png", self.out.name)
                if c.sample_every and (step % c.sample_every == 0 or last):
                    self._tell_stories()
        best = self.checkpoints.root / "best"
        return TrainResult(
            self.out, state.step, best, state.best["loss"], state.best["bpb"], time.perf_counter() - began
        )

    def _compile(self) -> None:
        """Spend the time to be faster afterwards; not where it cannot pay."""
        c = self.config.train
        if not wants_compiling(self.config, self.device.type):
            return
        if can_compile(self.device.type):
            speed_up(self.state, c)
        elif c.compile == "on":
            raise GemletError("compile is on, but torch.compile does not work here (it needs a C++ compiler); use off")
        else:
            self.log.note("torch.compile does not work here (it needs a C++ compiler): training goes on without it")

    def _figures(self, loss: float, norm: float, rate: float) -> dict[str, Any]:
        return {
            "train/loss": loss,
            "train/lr": self.config.train.lr * lr_at(self.state.step - 1, self.config.train),
            "train/grad_norm": norm,
            "train/tokens": self.state.step * self.config.train.tokens_per_step,
            "train/tok_per_sec": rate,
            "train/mfu": rate * self.flops / self.peak if self.peak else None,
            "mem/peak_gib": peak_memory_gib(self.device),
        }

    def _validate(self) -> dict[str, Any]:
        result: Evaluation = evaluate_tokens(self.state.model, self.tokenizer, *self.validation)
        return {"val/loss": result.nats_per_token, "val/ppl": result.perplexity, "val/bpb": result.bits_per_byte}

    def _save(self, best: bool) -> None:
        state = self.state
        meta = {
            "step": state.step,
            "best": state.best,
            "scaler": state.scaler.state_dict(),
            "data": self.fingerprint,
        }
        tensors = export_state(state.optimizers, state.model)
        self.checkpoints.save(state.step, state.model, self.tokenizer, tensors, meta, best)

    def _tell_stories(self) -> None:
        c, model = self.config.train, self.state.model
        told = []
        for prompt in c.sample_prompts:
            ids = self.tokenizer.prompt_ids(prompt)
            params = SamplingParams(max_new_tokens=min(256, c.sequence_length), temperature=0.7, seed=c.seed)
            with eager():
                story = prompt + self.tokenizer.decode(list(generate(model, ids, params)))
            told.append(story)
            self.log.note(story, title=f"step {self.state.step}")
        write_text(self.out / "samples" / f"step-{self.state.step:08d}.txt", "\n\n".join(told) + "\n")


def _validation(stream: TokenStream, tokenizer: Tokenizer, budget: int) -> tuple[list[list[int]], int]:
    """The first validation documents of about `budget` tokens, without their end tokens, and their UTF-8 bytes."""
    begin = tokenizer.prompt_ids("")[0]
    documents = []
    for ids in stream.documents():
        documents.append(ids[1:] if ids[:1] == [begin] else ids)
        budget -= len(ids) + 1
        if budget <= 0:
            break
    return documents, sum(len(tokenizer.decode(ids).encode()) for ids in documents)


def _non_finite(state: TrainState, loss: float, norm: float, lr: float) -> str:
    """Where a number stopped being finite, in a sentence."""
    parameters = list(state.model.named_parameters())
    weights = [f"the weights of {name}" for name, p in parameters if not p.isfinite().all()]
    gradients = [
        f"the gradient of {name}" for name, p in parameters if p.grad is not None and not p.grad.isfinite().all()
    ]
    where = [*weights, *gradients, "the loss"][0]
    return (
        f"{where} is not finite at step {state.step + 1} (loss {loss:g}, gradient norm {norm:g}, lr {lr:g}); the "
        "weights were not touched and the last checkpoint is good: resume with a lower --train.lr"
    )


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect the first Ctrl-C or SIGTERM; the second one ends the process at once.

    After the block the signal that came is raised: KeyboardInterrupt for Ctrl-C, SystemExit(143) for SIGTERM.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield came
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: object) -> None:
        came.append(number)
        for n in before:
            signal.signal(n, signal.SIG_DFL)

    for number in before:
        signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came == [signal.SIGINT]:
        raise KeyboardInterrupt
    if came:
        raise SystemExit(128 + came[0])
