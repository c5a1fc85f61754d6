"""The runtimes of other environments compute what gemlet computes: `make interop` installs them and runs this.

An environment is a folder .envs/NAME, made from NAME.txt beside this file.
"""

import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from gemlet import runtimes
from gemlet.checkpoint import save_model
from gemlet.export.gguf import export_gguf
from gemlet.lm import load
from gemlet.tales import stories
from gemlet.testing import HARD_TEXTS, tiny_model, tiny_tokenizer
from gemlet.verify import verify
from tests.parity.test_transformers import SHAPES
from tests.test_golden import MODEL, PROMPT, STORY

ENVIRONMENTS = {"transformers-4": "transformers", "llama.cpp": "llama-cpp-python", "mlx": "mlx-lm"}
ROOT = Path(__file__).parents[2]
TALES = list(islice(stories(1), 40))


@pytest.fixture(scope="module", params=ENVIRONMENTS)
def environment(request) -> str:
    if not python(request.param).exists():
        pytest.skip(f".envs/{request.param} is not there: make interop RUNTIMES={request.param} installs it")
    return request.param


def python(environment: str) -> Path:
    return ROOT / ".envs" / environment / "bin" / "python"


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch):
    """`verify` by the runtime of an environment alone: its one report."""

    def ask(target: Path, environment: str, **more):
        monkeypatch.setattr(sys, "executable", str(python(environment)))
        (report,) = verify(target, TALES, **more)
        assert report.runtime.startswith(version(environment))
        return report

    return ask


def version(environment: str) -> str:
    pinned = (Path(__file__).parent / f"{environment}.txt").read_text(encoding="utf-8")
    found = re.search(rf"^{ENVIRONMENTS[environment]}==(.+)$", pinned, re.MULTILINE)
    assert found
    return f"{ENVIRONMENTS[environment]} {found[1]}"


def test_the_golden_story(environment: str, tmp_path: Path):
    """Byte for byte, by the program's own tokenizer, loop and words, with the end token where the story ends."""
    runtime = ENVIRONMENTS[environment]
    lm = load(MODEL)
    model = MODEL if runtime != "llama-cpp-python" else export_gguf(MODEL, tmp_path / "golden.gguf", "f32")
    prompt = lm.tokenizer.prompt_ids(PROMPT)
    length = len(lm.tokenizer.encode(STORY)) + 1 - len(lm.tokenizer.encode(PROMPT))
    job = {"model": str(model), "sequence": prompt, "rows": [0], "documents": [], "prompt": prompt}
    job |= {"new_tokens": length, "texts": [PROMPT]}
    (tmp_path / "job.json").write_text(json.dumps(job), encoding="utf-8")
    (tmp_path / "script.py").write_text(Path(runtimes.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run([python(environment), tmp_path / "script.py", runtime, tmp_path], check=True)
    answer = json.loads((tmp_path / "answer.json").read_text(encoding="utf-8"))
    assert answer["ids"] == [prompt]
    assert answer["greedy"][-1] == lm.tokenizer.eos_token_id
    assert PROMPT + answer["text"] == STORY


def test_the_golden_model(ask, environment: str):
    report = ask(MODEL, environment)
    assert report.passed and not report.refused, report
    assert report.greedy == 64 and report.ids == len(HARD_TEXTS)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(ask, environment: str, shape: str, tmp_path: Path):
    """Random weights, the norms' too; what a runtime cannot hold is told by name."""
    save_model(tmp_path / "tiny", tiny_model(3, **SHAPES[shape]), tiny_tokenizer())
    report = ask(tmp_path / "tiny", environment)
    assert report.passed, report
    assert report.refused == ((environment, shape) in REFUSED), report


REFUSED = {("llama.cpp", "grouped, other query scale"), ("mlx", "no rule, other bases")}


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_gguf(ask, dtype: str, tmp_path: Path):
    if not python("llama.cpp").exists():
        pytest.skip(".envs/llama.cpp is not there: make interop RUNTIMES=llama.cpp installs it")
    report = ask(export_gguf(MODEL, tmp_path / "golden.gguf", dtype), "llama.cpp", against=MODEL)
    assert report.passed, report
    assert report.ids == len(HARD_TEXTS)
