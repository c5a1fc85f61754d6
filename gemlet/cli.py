"""The command line. A verb is a class: its fields are the flags, their docstrings the help, calling it does the work.

tyro turns the classes into flags. What is heavy (torch above all) is imported inside the calls, so that `--help` and a
mistake cost no waiting. Exit codes: 0 success, 1 a failure at run time, 2 bad usage or input, 128 + n for signal n.
"""

import contextlib
import dataclasses
import errno
import io
import itertools
import json
import os
import platform
import re
import shutil
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import BaseModel
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from gemlet.config import DataConfig, RunConfig, preset, validated
from gemlet.errors import GemletError, did_you_mean

Unnamed = tyro.conf.arg(name="")  # a nested configuration whose fields are flags without a prefix for itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Train a small model on stories that gemlet writes itself, and let it tell three. Takes a few minutes.

    A second run takes up what the first one left, and does not redo what is whole.
    """

    out: Path = Path("runs/tales")
    """Folder of the run."""
    run: Annotated[RunConfig, Unnamed]

    def __call__(self) -> None:
        """Train, or find what is trained, then tell the stories."""
        from gemlet.lm import load
        from gemlet.train import train

        begun = (self.out / "config.toml").exists()
        if begun:
            print(f"{self.out} holds a quick start already: only what is missing is done.", flush=True)
        else:
            print(
                f"Writing stories, training a tokenizer on them, then a model. All of it goes to {self.out}.",
                flush=True,
            )
        with _stopped_says(f"{_program()} quickstart --out {self.out}"):
            result = train(self.run, self.out, resume=begun)
        print(f"\nValidation loss  {result.val_loss:.4f} nats per token, {result.val_bpb:.4f} bits per byte")
        if not begun:
            print(f"Training time    {result.seconds:,.0f} s")
        print(f"Loss curve       {self.out / 'loss.png'}\nModel            {result.checkpoint}")
        lm = load(result.checkpoint)
        for seed, prompt in enumerate(STORIES):
            print()
            _tell(prompt, lm.stream(prompt, temperature=0.5, seed=seed))
        gemlet = _program()
        print(
            f'\nNext:\n  {gemlet} generate --model {self.out} --prompt "Once upon a time" --num-samples 3\n'
            f"  {gemlet} eval --model {self.out} --data YOUR_STORIES.txt\n"
            f"  {gemlet} train --data YOUR_STORIES.txt --out runs/mine\n"
            f"  {gemlet} --help"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepare:
    """Turn documents into a folder of tokens, which `gemlet train --data FOLDER` trains on.

    A folder that is whole is left as it is.
    """

    out: Path
    """Folder to write."""
    vocab_size: int = 4096
    """Size of the vocabulary, when the tokenizer is trained here."""
    data: Annotated[DataConfig, Unnamed]

    def __call__(self) -> None:
        """Write the folder, and say what is in it."""
        from gemlet.metrics import preparation
        from gemlet.prepare import load_meta, prepare

        with preparation() as progress:
            folder = prepare(self.data, self.out, vocab_size=self.vocab_size, progress=progress)
        meta = load_meta(folder)
        for name, split in meta.splits.items():
            print(
                f"{name:<10} {split.documents:>12,} documents  {split.tokens:>15,} tokens  "
                f"{split.bytes / max(split.tokens, 1):.2f} bytes per token"
            )
        print(f"{folder}: vocabulary {meta.vocab_size:,}, {meta.dtype}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Documents:
    """The flags of a verb that reads documents."""

    data: str
    """Where the documents come from: `tales`, `tinystories`, `hub:OWNER/NAME`, a .txt / .jsonl / .parquet file (also
    .gz, .zst) or a folder of them."""
    text_field: str = "text"
    """The column or key that holds the text, in .jsonl, .parquet and hub data."""
    split: Annotated[str, tyro.conf.arg(metavar="{auto,endoftext,blank-lines,line,file}")] = "auto"
    """What separates documents in a .txt; `gemlet prepare --help` explains it."""
    max_documents: int | None = None
    """Stop after this many documents. Unset: all of them."""

    def documents(self, *, held_out: bool = False) -> Iterator[str]:
        """The documents that the flags name; held out: those for validation, where the source has its own."""
        flags: dict[str, Any] = {name: getattr(self, name) for name in ("text_field", "split", "max_documents")}
        validated(DataConfig, {"source": self.data, **flags}, "bad flags")
        from gemlet.sources import documents, has_validation

        if held_out and has_validation(self.data):
            flags |= {"split_name": "validation", "max_documents": None}
        return itertools.islice(documents(self.data, **flags), self.max_documents)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer(Documents):
    """Train a byte-level BPE tokenizer on documents."""

    out: Path
    """Folder to write, in the form that transformers' AutoTokenizer loads."""
    vocab_size: int = 4096
    """Size of the vocabulary, the 256 bytes and the end token included."""

    def __call__(self) -> None:
        """Train and save."""
        from gemlet.tokenizer import Tokenizer as BPE

        tokenizer = BPE.train(self.documents(), self.vocab_size)
        tokenizer.save(self.out)
        print(f"{self.out}: vocabulary {tokenizer.vocab_size:,}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train a model: prepare the documents, train, save checkpoints, draw the loss, tell sample stories.

    The groups of flags below are the whole configuration; their defaults are those of the preset.
    Ctrl-C finishes the step, saves and stops; --resume goes on from there.
    """

    out: Path
    """Folder of the run."""
    preset: str = "tales"
    """A preset of the package, or a .toml file, such as the config.toml of a run."""
    resume: bool = False
    """Go on with the run in --out from its last whole checkpoint; the defaults of the flags are then the run's own."""
    run: Annotated[RunConfig, Unnamed]

    def __call__(self) -> None:
        """Train."""
        from gemlet.train import train

        with _stopped_says(f"{_program()} train --out {self.out} --resume"):
            result = train(self.run, self.out, resume=self.resume)
        print(
            f"{result.checkpoint}: step {result.step:,}, validation loss {result.val_loss:.4f} nats per token, "
            f"{result.val_bpb:.4f} bits per byte"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(Documents):
    """Score a model on documents: each one from its start, its end token included.

    `tales`, and a data set of the hub that has a validation split, give their validation documents.
    """

    model: str
    """A run or a checkpoint of it, any Hugging Face Gemma 3 text folder, or a hub name."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    json: bool = False
    """Print one JSON object instead of the table."""

    def __call__(self) -> None:
        """Print the figures."""
        documents = self.documents(held_out=True)
        from gemlet.evaluate import evaluate
        from gemlet.lm import load

        lm = load(self.model, device=self.device)
        found = evaluate(lm.model, lm.tokenizer, documents)
        names = ("nats_per_token", "perplexity", "bits_per_byte", "tokens", "bytes", "documents")
        figures = {name: getattr(found, name) for name in names}
        if self.json:
            print(json.dumps(figures))
        else:
            for name, value in figures.items():
                print(f"{name.replace('_', ' '):<16}", f"{value:>12,}" if isinstance(value, int) else f"{value:>12.4f}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt; the text streams to stdout, the rate goes to stderr."""

    # The sampling flags are the fields of generate.SamplingParams, written again because that file needs torch;
    # a test holds the two together.
    model: str
    """A run or a checkpoint of it, any Hugging Face Gemma 3 text folder, or a hub name."""
    prompt: str = ""
    """Beginning of the story; empty lets the model begin."""
    max_new_tokens: int = 256
    """At most this many tokens, fewer where the context ends before; 0 gives nothing."""
    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token (greedy)."""
    top_k: int | None = None
    """Only the k likeliest tokens are drawn from; unset or 0: all of them."""
    top_p: float = 0.95
    """Only the likeliest tokens that together reach this probability are drawn from (arXiv 1904.09751); 1: all."""
    min_p: float = 0.0
    """Only tokens at least this fraction as likely as the likeliest are drawn from (arXiv 2407.01082); 0: all."""
    repetition_penalty: float = 1.0
    """Positive logits of tokens that have occurred are divided by it, negative ones multiplied (arXiv 1909.05858)."""
    seed: int | None = None
    """Sample i of a prompt draws from seed + i, whatever the other samples are; unset: other draws every time."""
    num_samples: int = 1
    """How many continuations to write, one after the other."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation and are left out of it; the model's end token always ends it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""

    def __call__(self) -> None:
        """Stream the samples."""
        if self.num_samples < 1:
            raise GemletError(f"--num-samples is {self.num_samples}, but must be at least 1")
        from gemlet.lm import load

        lm = load(self.model, device=self.device)
        others = ("model", "prompt", "num_samples", "device")
        sampling: dict[str, Any] = {name: value for name, value in vars(self).items() if name not in others}
        tokens, start = 0, time.perf_counter()
        for sample in range(self.num_samples):
            if sample:
                print("\n---\n")
            if self.seed is not None:
                sampling["seed"] = self.seed + sample
            tokens += len(lm.tokenizer.encode(_tell(self.prompt, lm.stream(self.prompt, **sampling))))
        seconds = time.perf_counter() - start
        print(f"{tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s", file=sys.stderr)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what gemlet finds here: versions, device, compiler, disk."""

    hub: bool = False
    """Also try to reach the Hugging Face hub."""

    def __call__(self) -> None:
        """Print the findings, one per line."""
        import torch

        packages = ("gemlet", "torch", "numpy", "tokenizers", "tiktoken", "safetensors", "huggingface_hub", "pyarrow")
        for package in packages:
            print(f"{package:<16}{metadata.version(package)}")
        print(f"{'python':<16}{platform.python_version()} on {platform.platform()}")
        print(f"{'threads':<16}{torch.get_num_threads()} of {os.cpu_count()} cores")
        for i in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(i)
            print(f"{f'cuda:{i}':<16}{card.name}, {card.total_memory / 2**30:.0f} GiB")
        if torch.backends.mps.is_available():
            print(f"{'mps':<16}available")
        if not torch.cuda.is_available() and not torch.backends.mps.is_available():
            print(f"{'device':<16}cpu only")
        compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))), None)
        print(f"{'compiler':<16}{compiler or 'none, so that torch.compile stays off on the cpu'}")
        print(f"{'free disk':<16}{shutil.disk_usage('.').free / 2**30:.0f} GiB here")
        if self.hub:
            print(f"{'hub':<16}{_reach_hub()}")


# How the stories of the quick start begin: each leads into a plot of its own.
STORIES = ("Once upon a time", "One night", "One afternoon, Lily planned a picnic")

VERBS: dict[str, type] = {
    "quickstart": Quickstart,
    "prepare": Prepare,
    "tokenizer": Tokenizer,
    "train": Train,
    "eval": Eval,
    "generate": Generate,
    "doctor": Doctor,
}

# What is wrong with the machine and not with gemlet: a full disk, a folder that must not be written.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: that of the process) and return its exit code; nothing is raised."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    name = f"gemlet {words[0]}" if words and words[0] in VERBS else "gemlet"
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a story may hold what an old terminal cannot show
    try:
        _run(words)
        sys.stdout.flush()
        return 0
    except SystemExit as end:  # --help, or a run that a signal ended
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BrokenPipeError:  # whoever read our output has seen enough, as in `gemlet ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        code, message = _explained(error)
        print(f"{name}: {message}", file=sys.stderr)
        return code


def _explained(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and what it says to a user."""
    if isinstance(error, GemletError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, OSError) and error.errno in _DISK:
        return 2, f"{error.strerror}: {error.filename or 'while writing'}"
    said = " ".join(str(error).split())[:160]
    return 1, f"{type(error).__name__}: {said}: this is a defect of gemlet; run it with --debug to see where"


def _run(words: list[str]) -> None:
    """Run the verb that the first word names with the flags that follow."""
    if not words or words[0] in ("-h", "--help", "help"):
        print("usage: gemlet VERB [FLAGS] [--debug]\n\nBuild, train and run a small Gemma 3 language model.\n")
        for name, kind in VERBS.items():
            print(f"  {name:<12}{(kind.__doc__ or '').splitlines()[0]}")
        print("\n`gemlet VERB --help` lists the flags of a verb; --debug shows the traceback of an error.")
    elif words[0] == "--version":
        print(f"gemlet {metadata.version('gemlet')}")
    elif words[0] in VERBS:
        _parse(words[0], words[1:])()
    else:
        raise GemletError(
            f"unknown verb {words[0]!r}{did_you_mean(words[0], VERBS)} (the verbs are {', '.join(VERBS)}; "
            "`gemlet VERB --help` lists the flags of one)"
        )


def _parse(verb: str, flags: list[str]) -> Any:
    """The verb with its fields filled in from the flags; a usage error becomes one line."""
    kind = VERBS[verb]
    default: dict[str, Any] = {}
    if kind in (Quickstart, Train):
        missing = {} if kind is Quickstart else {"out": tyro.MISSING}
        default = {"default": kind(run=_run_before_flags(flags if kind is Train else []), **missing)}
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _pydantic_flags():
            parsed = tyro.cli(
                kind, prog=f"gemlet {verb}", args=flags, config=(tyro.conf.FlagCreatePairsOff,), **default
            )
    except SystemExit as end:
        if end.code:
            raise GemletError(f"{_one_line(errors.getvalue())} (gemlet {verb} --help lists the flags)") from None
        raise
    configs = {"run": RunConfig, "data": DataConfig}
    given = {name: value for name, value in vars(parsed).items() if isinstance(value, dict)}
    checked = {name: validated(configs[name], value, "bad flags") for name, value in given.items()}
    return dataclasses.replace(parsed, **checked)


def _run_before_flags(flags: list[str]) -> RunConfig:
    """What the flags of a run change: the preset that is named, else the run that is resumed, else the first preset."""
    given = {"--preset": "", "--out": ""}
    for flag, value in zip(flags, [*flags[1:], ""], strict=False):
        name, equals, rest = flag.partition("=")
        if name in given:
            given[name] = rest if equals else value
    saved = Path(given["--out"], "config.toml")
    if "--resume" in flags and not given["--preset"] and saved.is_file():
        return RunConfig.from_toml(saved.read_text("utf-8"), str(saved))
    return preset(given["--preset"] or "tales")


def _pydantic_flags() -> ConstructorRegistry:
    """How tyro reads a pydantic model: a flag per field, gathered in a dict; `validated` checks it in its own words."""
    registry = ConstructorRegistry()

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not (isinstance(info.type, type) and issubclass(info.type, BaseModel)):
            return None
        base = info.default if isinstance(info.default, BaseModel) else info.type()
        fields = []
        for name, field in info.type.model_fields.items():
            kind: Any = field.annotation
            if name == "source":
                kind = Annotated[kind, tyro.conf.arg(aliases=("--data",))]
            told = " ".join((field.description or "").split())
            fields.append(StructFieldSpec(name=name, type=kind, default=getattr(base, name), helptext=told))
        return StructConstructorSpec(instantiate=dict, fields=tuple(fields))

    return registry


def _one_line(box: str) -> str:
    """What tyro's box says, in one line: its title and help left out, the flag that it suggests put in."""
    rows = [row for line in box.splitlines() if (row := line.strip("│╭╮╰╯ "))]
    parts = [
        list(part) for is_rule, part in itertools.groupby(rows[1:], lambda row: set(row) <= set("─-")) if not is_rule
    ]
    said, more = parts[0] if parts else rows, " ".join(itertools.chain(*parts[1:]))
    if said[0].startswith("Missing from"):
        return "missing " + ", ".join(row.split()[0] for row in said if row.startswith("--"))
    line = " ".join(said).removeprefix("Error parsing ").rstrip(".")
    line = re.sub(r"no type matching (.+?) could be instantiated from \[(.*?)\].*", r"\2 is not \1", line)
    line = line.replace("invalid literal for int() with base 10:", "not a whole number:")
    line = line.replace("could not convert string to float:", "not a number:")
    near = re.search(r"Perhaps you meant:\s+(--\S+)", more)
    return line[:1].lower() + line[1:] + (f"; did you mean {near[1]}?" if near else "")


def _tell(prompt: str, pieces: Iterable[str]) -> str:
    """Stream a prompt and its continuation to stdout, and return the latter; a terminal's edge breaks no word."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    told, column, held = "", 0, ""  # held: the last word, as more of it may come

    def show(words: list[str]) -> None:
        nonlocal column
        for word in words:
            if column and column + len(word) >= width:
                print()
                column = 0
            print(word, end="", flush=True)
            column = 0 if word.endswith("\n") else column + len(word)

    for piece in itertools.chain([prompt], pieces):
        told += piece
        *whole, held = re.split(r"(?<=\s)", held + piece)
        show(whole)
    show([held, "\n"])
    return told.removeprefix(prompt)


@contextlib.contextmanager
def _stopped_says(command: str) -> Iterator[None]:
    """Tell whoever stops a run (Ctrl-C, SIGTERM) how to go on with it."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print(f"stopped; to go on: {command}", file=sys.stderr)
        raise


def _program() -> str:
    """How to call gemlet from here: by its name where that is on the path."""
    script = Path(sys.executable).with_name("gemlet")
    if shutil.which("gemlet"):
        return "gemlet"
    return str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script)


def _reach_hub() -> str:
    from urllib import request

    from huggingface_hub import constants

    try:
        with request.urlopen(constants.ENDPOINT, timeout=10) as answer:
            return f"{constants.ENDPOINT} answers ({answer.status})"
    except OSError as error:
        return f"{constants.ENDPOINT} cannot be reached: {error}"
