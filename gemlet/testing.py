"""Tiny, whole, deterministic stand-ins for tests, ours and those of code that uses gemlet."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from gemlet.config import ModelConfig, layer_pattern

if TYPE_CHECKING:
    from gemlet.model import Gemma
    from gemlet.tokenizer import Tokenizer

TINY_VOCABULARY = 320


def tiny_config(**changes: Any) -> ModelConfig:
    """A model of six layers with everything that makes Gemma 3: grouped heads, two full layers, a window of 8."""
    values: dict[str, Any] = {
        "vocab_size": TINY_VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **changes,
    }
    values.setdefault("layer_types", layer_pattern(values["num_hidden_layers"], 3))
    return ModelConfig(**values)


def tiny_model(seed: int = 0, **changes: Any) -> Gemma:
    """A model of `tiny_config(**changes)` with random weights, the norms' too, so that every part of it matters."""
    import torch

    from gemlet.model import Gemma, init_weights

    model = init_weights(Gemma(tiny_config(**changes)), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return model


def tiny_corpus() -> list[str]:
    """A few dozen very short stories, all different."""
    animals = ("fox", "duck", "mouse", "bear", "frog", "owl")
    things = ("a red ball", "an old hat", "a blue kite", "a small boat", "a warm scarf", "a round stone")
    return [
        f'Once there was a little {one} who had lost {thing}.\n"Have you seen it?" asked the {one}. '
        f'"Yes!" said Zoë the {other}. "It is under the tree, come and see." They went together, and both were happy.'
        for i, one in enumerate(animals)
        for j, thing in enumerate(things)
        for other in [animals[(i + j % 5 + 1) % 6]]
    ]


@cache
def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE of 320 tokens, trained on `tiny_corpus`."""
    from gemlet.tokenizer import Tokenizer

    return Tokenizer.train(tiny_corpus(), TINY_VOCABULARY)
