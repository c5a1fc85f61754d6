"""A model's folder as it is published: a Hugging Face folder in the precision that is wanted, with a model card.

Both generations of transformers, and what reads their folders, load it as it lies. The state of the training stays
behind.
"""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from gemlet.checkpoint import SHARD_BYTES, load_model, write_model
from gemlet.config import ModelConfig
from gemlet.device import DTYPES
from gemlet.errors import GemletError
from gemlet.export.card import PLOT, find_run, model_card
from gemlet.files import new_folder
from gemlet.folder import stored_weights
from gemlet.lm import model_folder
from gemlet.safetensors import Stored
from gemlet.tensors import dtype_of
from gemlet.tokenizer import HF_CLASS, Tokenizer

KEPT = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
"""Files that are copied as they are: whatever made the folder may have said more in them than gemlet reads."""


def export_hf(
    source: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    license: str | None = None,
    language: str | None = None,
    name: str | None = None,
) -> Path:
    """Write the model of `source` (as for `gemlet.load`) as a Hugging Face folder to `out`, new or empty.

    `dtype` is fp32, bf16 or fp16; unset, the weights stay in the dtype that they are stored in. A weight file is at
    most `max_shard_bytes` long, or holds a single tensor. README.md is a model card, which calls the model `name`
    (unset: as the folder); `license` and `language` are for its front matter. A README.md that the model has already
    is kept. Memory is that of the weights in `dtype`. Raises GemletError where the folder is no whole model or a weight
    is beyond the range of fp16.
    """
    folder, out = model_folder(source), Path(out)
    if dtype is not None and dtype not in DTYPES:
        raise GemletError(f"dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}")
    if max_shard_bytes < 1:
        raise GemletError(f"max_shard_bytes is {max_shard_bytes}, but must be at least 1")
    config, stored = stored_weights(folder)
    target = _stored_dtype(stored) if dtype is None else DTYPES[dtype]
    card = _card(folder, config, name or out.resolve().name, license, language)
    with new_folder(out, config.num_parameters * target.itemsize) as new:
        write_model(new, load_model(folder, dtype=target), Tokenizer.load(folder), None, max_shard_bytes)
        for file in KEPT:
            if (folder / file).is_file():
                shutil.copyfile(folder / file, new / file)
        _for_both_generations(new / "tokenizer_config.json")
        (new / "README.md").write_text(card, encoding="utf-8")
        plot = _plot(folder)
        if plot is not None:
            shutil.copyfile(plot, new / PLOT)
    return out


def _stored_dtype(stored: dict[str, Stored]) -> torch.dtype:
    """The dtype that holds all weights exactly, float32 at most."""
    widest = functools.reduce(torch.promote_types, {dtype_of(tensor) for tensor in stored.values()})
    return widest if widest in DTYPES.values() else torch.float32


def _card(folder: Path, config: ModelConfig, name: str, license: str | None, language: str | None) -> str:
    """The README.md that the folder has, or else a new one."""
    file = folder / "README.md"
    if not file.is_file():
        return model_card(name, config, find_run(folder), license=license, language=language)
    if license is not None or language is not None:
        raise GemletError(f"{file} is there and is kept; write the license and the language at its top, or remove it")
    return file.read_text("utf-8", errors="replace")


def _plot(folder: Path) -> Path | None:
    """The loss plot that belongs to the card."""
    run = find_run(folder)
    plots = [folder / PLOT, *([] if run is None else [run.folder / PLOT])]
    return next((plot for plot in plots if plot.is_file()), None)


def _for_both_generations(file: Path) -> None:
    """Have transformers 4 load a tokenizer that transformers 5 saved under a name of its own, and all `generate`."""
    values: dict[str, Any] = json.loads(file.read_text("utf-8"))
    if values.get("tokenizer_class") in ("TokenizersBackend", HF_CLASS["tokenizer_class"]):
        values = {**HF_CLASS, **values, "tokenizer_class": HF_CLASS["tokenizer_class"]}
        file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
