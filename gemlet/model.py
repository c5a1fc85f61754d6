"""Gemma 3's text model (arXiv 2503.19786): modules and `forward`, nothing else.

- grouped-query attention with RMSNorm on queries and keys (QK-norm)
- `(1 + w)` RMSNorm before and after attention and MLP: the sandwich
- rotary positions with a local base in sliding layers and a global one in full layers
- GeGLU (tanh), an embedding scaled by sqrt(D) and tied to the output head

Parameter names are those of transformers' `Gemma3ForCausalLM`, so importing a model is a load, exporting one a save.
Weights keep their own dtype; the matrix products compute in `compute_dtype`, norms, RoPE and softmax in float32.

Shapes: B batch, T new positions, S cached and new positions, D hidden_size, N query heads, K key-value heads,
H head_dim, F intermediate_size, V vocab_size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gemlet.attention import attention
from gemlet.cache import KVCache, LayerCache
from gemlet.config import FULL, SLIDING, ModelConfig
from gemlet.geglu import geglu
from gemlet.kernels import norm as kernel
from gemlet.linear import feed_forward, linear, linears, together

Rope = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + w) over the last dimension, in float32 (RMSNorm: arXiv 1910.07467; w starts at 0)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """[..., size] -> [..., size], in x's dtype, added to `onto` if there is one."""
        if kernel.available(x.device.type, x.dtype, x.shape[-1]):
            return kernel.rms_norm(x, self.weight, onto, self.eps)
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        y = (y * (1 + self.weight.float())).to(x.dtype)
        return y if onto is None else onto + y


class Linear(nn.Module):
    """x @ w.T without bias, computed in x's dtype whatever the dtype in which w is kept."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return linear(x, self.weight)


def rope(positions: Tensor, head_dim: int, base: float) -> Rope:
    """Cosine and sine, [T, H] in float32, of the angles by which RoPE (2104.09864) turns pairs (i, i + H/2).

    The sine of the left half is negative: that is its sign in the formula, see `rotate`.
    """
    angle = torch.outer(positions.float(), rope_frequencies(head_dim, base, positions.device))
    return angle.repeat(1, 2).cos(), torch.cat((-angle, angle), -1).sin()


def rope_frequencies(head_dim: int, base: float, device: torch.device | None = None) -> Tensor:
    """By how much each of the H / 2 pairs turns from one position to the next: [H / 2] in float32."""
    return base ** -(torch.arange(0, head_dim, 2, device=device).float() / head_dim)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn the pairs of x [B, heads, T, H] by their positions' angles: (a cos - b sin, b cos + a sin).

    Halves that change places cost compiled code two thirds of what a `cat` does, on the way back above all.
    """
    halves, cos, sin = (y.unflatten(-1, (2, -1)) for y in (x.float(), *rope))  # [.., 2, H/2]
    return (halves * cos + halves.flip(-2) * sin).flatten(-2).to(x.dtype)


class HeadNorm(RMSNorm):
    """RMSNorm of each head of the queries or keys (QK-norm), which RoPE then turns."""

    def forward(self, x: Tensor, rope: Rope) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[B, T, heads, H] -> [B, heads, T, H]."""
        if kernel.available(x.device.type, x.dtype, x.shape[-1] // 2):
            return kernel.norm_and_turn(x, self.weight, *rope, self.eps)
        return rotate(super().forward(x).transpose(1, 2), rope)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with normalised queries and keys."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, H = config.hidden_size, config.head_dim
        self.head_dim, self.scale = H, config.query_scale
        self.q_proj = Linear(D, config.num_attention_heads * H)
        self.k_proj = Linear(D, config.num_key_value_heads * H)
        self.v_proj = Linear(D, config.num_key_value_heads * H)
        self.o_proj = Linear(config.num_attention_heads * H, D)
        self.q_norm = HeadNorm(H, config.rms_norm_eps)
        self.k_norm = HeadNorm(H, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        window: int | None,
        cache: LayerCache | None,
        start: int,
        starts: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; with a cache, x stands at the positions from `start` on."""
        B, T, _ = x.shape
        projections = self.q_proj, self.k_proj, self.v_proj
        weights = [p.weight for p in projections]
        projected = linears(x, *weights) if together(x, *weights) else [p(x) for p in projections]
        q, k, v = (y.view(B, T, -1, self.head_dim) for y in projected)
        q, k = self.q_norm(q, rope), self.k_norm(k, rope)  # [B, N, T, H], [B, K, T, H]
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, start)  # [B, K, S, H]
        y = attention(q, k, v, window=window, scale=self.scale, starts=starts)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """down(GeGLU(gate(x), up(x)))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, inner)
        self.up_proj = Linear(D, inner)
        self.down_proj = Linear(inner, D)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        weights = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        if together(x, *weights):
            return feed_forward(x, *weights)
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """The sandwich: each half normalises what it reads and what it adds."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(D, eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.pre_feedforward_layernorm = RMSNorm(D, eps)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = RMSNorm(D, eps)
        self.recomputes_mlp = False

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        window: int | None,
        cache: LayerCache | None,
        start: int,
        starts: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]. What makes a layer slide, its rope and its window, come from outside."""
        attended = self.self_attn(self.input_layernorm(x), rope, window, cache, start, starts)
        x = self.post_attention_layernorm(attended, onto=x)
        return self.post_feedforward_layernorm(self._mlp(self.pre_feedforward_layernorm(x)), onto=x)

    def _mlp(self, x: Tensor) -> Tensor:
        if not self.recomputes_mlp:
            return self.mlp(x)
        return checkpoint(self.mlp, x, use_reentrant=False, preserve_rng_state=False)  # there is nothing random in it


class Backbone(nn.Module):
    """Token ids to hidden states: embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None  # None: that of the weights
        # from_pretrained, because nn.Embedding's own constructor would draw weights that nobody keeps
        empty = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, cache: KVCache | None = None, starts: Tensor | None = None) -> Tensor:
        """[B, T] -> [B, T, D], after the final norm. With a cache, the T tokens follow those seen and join them.

        Where documents share a row, `starts` [B, T] says where that of each token begins, and it sees no other.
        """
        config, T = self.config, input_ids.shape[1]
        start = 0 if cache is None else cache.length
        assert cache is None or start + T <= cache.max_length, f"{start} + {T} tokens in a cache of {cache.max_length}"
        positions = torch.arange(start, start + T, device=input_ids.device)
        window = config.sliding_window if config.sliding_window < start + T else None
        kinds = {
            SLIDING: (rope(positions, config.head_dim, config.rope_local_base_freq), window),
            FULL: (rope(positions, config.head_dim, config.rope_theta), None),
        }
        x = self.scaled(input_ids)
        for i, block in enumerate(self.layers):
            x = block(x, *kinds[config.layers[i]], None if cache is None else cache.layers[i], start, starts)
        if cache is not None:
            cache.length += T
        return self.norm(x)

    def recompute_mlps(self, on: bool) -> None:
        """Keep nothing of the MLPs for the backward pass: half of the memory for a sixth more of the products."""
        blocks: Any = self.layers
        for block in blocks:
            block.recomputes_mlp = on

    def scaled(self, input_ids: Tensor) -> Tensor:
        """[...] -> [..., D]: the embeddings, times sqrt(D), as the blocks take them."""
        x = self.embed_tokens(input_ids)
        # transformers multiplies by sqrt(D) rounded to the dtype of the weights; in float32 that is sqrt(D)
        return (x * torch.tensor(self.config.hidden_size**0.5, dtype=x.dtype)).to(self.compute_dtype or x.dtype)


class Gemma(nn.Module):
    """The language model: the backbone and the output head. Built with uninitialised weights; see `init_weights`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)

    @property
    def head_weight(self) -> Tensor:
        """The output head's matrix, [V, D]: the embedding, if they are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the matrix products compute in."""
        return self.model.compute_dtype or self.head_weight.dtype

    def compute_in(self, dtype: torch.dtype | None) -> None:
        """Choose the dtype of the matrix products (None: that of the weights)."""
        self.model.compute_dtype = dtype

    def head(self, hidden: Tensor) -> Tensor:
        """[..., D] -> logits [..., V] in float32."""
        return F.linear(hidden, self.head_weight.to(hidden.dtype)).float()

    def forward(self, input_ids: Tensor, cache: KVCache | None = None, starts: Tensor | None = None) -> Tensor:
        """[B, T] -> logits [B, T, V] in float32; `cache` and `starts` as in `Backbone`."""
        return self.head(self.model(input_ids, cache, starts))


def post_norm_gain(layers: int) -> float:
    """Initial gain of what a block adds to the stream: a deep model learns faster from near the identity, a shallow
    one from 1 (docs/decisions.md)."""
    return 1.0 if layers <= 8 else 0.2


@torch.no_grad()
def init_weights(model: Gemma, seed: int = 0) -> Gemma:
    """Draw the initial weights, all of them here.

    | parameter                         | distribution                                                      |
    |-----------------------------------|-------------------------------------------------------------------|
    | embedding (and untied head)       | normal, sigma 1 / sqrt(D): a scaled embedding of unit variance    |
    | matrices reading the stream       | uniform, sigma 1 / sqrt(fan in)                                   |
    | o_proj, down_proj                 | the same; the norm behind them sets what reaches the stream       |
    | norms                             | w = 0 (gain 1); the two post-norms `post_norm_gain` - 1           |
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            p.fill_(post_norm_gain(model.config.num_hidden_layers) - 1)
        elif p.ndim == 1:
            p.zero_()
        elif "embed_tokens" in name or "lm_head" in name:
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
        else:
            bound = (3 / p.shape[1]) ** 0.5
            p.copy_(torch.rand(p.shape, generator=generator) * (2 * bound) - bound)
    return model
