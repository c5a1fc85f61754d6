"""A model made ready to write: several sequences, a token at a time, each as if it were alone.

`Decoder` is the contract: what `generate` runs on and the engine shares among requests. A decoder has `slots`, each of
which holds one sequence of up to `max_length` tokens: its keys and values lie in memory that is taken once. A slot has
no state but that memory. Whoever calls says at which position a token stands; nothing needs to be reset.

- `step` takes rows: each one token of one slot at one position
- `prefill` takes a prompt
- `copy` gives a slot the beginning of another one

A row's logits depend on the tokens before it in its slot, never on the other rows: on a CPU to the last bit.

`decoder(model, ...)` makes the fastest one there is for a model.
"""

import ctypes
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemlet.cache import KVCache
from gemlet.config import FULL, SLIDING, ModelConfig
from gemlet.errors import GemletError
from gemlet.kernels.build import library
from gemlet.model import Gemma, Linear, RMSNorm, rope, rope_frequencies, rotate
from gemlet.quantise import FORMATS, pack

SPARE = 64
"""Tokens that a slot can be taken back by, and the most rows that one slot may have in a step."""


class Decoder(ABC):
    """The contract. The caller keeps to it: nothing is checked here for every token."""

    config: ModelConfig
    slots: int
    """Sequences there is room for; they are numbered from 0."""
    max_length: int
    """Tokens that each of them can hold."""
    cache: KVCache
    """The keys and values, slot by slot."""
    guesses: int = 0
    """Rows of a slot beyond the first that cost little more than it: so many tokens are worth guessing."""

    @abstractmethod
    def step(
        self,
        tokens: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[int],
        wanted: Sequence[int] | None = None,
    ) -> Tensor:
        """Take in R tokens, row i standing at `positions[i]` of `slots[i]`; float32 logits [R, V] of what follows.

        Several rows of one slot, at most SPARE of them, stand one behind the other in ascending positions. A position
        is at most one beyond what its slot holds, and at most SPARE before the last one it was ever given: what was
        there and behind it is forgotten. `wanted` names the rows whose logits are returned, in its order; unset: all.
        """

    @abstractmethod
    def prefill(self, slot: int, ids: Sequence[int], start: int = 0) -> Tensor:
        """Take in ids at the positions from `start` on, any number of them; the logits [V] of what follows the last.

        With `start` 0 the slot begins a new sequence, whatever it held.
        """

    def copy(self, source: int, target: int, length: int) -> None:
        """Make the first `length` positions of `target` those of `source`, which is not changed.

        `length` lies at most SPARE before the last position that `source` was ever given, see `remembers`.
        """
        for layer in self.cache.layers:
            for memory in (layer.k, layer.v):
                kept = min(length, memory.shape[2])  # a ring that has wrapped is copied whole
                memory[target, :, :kept] = memory[source, :, :kept]

    def remembers(self, held: int, length: int) -> bool:
        """Whether a slot that holds `held` tokens still knows what its first `length` need: `copy`, or going back."""
        window = self.config.sliding_window
        return length <= held and (held <= min(window + SPARE, self.max_length) or held - length <= SPARE)


class TorchDecoder(Decoder):
    """The contract in plain torch, on any device: the reference, and what runs where nothing faster does.

    A row at a time, since the matrix products of several rows round differently from those of one.
    """

    def __init__(self, model: Gemma, slots: int, max_length: int, cache_dtype: torch.dtype | None = None):
        self.model, self.config = model, model.config
        self.slots, self.max_length = slots, max_length
        self.cache = KVCache(model.config, slots, max_length, cache_dtype or model.dtype, model.device, SPARE)

    @torch.inference_mode()
    def step(self, tokens, slots, positions, wanted=None) -> Tensor:
        """See `Decoder.step`."""
        rows = [
            self._take([token], slot, position) for token, slot, position in zip(tokens, slots, positions, strict=True)
        ]
        kept = rows if wanted is None else [rows[i] for i in wanted]
        return torch.cat([self.model.head(row) for row in kept])

    @torch.inference_mode()
    def prefill(self, slot, ids, start=0) -> Tensor:
        """See `Decoder.prefill`."""
        hidden = None
        for at in range(0, len(ids), PREFILL_CHUNK):
            hidden = self._take(ids[at : at + PREFILL_CHUNK], slot, start + at)
        assert hidden is not None, "no ids"
        return self.model.head(hidden)[0]

    def _take(self, ids: Sequence[int], slot: int, position: int) -> Tensor:
        """The hidden state [1, D] behind the last of these tokens of one slot."""
        batch = torch.as_tensor(ids, device=self.model.device)[None]
        return self.model.model(batch, self.cache.row(slot, position))[:, -1]


PREFILL_CHUNK = 512
"""Prompt tokens taken in at once: the memory of a long prompt grows with its length, not with its square."""


class BatchDecoder(TorchDecoder):
    """The contract on a GPU, in plain torch: one row of every slot at once, on NVIDIA's as one captured CUDA graph.

    Shapes are those of all slots, whoever has a row; several rows of a slot are taken one by one. The rows of a batch
    agree with those alone up to rounding.
    """

    def __init__(self, model: Gemma, slots: int, max_length: int, cache_dtype: torch.dtype | None = None):
        super().__init__(model, slots, max_length, cache_dtype)
        self._inputs = torch.zeros(3, slots, dtype=torch.long, device=model.device)  # tokens, positions, has a row
        self._logits = torch.empty(0)
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def step(self, tokens, slots, positions, wanted=None) -> Tensor:
        """See `Decoder.step`."""
        if len(set(slots)) < len(slots):
            return super().step(tokens, slots, positions, wanted)
        inputs = torch.zeros(3, self.slots, dtype=torch.long)
        inputs[:, list(slots)] = torch.tensor([list(tokens), list(positions), [1] * len(slots)])
        self._inputs.copy_(inputs)
        if self._graph is None:
            self._capture()
        else:
            self._graph.replay()
        rows = slots if wanted is None else [slots[i] for i in wanted]
        return self._logits[list(rows)]

    def _capture(self) -> None:
        """Compute, and on a GPU of NVIDIA keep what was launched. Computing again changes nothing."""
        self._logits = self._forward()
        if self.model.device.type == "cuda":
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._logits = self._forward()
            self._graph.replay()

    def _forward(self) -> Tensor:
        tokens, positions, active = self._inputs
        config, backbone, S = self.config, self.model.model, self.slots
        x = backbone.scaled(tokens)  # [S, D]
        ropes = {
            SLIDING: rope(positions, config.head_dim, config.rope_local_base_freq),
            FULL: rope(positions, config.head_dim, config.rope_theta),
        }
        masks = {kind: self._visible(positions, kind) for kind in set(config.layers)}
        blocks: Any = backbone.layers
        for block, kind, cache in zip(blocks, config.layers, self.cache.layers, strict=True):
            part = block.self_attn
            h = block.input_layernorm(x)
            q, k, v = (
                p(h).view(S, -1, config.head_dim).transpose(0, 1) for p in (part.q_proj, part.k_proj, part.v_proj)
            )
            q, k = rotate(part.q_norm(q), ropes[kind]), rotate(part.k_norm(k), ropes[kind])  # [heads, S, H]
            at = (torch.arange(S, device=x.device), slice(None), positions % cache.k.shape[2])
            for memory, new in ((cache.k, k), (cache.v, v)):
                memory[at] = torch.where(active[:, None, None] > 0, new.transpose(0, 1).to(memory.dtype), memory[at])
            q = q.transpose(0, 1)[:, :, None].to(cache.k.dtype)  # [S, N, 1, H]
            how = {"attn_mask": masks[kind], "scale": part.scale, "enable_gqa": True}
            y = F.scaled_dot_product_attention(q, cache.k, cache.v, **how)
            x = x + block.post_attention_layernorm(part.o_proj(y.reshape(S, -1).to(x.dtype)))
            x = x + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x)))
        return self.model.head(backbone.norm(x))

    def _visible(self, positions: Tensor, kind: str) -> Tensor:
        """Which places of a ring each row sees: [S, 1, 1, places]."""
        window = self.config.sliding_window if kind == SLIDING else self.max_length
        places = next(
            cache.k.shape[2] for cache, k in zip(self.cache.layers, self.config.layers, strict=True) if k == kind
        )
        age = (positions[:, None] - torch.arange(places, device=positions.device)) % places
        return ((age < window) & (age <= positions[:, None]))[:, None, None]


class NativeWeights:
    """The matrices of a model on a CPU as `kernels/decode.cpp` reads them."""

    def __init__(self, kernel: ctypes.CDLL, model: Gemma, format: str):
        self.kernel, self.config, self.format = kernel, model.config, format
        self._kept: list[Tensor] = []  # what the pointers point to
        self.layers = [_Layer() for _ in model.model.layers]
        for layer, block in zip(self.layers, model.model.layers, strict=True):
            for name, module in block.named_modules():
                if isinstance(module, Linear):
                    setattr(layer, name.split(".")[-1], self._matrix(name, module.weight))
                elif isinstance(module, RMSNorm):
                    setattr(layer, name.split(".")[-1], self._gain(module))
        self.norm = self._gain(model.model.norm)
        self.embedding = self._matrix("embed_tokens", model.model.embed_tokens.weight)
        self.head = self.embedding if model.lm_head is None else self._matrix("lm_head", model.lm_head.weight)
        bases = (self.config.rope_local_base_freq, self.config.rope_theta)
        self.frequencies = self._pointer(torch.cat([rope_frequencies(self.config.head_dim, base) for base in bases]))

    def _matrix(self, name: str, weight: Tensor) -> "_Matrix":
        packed = pack(weight, _matrix_format(name, self.format))
        scales = None if packed.scales is None else self._pointer(packed.scales)
        return _Matrix(self._pointer(packed.values), scales, *weight.shape, FORMATS.index(packed.format))

    def _gain(self, norm: RMSNorm) -> int:
        return self._pointer(1 + norm.weight.detach().float())

    def _pointer(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


class NativeDecoder(Decoder):
    """The contract by `kernels/decode.cpp`, on a CPU: every weight is read once a step, however many rows there are.

    Computed in float32 from weights in any of `quantise.FORMATS`. A row's logits do not depend, to the last bit, on
    how the tokens before it were taken in either.
    """

    guesses = 3

    def __init__(self, weights: NativeWeights, slots: int, max_length: int):
        config = self.config = weights.config
        self.slots, self.max_length = slots, max_length
        dtype = _cache_dtype(weights.format)
        self.cache = KVCache(config, slots, max_length, dtype, "cpu", SPARE)
        self._weights, self._kernel = weights, weights.kernel
        layers = (_Layer * config.num_hidden_layers)(*weights.layers)
        for i, (layer, cache) in enumerate(zip(layers, self.cache.layers, strict=True)):
            layer.keys, layer.values, layer.places = cache.k.data_ptr(), cache.v.data_ptr(), cache.k.shape[2]
            layer.window = config.window(i) or max_length
            layer.rope = config.layers[i] == FULL
        # what a model in this dtype multiplies its embedding by
        scale = torch.tensor(config.hidden_size**0.5, dtype=torch.bfloat16 if weights.format == "bf16" else None)
        description = _Model(
            weights.embedding, weights.head, weights.norm, weights.frequencies, layers,
            config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.num_key_value_heads,
            config.head_dim, config.intermediate_size, dtype == torch.bfloat16,
            float(scale), config.query_scale, config.rms_norm_eps,
        )  # fmt: skip
        self._kernel.decoder_new.restype = ctypes.c_void_p
        self._handle = ctypes.c_void_p(self._kernel.decoder_new(ctypes.byref(description), torch.get_num_threads()))
        weakref.finalize(self, self._kernel.decoder_free, self._handle)

    def step(self, tokens, slots, positions, wanted=None) -> Tensor:
        """See `Decoder.step`."""
        R = len(tokens)
        wanted = range(R) if wanted is None else wanted
        logits = torch.empty(len(wanted), self.config.vocab_size)
        places = [0] * R
        for i, row in enumerate(wanted):
            places[row] = logits.data_ptr() + 4 * i * self.config.vocab_size
        rows = ctypes.c_int32 * R
        arguments = rows(*tokens), rows(*slots), rows(*positions), R, (ctypes.c_void_p * R)(*places)
        self._kernel.decoder_step(self._handle, *arguments)
        return logits

    def prefill(self, slot, ids, start=0) -> Tensor:
        """See `Decoder.prefill`."""
        T = len(ids)
        return self.step(ids, [slot] * T, range(start, start + T), [T - 1])[0]


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


def format_of(model: Gemma, weights: str) -> str:
    """The one of `quantise.FORMATS` that `weights` means for a model; auto: bf16 where it has 16 bits."""
    if weights == "auto":
        return "bf16" if model.head_weight.dtype == torch.bfloat16 else "fp32"
    if weights not in FORMATS:
        raise GemletError(f"weights is {weights!r}, but must be auto, {', '.join(FORMATS)}")
    return weights


def rounded(model: Gemma, format: str) -> Gemma:
    """The model with the values that a format keeps, in memory that is shared where it can be; in float32 on a CPU."""
    on_cpu, own = model.device.type == "cpu", format_of(model, "auto")
    state, config = model.state_dict(), model.config
    if format == "bf16" and on_cpu:
        # products of float32 are many times as fast here; the embedding rounds as that of a model in bf16 does
        embedding = model.model.embed_tokens.weight.bfloat16()
        state = _unpacked({"lm_head.weight": model.head_weight, **state}, format)
        state["model.embed_tokens.weight"] = embedding
        config = config.replace(tie_word_embeddings=False)
    elif format != own:
        state = _unpacked(state, format)
    with torch.device("meta"):
        other = Gemma(config)
    other.load_state_dict(state, assign=True)
    other.compute_in(torch.float32 if on_cpu else model.model.compute_dtype)
    return other


def _unpacked(state: dict[str, Tensor], format: str) -> dict[str, Tensor]:
    dtype = torch.bfloat16 if format == "bf16" else torch.float32
    return {
        name: pack(w, _matrix_format(name, format)).unpack().to(dtype) if w.ndim == 2 else w
        for name, w in state.items()
    }


def _matrix_format(name: str, format: str) -> str:
    """Never 4 bits for the embedding and the head: they are what the logits depend on most."""
    return "int8" if format == "int4" and ("embed_tokens" in name or "lm_head" in name) else format


def _cache_dtype(format: str) -> torch.dtype:
    return torch.float32 if format == "fp32" else torch.bfloat16


class Ready:
    """A model whose weights are kept in a format, for any number of decoders; they must not change meanwhile.

    `weights` is auto (as the model has them, shared, not copied), or one of `quantise.FORMATS`. Unless told to `wait`,
    it does not wait for the kernel to be compiled, which happens once on a machine and takes some seconds: the
    decoders are in plain torch until then.
    """

    def __init__(self, model: Gemma, weights: str = "auto", wait: bool = False):
        self.model, self.config = model, model.config
        self.format = format_of(model, weights)
        self._wait = wait
        self._weights: NativeWeights | Gemma | None = None

    def decoder(self, slots: int, max_length: int) -> Decoder:
        """The fastest there is here now; `max_length` is at most the model's context."""
        kernel = library("decode", self._wait) if self.model.device.type == "cpu" else None
        if kernel is not None:
            if not isinstance(self._weights, NativeWeights):
                self._weights = NativeWeights(kernel, self.model, self.format)
            return NativeDecoder(self._weights, slots, max_length)
        if not isinstance(self._weights, Gemma):
            self._weights = rounded(self.model, self.format)
        kind = TorchDecoder if self.model.device.type == "cpu" else BatchDecoder
        return kind(self._weights, slots, max_length, _cache_dtype(self.format))

    def rounded(self) -> Gemma:
        """The model in plain torch, with the values that the format keeps: what any of the decoders computes."""
        return rounded(self.model, self.format)

    def outruns(self, decoder: Decoder) -> bool:
        """Whether `decoder` would now be made as a faster one."""
        return type(decoder) is TorchDecoder and library("decode", wait=False) is not None


def decoder(model: Gemma, slots: int, max_length: int, weights: str = "auto") -> Decoder:
    """One decoder for a model: see `Ready`, which makes several of the same weights."""
    return Ready(model, weights, wait=True).decoder(slots, max_length)
