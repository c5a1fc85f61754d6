"""A decoder in numpy and C++: what writes on a CPU. torch is not needed, nor the seconds and the memory it takes."""

import ctypes
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemlet.config import FULL, ModelConfig
from gemlet.decoder import SPARE, Decoder
from gemlet.folder import EMBEDDING, HEAD
from gemlet.host import threads
from gemlet.quantise import FORMATS, matrix_format, narrowed, pack, widened
from gemlet.sampling import sample


def rope_frequencies(head_dim: int, base: float) -> np.ndarray:
    """`model.rope_frequencies` in numpy: radians a position, float32 [head_dim / 2]."""
    return np.float32(base) ** -(np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))


class NativeWeights:
    """The matrices of a model on a CPU as `kernels/decode.cpp` reads them."""

    def __init__(self, kernel: ctypes.CDLL, config: ModelConfig, arrays: Mapping[str, np.ndarray], format: str):
        self.kernel, self.config, self.format = kernel, config, format
        self._kept: list[np.ndarray] = []  # what the pointers point to
        self.layers = [_Layer() for _ in config.layers]
        places: dict[str, Any] = {}
        for name, array in arrays.items():
            places[name] = self._matrix(name, array) if array.ndim == 2 else self._pointer(1 + widened(array))
            *path, part, _ = name.split(".")
            if "layers" in path:
                setattr(self.layers[int(path[2])], part, places[name])
        self.norm, self.embedding = places["model.norm.weight"], places[EMBEDDING]
        self.head = places.get(HEAD, self.embedding)
        bases = (config.rope_local_base_freq, config.rope_theta)
        self.frequencies = self._pointer(np.concatenate([rope_frequencies(config.head_dim, base) for base in bases]))

    def _matrix(self, name: str, weight: np.ndarray) -> "_Matrix":
        packed = pack(weight, matrix_format(name, self.format))
        scales = None if packed.scales is None else self._pointer(packed.scales)
        return _Matrix(self._pointer(packed.values), scales, *weight.shape, FORMATS.index(packed.format))

    def _pointer(self, array: np.ndarray) -> int:
        self._kept.append(array)
        return array.ctypes.data


class NativeDecoder(Decoder):
    """The contract by `kernels/decode.cpp`, on a CPU: every weight is read once a step, however many rows there are.

    Computed in float32 from weights in any of `quantise.FORMATS`. A row's logits do not depend, to the last bit, on
    how the tokens before it were taken in either.
    """

    guesses = 3

    def __init__(self, weights: NativeWeights, slots: int, max_length: int):
        config = self.config = weights.config
        self.slots, self.max_length = slots, max_length
        exact = weights.format == "fp32"
        self.rings = []
        for i in range(config.num_hidden_layers):
            shape = (slots, config.num_key_value_heads, config.places(i, max_length, SPARE), config.head_dim)
            keys, values = (np.zeros(shape, np.float32 if exact else np.uint16) for _ in range(2))
            self.rings.append((keys, values))
        self._weights, self._kernel = weights, weights.kernel
        layers = (_Layer * config.num_hidden_layers)(*weights.layers)
        for i, (layer, (keys, values)) in enumerate(zip(layers, self.rings, strict=True)):
            layer.keys, layer.values, layer.places = keys.ctypes.data, values.ctypes.data, keys.shape[2]
            layer.window = config.window(i) or max_length
            layer.rope = config.layers[i] == FULL
        # what a model in this dtype multiplies its embedding by
        scale = np.array(config.hidden_size**0.5, np.float32)
        scale = widened(narrowed(scale)) if weights.format == "bf16" else scale
        description = _Model(
            weights.embedding, weights.head, weights.norm, weights.frequencies, layers,
            config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
            config.head_dim, config.intermediate_size, not exact,
            float(scale), config.query_scale, config.rms_norm_eps,
        )  # fmt: skip
        self._kernel.decoder_new.restype = ctypes.c_void_p
        self._handle = ctypes.c_void_p(self._kernel.decoder_new(ctypes.byref(description), threads()))
        weakref.finalize(self, self._kernel.decoder_free, self._handle)

    def step(self, tokens, slots, positions, wanted=None) -> np.ndarray:
        """See `Decoder.step`."""
        R = len(tokens)
        wanted = range(R) if wanted is None else wanted
        logits = np.empty((len(wanted), self.config.vocab_size), np.float32)
        places = [0] * R
        for i, row in enumerate(wanted):
            places[row] = logits.ctypes.data + 4 * i * self.config.vocab_size
        rows = ctypes.c_int32 * R
        arguments = rows(*tokens), rows(*slots), rows(*positions), R, (ctypes.c_void_p * R)(*places)
        self._kernel.decoder_step(self._handle, *arguments)
        return logits

    def prefill(self, slot, ids, start=0) -> np.ndarray:
        """See `Decoder.prefill`."""
        T = len(ids)
        return self.step(ids, [slot] * T, range(start, start + T), [T - 1])[0]

    def sample(self, logits, params, draws, texts) -> list[int]:
        """See `Decoder.sample`."""
        sound = np.isfinite(logits.sum(-1))  # one NaN or infinity shows in the sum, which is faster than to look at all
        rows = zip(logits, params, draws, texts, sound, strict=True)
        return [sample(row, how, draw, text) if finite else -1 for row, how, draw, text, finite in rows]


class _Matrix(ctypes.Structure):
    """`Matrix` of kernels/decode.cpp; the next two likewise."""

    _fields_ = (
        ("values", ctypes.c_void_p), ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_int32), ("columns", ctypes.c_int32), ("format", ctypes.c_int32),
    )  # fmt: skip


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
        *((name, ctypes.c_void_p) for name in (
            "input_layernorm", "q_norm", "k_norm", "post_attention_layernorm", "pre_feedforward_layernorm",
            "post_feedforward_layernorm", "keys", "values",
        )),
        *((name, ctypes.c_int32) for name in ("places", "window", "rope")),
    )  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = (
        ("embedding", _Matrix), ("head", _Matrix), ("norm", ctypes.c_void_p), ("frequencies", ctypes.c_void_p),
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_int32) for name in (
            "num_layers", "hidden", "heads", "key_heads", "head_dim", "inner", "cache_format",
        )),
        *((name, ctypes.c_float) for name in ("embedding_scale", "query_scale", "eps")),
    )  # fmt: skip
