"""Checkpoints: a checkpoint IS a Hugging Face folder, with what a resumed run needs beside it in `train_state/`.

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json  generation_config.json
    train_state/{optimizer.safetensors, state.json, manifest.json}

`save_model` and `load_model` are the folder, ours or any that transformers wrote for a Gemma 3 text model.
`Checkpoints` is a run's row of such folders, each made in one move and checked by checksums. There is no pickle.
"""

import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemlet.errors import GemletError
from gemlet.files import new_folder, recover, remove, whole_folder, writing
from gemlet.folder import (
    HEAD,
    INDEX,
    MANIFEST,
    WEIGHTS,
    bad_head,
    check_weights,
    fingerprint,
    read_json,
    some,
    stored_in,
    stored_weights,
    verify,
)
from gemlet.model import Gemma
from gemlet.safetensors import Stored
from gemlet.tensors import equals, is_finite, read_into, read_tensors, write_tensors
from gemlet.tokenizer import Tokenizer

STATE = "train_state/state.json"
SHARD_BYTES = 5 * 10**9
"""Weights beyond this are cut into several files, as transformers does."""

# ---------------------------------------------------------------------------------------------------------------------
# A model's folder


def save_model(
    folder: str | Path,
    model: Gemma,
    tokenizer: Tokenizer,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a Hugging Face folder, whole or not at all; its weights in `dtype`, or as they are.

    The folder must be new or empty. Weights that are not finite are a TrainingError.
    """
    folder = Path(folder)
    with new_folder(folder, _bytes(model.state_dict(), dtype)) as new:
        write_model(new, model, tokenizer, dtype, max_shard_bytes)


def load_model(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Gemma:
    """The model of a Hugging Face folder, sharded or not, its weights in `dtype` on `device`.

    Nothing is loaded approximately: every tensor of the configuration must be there by name and shape, in floating
    point and finite, and nothing else. All of this but the finiteness is checked before memory is taken for weights.
    """
    config, stored = stored_weights(folder)
    with torch.device("meta"):
        model = Gemma(config).to(dtype)
    model.to_empty(device=device)
    _read_weights(stored, model)
    return model


def write_model(
    folder: Path, model: Gemma, tokenizer: Tokenizer, dtype: torch.dtype | None, max_shard_bytes: int = SHARD_BYTES
) -> None:
    """Write the files of a Hugging Face folder into a folder that is not yet in its own place."""
    config, tensors = model.config, model.state_dict()
    stored = dtype or model.model.embed_tokens.weight.dtype
    _write_json(folder / "config.json", config.to_hf(str(stored).removeprefix("torch.")))
    ids = {key: config.to_hf()[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    _write_json(folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None} | sampling)
    tokenizer.save(folder, config.max_position_embeddings)

    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and _bytes({**shards[-1], name: tensor}, dtype) > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_tensors(folder / WEIGHTS, tensors, dtype)
        return
    files = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, shard, dtype)
        files.update(dict.fromkeys(shard, file))
    _write_json(folder / INDEX, {"metadata": {"total_size": _bytes(tensors, dtype)}, "weight_map": files})


def _read_weights(stored: dict[str, Stored], model: Gemma) -> None:
    """Fill the model's weights, which are allocated and whose names and shapes are checked."""
    for name, target in model.state_dict().items():
        read_into(stored[name], target)
    _check_values(stored, model)


def _check_values(stored: dict[str, Stored], model: Gemma) -> None:
    """Refuse weights that are not finite, and a head of a tied model that is not the embedding."""
    for name, target in model.state_dict().items():
        if not is_finite(target):
            narrower = target.dtype == torch.float16 and stored[name].dtype != "float16"
            raise GemletError(
                f"{stored[name].file}: {name} has values that are not finite in {_short(target.dtype)}"
                + (", which ends at 65,504; take bf16 or fp32" if narrower else "")
            )
    if model.lm_head is None and HEAD in stored and not equals(stored[HEAD], model.model.embed_tokens.weight):
        raise bad_head(stored[HEAD])


# ---------------------------------------------------------------------------------------------------------------------
# A run's checkpoints


class Checkpoints:
    """The checkpoints of a run: folders `step-00001000` in `root`, and `last` and `best`, which point to two of them.

    Only one process may save to a root; see `run_lock`.
    """

    def __init__(self, root: str | Path, keep: int):
        self.root = Path(root)
        self.keep = keep
        self._verified: Path | None = None

    def save(
        self,
        step: int,
        model: Gemma,
        tokenizer: Tokenizer,
        state: Mapping[str, Tensor],
        meta: Mapping[str, Any],
        best: bool,
    ) -> Path:
        """Save a checkpoint, point `last` (and `best`) to it, and drop all but the `keep` newest and those two.

        `state` are tensors of any dtype, `meta` is anything that JSON holds. A step that is there already is replaced.
        A failure, such as a full disk, leaves nothing half-written and loses no checkpoint that was there.
        """
        folder = self.root / f"step-{step:08d}"
        needed = _bytes(model.state_dict()) + _bytes(state) + 2**20
        self._recover()
        with writing(folder, needed), whole_folder(folder) as new:
            write_model(new, model, tokenizer, None)
            (new / "train_state").mkdir()
            write_tensors(new / "train_state" / "optimizer.safetensors", state)
            _write_json(new / STATE, meta)
            _write_json(new / MANIFEST, _manifest(new))
        with writing(self.root, needed):
            self.point("last", folder)
            if best:
                self.point("best", folder)
            self._rotate()
        return folder

    def latest(self, warn: Callable[[str], None] | None = None) -> Path | None:
        """The newest whole checkpoint, verified; None if the run has saved none.

        A damaged one is passed over, and `warn` (default: a line on stderr) is told what is wrong with it. If there
        are checkpoints but none is whole, that is a GemletError.
        """
        self._recover()
        folders = self._numbered()
        for folder in folders:
            try:
                verify(folder)
                self._verified = folder
                return folder
            except GemletError as error:
                message = f"{error}; going back to the checkpoint before it"
                warn(message) if warn else print(message, file=sys.stderr)
        if folders:
            raise GemletError(f"{self.root}: no checkpoint is whole ({some([f.name for f in folders])}); start anew")
        return None

    def load(self, path: Path, model: Gemma | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state's tensors, on the CPU, and the meta of a checkpoint; its weights are copied into `model`."""
        if path != self._verified:  # gigabytes are not read twice where `latest` has just done it
            verify(path)
        if model is not None:
            stored = stored_in(path)
            check_weights(path, stored, model.config)
            _read_weights(stored, model)
        return read_tensors(path / "train_state" / "optimizer.safetensors"), read_state(path)

    def _numbered(self) -> list[Path]:
        """The numbered folders, newest first."""
        if not self.root.is_dir():
            return []
        return sorted((p for p in self.root.iterdir() if re.fullmatch(r"step-\d{8,}", p.name)), key=_step, reverse=True)

    def _recover(self) -> None:
        """Tidy up after a process that was killed while it saved."""
        for path in list(self.root.glob(".tmp-*")) + list(self.root.glob(".old-*")):
            recover(path.with_name(path.name[5:]))

    def point(self, name: str, folder: Path) -> None:
        """Make `name` lead to the folder, in one move: a relative link, or a copy where there are no links."""
        link, new = self.root / name, self.root / f".tmp-{name}"
        try:
            os.symlink(folder.name, new, target_is_directory=True)
            if link.is_dir() and not link.is_symlink():
                remove(link)  # a copy from a disk without links
            os.replace(new, link)
        except (OSError, NotImplementedError):
            remove(new)
            with whole_folder(link) as copy:
                shutil.copytree(folder, copy, dirs_exist_ok=True)

    def _rotate(self) -> None:
        kept = {os.path.basename(os.path.realpath(self.root / name)) for name in ("last", "best")}
        for folder in self._numbered()[self.keep :]:
            if folder.name not in kept:
                doomed = self.root / f".tmp-{folder.name}"  # in one move, so that no half of it looks like a checkpoint
                os.rename(folder, doomed)
                remove(doomed)


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint says beside its tensors: the `meta` of `Checkpoints.save`."""
    return read_json(folder / STATE)


def _manifest(folder: Path) -> dict[str, Any]:
    """Size and SHA-256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {"format": 1, "files": {path.relative_to(folder).as_posix(): fingerprint(path) for path in files}}


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


# ---------------------------------------------------------------------------------------------------------------------
# One run in a folder


@contextmanager
def run_lock(out: str | Path) -> Iterator[None]:
    """Make sure that no other process trains in `out`, which is created if need be.

    The lock is the operating system's, on the file `.lock`, so it ends with the process however that ends; the file
    only says who holds it. On a file system that knows no locks there is none.
    """
    path = Path(out) / ".lock"
    with writing(path, 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    with file:
        if not _lock(file.fileno()):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise GemletError(f"{out} is in use by {holder}; wait for it or give another --out")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _lock(descriptor: int) -> bool:
    """Take the lock of an open file until it is closed; False if another process, or another opening, has it."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 2**30, os.SEEK_SET)  # far beyond the text, which others could not read otherwise
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system
        return True
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Small things


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _bytes(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> int:
    return sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in tensors.values())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
