"""A model's folder, as Hugging Face lays it out: what it must hold, and its weights where they are, without torch.

Ours or any that transformers wrote for a Gemma 3 text model. Whatever is wrong with one is one line. `StoredModel` is a
model that is only to write: its weights are there at once, and once in memory for all processes.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gemlet.config import ModelConfig
from gemlet.errors import GemletError, did_you_mean
from gemlet.quantise import widened
from gemlet.safetensors import Stored, map_arrays, read_header

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MANIFEST = "train_state/manifest.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PIECE = 2**20
"""Numbers looked at at a time."""


class StoredModel:
    """A model in its folder: every tensor as an array [...] of float32, or of uint16, the bits of a bfloat16.

    These are mapped, not copied; float16 and float64, which nothing here computes with on a CPU, are read as float32.
    What is checked is what `checkpoint.load_model` checks.
    """

    def __init__(self, folder: str | Path):
        self.config, stored = stored_weights(folder)
        self.arrays = map_arrays(stored.values())
        for name, array in self.arrays.items():
            if array.dtype in (np.float16, np.float64):
                with np.errstate(over="ignore"):
                    self.arrays[name] = array.astype(np.float32)
            if not _is_finite(self.arrays[name]):
                dtype = "bfloat16" if array.dtype == np.uint16 else "float32"
                raise GemletError(f"{stored[name].file}: {name} has values that are not finite in {dtype}")
        tied = self.config.tie_word_embeddings and HEAD in stored
        if tied and not _are_equal(self.arrays.pop(HEAD), self.arrays[EMBEDDING]):
            raise bad_head(stored[HEAD])
        head = self.arrays.get(HEAD, self.arrays[EMBEDDING])
        self.format = "bf16" if head.dtype == np.uint16 else "fp32"
        """The one of `quantise.FORMATS` that it has: bf16 where its head has 16 bits."""


def _is_finite(array: np.ndarray) -> bool:
    flat = array.reshape(-1)
    for at in range(0, len(flat), PIECE):
        piece = flat[at : at + PIECE]
        if piece.dtype == np.uint16:  # an exponent of ones
            if ((piece & 0x7FFF) >= 0x7F80).any():
                return False
        elif not np.isfinite(piece).all():
            return False
    return True


def _are_equal(a: np.ndarray, b: np.ndarray) -> bool:
    a, b = a.reshape(-1), b.reshape(-1)
    pieces = (slice(at, at + PIECE) for at in range(0, len(a), PIECE))
    return all(np.array_equal(widened(a[piece]), widened(b[piece])) for piece in pieces)


def stored_weights(folder: str | Path) -> tuple[ModelConfig, dict[str, Stored]]:
    """The configuration of a Hugging Face folder and its tensors by name, checked but not read.

    Every tensor of the configuration is there by name and shape, in floating point, and nothing else but perhaps the
    head of a tied model, which has to equal the embedding.
    """
    folder = Path(folder)
    config = read_config(folder)
    if (folder / MANIFEST).is_file():
        verify(folder, r"[^/]+\.safetensors")
    stored = stored_in(folder)
    held = sum(math.prod(tensor.shape) for tensor in stored.values())
    if config.num_parameters > 10 * held:  # more than a few tensors to name, and perhaps more than a machine can hold
        raise GemletError(f"{folder}: config.json makes {config.num_parameters:,} parameters, the files hold {held:,}")
    check_weights(folder, stored, config)
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
    values = read_json(file)
    return ModelConfig.from_hf(values, str(file))


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a model and their shapes, in the order of its parts."""
    d, inner, h = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * h, config.num_key_value_heads * h
    block = {
        "self_attn.q_proj": (queries, d),
        "self_attn.k_proj": (keys, d),
        "self_attn.v_proj": (keys, d),
        "self_attn.o_proj": (d, queries),
        "self_attn.q_norm": (h,),
        "self_attn.k_norm": (h,),
        "mlp.gate_proj": (inner, d),
        "mlp.up_proj": (inner, d),
        "mlp.down_proj": (d, inner),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
        "pre_feedforward_layernorm": (d,),
        "post_feedforward_layernorm": (d,),
    }
    layers = range(config.num_hidden_layers)
    return {
        EMBEDDING: (config.vocab_size, d),
        **{f"model.layers.{i}.{name}.weight": shape for i in layers for name, shape in block.items()},
        "model.norm.weight": (d,),
        **({} if config.tie_word_embeddings else {HEAD: (config.vocab_size, d)}),
    }


def check_weights(folder: Path, stored: dict[str, Stored], config: ModelConfig) -> None:
    """Check that the tensors of a folder are the model's, by name, kind and shape; none is read."""
    wanted = parameter_shapes(config)
    if config.tie_word_embeddings and HEAD in stored:  # harmless if it is the embedding
        wanted[HEAD] = wanted["model.embed_tokens.weight"]
    missing, extra = [name for name in wanted if name not in stored], [name for name in stored if name not in wanted]
    if missing or extra:
        parts = [f"{some(missing)} missing"] if missing else []
        parts += [f"{some(extra)} unknown{did_you_mean(extra[0], missing)}"] if extra else []
        raise GemletError(f"{folder}: the weights are not those of config.json: {'; '.join(parts)}")
    for name, tensor in stored.items():
        if "float" not in tensor.dtype:
            raise GemletError(f"{tensor.file}: {name} is {tensor.dtype}, but weights are floating-point")
        if tensor.shape != wanted[name]:
            raise GemletError(
                f"{tensor.file}: {name} is {list(tensor.shape)}, but config.json makes it {list(wanted[name])}"
            )


def bad_head(head: Stored) -> GemletError:
    """A tied model with a head that is not the embedding."""
    return GemletError(
        f"{head.file}: lm_head.weight differs from the embedding, but config.json ties them; "
        "set tie_word_embeddings to false there if the model has its own output head"
    )


def stored_in(folder: Path) -> dict[str, Stored]:
    """Everything that the weight files of a folder hold, by name."""
    if (folder / WEIGHTS).is_file():
        return _header(folder / WEIGHTS)
    if not (folder / INDEX).is_file():
        pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
        raise pickle_error(pickles[0]) if pickles else _incomplete(folder, WEIGHTS)
    index = read_json(folder / INDEX).get("weight_map")
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
        raise GemletError(f"{folder / INDEX} lists {some(lost)}, but the files do not hold it; download them again")
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
        f"{folder} is not a whole model: no {missing}; it holds {some(there) if there else 'nothing'}. "
        "Copy or save it again, or give another folder"
    )


def verify(folder: Path, pattern: str = ".+") -> None:
    """Compare the files of a checkpoint (whose names match) with its manifest; a GemletError says what is damaged.

    Files that the manifest does not list, such as a README that was added, are nobody's business.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise GemletError(f"{folder} is not a whole checkpoint: no {MANIFEST}")
    manifest = read_json(file)
    files = manifest.get("files")
    if not isinstance(files, dict) or manifest.keys() != {"format", "files"} or manifest["format"] != 1:
        raise GemletError(f"{file} is damaged")
    for name, expected in files.items():
        if not re.fullmatch(pattern, name):
            continue
        if not (folder / name).is_file():
            raise GemletError(f"{folder} is damaged: {name} is missing; copy it again, or use another")
        if fingerprint(folder / name) != expected:
            raise GemletError(f"{folder} is damaged: {name} is not what was saved; copy it again, or use another")


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with _reading(path), open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or a GemletError that says what is wrong with it."""
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


def some(names: list[str]) -> str:
    """The first two of them, and how many more."""
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
