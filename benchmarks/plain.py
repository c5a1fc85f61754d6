"""Gemma 3 as one writes it down from the paper: torch's own modules and attention, and the whole of the logits.

A peer to measure against: what PyTorch and torch.compile do without anything that gemlet adds. The parameter names are
gemlet's, and a test holds the two against each other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemlet.config import SLIDING, ModelConfig


class Norm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return (F.rms_norm(x.float(), x.shape[-1:], eps=self.eps) * (1 + self.weight)).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim, self.scale, self.grouped = (
            c.head_dim,
            c.query_scale,
            c.num_attention_heads > c.num_key_value_heads,
        )
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm, self.k_norm = Norm(c.head_dim, c.rms_norm_eps), Norm(c.head_dim, c.rms_norm_eps)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = turned(self.q_norm(q).transpose(1, 2), angles), turned(self.k_norm(k).transpose(1, 2), angles)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v.transpose(1, 2).to(q.dtype),
            scale=self.scale,
            enable_gqa=self.grouped,
            attn_mask=mask,
            is_causal=mask is None,
        )
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """RoPE: pairs (i, i + H/2) of [B, heads, T, H], turned by [T, H/2] angles."""
    left, right = x.float().chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.pre_feedforward_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.post_feedforward_layernorm = Norm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, angles: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), angles, mask))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Plain(nn.Module):
    """Token ids [B, T] to the mean loss, with the head tied to the embedding."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        c, T = self.c, ids.shape[1]
        positions = torch.arange(T, device=ids.device)
        inverse = torch.arange(0, c.head_dim, 2, device=ids.device) / -c.head_dim
        local, full = (positions[:, None] * base**inverse for base in (c.rope_local_base_freq, c.rope_theta))
        back = positions[:, None] - positions
        mask = None if c.sliding_window >= T else (back >= 0) & (back < c.sliding_window)
        x = self.embed_tokens(ids) * c.hidden_size**0.5
        for kind, block in zip(c.layers, self.layers, strict=True):
            x = block(x, *((local, mask) if kind == SLIDING else (full, None)))
        logits = self.norm(x) @ self.embed_tokens.weight.T
        return F.cross_entropy(logits.float().view(-1, c.vocab_size), targets.reshape(-1))
