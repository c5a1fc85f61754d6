"""benchmarks/gpu.py and tests/gpu, tried without a GPU: each part gives its figures, a failing one stops nothing."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.plain import Plain
from gemlet.loss import linear_cross_entropy
from gemlet.testing import tiny_model

DRY = argparse.Namespace(device="cpu", tiny=True, batch=32, data="tales", valid=None, preset="stories-42m")


@pytest.mark.parametrize(
    "part",
    [
        "throughput, gemlet",
        "throughput, transformers",
        "throughput, gemlet with Muon",
        "long, gemlet",
        "vocabulary, gemlet",
        "decode 2, gemlet",
        "decode 2, transformers",
        "recipe 1 s",
    ],
)
def test_a_part_gives_its_figures(part: str) -> None:
    torch.manual_seed(0)
    found = gpu.parts(DRY)[part]()
    assert found["tokens_per_second"] > 0
    assert found.get("peak_memory_gib", 1) > 0 and found.get("val_loss", 1) > 0
    json.dumps(found, allow_nan=False)


def test_the_real_parts_are_those_of_the_dry_run() -> None:
    real = gpu.parts(argparse.Namespace(**{**vars(DRY), "tiny": False}))
    assert {name.split()[0].strip(",") for name in real} == {"throughput", "long", "vocabulary", "decode", "recipe"}
    assert {"decode 256, gemlet", "recipe 120 s", "throughput, plain compiled"} <= set(real)


def test_the_plain_port_is_gemma() -> None:
    ours = tiny_model()
    theirs = Plain(ours.config)
    theirs.load_state_dict({name.removeprefix("model."): p for name, p in ours.state_dict().items()})
    ids = torch.randint(0, ours.config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    x, y = ids[:, :-1], ids[:, 1:]
    expected = linear_cross_entropy(ours.model(x), ours.head_weight, y) / y.numel()
    assert theirs(x, y).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_failing_part_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out.json"
    only = ["--only", "recipe", "--only", "vocabulary, gemlet", "--data", str(tmp_path / "nothing.txt")]
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--tiny", "--json", str(file), *only])
    assert gpu.main() == 1
    good, bad = json.loads(file.read_text())
    assert good["part"] == "vocabulary, gemlet" and good["tokens_per_second"] > 0
    assert bad["part"] == "recipe 1 s" and "nothing.txt" in bad["error"]
    assert {"commit", "torch", "device", "date"} <= set(bad["on"])


def test_the_tests_of_the_gpu_run_without_one() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "--device", "cpu"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout
