"""GGUF: the file that llama.cpp and its kin run, written here from a Hugging Face folder.

A file (github.com/ggml-org/ggml, docs/gguf.md) is a header, metadata, the tensors' names, shapes and places, then their
values, each tensor at a multiple of 32 bytes; all little-endian. The names, and what llama.cpp computes from them, are
in its src/models/gemma3.cpp; a model of which it would compute something else is refused.

Weights are read, converted and written in pieces, so memory does not grow with the model.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from gemlet.config import SLIDING, ModelConfig, layer_pattern
from gemlet.errors import GemletError
from gemlet.export.vocabulary import Value, tokenizer_metadata
from gemlet.files import whole_file, write_text, writing
from gemlet.folder import bad_head, stored_weights
from gemlet.lm import model_folder
from gemlet.safetensors import Stored
from gemlet.tensors import is_finite, pieces
from gemlet.tokenizer import Tokenizer

ALIGNMENT = 32
"""Bytes; a tensor begins at a multiple of it."""
BLOCK = 32
"""Weights that share a scale in a quantised format."""
MAX_LAYERS = 512
"""llama.cpp has no room for more (LLAMA_MAX_LAYERS)."""

# ---------------------------------------------------------------------------------------------------------------------
# Formats of tensors


class Format(NamedTuple):
    """How a tensor's values are stored: `block` values in `size` bytes."""

    number: int
    """ggml's number of the format."""
    block: int
    size: int
    pack: Callable[[Tensor], Tensor]
    """float32 [n], whole blocks -> what is written, contiguous; OverflowError where a value is too large for it."""


def _cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def pack(values: Tensor) -> Tensor:
        packed = values.to(dtype)
        if not is_finite(packed):
            raise OverflowError
        return packed

    return pack


def quantize_q8_0(values: Tensor) -> Tensor:
    """[n] -> uint8 [n/32, 34]: a scale in half precision, the largest magnitude / 127, then 32 signed steps of it."""
    blocks = values.view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * _inverse(scale)
    magnitude = scaled.abs().floor() + (scaled.abs().frac() >= 0.5)  # halves away from zero
    return torch.cat([_bytes(_cast(torch.float16)(scale)), _bytes((magnitude * scaled.sign()).to(torch.int8))], 1)


def quantize_q4_0(values: Tensor) -> Tensor:
    """[n] -> uint8 [n/32, 18]: a scale in half precision, the value of largest magnitude / -8, then 16 bytes.

    Byte i holds value i in its low half and value i + 16 in its high half, in steps of the scale, plus 8.
    """
    blocks = values.view(-1, BLOCK)
    scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -8
    steps = (blocks * _inverse(scale) + 8.5).to(torch.uint8).clamp(max=15)
    low, high = steps.chunk(2, 1)
    return torch.cat([_bytes(_cast(torch.float16)(scale)), low | high << 4], 1)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0, 1 / scale)


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


F32 = Format(0, 1, 4, _cast(torch.float32))
F16 = Format(1, 1, 2, _cast(torch.float16))
BF16 = Format(30, 1, 2, _cast(torch.bfloat16))
Q8_0 = Format(8, BLOCK, 34, quantize_q8_0)
Q4_0 = Format(2, BLOCK, 18, quantize_q4_0)

DTYPES = {"f32": (F32, 0), "f16": (F16, 1), "bf16": (BF16, 32), "q8_0": (Q8_0, 7), "q4_0": (Q4_0, 2)}
"""What a model can be exported in, with llama.cpp's number of such a file (general.file_type)."""

# ---------------------------------------------------------------------------------------------------------------------
# The model

TENSORS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK_TENSORS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
}
"""Hugging Face's names and GGUF's; those of a block follow `model.layers.I.` and `blk.I.`."""


def export_gguf(
    source: str | Path, out: str | Path, dtype: str, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Write the model of `source` (as for `gemlet.load`) as the GGUF file `out`, with an Ollama Modelfile beside it.

    `dtype` is f32, f16, bf16, q8_0 or q4_0. `progress` is called with the bytes written and those of the whole file.
    The file appears whole or not at all; one that is there already is refused, a Modelfile that is there is kept. The
    same model gives the same bytes. Raises GemletError for what llama.cpp would compute otherwise, and for weights that
    are not finite or too large for the dtype.
    """
    out = Path(out)
    if dtype not in DTYPES:
        raise GemletError(f"dtype is {dtype!r}, but must be one of {', '.join(DTYPES)}")
    if out.suffix != ".gguf":
        raise GemletError(f"{out} does not end in .gguf, by which other programs know such a file")
    if out.exists():
        raise GemletError(f"{out} is there already; remove it or give another name")
    folder = model_folder(source)
    config, stored = stored_weights(folder)
    tokenizer = Tokenizer.load(folder)
    metadata = model_metadata(config, out.stem, DTYPES[dtype][1]) | tokenizer_metadata(tokenizer, config)
    tensors = _tensors(config, stored, dtype)
    header = _header(metadata, tensors)
    total = len(header) + sum(_aligned(tensor.size) for tensor in tensors)
    with writing(out, total), whole_file(out) as file:
        file.write(header)
        for tensor in tensors:
            for data in chain(tensor.data(), [bytes(_aligned(tensor.size) - tensor.size)]):
                file.write(data)
                if progress:
                    progress(file.tell(), total)
        assert file.tell() == total, f"{file.tell()} bytes were written, not {total}"
        modelfile = out.with_suffix(".Modelfile")
        if not modelfile.exists():
            write_text(modelfile, ollama_modelfile(out.name, folder, config, tokenizer))
    return out


def model_metadata(config: ModelConfig, name: str, file_type: int) -> dict[str, Value]:
    """The metadata `general.*` and `gemma3.*`; a model that llama.cpp would compute otherwise is refused."""
    layers, sliding = config.num_hidden_layers, [kind == SLIDING for kind in config.layers]
    if layers > MAX_LAYERS:
        raise GemletError(f"num_hidden_layers is {layers}, but llama.cpp has at most {MAX_LAYERS}")
    # llama.cpp takes a model of 62 layers for Gemma 3 27B, which scales its queries by other numbers
    scalar = config.hidden_size // config.num_attention_heads if layers == 62 else config.head_dim
    if config.query_scale != scalar**-0.5:
        raise GemletError(
            f"query_pre_attn_scalar is {config.query_pre_attn_scalar or config.head_dim}, but llama.cpp scales the "
            f"queries of this model by {scalar}**-0.5 whatever a file says; it would compute something else"
        )
    gemma3: dict[str, Value] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": layers,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    if any(sliding):  # a file without a window has full layers only; a pattern is a number, or else a list
        pattern = next((p for p in range(2, layers + 2) if config.layers == layer_pattern(layers, p)), None)
        gemma3 |= {
            "attention.sliding_window": config.sliding_window,
            "attention.sliding_window_pattern": sliding if pattern is None else pattern,
            "rope.freq_base_swa": config.rope_local_base_freq,
        }
    return {
        "general.architecture": "gemma3",
        "general.type": "model",
        "general.name": name,
        "general.file_type": file_type,
        "general.quantization_version": 2,
        **{f"gemma3.{key}": value for key, value in gemma3.items()},
    }


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file to be written."""

    name: str
    stored: Stored
    format: Format

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.stored.shape) // self.format.block * self.format.size

    def data(self) -> Iterator[memoryview]:
        """The values, piece after piece, as they are written."""
        is_norm = self.name.endswith("norm.weight")
        for piece in pieces(self.stored):
            if not is_finite(piece):
                raise GemletError(f"{self.stored.file}: {self.stored.name} has values that are not finite")
            values = piece.float()
            try:
                packed = self.format.pack(values + 1 if is_norm else values)  # llama.cpp's norms multiply by w alone
            except OverflowError:
                raise GemletError(
                    f"{self.stored.file}: {self.stored.name} has values that are too large for this dtype; export the "
                    "model as f32, or as bf16 if they are not beyond its range too"
                ) from None
            yield packed.view(torch.uint8).numpy().data


def _tensors(config: ModelConfig, stored: dict[str, Stored], dtype: str) -> list[_Tensor]:
    """The tensors of the file in its order, which is that of the model, however the folder is cut into files."""
    embedding, norm, head = TENSORS
    names = {embedding: TENSORS[embedding]}
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{theirs}": f"blk.{i}.{ours}" for theirs, ours in BLOCK_TENSORS.items()}
    names[norm] = TENSORS[norm]
    if not config.tie_word_embeddings:
        names[head] = TENSORS[head]
    elif head in stored:
        _check_equal(stored[head], stored[embedding])
    output = embedding if config.tie_word_embeddings else head
    return [
        _Tensor(ours, stored[theirs], _format(stored[theirs], dtype, theirs == output))
        for theirs, ours in names.items()
    ]


def _check_equal(head: Stored, embedding: Stored) -> None:
    """A tied model may come with its output head all the same."""
    for ours, theirs in zip(pieces(head), pieces(embedding), strict=True):
        if not torch.equal(ours.float(), theirs.float()):
            raise bad_head(head)


def _format(stored: Stored, dtype: str, is_output: bool) -> Format:
    """Norms stay in float32; matrices whose rows are no whole blocks in half precision, as llama.cpp's own tool has it.

    q4_0 keeps the output head in q8_0: every error in it is an error of a logit.
    """
    format = Q8_0 if dtype == "q4_0" and is_output else DTYPES[dtype][0]
    if len(stored.shape) == 1:
        return F32
    return F16 if stored.shape[-1] % format.block else format


# ---------------------------------------------------------------------------------------------------------------------
# The container


def _header(metadata: dict[str, Value], tensors: list[_Tensor]) -> bytes:
    """All that stands before the tensors' values."""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    parts += [_string(key) + _value(value) for key, value in metadata.items()]
    at = 0
    for tensor in tensors:
        shape = tensor.stored.shape[::-1]  # ggml names the fastest dimension first
        parts += [_string(tensor.name), struct.pack(f"<I{len(shape)}Q", len(shape), *shape)]
        parts += [struct.pack("<IQ", tensor.format.number, at)]
        at += _aligned(tensor.size)
    header = b"".join(parts)
    return header + bytes(_aligned(len(header)) - len(header))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    """A value of the metadata after the number of its type: bool, uint32, float32, string, or a list of them.

    Whole numbers in a list are signed, as llama.cpp wants the types of tokens.
    """
    if isinstance(value, list):
        number, items = _scalars(value)
        return struct.pack("<IIQ", 9, 5 if number == 4 else number, len(value)) + items
    number, item = _scalars([value])
    return struct.pack("<I", number) + item


def _scalars(values: Sequence[bool | int | float | str]) -> tuple[int, bytes]:
    """GGUF's number of their type, and they."""
    if isinstance(values[0], str):
        return 8, b"".join(_string(str(value)) for value in values)
    number, letter = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(values[0])]
    return number, struct.pack(f"<{len(values)}{letter}", *values)


# ---------------------------------------------------------------------------------------------------------------------
# Ollama


def ollama_modelfile(file: str, folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> str:
    """What `ollama create NAME -f` reads (docs/modelfile.md there): the file, the prompt's form, how to sample."""
    path = folder / "generation_config.json"
    sampling = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    parameters = {
        "temperature": sampling.get("temperature", 1.0) if sampling.get("do_sample", False) else 0,
        "top_k": sampling.get("top_k", 0),
        "top_p": sampling.get("top_p", 1.0),
        "min_p": sampling.get("min_p", 0.0),
        "repeat_penalty": sampling.get("repetition_penalty", 1.0),
        "num_ctx": config.max_position_embeddings,
        "stop": json.dumps(tokenizer.eos_token),
    }
    lines = [f"FROM ./{file}"]
    if config.layers != layer_pattern(config.num_hidden_layers, 6) or config.rope_local_base_freq != 10_000:
        lines = [
            "# Ollama's own engine for Gemma 3 takes every sixth layer to be full and the local RoPE base to be 10000",
            "# (read in its source, not run). Not so in this model: llama.cpp computes it right, that engine does not.",
            *lines,
        ]
    if tokenizer.chat_template is None:  # with one, Ollama looks for its own form of it
        lines.append("TEMPLATE {{ .Prompt }}")
    lines += [f"PARAMETER {key} {value}" for key, value in parameters.items()]
    return "\n".join(lines) + "\n"
