"""One step of every slot on a GPU of NVIDIA, in Triton. Its reference is `BatchDecoder._forward`.

Few rows make a step's time that of reading the weights, and of how many kernels stand one behind the other. So a kernel
begins with what its input still lacks, every program for itself: sums of parts, norms, the softmax across splits. Only
what has to be complete before anybody reads it ends a kernel, and a layer has five:

- `_embed`: the embeddings
- `_read`: a norm of the stream and a product with rows that read it: queries, keys and values; gate and up; the head
- `_attend`: a part of a ring's places, and the new key and value into the ring
- `_mix`: the softmax of all parts, and o_proj, a query head at a time
- `_down`: down_proj, a slice of its inputs at a time

No program overwrites what another one of its launch may read: `_read` takes the stream out of one buffer and what the
layer added to it out of another, and writes the sum into a third. The stream is kept in float32.

Many rows are work enough for cuBLAS: `ManyStep` has its products, and kernels of one program a slot between them:

- `_norm`: what `_read` does before its product
- `_attend`: the same one
- `_whole`: what `_mix` does before its product

Shapes as in `model`, and S slots; in capitals, too, what a kernel is compiled for: SLOTS and WIDTH are powers of two
that hold the S slots and the inputs of a product, ROWS the outputs that a program computes.
"""

# Triton comes with torch for a GPU alone, and its functions are no functions
# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportReturnType=false

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from gemlet.cache import KVCache
from gemlet.config import FULL, SLIDING
from gemlet.model import Gemma, rope_frequencies

ROWS = 16
"""Outputs of a product that one program computes: few, such that there are programs for all processors."""
HEAD_ROWS = 32
"""The same of the head, which has more than enough."""
BLOCK = 32
"""Places of a ring that a program of `_attend` takes at a time."""
SPLITS = 32
"""The most programs that share one ring: every program of `_mix` reads what all of them have found."""
PROGRAMS = 256
"""Programs of `_attend` beyond which its rings are not split further."""
SLICES = 4
"""Of the inputs of down_proj, at most."""
GROUP = 16
"""Query heads of a key head that fit into one product; the least that the tensor cores take."""
FEW = 4
"""Slots up to which `Step` is faster than `ManyStep`."""
TILE = 1 << 15
"""Inputs of a product, of all slots, that a program can hold; the weights of its rows take as much as 8 slots do."""


def step_of(model: Gemma, cache: KVCache, inputs: Tensor) -> "Step | None":
    """The step in the kernels that are for this model and so many slots, if there are any: in 16 bits, not too wide."""
    config, slots = model.config, inputs.shape[1]
    kinds = {p.dtype for p in model.parameters() if p.ndim == 2} | {model.dtype, cache.layers[0].k.dtype}
    width = max(_power(config.hidden_size), _slice(config.intermediate_size))
    fits = (
        kinds == {torch.bfloat16}
        and config.head_dim <= 256
        and cache.max_length * config.head_dim < 2**31  # offsets in a ring are of 32 bits
        and config.num_attention_heads // config.num_key_value_heads <= GROUP
    )
    if not fits or width > TILE:
        return None
    # as many parts of o_proj as there are heads are summed
    few = slots <= FEW and max(8, _columns(slots)) * width <= TILE and config.num_attention_heads <= 32
    return (Step if few else ManyStep)(model, cache, inputs)


class Step:
    """A step on memory that stays where it is, for a CUDA graph: the weights, the rings, `inputs`, what is between.

    `inputs` [3, S] are the tokens, their positions, and whether a slot has a row: if not, its rings stay as they are.
    """

    products: torch.dtype | None = torch.float32
    """The dtype of what products leave for the next kernel; None: the model's."""

    def __init__(self, model: Gemma, cache: KVCache, inputs: Tensor):
        config, backbone = model.config, model.model
        D, H, S = config.hidden_size, config.head_dim, inputs.shape[1]
        N, K = config.num_attention_heads, config.num_key_value_heads
        self.model, self.cache, self.inputs = model, cache, inputs
        self.blocks: Any = backbone.layers
        projections = ((b.self_attn.q_proj, b.self_attn.k_proj, b.self_attn.v_proj) for b in self.blocks)
        self.qkv_weights = [torch.cat([p.weight.detach() for p in three]) for three in projections]
        bases = {SLIDING: config.rope_local_base_freq, FULL: config.rope_theta}
        self.kinds = {kind: i for i, kind in enumerate(bases)}
        self.frequencies = torch.stack([rope_frequencies(H, base, model.device) for base in bases.values()])[:, None]
        # rounded as in Backbone.scaled
        self.scale = torch.tensor(D**0.5, dtype=model.dtype).item()
        self.width, self.slice = _power(D), _slice(config.intermediate_size)

        def floats(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=model.device)

        self.stream, self.next = floats(S, D), floats(S, D)
        products = self.products or model.dtype
        self.qkv = floats(S, (N + 2 * K) * H).to(products)
        self.found, self.logsums = floats(SPLITS, S, N, H), floats(SPLITS, S, N)
        self.attended, self.processed = (floats(parts, S, D).to(products) for parts in self._parts())
        self.inner = floats(S, config.intermediate_size).to(model.dtype)
        self.logits = floats(S, config.vocab_size)

    def _parts(self) -> tuple[int, int]:
        """How many parts make what attention, and what the MLP adds to the stream."""
        config = self.model.config
        return config.num_attention_heads, triton.cdiv(config.intermediate_size, self.slice)

    def __call__(self) -> Tensor:
        """The logits [S, V] in float32: always the same memory."""
        model, config = self.model, self.model.config
        tokens, positions, _ = self.inputs
        D, S = config.hidden_size, len(tokens)
        angles = self.frequencies * positions[:, None]  # [kinds, S, H / 2]
        ropes = angles.cos(), angles.sin()
        known = {"D": D, "SCALE": self.scale, "PARTS": len(self.processed), "WIDTH": self.width}
        _embed[(S,)](tokens, model.model.embed_tokens.weight, self.stream, self.processed, **known)
        for i, block in enumerate(self.blocks):
            attention, mlp = block.self_attn, block.mlp
            # behind the embeddings stand zeros, whatever norm they take
            before, norm = self.blocks[i - 1].post_feedforward_layernorm, block.input_layernorm
            self._read(self.processed, before, norm, self.qkv, self.qkv_weights[i])
            splits = self._attend(i, ropes)
            self._mix(attention.o_proj.weight, splits)
            norms = block.post_attention_layernorm, block.pre_feedforward_layernorm
            self._read(self.attended, *norms, self.inner, mlp.gate_proj.weight, mlp.up_proj.weight)
            self._down(mlp.down_proj.weight)
        before = self.blocks[-1].post_feedforward_layernorm
        self._read(self.processed, before, model.model.norm, self.logits, model.head_weight)
        return self.logits

    def _read(self, parts: Tensor, post: Any, norm: Any, out: Tensor, weight: Tensor, up: Tensor | None = None) -> None:
        S, outputs = out.shape
        rows = HEAD_ROWS if out is self.logits else ROWS
        known = {"S": S, "D": self.model.config.hidden_size, "OUTPUTS": outputs, "PARTS": len(parts), "EPS": norm.eps}
        sizes = {"GATED": up is not None, "SLOTS": _columns(S), "WIDTH": self.width, "ROWS": rows}
        tensors = self.stream, self.next, parts, post.weight, norm.weight, weight, weight if up is None else up, out
        _read[(triton.cdiv(outputs, rows),)](*tensors, **known, **sizes, num_warps=_warps(S, self.width))
        self.stream, self.next = self.next, self.stream

    def _attend(self, layer: int, ropes: tuple[Tensor, Tensor]) -> int:
        """Into how many splits, as each layer of a kind has."""
        config, part = self.model.config, self.blocks[layer].self_attn
        k, v = self.cache.layers[layer].k, self.cache.layers[layer].v
        S, K, places, H = k.shape
        blocks = triton.cdiv(places, BLOCK)
        splits = min(blocks, SPLITS, max(1, PROGRAMS // (S * K)))
        ring = places, config.window(layer) or self.cache.max_length, splits
        known = {"S": S, "N": config.num_attention_heads, "K": K, "H": H, "SCALE": part.scale, "EPS": part.q_norm.eps}
        blocks = triton.next_power_of_2(triton.cdiv(blocks, splits))
        sizes = {"BLOCKS": blocks, "BLOCK": BLOCK, "GROUP": GROUP, "HALF": _power(H // 2), "WHOLE": _power(H)}
        cos, sin = (table[self.kinds[config.layers[layer]]] for table in ropes)
        tensors = self.qkv, part.q_norm.weight, part.k_norm.weight, cos, sin, *self.inputs[1:], k, v
        _attend[(S, K, splits)](*tensors, self.found, self.logsums, *ring, **known, **sizes, num_warps=4)
        return splits

    def _mix(self, weight: Tensor, splits: int) -> None:
        D, N, S = self.model.config.hidden_size, *self.attended.shape[:2]
        H = self.model.config.head_dim
        known = {"S": S, "N": N, "H": H, "D": D, "SPLITS": triton.next_power_of_2(splits)}
        sizes = {"SLOTS": _columns(S), "WIDTH": _power(H), "ROWS": ROWS}
        grid, warps = (triton.cdiv(D, ROWS), N), _warps(S, _power(H))
        _mix[grid](self.found, self.logsums, weight, self.attended, splits, **known, **sizes, num_warps=warps)

    def _down(self, weight: Tensor) -> None:
        D, (S, inputs) = self.model.config.hidden_size, self.inner.shape
        sizes = {"SLOTS": _columns(S), "WIDTH": self.slice, "ROWS": ROWS}
        grid, warps = (triton.cdiv(D, ROWS), len(self.processed)), _warps(S, self.slice)
        _down[grid](self.inner, weight, self.processed, S=S, D=D, F=inputs, **sizes, num_warps=warps)


class ManyStep(Step):
    """The same for many slots, with cuBLAS's products."""

    products = None

    def __init__(self, model: Gemma, cache: KVCache, inputs: Tensor):
        super().__init__(model, cache, inputs)
        S, N, H = self.found.shape[1:]
        self.normed, self.heads = self.inner.new_empty(S, self.stream.shape[1]), self.inner.new_empty(S, N * H)

    def _parts(self) -> tuple[int, int]:
        return 1, 1

    def _read(self, parts: Tensor, post: Any, norm: Any, out: Tensor, weight: Tensor, up: Tensor | None = None) -> None:
        S, D = self.stream.shape
        known = {"D": D, "EPS": norm.eps, "WIDTH": self.width}
        _norm[(S,)](self.stream, parts, post.weight, norm.weight, self.normed, **known)
        if up is not None:
            gate = F.gelu(self.normed @ weight.T, approximate="tanh")
            torch.mul(gate, self.normed @ up.T, out=out)
        elif out is self.logits:  # a row for each token, since rows as long as the vocabulary are slow to write
            out.copy_((weight @ self.normed.T).T)
        else:
            torch.mm(self.normed, weight.T, out=out)

    def _mix(self, weight: Tensor, splits: int) -> None:
        _, S, N, H = self.found.shape
        known = {"S": S, "N": N, "H": H, "WIDTH": _power(H), "SPLITS": _power(splits)}
        _whole[(S, N)](self.found, self.logsums, self.heads, splits, **known)
        torch.mm(self.heads, weight.T, out=self.attended[0])

    def _down(self, weight: Tensor) -> None:
        torch.mm(self.inner, weight.T, out=self.processed[0])


def _power(n: int) -> int:
    """Tensors in Triton have powers of two as sizes, and a product's inputs are at least 16."""
    return max(16, triton.next_power_of_2(n))


def _slice(inputs: int) -> int:
    """Inputs of down_proj that a program takes."""
    return _power(triton.cdiv(inputs, SLICES))


def _columns(slots: int) -> int:
    """SLOTS: as many as there are, or the next size that a tensor in Triton can have."""
    return triton.next_power_of_2(slots)


def _warps(slots: int, width: int) -> int:
    """As many as hold a program's elements in their registers."""
    return min(16, max(4, max(4, _columns(slots)) * width // 1024))


@triton.jit
def _normalised(x, weight, d, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """RMSNorm of x [.., power of two], of which WIDTH are inputs and the others 0; see `model.RMSNorm`."""
    gain = 1 + tl.load(weight + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, 1) / WIDTH + EPS)[:, None] * gain[None, :]


@triton.jit
def _product(x, w):
    """x [SLOTS, WIDTH] in float32 and w [ROWS, WIDTH] to [SLOTS, ROWS] in float32, of x rounded as w is."""
    x = x.to(w.dtype)
    SLOTS: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1]
    ROWS: tl.constexpr = w.shape[0]
    if SLOTS < 16:
        return tl.sum(x.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :], 2)
    # a warp a slice of the inputs, or else every warp would go through all of them
    SLICES: tl.constexpr = min(16, WIDTH // 16)
    x = tl.permute(tl.reshape(x, (SLOTS, SLICES, WIDTH // SLICES)), (1, 0, 2))
    w = tl.permute(tl.reshape(w, (ROWS, SLICES, WIDTH // SLICES)), (1, 2, 0))
    return tl.sum(tl.dot(x, w), 0)


@triton.jit
def _embed(
    tokens, embedding, stream, parts, D: tl.constexpr, SCALE: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr
):
    """The beginning of the stream [S, D]; nothing has been added to it, so that the `parts` [PARTS, S, D] are 0."""
    slot, d = tl.program_id(0), tl.arange(0, WIDTH)
    x = tl.load(embedding + tl.load(tokens + slot) * D + d, mask=d < D, other=0.0)
    scaled = (x.to(tl.float32) * SCALE).to(x.dtype).to(tl.float32)
    tl.store(stream + slot * D + d, scaled, mask=d < D)
    for part in tl.static_range(PARTS):
        tl.store(parts + (part * tl.num_programs(0) + slot) * D + d, tl.zeros_like(scaled), mask=d < D)


@triton.jit
def _read(
    stream,
    following,
    parts,
    post,
    norm,
    weight,
    up,
    out,
    S: tl.constexpr,
    D: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PARTS: tl.constexpr,
    EPS: tl.constexpr,
    GATED: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """following = stream + post(sum of the parts), each [S, D]; out [S, OUTPUTS] = norm(following) @ weight.T.

    GATED: GELU of that, times what the matrix `up` makes of it.
    """
    s, d = tl.arange(0, SLOTS), tl.arange(0, WIDTH)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # the weights have the longest way: they are asked for first
    there = (row < OUTPUTS)[:, None] & (d < D)[None, :]
    element = row.to(tl.int64)[:, None] * D + d[None, :]
    w = tl.load(weight + element, mask=there, other=0.0)
    if GATED:
        u = tl.load(up + element, mask=there, other=0.0)
    at, inside = s[:, None] * D + d[None, :], (s < S)[:, None] & (d < D)[None, :]
    x = tl.load(stream + at, mask=inside, other=0.0)
    added = tl.zeros_like(x)
    for part in tl.static_range(PARTS):
        added += tl.load(parts + part * S * D + at, mask=inside, other=0.0)
    x += _normalised(added, post, d, D, EPS)
    if tl.program_id(0) == 0:
        tl.store(following + at, x, mask=inside)
    x = _normalised(x, norm, d, D, EPS)
    y = _product(x, w)
    if GATED:
        y *= tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y)) * _product(x, u)  # see gemlet/geglu.py
    kept = (s < S)[:, None] & (row < OUTPUTS)[None, :]
    tl.store(out + s[:, None] * OUTPUTS + row[None, :], y.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _turned(vectors, mask, norm, cos, sin, half, H: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr):
    """Both halves of vectors [.., H] in memory, normalised, and then turned by RoPE; see `model.rotate`."""
    inside = half < H // 2
    x = tl.load(vectors, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(vectors + H // 2, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / H + EPS)[:, None]
    x *= scale * (1 + tl.load(norm + half, mask=inside, other=0.0).to(tl.float32))[None, :]
    y *= scale * (1 + tl.load(norm + H // 2 + half, mask=inside, other=0.0).to(tl.float32))[None, :]
    c = tl.load(cos + half, mask=inside, other=0.0)[None, :]
    s = tl.load(sin + half, mask=inside, other=0.0)[None, :]
    return (x * c - y * s).to(DTYPE), (y * c + x * s).to(DTYPE)


@triton.jit(do_not_specialize=["places", "window", "splits"])
def _attend(
    qkv,
    q_norm,
    k_norm,
    cos,
    sin,
    positions,
    active,
    ring_k,
    ring_v,
    found,
    logsums,
    places,
    window,
    splits,
    S: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Attention of the query heads of one key head of one slot to every splits-th block of its places.

    qkv is [S, (N + 2 K) * H]; found [splits, S, N, H] is the mean of the values by the softmax over these places, and
    logsums [splits, S, N] the logarithm of its denominator. The new key and value go into the ring from one program,
    and into everybody's registers: nobody needs to see them in the ring.
    """
    slot, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g, half, h = tl.arange(0, GROUP), tl.arange(0, HALF), tl.arange(0, WHOLE)
    DTYPE: tl.constexpr = ring_k.dtype.element_ty
    position = tl.load(positions + slot).to(tl.int32)
    here = position % places
    writes = (here // BLOCK % splits == split) & (tl.load(active + slot) > 0)
    left = half < H // 2
    cos += slot * (H // 2)
    sin += slot * (H // 2)
    ring = (slot.to(tl.int64) * K + head) * places * H
    ring_k += ring
    ring_v += ring

    qkv += slot * (N + 2 * K) * H
    heads = head * (N // K) + g
    mine = (g < N // K)[:, None] & left[None, :]
    at = heads[:, None] * H + half[None, :]
    q1, q2 = _turned(qkv + at, mine, q_norm, cos, sin, half, H, EPS, DTYPE)
    at = (N + head) * H + half[None, :]
    k1, k2 = _turned(qkv + at, left[None, :], k_norm, cos, sin, half, H, EPS, DTYPE)  # [1, HALF]
    v = tl.load(qkv + (N + K + head) * H + h, mask=h < H, other=0.0).to(DTYPE)[None, :]
    if writes:
        tl.store(ring_k + here * H + half[None, :], k1, mask=left[None, :])
        tl.store(ring_k + here * H + H // 2 + half[None, :], k2, mask=left[None, :])
        tl.store(ring_v + here * H + h[None, :], v, mask=(h < H)[None, :])

    top = tl.full((GROUP,), -float("inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    mean = tl.zeros((GROUP, WHOLE), tl.float32)
    for block in range(BLOCKS):
        place = (block * splits + split) * BLOCK + tl.arange(0, BLOCK)
        age = here - place
        age = tl.where(age < 0, age + places, age)
        seen = (place < places) & (age < window) & (age <= position)
        if tl.max(seen.to(tl.int32), 0) > 0:
            old = (seen & (place != here))[:, None]
            new = (place == here)[:, None]
            keys = ring_k + place[:, None] * H + half[None, :]
            keys1 = tl.where(new, k1, tl.load(keys, mask=old & left[None, :], other=0.0))
            keys2 = tl.where(new, k2, tl.load(keys + H // 2, mask=old & left[None, :], other=0.0))
            values = ring_v + place[:, None] * H + h[None, :]
            values = tl.where(new, v, tl.load(values, mask=old & (h < H)[None, :], other=0.0))
            scores = (tl.dot(q1, tl.trans(keys1)) + tl.dot(q2, tl.trans(keys2))) * SCALE  # [GROUP, BLOCK]
            scores = tl.where(seen[None, :], scores, -float("inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            p, fade = tl.exp(scores - higher[:, None]), tl.exp(top - higher)
            total = total * fade + tl.sum(p, 1)
            mean = mean * fade[:, None] + tl.dot(p.to(DTYPE), values)
            top = higher
    mean /= tl.where(total > 0, total, 1.0)[:, None]
    found += (split * S + slot) * N * H
    tl.store(found + heads[:, None] * H + h[None, :], mean, mask=(g < N // K)[:, None] & (h < H)[None, :])
    tl.store(logsums + (split * S + slot) * N + heads, top + tl.log(total), mask=g < N // K)


@triton.jit(do_not_specialize=["splits"])
def _mix(
    found,
    logsums,
    weight,
    out,
    splits,
    S: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """What `_attend` found for one query head, made whole, through o_proj [D, N * H]: a part of out [N, S, D]."""
    s, h, head = tl.arange(0, SLOTS), tl.arange(0, WIDTH), tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = (row < D)[:, None] & (h < H)[None, :]
    w = tl.load(weight + row[:, None] * (N * H) + head * H + h[None, :], mask=there, other=0.0)
    known, inside = s < S, (s < S)[:, None] & (h < H)[None, :]
    top = tl.full((SLOTS,), -float("inf"), tl.float32)
    for split in tl.range(0, SPLITS, loop_unroll_factor=8):
        at = (split * S + s) * N + head
        top = tl.maximum(top, tl.load(logsums + at, mask=known & (split < splits), other=-float("inf")))
    total = tl.zeros((SLOTS,), tl.float32)
    y = tl.zeros((SLOTS, WIDTH), tl.float32)
    for split in tl.range(0, SPLITS, loop_unroll_factor=8):
        at = (split * S + s) * N + head
        share = tl.exp(tl.load(logsums + at, mask=known & (split < splits), other=-float("inf")) - top)
        total += share
        mean = tl.load(found + at[:, None] * H + h[None, :], mask=inside & (split < splits), other=0.0)
        y += share[:, None] * mean
    y = _product(y / total[:, None], w)
    tl.store(out + (head * S + s)[:, None] * D + row[None, :], y, mask=known[:, None] & (row < D)[None, :])


@triton.jit
def _down(
    inner,
    weight,
    out,
    S: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """WIDTH of the F inputs of down_proj [D, F]: a part of out [slices, S, D]."""
    s, part = tl.arange(0, SLOTS), tl.program_id(1)
    f = part * WIDTH + tl.arange(0, WIDTH)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = (row < D)[:, None] & (f < F)[None, :]
    w = tl.load(weight + row[:, None] * F + f[None, :], mask=there, other=0.0)
    x = tl.load(inner + s[:, None] * F + f[None, :], mask=(s < S)[:, None] & (f < F)[None, :], other=0.0)
    y = _product(x, w)
    tl.store(out + (part * S + s)[:, None] * D + row[None, :], y, mask=(s < S)[:, None] & (row < D)[None, :])


@triton.jit
def _norm(stream, parts, post, norm, out, D: tl.constexpr, EPS: tl.constexpr, WIDTH: tl.constexpr):
    """stream += post(the one part); out = norm(stream): a slot [D] of each."""
    d = tl.arange(0, WIDTH)
    at, inside = (tl.program_id(0) * D + d)[None, :], (d < D)[None, :]
    x = tl.load(stream + at, mask=inside, other=0.0)
    added = tl.load(parts + at, mask=inside, other=0.0).to(tl.float32)
    x += _normalised(added, post, d, D, EPS)
    tl.store(stream + at, x, mask=inside)
    tl.store(out + at, _normalised(x, norm, d, D, EPS).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits"])
def _whole(
    found,
    logsums,
    out,
    splits,
    S: tl.constexpr,
    N: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """What `_attend` found for one query head of one slot, made whole: [H] of out [S, N * H]."""
    at, split, h = tl.program_id(0) * N + tl.program_id(1), tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    logs = tl.load(logsums + split * S * N + at, mask=split < splits, other=-float("inf"))
    share = tl.exp(logs - tl.max(logs, 0))
    there = (split < splits)[:, None] & (h < H)[None, :]
    mean = tl.load(found + (split * S * N + at)[:, None] * H + h[None, :], mask=there, other=0.0)
    y = tl.sum(share[:, None] * mean, 0) / tl.sum(share, 0)
    tl.store(out + at * H + h, y.to(out.dtype.element_ty), mask=h < H)
