"""What a run counts, shows and remembers: FLOPs and memory, live progress, `metrics.jsonl`, the loss plot."""

import functools
import io
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gemlet.config import ModelConfig
from gemlet.files import write_bytes, writing

# ---------------------------------------------------------------------------------------------------------------------
# Counting


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations that training needs per token at a sequence length (T).

    The forward pass three times (the backward pass is two), a multiplication and an addition per weight of the
    blocks' matrices and of the output head, and attention counted exactly: two products (scores, values) of 2 N H each
    for every pair of a query and a key that it sees, causally and within the window. Recomputation, norms, RoPE and
    the embedding's look-up are not work in this sense. The MFU is this, times tokens per second, over `peak_flops`.
    """
    D, NH = config.hidden_size, config.num_attention_heads * config.head_dim
    KH = config.num_key_value_heads * config.head_dim
    block = 2 * D * (NH + KH) + 3 * D * config.intermediate_size
    matrices = config.num_hidden_layers * block + config.vocab_size * D
    keys = sum(_visible_keys(sequence_length, config.window(i)) for i in range(config.num_hidden_layers))
    return 3.0 * (2 * matrices + 4 * NH * keys)


def _visible_keys(length: int, window: int | None) -> float:
    """Keys that a query sees on average over a sequence: 1, 2, ... and from the window's length on that many."""
    w = length if window is None else min(window, length)
    return (w * (w + 1) / 2 + (length - w) * w) / length


# Dense 16-bit tensor-core peaks in TFLOP/s with float32 accumulation; the first name that matches counts.
_GPU_TFLOPS = {
    "H100 NVL": 835, "H200 NVL": 835, "H100 PCIe": 756, "GH200": 989, "H200": 989, "H100": 989, "H800": 989,
    "GB200": 2500, "B200": 2250, "B300": 2250, "A100": 312, "A800": 312, "A40": 150, "A30": 165, "A10G": 70,
    "A10": 125, "L40S": 362, "L40": 181, "L4": 121, "V100": 125, "T4": 65, "RTX 6000 Ada": 364, "A6000": 155,
    "RTX 5090": 210, "RTX 4090": 165, "RTX 4080": 97, "RTX 3090": 71, "MI300X": 1307, "MI325X": 1307, "MI250X": 383,
}  # fmt: skip


def peak_flops(device: torch.device | str, precision: str) -> float | None:
    """Floating-point operations per second that the device could do at best in "bf16", "fp16" or "fp32".

    CUDA: the dense 16-bit figure of the maker's data sheet (NVIDIA's data sheets and architecture white papers, AMD's
    for Instinct; those that state it with sparsity are halved), found by the device's name. CPU: the fastest of a few
    matrix products, measured once in a process (a quarter of a second). None where nothing is known.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _measured_flops(precision, torch.get_num_threads())
    if device.type != "cuda" or precision == "fp32":
        return None
    return gpu_peak_flops(torch.cuda.get_device_name(device))


def gpu_peak_flops(name: str) -> float | None:
    """The same for a GPU by its name, as torch or its maker writes it; it need not be there."""
    known = (peak for key, peak in _GPU_TFLOPS.items() if re.search(rf"\b{key}\b", name) and "Laptop" not in name)
    return next((peak * 1e12 for peak in known), None)


@functools.cache
def _measured_flops(precision: str, threads: int) -> float:
    """The best rate of square matrix products of growing size, on `threads` threads (part of the cache's key)."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    best = 0.0
    for size in (512, 1024, 2048):
        matrix, fastest = torch.rand(size, size).to(dtype), math.inf
        torch.mm(matrix, matrix)  # the first product also starts threads and chooses a kernel
        deadline = time.perf_counter() + 0.07
        while time.perf_counter() < deadline:  # several times, because other processes may be in the way
            start = time.perf_counter()
            torch.mm(matrix, matrix)
            fastest = min(fastest, time.perf_counter() - start)
        best = max(best, 2 * size**3 / fastest)
        if 8 * fastest > 0.07:  # the next size would take too long
            break
    return best


def peak_memory_gib(device: torch.device | str) -> float:
    """The most memory held so far, in GiB: tensors on a CUDA device, the whole process (resident) elsewhere."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return math.nan  # the standard library does not tell
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere


# ---------------------------------------------------------------------------------------------------------------------
# Progress and metrics.jsonl

_FORMATS = {
    "train/loss": "loss {:.4f}",
    "val/loss": "val {:.4f}",
    "val/ppl": "ppl {:.4g}",
    "val/bpb": "{:.4f} bits per byte",
    "train/lr": "lr {:.2e}",
    "train/grad_norm": "grad {:.2f}",
    "train/tok_per_sec": "{:,.0f} tok/s",
    "train/mfu": "MFU {:.0%}",
    "mem/peak_gib": "{:.2f} GiB",
}
_LIVE = ("train/loss", "val/loss", "train/lr", "train/tok_per_sec", "train/mfu", "mem/peak_gib")
_VALIDATION = ("train/loss", "val/loss", "val/ppl", "val/bpb")


@contextmanager
def preparation(quiet: bool = False) -> Iterator[Callable[[int, int, int, int | None], None]]:
    """A `progress` for `prepare`, on stderr: one line that changes on a terminal, elsewhere one in ten seconds."""
    began = shown = time.perf_counter()
    live = sys.stderr.isatty()

    def show(documents: int, tokens: int, size: int, total: int | None) -> None:
        nonlocal shown
        now = time.perf_counter()
        if quiet or now - shown < (0.2 if live else 10):
            return
        shown, rate = now, size / (now - began)
        line = f"{documents:,} documents  {tokens:,} tokens  {rate / 1e6:.1f} MB/s"
        if total:
            line += f"  {min(size / total, 1):.0%}  {max(total - size, 0) / max(rate, 1):,.0f} s left"
        print(f"\r\033[K{line}" if live else line, end="" if live else "\n", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if live and not quiet:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


class RunLog:
    """Progress on the terminal and `metrics.jsonl` in the run's folder. A context manager, which restores the terminal.

    A terminal shows one live area (bar, time left, the latest figures) below permanent lines: validations and notes. A
    pipe or a log file gets one plain line for every `log`, without control codes. `quiet` shows nothing at all.
    """

    def __init__(self, out: Path, total_steps: int, tokens_per_step: int, quiet: bool = False):
        self.path = Path(out) / "metrics.jsonl"
        self.total_steps = total_steps
        self.tokens_per_step = tokens_per_step
        self.quiet = quiet
        self.step = 0
        self.best = math.inf  # validation loss
        self._latest: dict[str, float] = {}
        self._console = Console(highlight=False)
        self._live: Live | None = None
        self._clock = time.perf_counter()
        self._intervals = 0
        self._seconds = self._steps = 0.0  # of the recent past, older times fading away; their ratio is the rate

    def __enter__(self) -> Self:
        self._clock = time.perf_counter()
        if not self.quiet and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, get_renderable=self._area, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def resume(self, step: int) -> None:
        """Go on after `step`: drop later lines of metrics.jsonl and a torn last one, leaving the others as they are."""
        kept = [(line, record) for line, record in _lines(self.path) if record["step"] <= step]
        if self.path.exists():
            write_bytes(self.path, b"".join(line for line, _ in kept))
        self.step = step
        losses = [record["val/loss"] for _, record in kept if record.get("val/loss") is not None]
        self.best = min(losses, default=math.inf)

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Append `{"step": step, **values}` to metrics.jsonl in one write, and show it.

        JSON has no NaN and no infinity: they are written as null. `train/tokens` and `train/tok_per_sec` are filled in
        beside a `train/loss` that comes without them.
        """
        record = {"step": step, **values}
        rate = self._tick(step)
        if "train/loss" in record:
            record.setdefault("train/tokens", step * self.tokens_per_step)
            if rate:
                record.setdefault("train/tok_per_sec", rate * self.tokens_per_step)
        line = json.dumps({key: _finite(value) for key, value in record.items()}, allow_nan=False).encode() + b"\n"
        with writing(self.path, len(line)), open(self.path, "ab", buffering=0) as file:
            file.write(line)
        self._latest.update({key: float(value) for key, value in record.items() if value is not None})
        self._show(step, record)

    def note(self, text: str, title: str = "") -> None:
        """Leave `text` on the terminal above the live area; with a title (a sample story's prompt) as a block."""
        if self.quiet:
            return
        text, title = _printable(text), _printable(title)
        if self._live is None:
            _print_plain("\n".join([title, *(f"  {line}" for line in text.splitlines())]) if title else text)
        elif not title:
            self._console.print(Text(text))
        else:
            bar = "| " if self._console.options.ascii_only else "│ "
            wrapped = Text(text).wrap(self._console, min(self._console.width, 100) - len(bar))
            lines = [Text.assemble((bar, "dim"), line) for line in wrapped]
            self._console.print(Text(f"\n{title}", "bold"), *lines, "", sep="\n")

    @property
    def seconds_left(self) -> float | None:
        """Time to the last step at the recent rate; None before the first figures."""
        if not self._steps:
            return None
        left = (self.total_steps - self.step) * self._seconds / self._steps
        return max(0.0, left - (time.perf_counter() - self._clock))

    def _tick(self, step: int) -> float | None:
        """Take in that `step` is reached now; steps per second since the last time, None if there were none."""
        steps, now = step - self.step, time.perf_counter()
        if steps <= 0:
            return None
        seconds = now - self._clock
        # The first interval holds the compilation, so that it counts for nothing as soon as there is a second one.
        fade = 0.9 if self._intervals > 1 else 0.0
        self._seconds, self._steps = fade * self._seconds + seconds, fade * self._steps + steps
        self._intervals += 1
        self._clock, self.step = now, step
        return steps / max(seconds, 1e-9)

    def _show(self, step: int, record: Mapping[str, Any]) -> None:
        validated = record.get("val/loss")
        best = validated is not None and validated < self.best
        if best:
            self.best = validated
        if self.quiet:
            return
        if self._live is None:
            left = "" if self.seconds_left is None else f"  {_clock(self.seconds_left)} left"
            shown = "  ".join(_formatted(record, _FORMATS)) + ("  best" if best else "")
            _print_plain(f"step {step}/{self.total_steps}  {shown}{left}")
        elif validated is not None:
            figures = "  ".join(_formatted(self._latest, _VALIDATION))
            number = f"{step:,}".rjust(len(f"{self.total_steps:,}"))
            self._console.print(
                Text.assemble((f"step {number}", "bold"), f"  {figures}", ("  best" if best else "", "green"))
            )

    def _area(self) -> Group:
        """The live area: the bar with its figures, and the latest metrics below."""
        done = self.step / self.total_steps
        left = "" if self.seconds_left is None else f"  {_clock(self.seconds_left)} left"
        table = Table.grid(expand=True)
        table.add_column(ratio=1)
        table.add_column(no_wrap=True)
        table.add_row(
            ProgressBar(self.total_steps, self.step, complete_style="cyan", finished_style="cyan"),
            Text.assemble(f"  {self.step:,}/{self.total_steps:,}  ", (f"{done:.0%}", "bold"), (left, "cyan")),
        )
        figures = "   ".join(_formatted(self._latest, _LIVE))
        return Group("", table, Text(figures, "dim", no_wrap=True, overflow="ellipsis"))


def _formatted(values: Mapping[str, Any], keys: Mapping[str, str] | tuple[str, ...]) -> list[str]:
    return [_FORMATS[key].format(values[key]) for key in keys if values.get(key) is not None]


def _finite(value: float | None) -> float | None:
    """A JSON number, or null where JSON has none."""
    if value is None or isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _clock(seconds: float) -> str:
    """1:05, or 2:03:04 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _printable(text: str) -> str:
    """Without control characters, which a model may well write and a terminal would obey."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", " ", text)


def _print_plain(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; none if there is no such file."""
    return [record for _, record in _lines(Path(path))]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a metrics.jsonl, as they lie in the file and read; a torn one is passed over."""
    if not path.exists():
        return
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("step"), int):
            yield line, record


# ---------------------------------------------------------------------------------------------------------------------
# The plot

_INK, _GREY, _PALE, _TRAIN, _VAL = "#1f2430", "#6b7280", "#e5e7eb", "#3b76c4", "#c8403f"
_Series = tuple[list[int], list[float]]  # steps, values


def draw_loss(metrics_path: Path, png_path: Path, title: str) -> None:
    """Draw training and validation loss over steps, with the learning rate below, from a metrics.jsonl to a PNG.

    The axis of the loss begins where the curves have left their steep start, so that the rest can be read.
    """
    # pyplot is left out: it takes longer to import, keeps every figure and may want a display
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

    records = read_metrics(metrics_path)
    train, val, lr, tokens, bpb = (
        _series(records, key) for key in ("train/loss", "val/loss", "train/lr", "train/tokens", "val/bpb")
    )
    figure = Figure(figsize=(9, 5), dpi=160, facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=(8, 1))

    many = len(train[0]) > 50  # then the measured values lie faintly behind their average
    loss.plot(*train, color=_TRAIN, linewidth=1, alpha=0.35 if many else 1, marker="o" if len(train[0]) == 1 else "")
    if many:
        loss.plot(train[0], _smooth(train[1]), color=_TRAIN, linewidth=2)
    loss.plot(*val, color=_VAL, linewidth=2, marker="o" if len(val[0]) < 40 else "", markersize=4)
    _fit_loss_axis(loss, train, val)
    _label_ends(loss, {"train": (_TRAIN, train), "validation": (_VAL, val)})
    if val[0]:
        best, step = min(zip(val[1], val[0], strict=True))
        bits = dict(zip(*bpb, strict=True)).get(step)
        text = f"best {best:.3f} nats" + ("" if bits is None else f", {bits:.3f} bits per byte")
        ring = {"color": "white", "markeredgecolor": _VAL, "markeredgewidth": 2, "markersize": 8}
        loss.plot(step, best, "o", clip_on=False, zorder=5, **ring)
        loss.annotate(text, (1, 1), (0, 6), "axes fraction", "offset points", ha="right", color=_VAL, weight="bold")
    loss.annotate("loss, nats per token", (0, 1), (0, 6), "axes fraction", "offset points", color=_GREY)
    loss.set_title(title, loc="left", color=_INK, fontsize=14, fontweight="bold", pad=26)
    loss.grid(axis="y", color=_PALE)

    rate.fill_between(*lr, color=_PALE, linewidth=0)
    rate.plot(*lr, color=_GREY, linewidth=1.2)
    rate.annotate("learning rate", (1, 0.5), (8, 0), "axes fraction", "offset points", color=_GREY, va="center")
    peak = max(lr[1], default=0) or 1.0
    rate.set(ylim=(0, 1.1 * peak), yticks=(0, peak), yticklabels=("0", f"{peak:.2g}" if any(lr[1]) else ""))

    for axes in (loss, rate):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(_GREY)
        axes.tick_params(colors=_GREY, length=0)
    rate.set_xlim(0, 1.005 * max((record["step"] for record in records), default=1) or 1)
    rate.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    rate.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    total = f" ({EngFormatter(places=1, sep='')(tokens[1][-1])} tokens)" if tokens[0] else ""
    rate.set_xlabel(f"step{total}", color=_INK)

    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_bytes(Path(png_path), image.getvalue())


def _series(records: list[dict[str, Any]], key: str) -> _Series:
    """The records that have a number there; a null is a figure that was not finite."""
    points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: list[float]) -> list[float]:
    """A centred moving average over about a twentieth of the values, narrow at the steep start only."""
    sums = list(itertools.accumulate(values, initial=0.0))
    half, n = max(1, len(values) // 40), len(values)
    spans = ((i - min(half, i), min(i + min(half, i) + 1, n)) for i in range(n))
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def _fit_loss_axis(loss: Any, train: _Series, val: _Series) -> None:
    """From the lowest loss to the highest after the first tenth of the run."""
    points = list(zip(train[0] + val[0], train[1] + val[1], strict=True))
    if points:
        last = max(step for step, _ in points)
        low, high = min(value for _, value in points), max(value for step, value in points if step >= last / 10)
        margin = 0.06 * (high - low) or 0.1
        loss.set_ylim(low - margin, high + margin)


def _label_ends(loss: Any, lines: dict[str, tuple[str, _Series]]) -> None:
    """Each line's name at its right end, moved apart where they would cover each other."""
    ends = sorted((series[1][-1], name, color, series[0][-1]) for name, (color, series) in lines.items() if series[0])
    low, high = loss.get_ylim()
    height = -1.0
    for value, name, color, step in ends:
        height = max(height + 0.06, (value - low) / (high - low))
        at = (step, low + height * (high - low))
        loss.annotate(
            name, at, (8, 0), "data", "offset points", va="center", color=color, weight="bold", annotation_clip=False
        )
