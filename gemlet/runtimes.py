"""Other programs that run a model, each behind the same questions. A script for any Python that has one of them:

    python runtimes.py                    what is installed here, as JSON: {"transformers": "5.23.0", ...}
    python runtimes.py RUNTIME FOLDER     answers the questions in FOLDER/job.json

It imports nothing of gemlet, so that an environment with another version of everything can run it, and it is a process
of its own, so that a runtime that aborts takes nothing with it. All of them compute in float32. A job is

    {"model": a folder or a .gguf file, "sequence": ids, "rows": positions in it, "documents": lists of ids,
     "prompt": ids, "new_tokens": a number, "texts": texts}

and the answer is `answer.json`, {"argmax": of every position of the sequence, "nats": of the documents, "greedy": the
continuation of the prompt, end tokens disregarded, "text": that in words, "ids": of the texts, with the begin token and
with special tokens as ordinary text, "facts": what the file says of itself}, and the logits of the rows, float32, in
`logits.npy`.
"""

# pyright: reportMissingImports=false
# The runtimes are not gemlet's dependencies, and often not in its environment.

import json
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

import numpy as np


class Transformers:
    """Hugging Face transformers, 4.57 or later."""

    package = "transformers"
    modules = ("transformers", "torch")

    def __init__(self, model: str, context: int):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self.facts: dict[str, Any] = {}

    def logits(self, ids: list[int]) -> np.ndarray:
        """[T] -> [T, V]."""
        with self.torch.no_grad():
            return self.model(self.torch.tensor([ids])).logits[0].numpy()

    def greedy(self, ids: list[int], new_tokens: int) -> list[int]:
        """The likeliest continuation, by the program's own loop."""
        prompt = self.torch.tensor([ids])
        options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
        found = self.model.generate(prompt, attention_mask=self.torch.ones_like(prompt), **options)
        return found[0, len(ids) :].tolist()

    def encode(self, text: str) -> list[int]:
        """The ids of a text that begins a document."""
        return self.tokenizer(text, split_special_tokens=True).input_ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class LlamaCpp:
    """llama.cpp through llama-cpp-python; its cache in float32 and without flash attention, which would round."""

    package = "llama-cpp-python"
    modules = ("llama_cpp",)

    def __init__(self, model: str, context: int):
        import llama_cpp

        self.llm = llama_cpp.Llama(
            model,
            n_ctx=context,
            n_batch=context,
            n_ubatch=context,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            flash_attn=False,
            n_gpu_layers=0,
            verbose=False,
        )
        self.facts: dict[str, Any] = dict(self.llm.metadata)

    def logits(self, ids: list[int]) -> np.ndarray:
        """[T] -> [T, V]."""
        self.llm.reset()
        self.llm.eval(ids)
        return np.array(self.llm.scores[: len(ids)])

    def greedy(self, ids: list[int], new_tokens: int) -> list[int]:
        """The likeliest continuation, by the program's own loop."""
        self.llm.reset()
        tokens = self.llm.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
        return [token for token, _ in zip(tokens, range(new_tokens), strict=False)]

    def encode(self, text: str) -> list[int]:
        """The ids of a text that begins a document."""
        return self.llm.tokenize(text.encode(), add_bos=True, special=False)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out."""
        return self.llm.detokenize(ids, special=False).decode("utf-8", "replace")


class Mlx:
    """Apple's MLX through mlx-lm; on Linux on the CPU."""

    package = "mlx-lm"
    modules = ("mlx_lm",)

    def __init__(self, model: str, context: int):
        import mlx.core as mx
        import mlx_lm

        self.mx = mx
        mx.set_default_device(mx.cpu)
        loaded: Any = mlx_lm.load(model)
        self.model, self.tokenizer = loaded[0], loaded[1]
        self.model.set_dtype(mx.float32)
        self.facts: dict[str, Any] = {}

    def logits(self, ids: list[int]) -> np.ndarray:
        """[T] -> [T, V]."""
        return np.array(self.model(self.mx.array([ids]))[0].astype(self.mx.float32))

    def greedy(self, ids: list[int], new_tokens: int) -> list[int]:
        """The likeliest continuation, by the program's own loop."""
        from mlx_lm.generate import generate_step

        steps = generate_step(self.mx.array(ids), self.model, max_tokens=new_tokens)
        return [int(token) for token, _ in steps]

    def encode(self, text: str) -> list[int]:
        """The ids of a text that begins a document."""
        return self.tokenizer._tokenizer(text, split_special_tokens=True).input_ids

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


RUNTIMES = {kind.package: kind for kind in (Transformers, LlamaCpp, Mlx)}


def installed() -> dict[str, str]:
    """{runtime: version} of those that this Python has."""
    return {name: metadata.version(name) for name, kind in RUNTIMES.items() if all(map(util.find_spec, kind.modules))}


def answer(runtime: str, folder: Path) -> None:
    """Answer the job in a folder."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    longest = max(map(len, [job["sequence"], *job["documents"], [*job["prompt"], *range(job["new_tokens"])]]))
    run = RUNTIMES[runtime](job["model"], longest)
    logits = run.logits(job["sequence"])
    np.save(folder / "logits.npy", logits[job["rows"]].astype(np.float32))
    greedy = run.greedy(job["prompt"], job["new_tokens"])
    answers = {
        "argmax": logits.argmax(-1).tolist(),
        "nats": sum(nats(run.logits(ids[:-1]), ids[1:]) for ids in job["documents"]),
        "greedy": greedy,
        "text": run.decode(greedy),
        "ids": [run.encode(text) for text in job["texts"]],
        "facts": run.facts,
    }
    (folder / "answer.json").write_text(json.dumps(answers), encoding="utf-8")


def nats(logits: np.ndarray, targets: list[int]) -> float:
    """The sum of -log p of the targets, a few rows at a time, in float64."""
    total = 0.0
    for at in range(0, len(targets), 64):
        rows = logits[at : at + 64].astype(np.float64)
        top = rows.max(-1)
        chosen = rows[np.arange(len(rows)), targets[at : at + 64]]
        total += float((top + np.log(np.exp(rows - top[:, None]).sum(-1)) - chosen).sum())
    return total


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(json.dumps(installed()))
    else:
        answer(sys.argv[1], Path(sys.argv[2]))
