"""Safetensors files against the reference library, and malformed in every way."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gemlet import tensors
from gemlet.errors import GemletError, TrainingError
from gemlet.safetensors import DTYPES, MAX_HEADER, read_header
from gemlet.tensors import equals, is_finite, read_into, read_tensors, write_tensors

EXAMPLES = {
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.empty(0, 4),
    "matrix": torch.arange(12, dtype=torch.float32).view(3, 4),
    "not contiguous": torch.arange(12, dtype=torch.float64).view(3, 4).T,
    "bytes": torch.arange(5, dtype=torch.uint8),
    "half": torch.tensor([1.5, -2.0, 65504.0], dtype=torch.float16),
    "brain": torch.tensor([[3.0e38]], dtype=torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
    'näme "quoted"': torch.ones(1),
}


@pytest.fixture(params=[2, tensors.PIECE])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensors, "PIECE", request.param)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.usefixtures("piece")
def test_both_directions_agree_with_the_reference_library(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, EXAMPLES)
    assert same(safetensors.torch.load_file(path), EXAMPLES)
    assert same(read_tensors(path), EXAMPLES)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    safetensors.torch.save_file({k: v.contiguous() for k, v in EXAMPLES.items()}, path)
    assert same(read_tensors(path), EXAMPLES)


def test_every_dtype_has_the_name_of_the_reference_library(tmp_path: Path):
    every = {name: torch.zeros(3).to(getattr(torch, dtype)) for name, dtype in DTYPES.items()}
    safetensors.torch.save_file(every, tmp_path / "a")
    assert {name: t.dtype for name, t in read_header(tmp_path / "a").items()} == DTYPES


@pytest.mark.usefixtures("piece")
def test_a_dtype_can_be_given_on_both_sides(tmp_path: Path):
    values = torch.randn(5, 3)
    write_tensors(tmp_path / "a", {"x": values}, torch.bfloat16)
    stored = read_header(tmp_path / "a")["x"]
    target = torch.empty(5, 3, dtype=torch.float64)
    read_into(stored, target)
    assert torch.equal(target, values.bfloat16().double())
    assert equals(stored, target)
    target[4, 2] += 1
    assert not equals(stored, target)


def test_no_tensors_at_all(tmp_path: Path):
    write_tensors(tmp_path / "a", {})
    assert read_tensors(tmp_path / "a") == {}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_not_written(tmp_path: Path, value: float):
    bad = torch.zeros(9)
    bad[7] = value
    assert not is_finite(bad) and is_finite(bad[:7])
    with pytest.raises(TrainingError, match=r"^layer\.weight has values that are not finite"):
        write_tensors(tmp_path / "a", {"fine": torch.ones(3), "layer.weight": bad})


def blob(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: Any = 0, end: Any = 16, shape: Any = (2, 2), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


MALFORMED = {
    "empty": (b"", "cut short"),
    "seven bytes": (bytes(7), "cut short"),
    "no header": (blob(b""), "cut short"),
    "header 2^63": (blob({}, length=2**63), "cut short"),
    "header 2^64 - 1": (blob({}, length=2**64 - 1), "cut short"),
    "header longer than the file": (blob({"x": entry()}, length=10_000), "cut short"),
    "header beyond the limit": (blob(b" " * (MAX_HEADER + 1)), "cut short"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
    "not JSON": (blob(b"{x}"), "not JSON"),
    "bad UTF-8": (blob(b'{"\xff": 1}'), "not JSON"),
    "too deep": (blob(b"[" * 100_000), "not JSON"),
    "a huge number": (blob(b'{"x": ' + b"9" * 10_000 + b"}"), "not JSON"),
    "a key twice": (blob(b'{"x": 1, "x": 1}'), "twice"),
    "a list": (blob([]), "not a JSON object"),
    "entry is a number": (blob({"x": 1}), "does not say what x is"),
    "entry without shape": (blob({"x": {"dtype": "F32", "data_offsets": [0, 16]}}), "does not say what x is"),
    "three offsets": (blob({"x": {**entry(), "data_offsets": [0, 8, 16]}}), "does not say what x is"),
    "offsets are text": (blob({"x": entry("0", "16")}), "impossible"),
    "offsets are floats": (blob({"x": entry(0.0, 16.0)}), "impossible"),
    "offsets are NaN": (blob({"x": entry(float("nan"), 16)}), "impossible"),
    "offsets are reversed": (blob({"x": entry(16, 0)}), "impossible"),
    "a negative offset": (blob({"x": entry(-16, 0)}), "impossible"),
    "a negative shape": (blob({"x": entry(shape=[-2, -2])}), "impossible"),
    "a shape of flags": (blob({"x": entry(0, 4, shape=[True])}), "impossible"),
    "a nested shape": (blob({"x": entry(shape=[[2, 2]])}), "impossible"),
    "an overflowing shape": (blob({"x": entry(shape=[2**62, 4])}), "not that many"),
    "a shape too small": (blob({"x": entry(shape=[3])}), "not that many"),
    "unknown dtype": (blob({"x": entry(dtype="F8_E4M3")}), "F8_E4M3"),
    "dtype is a list": (blob({"x": entry(dtype=["F32"])}), "gemlet reads"),
    "overlap": (blob({"x": entry(0, 8, [2]), "y": entry(4, 16, [3])}), "overlap before y"),
    "same place": (blob({"x": entry(), "y": entry()}), "overlap before y"),
    "gap": (blob({"x": entry(0, 4, [1]), "y": entry(8, 16, [2])}), "gap before y"),
    "gap at the start": (blob({"x": entry(4, 16, [3])}), "gap before x"),
    "trailing bytes": (blob({"x": entry()}, bytes(17)), "bytes after its end"),
    "cut by one byte": (blob({"x": entry()}, bytes(15)), "cut short"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(tmp_path: Path, case: str):
    content, message = MALFORMED[case]
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(GemletError, match=message) as error:
        read_tensors(tmp_path / "a.safetensors")
    assert "a.safetensors" in str(error.value) and len(str(error.value)) < 300 + len(str(tmp_path))


def test_cut_anywhere(tmp_path: Path):
    write_tensors(tmp_path / "a", {"x": torch.ones(4), "y": torch.ones(3)})
    whole = (tmp_path / "a").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "b").write_bytes(whole[:size])
        with pytest.raises(GemletError):
            read_tensors(tmp_path / "b")


def test_a_file_that_is_cut_while_it_is_read(tmp_path: Path):
    write_tensors(tmp_path / "a", {"x": torch.ones(4)})
    stored = read_header(tmp_path / "a")["x"]
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-4])
    with pytest.raises(GemletError, match="become shorter"):
        read_into(stored, torch.empty(4))
