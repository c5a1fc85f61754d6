"""What `gemlet verify` finds and what it says. transformers is the runtime here; `make interop` brings the others."""

import json
import shutil
import sys
from itertools import islice
from pathlib import Path

import pytest

from gemlet import runtimes, verify
from gemlet.checkpoint import load_model, save_model
from gemlet.cli import main
from gemlet.errors import GemletError
from gemlet.tales import stories
from gemlet.testing import HARD_TEXTS
from gemlet.tokenizer import Tokenizer
from tests.test_golden import MODEL

TALES = list(islice(stories(1), 25))
needs_transformers = pytest.mark.skipif(
    "transformers" not in runtimes.installed(), reason="transformers is not installed (the extra `dev`)"
)


def only(reports):
    """The report of transformers."""
    (report,) = [report for report in reports if report.runtime.startswith("transformers")]
    return report


@needs_transformers
def test_the_golden_model_passes():
    report = only(verify.verify(MODEL, TALES))
    assert report.passed and not report.failed and report.problem is None
    assert 0 < report.logits < 1e-4
    assert (report.argmax, report.greedy, report.greedy_of) == (1, 64, 64)
    assert report.ids == report.ids_of == len(HARD_TEXTS)
    assert abs(report.perplexity) < 1e-5


@needs_transformers
def test_a_model_that_differs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The runtime is given other weights and another tokenizer than we have: every figure shows it."""
    other = load_model(MODEL)
    other.state_dict()["model.layers.3.self_attn.q_proj.weight"].mul_(-1)
    save_model(tmp_path / "other", other, Tokenizer.train(TALES, 512))
    monkeypatch.setattr(verify, "_readable", lambda *_: tmp_path / "other")
    report = only(verify.verify(MODEL, TALES))
    assert not report.passed
    assert set(report.failed) == {"logits", "argmax", "greedy", "ids", "perplexity"}


@needs_transformers
def test_a_runtime_that_fails_is_a_mismatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_model(tmp_path / "other", load_model(MODEL), Tokenizer.load(MODEL))
    (tmp_path / "other" / "model.safetensors").write_bytes(b"nothing")
    monkeypatch.setattr(verify, "_readable", lambda *_: tmp_path / "other")
    report = only(verify.verify(MODEL, TALES))
    assert not report.passed
    assert report.problem is not None and report.problem.startswith("ended with exit code 1: ")


@needs_transformers
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    ask, jobs = verify._ask, {}

    def ask_once(python: str, runtime: str, model: Path, job: dict, place: Path):
        """The second call puts the same questions: it is given the answers of the first, which took seconds."""
        kept = tmp_path / runtime
        assert jobs.setdefault(runtime, job) == job
        if kept.exists():
            shutil.copy(kept / "logits.npy", place)
            return json.loads((kept / "answer.json").read_text(encoding="utf-8"))
        answers = ask(python, runtime, model, job, place)
        shutil.copytree(place, kept)
        return answers

    monkeypatch.setattr(verify, "_ask", ask_once)
    monkeypatch.setattr(verify, "STORIES", 2)
    assert main(["verify", str(MODEL), "--json"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "transformers" in line]
    assert json.loads(line)["passed"] is True
    monkeypatch.setattr(verify, "EXACT", verify.Tolerance(1e-9, True, True, 1.0))
    assert main(["verify", str(MODEL)]) == 1
    out, err = capsys.readouterr()
    assert " !" in out and "FAIL" in out
    assert "do not compute what gemlet does: transformers" in err.splitlines()[-1]


def test_each_version_is_asked_once():
    found = list(verify._runtimes([sys.executable], set(runtimes.RUNTIMES)))
    assert len(found) == len(runtimes.installed())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nowhere.gguf"], "no file nowhere.gguf"),
        (["{file}"], "--against"),
        (["nowhere"], "no model folder nowhere"),
        ([str(MODEL), "--python", "/nowhere/python"], "/nowhere/python is not a Python"),
        ([str(MODEL), "--data", "{short}"], "give more"),
    ],
)
def test_bad_input(words: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF")
    short = tmp_path / "short.txt"
    short.write_text("Once.", encoding="utf-8")
    assert main(["verify", *[word.format(file=file, short=short) for word in words]]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert complaint in line


def test_nothing_to_compare_with(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verify, "_runtimes", lambda *_: [])
    with pytest.raises(GemletError, match="nothing to compare with"):
        list(verify.verify(MODEL, TALES))
