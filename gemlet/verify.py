"""Whether other programs compute what we compute: a model's folder or GGUF file in every runtime that is installed.

    for report in verify(Path("runs/tales/checkpoints/best")):
        print(report.runtime, report.passed, report.logits)

Each runtime answers in a process of its own (`gemlet.runtimes`): logits, likeliest tokens and a greedy continuation of
a text longer than the window, the ids of texts that are hard to tokenise, and the perplexity of a few stories. Here the
answers are held against ours, which are computed in float32 on the CPU.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table

from gemlet import runtimes
from gemlet.errors import GemletError
from gemlet.export.gguf import export_gguf
from gemlet.folder import read_config
from gemlet.lm import LM, load, model_folder
from gemlet.model import Gemma
from gemlet.ready import decoder
from gemlet.testing import HARD_TEXTS

NEW_TOKENS = 64
"""Length of the greedy continuation."""
STORIES = 20
"""Documents scored, at least."""
SCORED_ROWS = 256
"""Positions at which whole rows of logits are compared; the likeliest token is compared at every position."""
MAX_LOGITS = 2**28
"""Logits of the sequence, all rows, so that a gigabyte holds them; a vocabulary of 262,144 leaves 1,024 tokens."""


@dataclass(frozen=True)
class Tolerance:
    """What a runtime may differ by."""

    logits: float | None
    """Largest difference of a logit; None: any."""
    argmax_equal: bool
    """Whether the likeliest token has to be ours at every position."""
    greedy_equal: bool
    """Whether the greedy continuation has to be ours."""
    perplexity: float
    """Relative difference."""


EXACT = Tolerance(1e-4, True, True, 1e-4)
"""For a runtime that computes in float32 what we compute in float32."""
GGUF_F32 = Tolerance(1e-2, True, True, 5e-3)
"""llama.cpp looks its GELU up in a table of half precision."""
ROUNDED = Tolerance(None, False, False, 5e-3)
"""Sixteen and eight bits a weight. Also mlx-lm (mlx_lm/models/gemma3_text.py), which scales the embedding by sqrt(D)
rounded to bfloat16, unless that is exact, as for D = 64 or 1024."""
FOUR_BITS = Tolerance(None, False, False, 0.1)
"""Four bits a weight cost something; how much depends on the model, and the figure says it."""

# general.file_type of a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)
_GGUF_TYPES = {
    "0": ("F32", GGUF_F32),
    "1": ("F16", ROUNDED),
    "2": ("Q4_0", FOUR_BITS),
    "7": ("Q8_0", ROUNDED),
    "32": ("BF16", ROUNDED),
}


@dataclass(frozen=True)
class Report:
    """How one runtime compares. Without `problem`, all figures are there."""

    runtime: str
    """Its name, version and, for a GGUF file, the type of the weights."""
    problem: str | None = None
    """Why there are no figures: the runtime failed, which is a mismatch, or cannot hold this model, which is none."""
    refused: bool = False
    """Whether the model cannot be written in the form that the runtime reads."""
    logits: float = math.nan
    """Largest difference of a logit."""
    argmax: float = math.nan
    """The part of all positions where the likeliest token is ours."""
    greedy: int = 0
    """How many tokens of the greedy continuation are ours before the first that is not."""
    greedy_of: int = 0
    """Of so many."""
    ids: int = 0
    """How many of the hard texts have our ids."""
    ids_of: int = 0
    """Of so many."""
    perplexity: float = math.nan
    """Relative difference, theirs over ours - 1."""
    failed: tuple[str, ...] = ()
    """The names of the figures above that are out of tolerance."""

    @property
    def passed(self) -> bool:
        """Whether nothing contradicts us."""
        return self.refused or (self.problem is None and not self.failed)


@dataclass(frozen=True)
class _Ours:
    """The questions, and our answers."""

    job: dict[str, Any]
    hidden_size: int
    logits: np.ndarray
    argmax: np.ndarray
    greedy: list[int]
    ids: list[list[int]]
    nats: float
    tokens: int


def verify(
    target: str | Path, documents: Iterable[str], against: str | Path | None = None, pythons: Sequence[str] = ()
) -> Iterator[Report]:
    """Compare `target`, a model as `gemlet.load` takes it or a .gguf file, in every runtime, one report each.

    A GGUF file is held against the model it was made from, `against`. `documents` are the stories of which the
    perplexity is taken. The runtimes are those of this Python and of the `pythons`, paths of others. Raises GemletError
    if there is none that could read the target.
    """
    file = Path(target) if str(target).endswith(".gguf") else None
    if file is not None and not file.is_file():
        raise GemletError(f"no file {file}; give a GGUF file, or a folder, a run or a hub name")
    if file is not None and against is None:
        raise GemletError(f"{file} says nothing of the model it was made from: name that with --against")
    found = list(_runtimes(pythons, {"llama-cpp-python"} if file else set(runtimes.RUNTIMES)))
    if not found:
        names = "llama-cpp-python" if file else ", ".join(runtimes.RUNTIMES)
        raise GemletError(
            f"nothing to compare with: none of {names} is installed here; install one, or name the Python of an "
            "environment that has one with --python"
        )
    folder = model_folder(target if against is None else against)
    ours = _our_answers(load(folder, device="cpu", dtype="fp32"), documents)
    with tempfile.TemporaryDirectory(prefix="gemlet-verify-") as temporary:
        for number, (python, name, version) in enumerate(found):
            place = Path(temporary, str(number))
            place.mkdir()
            try:
                model = file or _readable(name, folder, Path(temporary))
            except GemletError as refusal:
                yield Report(f"{name} {version}", str(refusal), refused=True)
                continue
            answers = _ask(python, name, model, ours.job, place)
            if isinstance(answers, str):
                yield Report(f"{name} {version}", answers)
            else:
                type, tolerance = _expected(name, ours.hidden_size, answers["facts"])
                yield _compare(
                    f"{name} {version} {type}".rstrip(), ours, answers, np.load(place / "logits.npy"), tolerance
                )


def table(reports: Sequence[Report]) -> Table:
    """The reports for a terminal of 80 columns; what is out of tolerance is marked."""
    shown = Table("runtime", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for head in ("logits", "argmax", "greedy", "ids", "ppl"):
        shown.add_column(head, justify="right")
    shown.add_column("")
    for report in reports:
        verdict = "n/a" if report.refused else "pass" if report.passed else "FAIL"
        figures = {
            "logits": f"{report.logits:.1e}",
            "argmax": f"{report.argmax:.1%}",
            "greedy": f"{report.greedy}/{report.greedy_of}",
            "ids": f"{report.ids}/{report.ids_of}",
            "perplexity": f"{report.perplexity:+.3%}",
        }
        marked = [f"{text} !" if name in report.failed else text for name, text in figures.items()]
        shown.add_row(report.runtime, *([""] * len(marked) if report.problem else marked), verdict)
    return shown


def _runtimes(pythons: Sequence[str], wanted: set[str]) -> Iterator[tuple[str, str, str]]:
    """(python, runtime, version) of what is installed, each version once."""
    seen = set()
    for python in (sys.executable, *pythons):
        try:
            probe = subprocess.run([python, runtimes.__file__], capture_output=True, text=True)
            versions = json.loads(probe.stdout)
        except (OSError, ValueError):
            raise GemletError(
                f"{python} is not a Python that has numpy, which a runtime needs; give its path"
            ) from None
        for name, version in versions.items():
            if name in wanted and (name, version) not in seen:
                seen.add((name, version))
                yield python, name, version


def _readable(runtime: str, folder: Path, place: Path) -> Path:
    """The model in the form that a runtime reads; a GemletError if there is none that it would compute exactly."""
    if runtime == "mlx-lm" and "sliding_window_pattern" not in read_config(folder).to_hf():
        raise GemletError("mlx-lm knows layer types only by a rule, every n-th layer full; this model follows none")
    file = place / "model-f32.gguf"
    if runtime != "llama-cpp-python" or file.is_file():
        return folder if runtime != "llama-cpp-python" else file
    return export_gguf(folder, file, "f32")


def _our_answers(lm: LM, documents: Iterable[str]) -> _Ours:
    config, tokenizer = lm.config, lm.tokenizer
    begin, end = tokenizer.prompt_ids(""), tokenizer.eos_token_id
    length = min(config.max_position_embeddings, 2 * config.sliding_window + 64, MAX_LOGITS // config.vocab_size)
    stories, sequence = [], begin
    for text in documents:
        stories.append([*begin, *tokenizer.encode(text), end])
        sequence = [*sequence, *stories[-1][len(begin) :]]
        if len(stories) >= STORIES and len(sequence) >= length:
            break
    if len(sequence) < length:
        raise GemletError(
            f"the documents have {len(sequence)} tokens, but {length} are compared, to pass the window; give more"
        )
    sequence = sequence[:length]
    rows = np.unique(np.linspace(0, length - 1, SCORED_ROWS).astype(int)).tolist()
    prompt = sequence[: min(config.sliding_window + 8, length // 2)]
    new_tokens = min(NEW_TOKENS, config.max_position_embeddings - len(prompt))
    logits = lm.logits(sequence)[0].numpy()
    # llama.cpp takes a token of this name for an end token, whatever the file says; Gemma has it as an ordinary one
    ordinary = "</s>" in tokenizer.spec["model"]["vocab"] and tokenizer.eos_token != "</s>"
    texts = [text for text in HARD_TEXTS if not (ordinary and "</s>" in text)]
    job = {
        "sequence": sequence,
        "rows": rows,
        "documents": [story[: length + 1] for story in stories],
        "prompt": prompt,
        "new_tokens": new_tokens,
        "texts": texts,
    }
    return _Ours(
        job,
        config.hidden_size,
        logits[rows],
        logits.argmax(-1),
        _greedy(lm.model, prompt, new_tokens),
        [tokenizer.prompt_ids(text) for text in texts],
        sum(runtimes.nats(lm.logits(ids[:-1])[0].numpy(), ids[1:]) for ids in job["documents"]),
        sum(len(ids) - 1 for ids in job["documents"]),
    )


@torch.inference_mode()
def _greedy(model: Gemma, prompt: list[int], new_tokens: int) -> list[int]:
    """The likeliest continuation; unlike `generate`, it does not stop at an end token."""
    writer = decoder(model, 1, len(prompt) + new_tokens)
    tokens = [int(writer.prefill(0, prompt).argmax())]
    while len(tokens) < new_tokens:
        tokens.append(int(writer.step(tokens[-1:], [0], [len(prompt) + len(tokens) - 1]).argmax()))
    return tokens


def _ask(python: str, runtime: str, model: Path, job: dict[str, Any], place: Path) -> dict[str, Any] | str:
    """A runtime's answers, or the last line that it said before it failed."""
    # beside the job instead of in the package, whose files would pass for modules of the same name
    script = shutil.copy(runtimes.__file__, place)
    (place / "job.json").write_text(json.dumps({**job, "model": str(model.resolve())}), encoding="utf-8")
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([python, script, runtime, str(place)], capture_output=True, text=True, env=offline)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        return f"ended with exit code {done.returncode}: {said[-1].strip():.200}"
    return json.loads((place / "answer.json").read_text(encoding="utf-8"))


def _expected(runtime: str, hidden_size: int, facts: dict[str, Any]) -> tuple[str, Tolerance]:
    """The type of the weights, where the file tells it, and how exact a runtime can be with this model."""
    if runtime == "llama-cpp-python":
        return _GGUF_TYPES[facts["general.file_type"]]
    scale = hidden_size**0.5
    rounds = runtime == "mlx-lm" and float(torch.tensor(scale, dtype=torch.bfloat16)) != scale
    return "", ROUNDED if rounds else EXACT


def _compare(runtime: str, ours: _Ours, theirs: dict[str, Any], logits: np.ndarray, tolerance: Tolerance) -> Report:
    argmax = np.array(theirs["argmax"]) == ours.argmax
    greedy = [a == b for a, b in zip(ours.greedy, theirs["greedy"], strict=True)]
    figures: dict[str, Any] = {
        "logits": float(np.abs(logits - ours.logits).max()),
        "argmax": float(argmax.mean()),
        "greedy": greedy.index(False) if False in greedy else len(greedy),
        "ids": sum(a == b for a, b in zip(ours.ids, theirs["ids"], strict=True)),
        "perplexity": math.expm1((theirs["nats"] - ours.nats) / ours.tokens),
    }
    holds = {
        "logits": tolerance.logits is None or figures["logits"] <= tolerance.logits,
        "argmax": not tolerance.argmax_equal or argmax.all(),
        "greedy": not tolerance.greedy_equal or all(greedy),
        "ids": figures["ids"] == len(ours.ids),
        "perplexity": abs(figures["perplexity"]) <= tolerance.perplexity,
    }
    failed = tuple(name for name, ok in holds.items() if not ok)
    return Report(runtime, **figures, greedy_of=len(greedy), ids_of=len(ours.ids), failed=failed)
