"""A tokenizer in the words of llama.cpp: the metadata `tokenizer.ggml.*` of a GGUF file.

Two of llama.cpp's tokenizers (its src/llama-vocab.cpp) can be what gemlet's are:

- `gpt2`, a byte-level BPE: GPT-2's pattern cuts a text, and pairs of a list are merged within the pieces
- `llama`, SentencePiece's BPE: any two neighbours whose union is a token are merged, the highest score first; a
  character that is no token falls into bytes. Gemma's tokenizer.json is a BPE with a list of pairs instead; `_scores`
  finds the scores that give the same ids.

Any other tokenizer is refused: one that is almost the same makes a model that is almost right.

Where llama.cpp (llama-cpp-python 0.3.36; each of Unicode's code points was tried) gives other ids all the same:

- Its tables end before Unicode 16, whose 4,382 new letters and digits are other characters to `gpt2`'s pattern.
- It takes a token called </s> for an end token; Gemma has one, a tag, whose text then falls into pieces.
- Written U+2581 beside a space or another one is a run of spaces to `llama`, but stays apart in Gemma's tokenizer.
"""

from itertools import pairwise
from typing import Any

from gemlet.config import ModelConfig
from gemlet.errors import GemletError
from gemlet.tokenizer import Tokenizer, is_byte_level

Value = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""llama.cpp's types of tokens. In text that is only text CONTROL is never found, USER_DEFINED before anything else."""

SPACE = "\u2581"
"""Stands for a space in the tokens of SentencePiece."""
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def tokenizer_metadata(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Value]:
    """All that llama.cpp needs to turn text into the ids that `tokenizer` gives, and ids into text.

    llama.cpp wants one token for each row of the embedding: rows without a token become UNUSED ones, and special tokens
    without a row (the official Gemma 3 270M has one, for images) are left out. Raises GemletError for a tokenizer that
    llama.cpp does not have.
    """
    spec = tokenizer.spec
    model, added = spec["model"], spec["added_tokens"]
    ids = model["vocab"] | {token["content"]: token["id"] for token in added}
    types = dict.fromkeys(ids, NORMAL)
    types |= {token["content"]: CONTROL if token["special"] else USER_DEFINED for token in added}
    tokens = _rows(ids, types, config.vocab_size)
    metadata: dict[str, Value]
    if is_byte_level(spec):
        merges = [f"{left} {right}" for left, right in model["merges"]]
        metadata = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": merges}
    elif _is_gemma(spec):
        types |= dict.fromkeys(_BYTES, BYTE)
        # A USER_DEFINED token would be printed as it is, with U+2581; a run of spaces is found by its score as well.
        types |= {token: NORMAL for token in ids if types[token] == USER_DEFINED and SPACE in token}
        found_first = {token for token in ids if types[token] == USER_DEFINED}
        scores = _scores(tokens, [(left, right) for left, right in model["merges"]], found_first)
        types[model["unk_token"]] = UNKNOWN
        metadata = {
            "model": "llama",
            "add_space_prefix": False,
            "tokens": tokens,
            "scores": [float(scores.get(token, 0)) for token in tokens],
            "unknown_token_id": ids[model["unk_token"]],
        }
    else:
        raise GemletError(
            "llama.cpp does not have this tokenizer: gemlet exports byte-level BPEs with GPT-2's pattern (its own, and "
            "GPT-2's) and Gemma's; this one has another model, normalizer, pre-tokenizer or kind of added tokens"
        )
    metadata["token_type"] = [types.get(token, UNUSED) for token in tokens]
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | _special_ids(tokenizer, config)).items()} | (
        {"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}
    )


def _rows(ids: dict[str, int], types: dict[str, int], rows: int) -> list[str]:
    """The token of every row of the embedding."""
    beyond = sorted(token for token, id in ids.items() if id >= rows and types[token] != CONTROL)
    if beyond:
        raise GemletError(
            f"the tokenizer has {len(beyond):,} tokens, such as {beyond[0]!r}, beyond the model's vocab_size of "
            f"{rows:,}; give the folder the tokenizer that the model was trained with"
        )
    names = {id: token for token, id in ids.items()}
    tokens = [names.get(id, f"[PAD{id}]") for id in range(rows)]
    if len(set(tokens)) < rows:
        raise GemletError("a token of the tokenizer is called [PAD and a number], like the rows without a token")
    return tokens


def _special_ids(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Value]:
    """What begins every text, and what ends one.

    llama.cpp takes up to three end tokens from a file. It adds those that it knows by name, whatever the file says,
    such as <|endoftext|>, <end_of_turn> and </s>.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    ends = [tokenizer.eos_token_id if end is None else end for end in ends]
    if len(ends) > 3:
        raise GemletError(f"config.json has {len(ends)} end tokens (eos_token_id), but a GGUF file holds at most 3")
    pad = {} if config.pad_token_id is None else {"padding_token_id": config.pad_token_id}
    return {
        "bos_token_id": tokenizer.prompt_ids("")[0],
        **dict(zip(("eos_token_id", "eot_token_id", "eom_token_id"), ends, strict=False)),
        **pad,
        "add_bos_token": True,  # as before every text in training
        "add_eos_token": False,
    }


def _is_gemma(spec: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is a BPE on whole texts, with U+2581 for spaces and bytes for unknown characters."""
    model = spec["model"]
    space = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    never = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    return (
        model["type"] == "BPE"
        and model["byte_fallback"]
        and all(byte in model["vocab"] for byte in _BYTES)
        and model["unk_token"] in model["vocab"]
        and not any(model[k] for k in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"))
        and spec["normalizer"] == space
        and spec["pre_tokenizer"] in (None, never)  # there are no spaces any more
        and not any(
            token[k] for token in spec["added_tokens"] for k in ("normalized", "lstrip", "rstrip", "single_word")
        )
    )


def _scores(tokens: list[str], merges: list[tuple[str, str]], found_first: set[str]) -> dict[str, int]:
    """The score of every token that merges make, such that SentencePiece's merging gives the ids of the list's.

    Both merge the best pair of neighbours again and again, the leftmost of equal ones; the list ranks pairs,
    SentencePiece scores what becomes of them. While a token forms, no merge crosses its borders, so whatever stands
    around it, its last pair is the one that forms it when it is spelt alone. Let that pair's rank be its score,
    negated: then in every text the two see the same pairs in the same order, unless SentencePiece merges two neighbours
    whose pair is not in the list. Spelling every token alone, short ones first, finds such a pair if there is one.
    """
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    scores: dict[str, int] = {}
    for token in sorted(tokens, key=len):
        pieces = list(token)
        while len(pieces) > 2:
            unions = [scores.get(left + right, -len(ranks)) for left, right in pairwise(pieces)]
            best = max(unions)
            if best == -len(ranks):
                break
            at = unions.index(best)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        if len(pieces) == 2:
            rank = ranks.get((pieces[0], pieces[1]))
            if rank is not None:
                scores[token] = -rank
            elif token not in found_first:
                raise GemletError(
                    f"llama.cpp would make {token!r} of {pieces[0]!r} and {pieces[1]!r}, which this tokenizer does not "
                    "merge; it cannot be exported"
                )
    return scores
