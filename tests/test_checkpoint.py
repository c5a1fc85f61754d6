"""Checkpoints: exact, readable by transformers, strict about what they read, and whole whatever happens."""

import errno
import json
import math
import os
import pickle
import random
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import gemlet.tensors
from gemlet.checkpoint import Checkpoints, load_model, run_lock, save_model
from gemlet.errors import GemletError, TrainingError
from gemlet.folder import read_config, verify
from gemlet.model import Gemma
from gemlet.safetensors import read_header
from gemlet.testing import tiny_config, tiny_model, tiny_tokenizer

FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
EMBEDDING = "model.embed_tokens.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


def small(seed: int = 0, **changes: Any) -> Gemma:
    """Smaller than tiny, for tests that save many times."""
    return tiny_model(seed, num_hidden_layers=1, hidden_size=8, intermediate_size=8, head_dim=4, **changes)


def same(a: Gemma, b: Gemma) -> bool:
    return same_tensors(a.state_dict(), b.state_dict())


def same_tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", small(), tiny_tokenizer())
    return tmp_path / "model"


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a folder by the reference library, which writes anything."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors")


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# --- a model's folder


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_to_the_byte(tmp_path: Path, tied: bool):
    model = tiny_model(tie_word_embeddings=tied)
    save_model(tmp_path / "a", model, tiny_tokenizer())
    again = load_model(tmp_path / "a")
    assert same(again, model) and again.config == model.config
    assert all(p.requires_grad for p in again.parameters())
    save_model(tmp_path / "b", again, tiny_tokenizer())
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert sorted(content(tmp_path / "a")) == FILES
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert ("lm_head.weight" in read_header(tmp_path / "a" / "model.safetensors")) is not tied


def test_another_dtype_on_the_way_out_and_in(tmp_path: Path):
    model = small()
    save_model(tmp_path / "a", model, tiny_tokenizer(), torch.bfloat16)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = {name: t.bfloat16() for name, t in model.state_dict().items()}
    assert same_tensors(load_model(tmp_path / "a", dtype=torch.bfloat16).state_dict(), rounded)
    assert same_tensors(load_model(tmp_path / "a").state_dict(), {name: t.float() for name, t in rounded.items()})


def test_large_weights_are_cut_into_shards(tmp_path: Path):
    model = small(tie_word_embeddings=False)
    save_model(tmp_path / "a", model, tiny_tokenizer(), max_shard_bytes=11_000)
    assert same(load_model(tmp_path / "a"), model)
    shards = sorted(p.name for p in (tmp_path / "a").glob("*.safetensors"))
    assert shards == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_a_folder_that_is_in_use_is_not_saved_to(folder: Path):
    before = content(folder)
    with pytest.raises(GemletError, match="not empty"):
        save_model(folder, small(1), tiny_tokenizer())
    assert content(folder) == before


def test_loading_takes_the_memory_of_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing as large as the largest weight is allocated besides the weights themselves."""
    load_model(folder)  # torch.device() collects the functions it applies to once, and should find the real torch.empty
    monkeypatch.setattr(gemlet.tensors, "PIECE", 64)
    model, largest, made = small(), 0, torch.empty

    def watched(*shape: Any, **options: Any) -> Tensor:
        nonlocal largest
        tensor = made(*shape, **options)
        largest = max(largest, 0 if tensor.is_meta else tensor.numel())
        return tensor

    monkeypatch.setattr(torch, "empty", watched)
    assert same(load_model(folder), model)
    assert 0 < largest <= 64


# --- transformers


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "query_pre_attn_scalar": 24}])
def test_transformers_reads_ours(tmp_path: Path, changes: dict[str, Any]):
    transformers = pytest.importorskip("transformers", reason="transformers, the oracle, is not installed")
    model, tokenizer = tiny_model(**changes), tiny_tokenizer()
    save_model(tmp_path / "a", model, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4
    assert theirs.generation_config.eos_token_id == 0 and theirs.generation_config.do_sample
    text = "Once upon a time"
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")(text).input_ids
    assert found == [tokenizer.bos_token_id, *tokenizer.encode(text)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_ours_reads_transformers(tmp_path: Path, dtype: torch.dtype, shard: str, tied: bool):
    transformers = pytest.importorskip("transformers", reason="transformers, the oracle, is not installed")
    config = {k: v for k, v in tiny_config(tie_word_embeddings=tied).to_hf().items() if k != "torch_dtype"}
    theirs = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**config)).eval()
    for name, p in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, std=0.3)
    theirs.to(dtype).save_pretrained(tmp_path / "a", max_shard_size=shard)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert (tmp_path / "a" / "model.safetensors.index.json").exists() is (shard == "40KB")
    model = load_model(tmp_path / "a")
    ids = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4


# --- folders that are not models, or not quite

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1072420424\n"


def nan_row(w: dict[str, Tensor]) -> None:
    w[Q][3, 1] = math.nan


def infinite(w: dict[str, Tensor]) -> None:
    w["model.norm.weight"][0] = -math.inf


CHANGED_TENSORS = {
    "missing": (lambda w: w.pop(Q), rf"{Q} missing"),
    "renamed": (lambda w: w.update({Q.replace("q_proj", "w_q"): w.pop(Q)}), r"q_proj.* missing; .*w_q.* unknown; did "),
    "extra": (lambda w: w.update({"model.extra": torch.ones(2)}), "model.extra unknown"),
    "another layer": (lambda w: w.update({Q.replace(".0.", ".1."): w[Q].clone()}), r"layers\.1\..* unknown"),
    "prefixed": (
        lambda w: [w.update({f"language_model.{name}": w.pop(name)}) for name in list(w)],
        r"and \d+ more missing; language_model.*more unknown",
    ),
    "misshapen": (lambda w: w.update({Q: w[Q][:-1].clone()}), rf"{Q} is \[15, 8\], but config.json makes it \[16, 8\]"),
    "transposed": (lambda w: w.update({EMBEDDING: w[EMBEDDING].T.contiguous()}), r"is \[8, 320\].*\[320, 8\]"),
    "integers": (lambda w: w.update({Q: w[Q].int()}), rf"{Q} is int32, but weights are floating-point"),
    "NaN": (nan_row, rf"{Q} has values that are not finite"),
    "infinity": (infinite, r"model\.norm\.weight has values that are not finite"),
    "another head": (lambda w: w.update({"lm_head.weight": w[EMBEDDING] + 1}), "lm_head.weight differs from the embed"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGED_TENSORS)
def test_weights_that_do_not_fit_are_refused_by_name(folder: Path, case: str):
    change, message = CHANGED_TENSORS[case]
    rewrite(folder, change)
    with pytest.raises(GemletError, match=message) as error:
        load_model(folder)
    assert str(folder) in str(error.value) and len(str(error.value)) < 300 + len(str(folder))


def test_a_head_that_repeats_the_embedding_is_accepted(folder: Path):
    rewrite(folder, lambda w: w.update({"lm_head.weight": w[EMBEDDING].clone()}))
    assert same(load_model(folder), small())


def test_values_too_large_for_the_dtype_are_refused(folder: Path):
    rewrite(folder, lambda w: w[Q].fill_(1e6))
    assert load_model(folder).state_dict()[Q].max() == 1e6
    with pytest.raises(GemletError, match="not finite in float16"):
        load_model(folder, dtype=torch.float16)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"no config\.json; it holds .* and 2 more"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no model\.safetensors; it holds config\.json"),
    "empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "it holds nothing"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "config binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "config deep": (lambda f: (f / "config.json").write_text("[" * 100_000), "is not JSON"),
    "git-lfs": (lambda f: (f / "model.safetensors").write_bytes(LFS), "git-lfs pointer"),
    "cut": (lambda f: os.truncate(f / "model.safetensors", 5_000), "cut short"),
    "weights a folder": (
        lambda f: [(f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()], "not a whole model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_folders_are_refused_in_one_line(folder: Path, case: str):
    damage, message = DAMAGES[case]
    damage(folder)
    with pytest.raises(GemletError, match=message) as error:
        load_model(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 + len(str(folder))


def test_what_is_no_folder(folder: Path, tmp_path: Path):
    with pytest.raises(GemletError, match="does not exist; give a folder that holds"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(GemletError, match="is a file; give a folder"):
        read_config(folder / "model.safetensors")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(GemletError, match=r"is a run; its best model is .*run.checkpoints.best"):
        load_model(tmp_path / "run")


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.ckpt"])
def test_a_pickle_is_refused_and_not_run(folder: Path, tmp_path: Path, name: str):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    for path in (folder, folder / name):
        with pytest.raises(GemletError, match=rf"{re.escape(name)} is a pickle.*save_pretrained"):
            load_model(path)
    assert not (tmp_path / "ran").exists()


INDICES: dict[str, tuple[Any, str]] = {
    "outside": ("../secret.safetensors", r"names '\.\./secret\.safetensors'"),
    "absolute": ("/elsewhere/secret.safetensors", "names '/elsewhere"),
    "backslashes": ("..\\secret.safetensors", "names '"),
    "a drive": ("C:secret.safetensors", "names 'C:"),
    "a subfolder": ("train_state/optimizer.safetensors", "names 'train_state"),
    "hidden": (".secret.safetensors", "names '.secret"),
    "a pickle": ("pytorch_model.bin", "names 'pytorch_model.bin'"),
    "a number": (3, "names '3'"),
    "not there": ("model-00001-of-00001.safetensors", "no model-00001-of-00001"),
}


@pytest.mark.parametrize("case", INDICES)
def test_an_index_leads_nowhere_else(folder: Path, case: str):
    name, message = INDICES[case]
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {EMBEDDING: name}}))
    with pytest.raises(GemletError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "has no weight_map"),
        ({"weight_map": []}, "has no weight_map"),
        ({"weight_map": {EMBEDDING: "a.safetensors"}}, r"a\.safetensors holds .* but .*json has it in None"),
        ({"weight_map": dict.fromkeys([*small().state_dict(), "x"], "a.safetensors")}, "lists x, but the files do not"),
    ],
)  # fmt: skip
def test_an_index_agrees_with_the_files(folder: Path, index: Any, message: str):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(GemletError, match=message):
        load_model(folder)


ABSURD: list[dict[str, Any]] = [
    {"num_hidden_layers": 10**9}, {"num_hidden_layers": 1024, "layer_types": None}, {"num_hidden_layers": 0},
    {"num_hidden_layers": "1"}, {"vocab_size": 10**12}, {"vocab_size": 2**24}, {"hidden_size": 2**16},
    {"intermediate_size": 2**20}, {"hidden_size": -8}, {"hidden_size": 8.5}, {"num_attention_heads": 0},
    {"num_attention_heads": 1}, {"num_key_value_heads": 3}, {"head_dim": 5}, {"head_dim": 4096},
    {"tie_word_embeddings": False}, {"tie_word_embeddings": "yes"}, {"model_type": "llama"}, {"model_type": "gemma3"},
    {"hidden_activation": "silu"}, {"rope_scaling": {"rope_type": "yarn", "factor": 8}}, {"auto_map": {"a": "b.c"}},
    {"layer_types": ["sliding_attention", "chunked"]}, {"layer_types": "full_attention"}, {"sliding_window": 0},
    {"rms_norm_eps": -1.0}, {"rope_theta": float("nan")}, {"rope_theta": 0.0, "rope_parameters": None},
    {"rope_parameters": [1]}, {"eos_token_id": 10**6}, {"final_logit_softcapping": 30.0},
    {"sliding_window_pattern": 10**9, "layer_types": None, "num_hidden_layers": 10**9},
]  # fmt: skip


@pytest.mark.parametrize("changes", ABSURD, ids=str)
def test_absurd_configurations_are_refused_before_memory_is_taken(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
):
    edit(folder / "config.json", **changes)
    monkeypatch.setattr(Gemma, "to_empty", None)
    with pytest.raises(GemletError):
        load_model(folder)


# --- a run's checkpoints


def state(step: int) -> dict[str, Tensor]:
    return {"a.exp_avg": torch.full((3, 4), float(step)), "a.step": torch.tensor(float(step)), "rng": torch.arange(9)}


def save(checkpoints: Checkpoints, step: int, best: bool = False) -> Path:
    return checkpoints.save(step, small(step), tiny_tokenizer(), state(step), {"step": step, "loss": 0.1 + 0.2}, best)


def check(checkpoints: Checkpoints, path: Path | None) -> int:
    """Load a checkpoint; its step, if all of it is of one step."""
    assert path is not None
    model = small(99)
    found, meta = checkpoints.load(path, model)
    step = meta["step"]
    assert meta == {"step": step, "loss": 0.1 + 0.2} and same_tensors(found, state(step))
    assert same(model, small(step)) and same(load_model(path), model)
    return step


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=2)
    assert checkpoints.latest() is None
    for step in range(1, 6):
        assert save(checkpoints, step, best=step == 2).name == f"step-0000000{step}"
    root = checkpoints.root
    assert names(root) == ["best", "last", "step-00000002", "step-00000004", "step-00000005"]
    assert check(checkpoints, root / "best") == 2 and check(checkpoints, root / "last") == 5
    assert os.readlink(root / "best") == "step-00000002"
    moved = root.parent.rename(tmp_path / "moved") / "checkpoints"
    assert check(Checkpoints(moved, 1), moved / "best") == 2
    save(Checkpoints(moved, 1), 6, best=True)
    assert names(moved) == ["best", "last", "step-00000006"]


def test_steps_are_ordered_as_numbers(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 99_999_999)
    save(checkpoints, 100_000_000)
    assert names(tmp_path) == ["last", "step-100000000"]
    assert check(checkpoints, checkpoints.latest()) == 100_000_000


def test_a_checkpoint_is_a_model_folder_that_its_owner_may_add_to(tmp_path: Path):
    path = save(Checkpoints(tmp_path, 1), 1)
    assert sorted(content(path)) == sorted(
        [*FILES, "train_state/manifest.json", "train_state/optimizer.safetensors", "train_state/state.json"]
    )
    (path / "README.md").write_text("mine")
    verify(path)


def test_the_same_step_again_replaces_it(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 3, best=True)
    checkpoints.save(3, small(7), tiny_tokenizer(), {}, {"again": True}, best=False)
    assert names(tmp_path) == ["best", "last", "step-00000003"]
    assert same(load_model(tmp_path / "best"), small(7))
    assert checkpoints.load(tmp_path / "last") == ({}, {"again": True})


def test_where_links_are_not_permitted_there_are_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "a required privilege is not held by the client")

    checkpoints = Checkpoints(tmp_path, keep=1)
    with monkeypatch.context() as without_links:
        without_links.setattr(os, "symlink", refuse)
        for step in range(1, 4):
            save(checkpoints, step, best=step == 1)
        assert check(checkpoints, tmp_path / "best") == 1 and check(checkpoints, tmp_path / "last") == 3
        assert names(tmp_path) == ["best", "last", "step-00000003"]
    save(checkpoints, 4, best=True)  # the disk has moved to a system that has links
    assert check(checkpoints, tmp_path / "best") == 4 and (tmp_path / "best").is_symlink()


def test_stale_folders_of_a_dead_writer_go_at_the_next_save(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    (tmp_path / ".tmp-step-00000002" / "train_state").mkdir(parents=True)
    (tmp_path / ".old-step-00000001").mkdir()
    (tmp_path / ".tmp-last").symlink_to("step-00000002")
    save(checkpoints, 3)
    assert names(tmp_path) == ["last", "step-00000003"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)
    model = small()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(TrainingError, match=r"model\.norm\.weight has values that are not finite"):
        checkpoints.save(2, model, tiny_tokenizer(), {}, {}, best=False)
    assert names(tmp_path) == ["last", "step-00000001"] and check(checkpoints, checkpoints.latest()) == 1


def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 1)
    path = save(checkpoints, 2)
    rng = random.Random(0)
    for name, data in content(path).items():
        for _ in range(8):
            at = rng.randrange(len(data))
            flipped = bytearray(data)
            flipped[at] ^= 1 << rng.randrange(8)
            for damaged in (bytes(flipped), data[:at]):
                (path / name).write_bytes(damaged)
                told: list[str] = []
                assert checkpoints.latest(told.append) == tmp_path / "step-00000001"
                assert len(told) == 1 and "step-00000002" in told[0] and "checkpoint before it" in told[0]
        (path / name).unlink()
        assert checkpoints.latest(lambda _: None) == tmp_path / "step-00000001"
        (path / name).write_bytes(data)
    assert checkpoints.latest(pytest.fail) == path


def test_a_damaged_checkpoint_is_not_loaded_by_name_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkpoints = Checkpoints(tmp_path, keep=1)
    path = save(checkpoints, 1)
    for name, load in (
        ("model.safetensors", lambda: load_model(path)),
        ("train_state/state.json", lambda: checkpoints.load(path)),
        ("train_state/optimizer.safetensors", lambda: checkpoints.load(path)),
    ):
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[:-3] + b"0" + data[-2:])
        with pytest.raises(GemletError, match=f"is damaged: {name} is not what was saved"):
            load()
        with pytest.raises(GemletError, match=r"no checkpoint is whole \(step-00000001\)"):
            checkpoints.latest()
        assert name in capsys.readouterr().err
        (path / name).write_bytes(data)


# --- a disk that is full, a process that is killed

MOVES = ("rename", "replace", "symlink")
"""How a save changes what is under its final name; between any two of these it may end."""


class Interrupted:
    """Lets `os` do `left` of the calls and then does something else instead."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, left: int, instead: Callable[[], Any], calls: tuple[str, ...] = MOVES
    ):
        self.left, self.instead = left, instead
        for name in calls:
            monkeypatch.setattr(os, name, self.watched(getattr(os, name)))

    def watched(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                self.instead()
            return real(*args, **kwargs)

        return call


def test_a_disk_that_is_full_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    failures = 0
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1, best=True)
    before = content(tmp_path / "step-00000001")
    for left in range(100):
        with monkeypatch.context() as context:
            Interrupted(context, left, full, ("fsync", *MOVES))
            try:
                save(checkpoints, 2)
                break
            except GemletError as error:
                assert re.search(r"cannot write .*: No space left.*\(1\.1 MB needed, .* free\)", str(error))
                assert ".tmp-" not in str(error)
        failures += 1
        assert content(tmp_path / "step-00000001") == before
        assert [n for n in names(tmp_path) if n.startswith(".")] == []
        assert check(checkpoints, checkpoints.latest(pytest.fail)) in (1, 2)
    assert failures > 10 and check(checkpoints, tmp_path / "last") == 2


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_a_file_that_may_not_grow(tmp_path: Path):
    import resource

    checkpoints = Checkpoints(tmp_path, keep=1)
    size = (save(checkpoints, 1) / "model.safetensors").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 7, 100, size // 2, size - 1):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(GemletError, match="File too large"):
                save(checkpoints, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert names(tmp_path) == ["last", "step-00000001"]
        assert check(checkpoints, checkpoints.latest()) == 1


KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    import pytest, torch
    torch.set_num_threads(1)
    sys.path.insert(0, {tests!r})
    from test_checkpoint import Interrupted, check, save, small, tiny_tokenizer
    from gemlet.checkpoint import Checkpoints
    from gemlet.folder import verify

    checkpoints = Checkpoints({root!r}, keep=1)
    tiny_tokenizer()
    save(checkpoints, 1, best=True)

    def child(work):
        pid = os.fork()
        if pid == 0:
            try:
                work()
            finally:
                os._exit(0)
        return pid

    def saves(left, step):
        Interrupted(pytest.MonkeyPatch(), left, lambda: os.kill(os.getpid(), signal.SIGKILL))
        save(checkpoints, step, best=step % 2 == 0)

    def wait(pid):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    kills = 0
    for step in (2, 2):  # a new step, then the same one again
        left, killed = 0, True
        while killed:
            killed = wait(child(lambda: saves(left, step)))
            kills, left = kills + killed, left + 1
            at = check(checkpoints, checkpoints.latest(pytest.fail))
            assert at in (step - 1, step), (left, at)
            verify(checkpoints.root / "best")
    print("at every move:", kills)

    step, rng = 2, random.Random(0)
    for _ in range(15):
        def loop():
            for n in range(step, step + 1000):
                save(checkpoints, n, best=n % 3 == 0)
        pid = child(loop)
        time.sleep(rng.uniform(0.01, 0.12))
        os.kill(pid, signal.SIGKILL)
        wait(pid)
        found = check(checkpoints, checkpoints.latest(pytest.fail))
        assert found >= step - 1, (found, step)
        step = found
    print("at random:", step)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork, no SIGKILL")
def test_killed_at_every_move_and_at_random_instants(tmp_path: Path):
    script = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent), root=str(tmp_path / "checkpoints"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kills = re.findall(r"\d+", done.stdout)
    assert int(kills[0]) > 15 and "at random" in done.stdout


# --- one run in a folder


def test_a_run_is_alone_in_its_folder(tmp_path: Path):
    out = tmp_path / "new" / "run"
    with run_lock(out):
        with pytest.raises(GemletError, match=rf"is in use by process {os.getpid()} on .*another --out"), run_lock(out):
            pass
        told: list[str] = []

        def elsewhere() -> None:
            try:
                with run_lock(out):
                    pass
            except GemletError as error:
                told.append(str(error))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert len(told) == 1
    with run_lock(out):
        pass
    with pytest.raises(KeyError), run_lock(out):
        raise KeyError
    with run_lock(out):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_the_lock_of_a_dead_process_is_no_lock(tmp_path: Path):
    script = (
        "import sys, time; from gemlet.checkpoint import run_lock\n"
        f"with run_lock({str(tmp_path)!r}): print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        with pytest.raises(GemletError, match=f"is in use by process {process.pid} on "), run_lock(tmp_path):
            pass
        process.kill()
        process.wait()
    assert str(process.pid) in (tmp_path / ".lock").read_text()
    with run_lock(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()


def test_a_place_that_cannot_hold_a_run(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(GemletError, match=r"cannot write .*file.\.lock: "), run_lock(tmp_path / "file"):
        pass
