"""The verbs of the command line: a verb is a class, its fields are the flags, their docstrings the help; calling it
does the work. `gemlet.cli` turns the classes into flags. What is heavy (torch above all) is imported inside the calls,
so that `--help` and a mistake cost no waiting.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import tyro

from gemlet.config import DataConfig, RunConfig, validated
from gemlet.errors import GemletError

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
