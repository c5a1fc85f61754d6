"""Writing in plain torch, on any device: what runs on a GPU, what runs until the kernel is compiled, and the reference.

- `TorchDecoder` and `BatchDecoder` are decoders; `sample` chooses tokens as `gemlet.sampling` does, on the device
- `generate_uncached` runs the whole sequence again for every token: the reference the others are tested against
- `model_of` and `arrays` are the way from arrays to a model and back, on the same memory
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemlet.cache import KVCache
from gemlet.config import FULL, SLIDING, ModelConfig
from gemlet.decoder import SPARE, Decoder
from gemlet.errors import GemletError
from gemlet.folder import EMBEDDING, HEAD
from gemlet.model import Gemma, rope
from gemlet.quantise import matrix_format, pack
from gemlet.sampling import HUGE, TINY, Draws, SamplingParams, checked, draws

if TYPE_CHECKING:
    from gemlet.kernels.step import Step


def model_of(config: ModelConfig, arrays: Mapping[str, np.ndarray]) -> Gemma:
    """A model on the memory of `folder.StoredModel.arrays`; it computes in float32."""
    with torch.device("meta"):
        model = Gemma(config)
    model.load_state_dict({name: _tensor(array) for name, array in arrays.items()}, assign=True)
    model.compute_in(torch.float32)
    return model


def arrays(model: Gemma) -> dict[str, np.ndarray]:
    """The weights of a model on a CPU, on the same memory where they are float32 or bfloat16, else as float32."""
    return {name: _array(tensor.detach()) for name, tensor in model.state_dict().items()}


def _tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.float().numpy()


def own_format(model: Gemma) -> str:
    """The one of `quantise.FORMATS` that a model has: bf16 where its head has 16 bits."""
    return "bf16" if model.head_weight.dtype == torch.bfloat16 else "fp32"


def rounded(model: Gemma, format: str) -> Gemma:
    """The model with the values that a format keeps, in memory that is shared where it can be; in float32 on a CPU."""
    on_cpu, own = model.device.type == "cpu", own_format(model)
    state, config = model.state_dict(), model.config
    if format == "bf16" and on_cpu:
        # products of float32 are many times as fast here; the embedding rounds as that of a model in bf16 does
        embedding = model.model.embed_tokens.weight.bfloat16()
        state = _unpacked({HEAD: model.head_weight, **state}, format)
        state[EMBEDDING] = embedding
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
    return {name: _values(name, w, format).to(dtype) if w.ndim == 2 else w for name, w in state.items()}


def _values(name: str, weight: Tensor, format: str) -> Tensor:
    packed = pack(_array(weight.detach().cpu()), matrix_format(name, format))
    return torch.from_numpy(packed.unpack()).to(weight.device)


def cache_dtype(format: str) -> torch.dtype:
    """What keys and values are kept in."""
    return torch.float32 if format == "fp32" else torch.bfloat16


class TorchDecoder(Decoder):
    """The contract in plain torch, on any device: the reference, and what runs where nothing faster does.

    A row at a time, since the matrix products of several rows round differently from those of one.
    """

    stands_in = True

    def __init__(self, model: Gemma, slots: int, max_length: int, cache_dtype: torch.dtype | None = None):
        self.model, self.config = model, model.config
        self.slots, self.max_length = slots, max_length
        self.cache = KVCache(model.config, slots, max_length, cache_dtype or model.dtype, model.device, SPARE)
        self.rings = [(layer.k, layer.v) for layer in self.cache.layers]

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

    @torch.inference_mode()
    def sample(self, logits, params, draws, texts) -> list[int]:
        """See `Decoder.sample`. Rows that draw alike are drawn in one batch."""
        alike: dict[SamplingParams, list[int]] = {}
        for row, how in enumerate(params):
            alike.setdefault(_drawing(how), []).append(row)
        tokens = [0] * len(params)
        usable = finite(logits)
        for how, rows in alike.items():
            whole = len(rows) == len(params)
            some = logits if whole else logits[rows]
            seen = None
            if how.repetition_penalty != 1:
                seen = torch.zeros_like(some, dtype=torch.bool)
                for i, row in enumerate(rows):
                    seen[i, list(texts[row])] = True
            chosen = sample(some, how, [draws[row] for row in rows], seen)
            chosen = chosen.where(usable if whole else usable[rows], -1).tolist()  # one wait for the device, not two
            for row, token in zip(rows, chosen, strict=True):
                tokens[row] = token
        return tokens

    @torch.inference_mode()
    def copy(self, source, target, length) -> None:
        """See `Decoder.copy`."""
        super().copy(source, target, length)

    def _take(self, ids: Sequence[int], slot: int, position: int) -> Tensor:
        """The hidden state [1, D] behind the last of these tokens of one slot."""
        batch = torch.as_tensor(ids, device=self.model.device)[None]
        return self.model.model(batch, self.cache.row(slot, position))[:, -1]


@lru_cache(maxsize=1024)
def _drawing(params: SamplingParams) -> SamplingParams:
    """What rows that draw alike have in common: kept, since a step of a GPU is soon over and asks for every row."""
    return replace(params, seed=None, max_new_tokens=0)


PREFILL_CHUNK = 512
"""Prompt tokens taken in at once: the memory of a long prompt grows with its length, not with its square."""


class BatchDecoder(TorchDecoder):
    """The contract on a GPU: one row of every slot at once, on NVIDIA's as one captured CUDA graph.

    In the kernels of `gemlet.kernels.step` where they are for the model, else in plain torch, which is their reference.
    Shapes are those of all slots, whoever has a row; several rows of a slot are taken one by one. The rows of a batch
    agree with those alone up to rounding.
    """

    stands_in = False

    def __init__(self, model: Gemma, slots: int, max_length: int, cache_dtype: torch.dtype | None = None):
        super().__init__(model, slots, max_length, cache_dtype)
        self._inputs = torch.zeros(3, slots, dtype=torch.long, device=model.device)  # tokens, positions, has a row
        self._kernels = self._step_in_kernels()
        self._logits = self._likeliest = torch.empty(0)
        self._given = self._logits  # what the last step returned, if that was a row of every slot
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def step(self, tokens, slots, positions, wanted=None) -> Tensor:
        """See `Decoder.step`."""
        if len(set(slots)) < len(slots):
            return super().step(tokens, slots, positions, wanted)
        inputs = torch.tensor([list(tokens), list(positions), [1] * len(slots)])
        whole = wanted is None and list(slots) == list(range(self.slots))
        if not whole:
            inputs = torch.zeros(3, self.slots, dtype=torch.long).index_copy_(1, torch.tensor(slots), inputs)
        self._inputs.copy_(inputs)
        if self._graph is None:
            self._capture()
        else:
            self._graph.replay()
        self._given = self._logits.clone() if whole else self._logits[:0]  # a copy, since the next step writes there
        if whole:
            return self._given
        rows = slots if wanted is None else [slots[i] for i in wanted]
        return self._logits[list(rows)]

    @torch.inference_mode()
    def sample(self, logits, params, draws, texts) -> list[int]:
        """See `Decoder.sample`. The likeliest tokens were found in the step."""
        greedy = all(how.temperature == 0 and how.repetition_penalty == 1 for how in params)
        if greedy and logits.data_ptr() == self._given.data_ptr() and logits.shape == self._given.shape:
            return self._likeliest.tolist()
        return super().sample(logits, params, draws, texts)

    def _capture(self) -> None:
        """Compute, and on a GPU of NVIDIA keep what was launched. Computing again changes nothing."""
        self._compute()
        if self.model.device.type == "cuda":
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._compute()
            self._graph.replay()

    def _compute(self) -> None:
        self._logits = (self._kernels or self._forward)()
        self._likeliest = self._logits.argmax(-1).where(finite(self._logits), -1)

    def _step_in_kernels(self) -> "Step | None":
        if self.model.device.type == "cuda" and torch.cuda.get_device_capability(self.model.device) >= (8, 0):
            with suppress(ImportError):  # Triton, which comes with torch wherever it is known to work
                from gemlet.kernels.step import step_of

                return step_of(self.model, self.cache, self._inputs)
        return None

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
            q, k, v = (p(h).view(1, S, -1, config.head_dim) for p in (part.q_proj, part.k_proj, part.v_proj))
            q, k = part.q_norm(q, ropes[kind])[0], part.k_norm(k, ropes[kind])[0]  # [heads, S, H]
            v = v[0].transpose(0, 1)
            at = (torch.arange(S, device=x.device), slice(None), positions % cache.k.shape[2])
            for memory, new in ((cache.k, k), (cache.v, v)):
                memory[at] = torch.where(active[:, None, None] > 0, new.transpose(0, 1).to(memory.dtype), memory[at])
            q = q.transpose(0, 1)[:, :, None].to(cache.k.dtype)  # [S, N, 1, H]
            how = {"attn_mask": masks[kind], "scale": part.scale, "enable_gqa": True}
            y = F.scaled_dot_product_attention(q, cache.k, cache.v, **how)
            x = block.post_attention_layernorm(part.o_proj(y.reshape(S, -1).to(x.dtype)), onto=x)
            x = block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x)), onto=x)
        return self.model.head(backbone.norm(x))

    def _visible(self, positions: Tensor, kind: str) -> Tensor:
        """Which places of a ring each row sees: [S, 1, 1, places]."""
        window = self.config.sliding_window if kind == SLIDING else self.max_length
        places = next(
            cache.k.shape[2] for cache, k in zip(self.cache.layers, self.config.layers, strict=True) if k == kind
        )
        age = (positions[:, None] - torch.arange(places, device=positions.device)) % places
        return ((age < window) & (age <= positions[:, None]))[:, None, None]


def finite(logits: Tensor) -> Tensor:
    """Whether all of them are, [..., V] to [...]: one NaN or infinity shows in the sum."""
    return logits.sum(-1).isfinite()


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Apply the repetition penalty to the logits [B, V] of the tokens that are True in `seen` [B, V]."""
    penalty, limit = min(max(penalty, TINY), HUGE), torch.finfo(logits.dtype).max
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-limit, limit)
    return torch.where(seen, penalised, logits)


def probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Logits [B, V] to the probabilities [B, V] that a token is drawn by; for a temperature above 0."""
    temperature = min(max(params.temperature, TINY), HUGE)
    p = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)  # 0 at the top: nothing overflows
    V = p.shape[-1]
    if params.top_k and params.top_k < V:
        p = p.where(p >= p.topk(params.top_k).values[:, -1:], 0)  # tokens as likely as the last one stay, too
    if params.top_p < 1:
        # All tokens below (1 - top_p) / V hold less than 1 - top_p together, so they are out: sort only the others.
        p = p / p.sum(-1, keepdim=True)
        candidates = max(1, int((p >= (1 - params.top_p) / V).sum(-1).max()))
        top, token = p.topk(candidates)
        top = top.where(top.cumsum(-1) - top < max(params.top_p, TINY), 0)
        p = torch.zeros_like(p).scatter(-1, token, top)
    if params.min_p > 0:
        p = p.where(p >= params.min_p * p.amax(-1, keepdim=True), 0)
    return p / p.sum(-1, keepdim=True)


def sample(logits: Tensor, params: SamplingParams, draws: Sequence[Draws], seen: Tensor | None = None) -> Tensor:
    """Choose one token a row, [B], from logits [B, V]; row i draws from `draws[i]`.

    `seen` [B, V] is True for the tokens that have occurred; only the repetition penalty reads it.
    """
    if seen is not None and params.repetition_penalty != 1:
        logits = penalise(logits, seen, params.repetition_penalty)
    if params.temperature == 0:
        return logits.argmax(-1)
    p = probabilities(logits, params)
    # The first token whose cumulative probability reaches a point in (0, 1]. Never one of probability 0, even where a
    # parallel sum rounds such that it is not quite monotonic.
    cumulative = p.cumsum(-1).where(p > 0, 0)
    point = 1 - torch.tensor([[draw()] for draw in draws], device=p.device)
    return (cumulative >= point * cumulative.amax(-1, keepdim=True)).int().argmax(-1)


@torch.inference_mode()
def generate_uncached(model: Gemma, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[int]:
    """`generate`, written for reading: the whole sequence through the model for every token, no cache, one sample."""
    ids, limit = checked(model.config, prompt_ids, params)
    own = draws(params, 1)
    for _ in range(limit):
        logits = model(torch.tensor([ids], device=model.device))[:, -1]
        if not logits.isfinite().all():
            raise not_finite(model, ids)
        seen = torch.zeros_like(logits, dtype=torch.bool)
        seen[0, ids] = True
        token = int(sample(logits, params, own, seen))
        if token in model.config.stop_ids:
            return
        ids.append(token)
        yield token


@torch.inference_mode()
def not_finite(model: Gemma, ids: Sequence[int]) -> GemletError:
    """An error that names the first weight, or else the first module in order of computation, that is not finite.

    `ids` are the tokens behind which the logits are not.
    """
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            return GemletError(f"the model is damaged: {name} has values that are not finite; load another checkpoint")
    found: list[str] = []

    def note(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
        return lambda module, inputs, output: None if output.isfinite().all() else found.append(name)

    # a module ends after those in it, and where a kernel computes it in one, these never begin
    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        model(torch.tensor([list(ids)], device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    where = found[0] if found else "the output head"
    return GemletError(
        f"the model's logits are not finite: the first such values come out of {where}, computed in "
        f"{model.dtype}, after {len(ids)} tokens; try float32, or another checkpoint"
    )
