"""The verbs of the command line: a verb is a class, its fields are the flags, their docstrings the help; calling it
does the work. `gemlet.cli` turns the classes into flags. What is heavy (torch above all) is imported inside the calls,
so that `--help` and a mistake cost no waiting.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gemlet.config import DataConfig, RunConfig
from gemlet.errors import GemletError, Mismatch
from gemlet.records import validated
from gemlet.sampling import SamplingParams
from gemlet.terminal import confirm, rate, tell, tell_samples

if TYPE_CHECKING:
    from gemlet.lm import LM

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
            tell(prompt, lm.stream(prompt, temperature=0.5, seed=seed))
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
class Plan:
    """Say what a training would need: memory, FLOPs, speed, time, cost, the largest micro-batch that fits.

    The flags are those of train. Parts of the step are measured on this machine for some seconds; nothing is written.
    A GPU that is named does not have to be here: its speed is assumed from its data sheet.
    """

    preset: str = "tales"
    """A preset of the package, or a .toml file, such as the config.toml of a run."""
    out: Path | None = None
    """Not used: it is here so that the flags of a train can be given as they are."""
    gpu: str | None = None
    """A GPU to plan for, such as A100 or "RTX 4090". Unset: this machine, with its GPU if it has one."""
    mfu: float = 0.4
    """The part of its peak that a named GPU is assumed to reach."""
    price_per_hour: float | None = None
    """What an hour of the machine costs, for the cost of the run."""
    json: bool = False
    """Print the plan as one line of JSON."""
    run: Annotated[RunConfig, Unnamed]

    def __call__(self) -> None:
        """Plan, and print it."""
        from gemlet.plan import described, plan

        if not 0 < self.mfu <= 1:
            raise GemletError(f"--mfu is {self.mfu:g}, but is a part of the peak: give a number above 0, at most 1")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < math.inf:
            raise GemletError(f"--price-per-hour is {self.price_per_hour:g}, but must be a number not below 0")
        if not self.gpu:
            print("measuring parts of a step here, some seconds ...", file=sys.stderr, flush=True)
        result = plan(self.run, self.gpu, mfu=self.mfu, price_per_hour=self.price_per_hour)
        print(json.dumps(result.as_dict()) if self.json else described(result))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading:
    """The flags of a verb that computes with a model."""

    model: str
    """A run or a checkpoint of it, any Hugging Face Gemma 3 text folder, or a hub name."""
    weights: Literal["auto", "fp32", "bf16", "fp16", "int8", "int4"] = "auto"
    """How the weights are kept: auto, as they are stored; int8 and int4, on a CPU, write faster and less exactly."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(Documents, Loading):
    """Score a model on documents: each one from its start, its end token included.

    `tales`, and a data set of the hub that has a validation split, give their validation documents.
    """

    json: bool = False
    """Print one JSON object instead of the table."""

    def __call__(self) -> None:
        """Print the figures."""
        documents = self.documents(held_out=True)
        from gemlet.evaluate import evaluate
        from gemlet.lm import load

        lm = load(self.model, device=self.device, dtype=self.weights)
        found = evaluate(lm.ready.rounded(), lm.tokenizer, documents)
        names = ("nats_per_token", "perplexity", "bits_per_byte", "tokens", "bytes", "documents")
        figures = {name: getattr(found, name) for name in names}
        if self.json:
            print(json.dumps(figures))
        else:
            for name, value in figures.items():
                print(f"{name.replace('_', ' '):<16}", f"{value:>12,}" if isinstance(value, int) else f"{value:>12.4f}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing(SamplingParams, Loading):
    """The flags of a verb that lets a model write."""

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of `sampling.SamplingParams`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(SamplingParams)}

    def loaded(self) -> "LM":
        """The model, with its weights as the flags want them."""
        from gemlet.kernels.build import library

        library("decode", wait=False)  # the first time, the compiler works while torch is loaded
        from gemlet.lm import load

        return load(self.model, device=self.device, dtype=self.weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Writing):
    """Continue a prompt; the text streams to stdout, the rate goes to stderr."""

    prompt: str = ""
    """Beginning of the story; empty lets the model begin."""
    num_samples: int = 1
    """How many continuations to write: side by side on a terminal that is wide enough, else one after the other."""
    stop: tuple[str, ...] = ()
    """Texts that end a continuation and are left out of it; the model's end token always ends it."""

    def __call__(self) -> None:
        """Stream the samples."""
        if self.num_samples < 1:
            raise GemletError(f"--num-samples is {self.num_samples}, but must be at least 1")
        lm = self.loaded()
        told, start = [""] * self.num_samples, time.perf_counter()
        pieces = lm.stream_samples(self.prompt, self.num_samples, stop=self.stop, **self.sampling)
        try:
            tell_samples(self.prompt, told, pieces)
        except KeyboardInterrupt:
            raise SystemExit(130) from None  # what was said stays, and nothing went wrong
        finally:
            tokens = sum(len(lm.tokenizer.encode(text)) for text in told)
            print(rate(tokens, time.perf_counter() - start), file=sys.stderr)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Writing):
    """Talk with a model, or write a story with one: a line is yours, a reply the model's, and so on.

    A model that was trained on Gemma's turns answers; every other one goes on with the text that the lines add up to.
    What is not for the model begins with a slash: /new, /undo, /help, /quit. Ctrl-C stops a reply; where there is none,
    it leaves, as Ctrl-D does. Lines can come from a pipe, too; the replies go to stdout, all else to stderr.
    """

    max_new_tokens: int = 256
    """At most this many tokens a reply, fewer where the context ends before; an empty line then goes on."""
    seed: int | None = None
    """Reply i draws from seed + i, counted from 0 since the beginning or /new; unset: other draws every time."""

    def __call__(self) -> None:
        """Talk until there is no more input."""
        lm = self.loaded()
        from gemlet.chat import Chat as Conversation
        from gemlet.talk import talk

        talk(Conversation(lm, **self.sampling))


Packed = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]  # types of the weights in a GGUF file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """The flag of a verb that writes a model in another form."""

    model: str
    """A run or a checkpoint of it, any Hugging Face Gemma 3 text folder, or a hub name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published(Export):
    """The flags of a verb that writes a Hugging Face folder for others."""

    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Of the weights. Unset: as they are stored."""
    max_shard_size: float = 5.0
    """Gigabytes of the largest file of weights; more are cut into several."""
    license: str | None = None
    """For the model card, as the hub writes it: apache-2.0, mit, cc-by-4.0, ... Unset: the card names none."""
    language: str | None = None
    """For the model card: en, de, ... Unset: en for tales and TinyStories, else none."""

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `export_hf`."""
        size = int(self.max_shard_size * 10**9) if math.isfinite(self.max_shard_size) else 0
        return {
            "dtype": self.dtype,
            "max_shard_bytes": size,
            "license": self.license,
            "language": self.language,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportHF(Published):
    """Write a Hugging Face folder to publish: cast, without the training's state, with a model card."""

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to write, new or empty."""

    def __call__(self) -> None:
        """Write it."""
        from gemlet.export.hf import export_hf

        print(f"{export_hf(self.model, self.out, **self.options)}: ready for transformers, vLLM, MLX and the hub")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportGGUF(Export):
    """Write a GGUF file for llama.cpp, and a Modelfile for Ollama beside it."""

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """File to write, such as tales.gguf."""
    dtype: Packed = "f16"
    """Of the weights: q8_0 takes half of 16 bits and loses next to nothing, q4_0 a quarter."""

    def __call__(self) -> None:
        """Write them."""
        from gemlet.export.gguf import export_gguf
        from gemlet.lm import model_folder

        file = export_gguf(model_folder(self.model), self.out, self.dtype)
        print(f"{file}: {file.stat().st_size / 1e6:,.1f} MB, {self.dtype}, for llama.cpp and what is made of it")
        print(f"{file.with_suffix('.Modelfile')}: ollama create {file.stem} -f {file.with_suffix('.Modelfile')}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportWeb(Export):
    """Write a folder of static files: a page that tells stories in a browser, with no server behind it.

    The page computes with wllama, llama.cpp in WebAssembly, which is not part of gemlet: --fetch has npm download it
    once.
    """

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to write, new or empty."""
    dtype: Packed = "q8_0"
    """Of the weights."""
    name: str | None = None
    """What the page calls the model. Unset: as the run or the folder."""
    prompts: tuple[str, ...] = ()
    """Beginnings that the page suggests. Unset: a few that fit children's stories."""
    wllama: Path | None = None
    """A folder that holds wllama's packages already. Unset: the cache that --fetch fills."""
    fetch: bool = False
    """Download wllama with npm, unless it is in the cache."""

    def __call__(self) -> None:
        """Write it."""
        from gemlet.export.web import BEGINNINGS, export_web, fetch_wllama

        wllama = fetch_wllama() if self.fetch and self.wllama is None else self.wllama
        options: dict[str, Any] = {"dtype": self.dtype, "name": self.name, "wllama": wllama}
        out = export_web(self.model, self.out, beginnings=self.prompts or BEGINNINGS, **options)
        print(f"{out}: put it on any static server; to see it here:")
        print(f"  python3 -m http.server --bind 127.0.0.1 --directory {out}   and open http://localhost:8000")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportHub(Published):
    """Push a model to the Hugging Face hub, after saying what will be uploaded and asking."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OWNER/NAME")]
    """The repository, OWNER/NAME. A new one is private unless --public is given."""
    public: bool = False
    """Make a new repository public."""
    yes: bool = False
    """Push without asking, for scripts."""

    def __call__(self) -> None:
        """Say it, ask, push."""
        from gemlet.export.hub import plan_push, published, push

        with published(self.model, self.name, **self.options) as folder:
            plan = plan_push(folder, self.name, private=False if self.public else None)
            print(plan, flush=True)
            if not self.yes:
                confirm("Push this?", "--yes")
            print(push(plan))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify(Documents):
    """Run a model in transformers, llama.cpp and MLX, as far as they are installed, and compare with ours.

    The table has, a row a runtime: the largest difference of a logit, the part of all positions with the same likeliest
    token, the tokens of a greedy continuation that are the same, the texts with the same ids among those that are hard
    to tokenise, and how much the perplexity differs. Exit code 1 if anything is out of tolerance.
    """

    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL|FILE.gguf")]
    """A run or a checkpoint of it, any Hugging Face Gemma 3 text folder, a hub name, or a .gguf file."""
    against: str | None = None
    """The model that a .gguf file was made from, named like a target."""
    python: tuple[str, ...] = ()
    """Pythons of other environments to look for runtimes in, such as .envs/mlx/bin/python."""
    data: str = "tales"
    """Stories to compare on, named as for `gemlet eval`."""
    json: bool = False
    """Print one JSON object a line instead of the table."""

    def __call__(self) -> None:
        """Print a row a runtime."""
        documents = self.documents(held_out=True)
        from rich.console import Console

        from gemlet.verify import table, verify

        reports = []
        with Console(stderr=True).status("comparing ...") as status:
            for report in verify(self.target, documents, self.against, self.python):
                reports.append(report)
                status.update(f"comparing ... {report.runtime} done")
                if self.json:
                    print(json.dumps(dataclasses.asdict(report) | {"passed": report.passed}), flush=True)
        if not self.json:
            Console(width=None if sys.stdout.isatty() else 100).print(table(reports))
            for report in reports:
                if report.problem:
                    print(f"{report.runtime}: {report.problem}")
        if wrong := [report.runtime for report in reports if not report.passed]:
            raise Mismatch(f"{len(wrong)} of {len(reports)} do not compute what gemlet does: {', '.join(wrong)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what gemlet finds here: versions, device, compiler, disk."""

    hub: bool = False
    """Also try to reach the Hugging Face hub."""

    def __call__(self) -> None:
        """Print the findings, one per line."""
        from gemlet.doctor import findings

        for name, found in findings(hub=self.hub):
            print(f"{name:<16}{found}")


# How the stories of the quick start begin: each leads into a plot of its own.
STORIES = ("Once upon a time", "One night", "One afternoon, Lily planned a picnic")

VERBS: dict[str, type] = {
    "quickstart": Quickstart,
    "prepare": Prepare,
    "tokenizer": Tokenizer,
    "plan": Plan,
    "train": Train,
    "eval": Eval,
    "generate": Generate,
    "chat": Chat,
    "export hf": ExportHF,
    "export gguf": ExportGGUF,
    "export web": ExportWeb,
    "export hub": ExportHub,
    "verify": Verify,
    "doctor": Doctor,
}


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
