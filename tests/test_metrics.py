"""Counting against brute force and the published figures; the log and the plot against what may befall them."""

import io
import json
import math
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from gemlet import metrics
from gemlet.config import ModelConfig, preset
from gemlet.errors import GemletError
from gemlet.metrics import RunLog, draw_loss, flops_per_token, peak_flops, peak_memory_gib


@pytest.mark.parametrize(("length", "mflop"), [(512, 852), (1024, 885), (2048, 915), (8192, 1037), (32768, 1492)])
def test_flops_of_the_270m_shape(length: int, mflop: int):
    assert flops_per_token(preset("gemma3-270m-gpt2").model, length) / 1e6 == pytest.approx(mflop, rel=2e-3)


@pytest.mark.parametrize("window", [1, 3, 7, 100])
def test_flops_count_every_visible_pair(window: int):
    config = ModelConfig(
        vocab_size=11, hidden_size=8, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2, head_dim=4,
        sliding_window=window, layer_types=("sliding_attention", "full_attention"),
    )  # fmt: skip
    T = 7
    pairs = sum(q - k < w for w in (window, T) for q in range(T) for k in range(q + 1))
    matrices = config.num_parameters - 8 - 2 * (4 * 8 + 2 * 4)  # without the norms; the tied embedding is the head
    assert flops_per_token(config, T) == pytest.approx(3 * (2 * matrices + pairs * 2 * (2 * 2 * 4) / T))


def test_the_cpus_peak_is_measured_once(monkeypatch: pytest.MonkeyPatch):
    first = peak_flops("cpu", "fp32")
    assert first is not None and first > 1e8
    monkeypatch.setattr(torch, "mm", None)
    assert peak_flops("cpu", "fp32") == first


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A1000", None),
    ],
)
def test_peaks_of_gpus_are_found_by_name(monkeypatch: pytest.MonkeyPatch, name: str, tflops: float | None):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops("cuda:0", "bf16") == (tflops and tflops * 1e12)
    assert peak_flops("cuda:0", "fp32") is None


@pytest.mark.skipif(sys.platform == "win32", reason="not known there")
def test_peak_memory_has_the_right_unit():
    assert 0.05 < peak_memory_gib("cpu") < 64


def records(folder: Path) -> list[dict]:
    return [
        json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_pipe_gets_one_plain_line_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with RunLog(tmp_path, 100, 64) as log:
        log.log(10, {"train/loss": 2.5, "train/lr": 1e-3, "train/mfu": None})
        log.log(10, {"val/loss": 2.0, "val/bpb": 0.7})
        log.log(20, {"train/loss": 2.25, "train/tok_per_sec": 1234.5, "val/loss": 2.1})
        log.note("one\x1b[31mtwo", title="a\rtale")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and not re.search(r"[\x00-\x1f]", "".join(lines))
    assert lines[0].startswith("step 10/100  loss 2.5000  lr 1.00e-03  ") and lines[0].endswith(" left")
    assert "val 2.0000  0.7000 bits per byte  best" in lines[1]
    assert "1,234 tok/s" in lines[2] and "best" not in lines[2]
    assert lines[3:] == ["a tale", "  one [31mtwo"]


def test_records_are_filled_in_and_exact(tmp_path: Path):
    with RunLog(tmp_path, 100, 64, quiet=True) as log:
        log.log(10, {"train/loss": 0.1 + 0.2})
        log.log(20, {"train/loss": 1.0, "train/tokens": 7, "train/tok_per_sec": 3.0})
        log.log(20, {"val/loss": math.nan, "val/ppl": math.inf, "train/mfu": None, "val/bpb": 1.5})
    first, second, third = records(tmp_path)
    assert first["train/tokens"] == 640 and first["train/tok_per_sec"] > 0 and first["train/loss"] == 0.1 + 0.2
    assert second == {"step": 20, "train/loss": 1.0, "train/tokens": 7, "train/tok_per_sec": 3.0}
    assert third == {"step": 20, "val/loss": None, "val/ppl": None, "train/mfu": None, "val/bpb": 1.5}


def test_quiet_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with RunLog(tmp_path, 100, 64, quiet=True) as log:
        log.log(10, {"train/loss": 2.5, "val/loss": 1.0})
        log.note("a tale", title="Once")
    assert capsys.readouterr() == ("", "")


def test_an_output_that_cannot_show_a_character_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    RunLog(tmp_path, 1, 1).note("café")
    assert stdout.buffer.getvalue() == b"caf?\n"  # type: ignore[attr-defined]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.skipif(sys.platform == "win32", reason="control codes as on a Unix terminal")
@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_shows_one_live_area_and_is_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: int):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(KeyboardInterrupt), RunLog(tmp_path, 12_000, 64) as log:
        log.log(10, {"train/loss": 2.5, "train/lr": 1e-3, "train/tok_per_sec": 1e5, "train/mfu": 0.5})
        log.log(10, {"val/loss": 2.4, "val/ppl": 11.02, "val/bpb": 0.8})
        log.note("[bold]one[/bold] " + "word " * 40, title="Once")
        log._live.refresh()  # type: ignore[union-attr]
        raise KeyboardInterrupt
    shown = terminal.getvalue()
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown)
    assert "step     10  loss 2.5000  val 2.4000  ppl 11.02  0.8000 bits per byte  best\n" in plain
    assert "│ [bold]one[/bold] word" in plain
    assert "loss 2.5000   val 2.4000   lr 1.00e-03   100,000 tok/s   MFU 50%" in plain
    assert re.search(r"━ +10/12,000  0%  [\d:]+ left", plain)
    assert all(len(line) <= columns for line in re.split(r"[\r\n]", plain))
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back


def test_resume_drops_later_and_torn_lines_and_keeps_the_rest_to_the_byte(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step": 10,  "train/loss": 1.50}\n{"step": 10, "val/loss": 1.25}\n{"step": 20, "val/loss": null}\n'
    path.write_bytes(kept + b'{"step": 30, "val/loss": 0.5}\n{"step": 2')
    log = RunLog(tmp_path, 100, 64, quiet=True)
    log.resume(20)
    assert path.read_bytes() == kept
    assert (log.step, log.best) == (20, 1.25)
    log.resume(20)
    assert path.read_bytes() == kept
    log.log(30, {"val/loss": 1.0})
    assert records(tmp_path)[-1] == {"step": 30, "val/loss": 1.0} and log.best == 1.0
    log.resume(0)
    assert path.read_bytes() == b"" and log.best == math.inf
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_of_nothing(tmp_path: Path):
    RunLog(tmp_path, 100, 64, quiet=True).resume(0)
    assert not list(tmp_path.iterdir())


def test_a_torn_last_number_is_not_taken_for_whole(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 10}\n{"step": 20}')  # the newline is missing
    RunLog(tmp_path, 100, 64, quiet=True).resume(20)
    assert [r["step"] for r in records(tmp_path)] == [10]


def test_time_left_forgets_the_compilation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    with RunLog(tmp_path, 100, 64, quiet=True) as log:
        assert log.seconds_left is None
        now = 100.0
        log.log(10, {})
        assert log.seconds_left == pytest.approx(900)
        for step in range(20, 60, 10):
            now += 5
            log.log(step, {})
        assert log.seconds_left == pytest.approx(25)
        now += 10
        assert log.seconds_left == pytest.approx(15)
        now += 100
        assert log.seconds_left == 0


def test_a_log_that_cannot_be_written_says_so(tmp_path: Path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(GemletError, match=r"cannot write .*metrics\.jsonl"):
        RunLog(tmp_path, 1, 1, quiet=True).log(1, {})


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (65, "1:05"), (7384, "2:03:04")])
def test_clock(seconds: float, text: str):
    assert metrics._clock(seconds) == text


CURVES = {
    "nothing": [],
    "one point": [{"step": 10, "train/loss": 2.0, "train/lr": 0.0}],
    "nulls": [{"step": 1, "train/loss": None, "val/loss": None}, {"step": 2, "train/loss": 3.0}],
    "no validation": [{"step": i, "train/loss": 5 / i, "train/lr": 1e-3, "train/tokens": 64 * i} for i in range(1, 90)],
    "all": [{"step": i, "train/loss": 5 / i, "train/lr": 1e-3, "val/loss": 6 / i, "val/bpb": 2 / i} for i in (1, 2, 3)],
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.filterwarnings("error")
def test_every_curve_can_be_drawn(tmp_path: Path, curve: str):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in CURVES[curve]) + '{"step": 9')
    draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "a title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_an_average_stays_where_the_values_are():
    values = [float(i) for i in range(200)]
    assert metrics._smooth(values)[:190] == pytest.approx(values[:190])
    assert metrics._smooth([3.0] * 7) == pytest.approx([3.0] * 7)
