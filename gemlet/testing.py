"""Tiny, whole, deterministic stand-ins for tests, ours and those of code that uses gemlet."""

# ruff: noqa: RUF001 (letters that look like others are the point of HARD_TEXTS)
from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from gemlet.config import ModelConfig, layer_pattern

if TYPE_CHECKING:
    from gemlet.model import Gemma
    from gemlet.tokenizer import Tokenizer

TINY_VOCABULARY = 320

HARD_TEXTS = (
    "",
    " ",
    "\n",
    "x:\n\n   y",
    "a  b   c    d\t\te \n f\n\n\ng   ",
    "   leading and trailing   ",
    "\r\n\r\n windows \r\n old mac \r end\r\n",
    "\n" * 50 + "x" + " " * 50,
    "\t" * 40 + "tabs" + " \t \t ",
    "it's I'll we've they're I'd I'm you't x's 's ' s '' 'S 'LL ’s don’t",
    "3.14159 1,000,000 007 1e-9 0x1F ½ ² Ⅷ ٣ 十2 १२३",
    "naïve Zoë café ﬁ Straße İi ı",
    "e\u0301 a\u0308\u0323 o\u0302\u0301 \u0301alone Z\u0351\u036b\u0343a\u0317l\u0321g\u0354o\u032f",
    "👩\u200d👩\u200d👧 👍🏽 🎈🎈 🇪🇺🇯🇵 ❤\ufe0f 🏴\U000e0067\U000e0062\U000e0065\U000e007f 1\ufe0f\u20e3",
    "中文字符、日本語のテキスト。カタカナ 한국어 ไทยไม่มีช่องว่าง 𠀋𠮟 ０１２ ａｂｃ",
    "\u202eright to left\u202c שָׁלוֹם עולם مرحبا بالعالم \u200f!\u200e",
    "\x00\x01\x1b[0m\x7f\x80\x85\x9f\x1c\x1d\x1e\x1f\x0b\x0c",
    "\ufeff\u200b\u200c\u2060\u00ad\u2028\u2029\u00a0\u00a0 \u00a0x\u3000y\u1680z\u180e\u202f\u205f\u2009\ufffd",
    "</s> and <s>",
    "<|endoftext|> <eos><bos><pad><unk><mask><start_of_turn>user\n<end_of_turn> <|endoftext| <unused7> [PAD7]",
    "text<|endoftext|>text<eos>text<bos>text",
    "<0x0A><0x41> \u2581 x\u2581y <h1>title</h1>\n<table><tr><td>1</td></tr></table> <b>bold</b>",
    '{"a": [1, 2, 3], \'b\': null}; // ---- ==== #### \\n \\\\ """ `code` $x^2$ <!-- --> &amp; https://example.org/?a=b&c=%20',
    "def f(x):\n    if x:\n\treturn  x**2  # ok\n\n\n",
    "ǅ ʰ ª º 𝔘𝔫𝔦 ⓐ ㈱ ℃ Ⅻ ❶ ᾳ ߀ ꙮ ჟ Ꮳ ⴰ",
    "αβγ АБВ ԱԲԳ ऄअ தமிழ் ಕನ್ನಡ မြန်မာ ខ្មែរ አማርኛ",
    "snake_case camelCase SCREAMING kebab-case a.b.c 1st 2nd x2y _ __ ___",
    "…—–‘’“”«»¿¡§¶†‡•™©®°±×÷√∞≠≤≥→⇒∀∃",
    'once upon a time, there was a little girl named Lily. She said: "Hello!"\n\nThe end.',
    "a" * 600,
    "ab1!" * 150,
    "\U0010ffff\ue000\U000f0000\ufdd0\ufffe",
)
"""Texts that tokenizers get wrong: their ids differ as soon as a tokenizer is not quite the same."""


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
