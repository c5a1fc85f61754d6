"""Checkpoints: a checkpoint IS a Hugging Face folder, with what a resumed run needs beside it in `train_state/`.

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json  generation_config.json
    train_state/{optimizer.safetensors, state.json, manifest.json}

`save_model` and `load_model` are the folder, ours or any that transformers wrote for a Gemma 3 text model.
`Checkpoints` is a run's row of such folders, each made in one move and checked by checksums. There is no pickle.
"""

import hashlib
import json
import math
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

from gemlet.config import ModelConfig
from gemlet.errors import GemletError, did_you_mean
from gemlet.files import new_folder, recover, remove, whole_folder, writing
from gemlet.model import Gemma
from gemlet.tensors import Stored, is_finite, map_tensors, read_header, read_tensors, write_tensors
from gemlet.tokenizer import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MANIFEST, STATE = "train_state/manifest.json", "train_state/state.json"
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


def map_model(folder: str | Path) -> Gemma:
    """`load_model` for reading only: on the CPU, each weight in the dtype it is stored in, mapped and not copied.

    float16 and float64, which nothing here computes with on a CPU, are read as float32.
    """
    config, stored = stored_weights(folder)
    if not {tensor.dtype for tensor in stored.values()} <= {torch.float32, torch.bfloat16}:
        return load_model(folder)
    with torch.device("meta"):
        model = Gemma(config)
    mapped = map_tensors({name: stored[name] for name in model.state_dict()})
    model.load_state_dict(mapped, assign=True)
    _check_values(stored, model)
    return model


def stored_weights(folder: str | Path) -> tuple[ModelConfig, dict[str, Stored]]:
    """The configuration of a Hugging Face folder and its tensors by name, checked but not read.

    Every tensor of the configuration is there by name and shape, in floating point, and nothing else but perhaps the
    head of a tied model, which has to equal the embedding.
    """
    folder = Path(folder)
    config = read_config(folder)
    if (folder / MANIFEST).is_file():
        verify(folder, r"[^/]+\.safetensors")
    stored = _stored(folder)
    held = sum(math.prod(tensor.shape) for tensor in stored.values())
    if config.num_parameters > 10 * held:  # more than a few tensors to name, and perhaps more than a machine can hold
        raise GemletError(f"{folder}: config.json makes {config.num_parameters:,} parameters, the files hold {held:,}")
    with torch.device("meta"):
        _check_weights(folder, stored, Gemma(config))
    return config, stored


def read_config(folder: str | Path) -> ModelConfig:
    """The configuration of a Hugging Face folder; one line says what is wrong with the folder if it has none."""
    folder = Path(folder)
    if folder.suffix in PICKLES and folder.is_file():
        raise pickle_error(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise GemletError(f"{folder} {what}; give a folder that holds config.json and {WEIGHTS}")
    file = folder / "config.json"
    if not file.is_file():
        raise _incomplete(folder, "config.json")
    values = _read_json(file)
    return ModelConfig.from_hf(values, str(file))


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


def _check_weights(folder: Path, stored: dict[str, Stored], model: Gemma) -> None:
    """Check that the tensors of a folder are the model's, by name, kind and shape; none is read."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = model.lm_head is None and "lm_head.weight" in stored
    if tied:  # superfluous, but harmless if it is the embedding: `_read_weights` compares them
        wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
    missing, extra = [name for name in wanted if name not in stored], [name for name in stored if name not in wanted]
    if missing or extra:
        parts = [f"{_some(missing)} missing"] if missing else []
        parts += [f"{_some(extra)} unknown{did_you_mean(extra[0], missing)}"] if extra else []
        raise GemletError(f"{folder}: the weights are not those of config.json: {'; '.join(parts)}")
    for name, tensor in stored.items():
        if not tensor.dtype.is_floating_point:
            raise GemletError(f"{tensor.file}: {name} is {_short(tensor.dtype)}, but weights are floating-point")
        if tensor.shape != wanted[name]:
            raise GemletError(
                f"{tensor.file}: {name} is {list(tensor.shape)}, but config.json makes it {list(wanted[name])}"
            )


def _read_weights(stored: dict[str, Stored], model: Gemma) -> None:
    """Fill the model's weights, which are allocated and whose names and shapes are checked."""
    for name, target in model.state_dict().items():
        stored[name].read_into(target)
    _check_values(stored, model)


def _check_values(stored: dict[str, Stored], model: Gemma) -> None:
    """Refuse weights that are not finite, and a head of a tied model that is not the embedding."""
    for name, target in model.state_dict().items():
        if not is_finite(target):
            narrower = target.dtype == torch.float16 and stored[name].dtype != torch.float16
            raise GemletError(
                f"{stored[name].file}: {name} has values that are not finite in {_short(target.dtype)}"
                + (", which ends at 65,504; take bf16 or fp32" if narrower else "")
            )
    if model.lm_head is None and "lm_head.weight" in stored:
        head = stored["lm_head.weight"]
        if not head.equals(model.model.embed_tokens.weight):
            raise GemletError(
                f"{head.file}: lm_head.weight differs from the embedding, but config.json ties them; "
                "set tie_word_embeddings to false there if the model has its own output head"
            )


def _stored(folder: Path) -> dict[str, Stored]:
    """Everything that the weight files of a folder hold, by name."""
    if (folder / WEIGHTS).is_file():
        return _header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
        raise pickle_error(pickles[0]) if pickles else _incomplete(folder, WEIGHTS)
    index = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise GemletError(f"{folder / INDEX} has no weight_map; copy or download it again")
    stored: dict[str, Stored] = {}
    for name in index.values():
        # a bare name: whatever a folder from elsewhere says, no path outside of it is opened
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise GemletError(f"{folder / INDEX} names {str(name)[:80]!r}, which is no safetensors file beside it")
    for name in sorted(set(index.values())):
        if not (folder / name).is_file():
            raise _incomplete(folder, name)
        header = _header(folder / name)
        for tensor in header:
            if index.get(tensor) != name:
                raise GemletError(f"{folder / name} holds {tensor}, but {INDEX} has it in {index.get(tensor)}")
        stored |= header
    if len(stored) < len(index):
        lost = [tensor for tensor in index if tensor not in stored]
        raise GemletError(f"{folder / INDEX} lists {_some(lost)}, but the files do not hold it; download them again")
    return stored


def _header(path: Path) -> dict[str, Stored]:
    with _reading(path):
        return read_header(path)


PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def pickle_error(what: str | Path) -> GemletError:
    """Weights that only a pickle holds, and how they become others."""
    return GemletError(
        f"{what} is a pickle: reading it can run any code, so gemlet does not. If you trust it, convert it to "
        "safetensors with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
    )


def _incomplete(folder: Path, missing: str) -> GemletError:
    """A folder that is not, or not wholly, a model's."""
    if (folder / "checkpoints").is_dir():
        return GemletError(f"{folder} is a run; its best model is {folder / 'checkpoints' / 'best'}")
    there = sorted(path.name for path in folder.iterdir())
    return GemletError(
        f"{folder} is not a whole model: no {missing}; it holds {_some(there) if there else 'nothing'}. "
        "Copy or save it again, or give another folder"
    )


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
            raise GemletError(f"{self.root}: no checkpoint is whole ({_some([f.name for f in folders])}); start anew")
        return None

    def load(self, path: Path, model: Gemma | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state's tensors, on the CPU, and the meta of a checkpoint; its weights are copied into `model`."""
        if path != self._verified:  # gigabytes are not read twice where `latest` has just done it
            verify(path)
        if model is not None:
            stored = _stored(path)
            _check_weights(path, stored, model)
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
    return _read_json(folder / STATE)


def verify(folder: Path, pattern: str = ".+") -> None:
    """Compare the files of a checkpoint (whose names match) with its manifest; a GemletError says what is damaged.

    Files that the manifest does not list, such as a README that was added, are nobody's business.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise GemletError(f"{folder} is not a whole checkpoint: no {MANIFEST}")
    manifest = _read_json(file)
    files = manifest.get("files")
    if not isinstance(files, dict) or manifest.keys() != {"format", "files"} or manifest["format"] != 1:
        raise GemletError(f"{file} is damaged")
    for name, expected in files.items():
        if not re.fullmatch(pattern, name):
            continue
        if not (folder / name).is_file():
            raise GemletError(f"{folder} is damaged: {name} is missing; copy it again, or use another")
        if _fingerprint(folder / name) != expected:
            raise GemletError(f"{folder} is damaged: {name} is not what was saved; copy it again, or use another")


def _manifest(folder: Path) -> dict[str, Any]:
    """Size and SHA-256 of every file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {"format": 1, "files": {path.relative_to(folder).as_posix(): _fingerprint(path) for path in files}}


def _fingerprint(path: Path) -> dict[str, Any]:
    with _reading(path), open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with _reading(path):
            value = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise GemletError(f"{path} is not JSON ({str(error)[:80]}); copy or download it again") from None
    if not isinstance(value, dict):
        raise GemletError(f"{path} is not a JSON object; copy or download it again")
    return value


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GemletError(f"cannot read {path}: {error.strerror}") from error


def _bytes(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> int:
    return sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in tensors.values())


def _some(names: list[str]) -> str:
    """The first two of them, and how many more."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
