"""Many texts at once, beside transformers: `python -m benchmarks.engine` prints a table.

1, 2, 4, 8 and 16 requests arrive together, each with a prompt of its own, and all write the same number of tokens,
drawn with the default settings. Ours go through `Engine` and are read by one event loop, theirs are one `generate`.
Then what a batch cannot do: requests of different lengths through eight places, in batches of eight for transformers;
and how long a text that is being written waits for its next token while a long prompt comes in.

Random weights, the same for both; float32. The two take turns, `--rounds` of them; medians.
"""

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from gemlet.config import ModelConfig, preset
from gemlet.engine import Engine
from gemlet.model import Gemma, init_weights
from gemlet.ready import decoder
from gemlet.sampling import SamplingParams

STREAMS = (1, 2, 4, 8, 16)
PROMPT = 16


@dataclass
class Run:
    seconds: float
    """From the first request to the last token."""
    first: float = 0.0
    """From the first request to the median request's first token."""
    gap: float = 0.0
    """The longest that a text waited between two of its tokens."""


def prompts(config: ModelConfig, count: int, length: int = PROMPT) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, config.vocab_size, (count, length), generator=generator).tolist()


class Letters:
    """A tokenizer that writes a letter for every token, so that each of them can be seen to arrive."""

    def decoder(self) -> "Letters":
        return self

    def push(self, token: int) -> str:
        return chr(ord("a") + token % 26)

    def flush(self) -> str:
        return ""


LETTERS: Any = Letters()


class Ours:
    def __init__(self, model: Gemma, slots: int, max_length: int):
        self.engine = Engine(decoder(model, slots, max_length), LETTERS)

    def write(self, requests: list[tuple[list[int], int]]) -> Run:
        """Write requests (prompt, new tokens) that all arrive now."""
        return asyncio.run(self._write(requests))

    async def _write(self, requests: list[tuple[list[int], int]]) -> Run:
        start = time.perf_counter()
        streams = [self.engine.submit(ids, SamplingParams(max_new_tokens=n, seed=0)) for ids, n in requests]
        times = await asyncio.gather(*(self._read(stream) for stream in streams))
        gaps = [b - a for at in times for a, b in pairwise(at)]
        return Run(
            max(at[-1] for at in times) - start, statistics.median(at[0] for at in times) - start, max(gaps, default=0)
        )

    async def _read(self, stream) -> list[float]:
        return [time.perf_counter() async for _ in stream]


class Theirs:
    def __init__(self, model: Gemma):
        from transformers import Gemma3ForCausalLM, Gemma3TextConfig

        self.model: Any = Gemma3ForCausalLM(Gemma3TextConfig(**model.config.to_hf())).eval()
        self.model.load_state_dict(model.state_dict(), strict=False)  # a tied head is not among ours
        self.model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def write(self, requests: list[tuple[list[int], int]]) -> Run:
        """Write requests, of prompts of one length, as one batch: as many tokens each as the longest one wants."""
        start = time.perf_counter()
        ids = torch.tensor([ids for ids, _ in requests])
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max(n for _, n in requests),
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
            top_k=0,
        )
        return Run(time.perf_counter() - start)


def median(runs: list[Run]) -> Run:
    return Run(*(statistics.median(getattr(run, name) for run in runs) for name in ("seconds", "first", "gap")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["gemma3-270m-gpt2", "stories-15m"])
    parser.add_argument("--streams", nargs="+", type=int, default=list(STREAMS))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="without transformers")
    flags = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, prompts of {PROMPT}, {flags.new_tokens} new")
    for name in flags.presets:
        config = preset(name).model.replace(eos_token_id=None)
        model = init_weights(Gemma(config)).eval()
        with torch.no_grad():
            model.model.norm.weight.fill_(4)  # logits as far apart as those of a trained model
        ours = Ours(model, max(flags.streams), 1280)
        theirs = None if flags.alone else Theirs(model)
        print(f"\n{name}: {type(ours.engine.decoder).__name__}")
        print("| streams | tokens/s | each | against one | first token, s | transformers, tokens/s | ours / theirs |")
        print("|---|---|---|---|---|---|---|")
        one = 0.0
        ours.write([(prompts(config, 1)[0], 8)])  # whatever is built on first use
        for count in flags.streams:
            requests = [(ids, flags.new_tokens) for ids in prompts(config, count)]
            a, b = [], []
            for _ in range(flags.rounds):
                a.append(ours.write(requests))
                b.append(theirs.write(requests) if theirs else Run(float("nan")))
                requests = [([(i + 1) % config.vocab_size for i in ids], n) for ids, n in requests]  # nothing shared
            tokens, run, peer = count * flags.new_tokens, median(a), median(b)
            rate, other = tokens / run.seconds, tokens / peer.seconds
            one = one or rate
            print(
                f"| {count} | {rate:.1f} | {rate / count:.1f} | {rate / one:.2f} | {run.first:.3f} | {other:.1f} "
                f"| {rate / other:.2f} |"
            )
        mixed = [(ids, flags.new_tokens // 4 * (1 + i % 8)) for i, ids in enumerate(prompts(config, 16))]
        wanted = sum(n for _, n in mixed)
        eight = Ours(model, 8, 1280)
        rate = wanted / eight.write(mixed).seconds
        line = f"16 requests of {mixed[0][1]} to {mixed[7][1]} tokens through 8 places: {rate:.1f} tokens/s"
        if theirs:
            line += f", transformers {wanted / sum(theirs.write(mixed[at : at + 8]).seconds for at in (0, 8)):.1f}"
        print(line)
        steady = eight.write([(prompts(config, 1)[0], 64)])
        long = (prompts(config, 1, 1024)[0], 1)
        beside = eight.write([(prompts(config, 1)[0][1:], 64), long])
        print(
            f"longest wait between two tokens: {steady.gap * 1e3:.0f} ms alone, {beside.gap * 1e3:.0f} ms while a "
            "prompt of 1,024 tokens comes in"
        )


if __name__ == "__main__":
    main()
