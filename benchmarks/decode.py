"""Decoding on a CPU, side by side: gemlet, llama.cpp and transformers with the same random weights, one text each.

    python -m benchmarks.decode --tokenizer FOLDER --peers PYTHON decode prefill
    python -m benchmarks.decode --tokenizer FOLDER context memory startup

`--peers` is an interpreter that has transformers and llama-cpp-python; without it only gemlet runs. `--tokenizer` is a
folder with GPT-2's (or `gpt2`, from the hub). Every engine is a process of its own that waits while another one
works; the rounds alternate; medians are printed, with the least and the largest. The bandwidth is what two threads
read of 512 MiB in the same run.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT, NEW = 16, 256
PREFILL = 1024
CONTEXTS = (64, 512, 2048, 8192, 32_000)
OURS = ("gemlet bf16", "gemlet int8", "gemlet int4", "gemlet fp32")
PEERS = (
    "llama.cpp bf16",
    "llama.cpp f16",
    "llama.cpp q8_0",
    "llama.cpp q4_0",
    "transformers bf16",
    "transformers fp32",
)


def ids(count: int) -> list[int]:
    return [(7919 * i + 13) % 50_000 for i in range(count)]


# ---- the engines: each gives a function (task, size) -> seconds


def gemlet(dtype: str, folder: Path, threads: int) -> Callable[[str, int], float]:
    import torch

    from gemlet.folder import StoredModel
    from gemlet.ready import Ready

    torch.set_num_threads(threads)
    ready = Ready(StoredModel(folder / ("fp32" if dtype == "fp32" else "bf16")), dtype, wait=True)

    def run(task: str, size: int) -> float:
        prompt = ids(size)
        decoder = ready.decoder(1, 32_768)
        start = time.perf_counter()
        if task == "prefill":
            decoder.prefill(0, prompt)
            return time.perf_counter() - start
        if task == "context":  # what lies in the cache does not matter for the time
            for at in range(size - 4, size):
                decoder.step([7], [0], [at])
            start = time.perf_counter()
            for at in range(size, size + 32):
                decoder.step([7], [0], [at])
            return (time.perf_counter() - start) / 32
        token = int(decoder.prefill(0, prompt).argmax())
        start = time.perf_counter()
        for at in range(size, size + NEW):
            token = int(decoder.step([token], [0], [at]).argmax())
        return (time.perf_counter() - start) / NEW

    return run


def llama(dtype: str, folder: Path, threads: int) -> Callable[[str, int], float]:
    from llama_cpp import Llama  # type: ignore

    model = Llama(
        str(folder / f"{dtype}.gguf"), n_ctx=2048, n_batch=1024, n_ubatch=512, n_threads=threads,
        n_threads_batch=threads, verbose=False,
    )  # fmt: skip

    def run(task: str, size: int) -> float:
        model.reset()
        start = time.perf_counter()
        model.eval(ids(size))
        if task == "prefill":
            return time.perf_counter() - start
        token = model.sample(temp=0)
        start = time.perf_counter()
        for _ in range(NEW):
            model.eval([token])
            token = model.sample(temp=0)
        return (time.perf_counter() - start) / NEW

    return run


def transformers(dtype: str, folder: Path, threads: int) -> Callable[[str, int], float]:
    import torch
    from transformers import AutoModelForCausalLM  # type: ignore

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder / dtype, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], attn_implementation="sdpa"
    ).eval()

    def run(task: str, size: int) -> float:
        prompt = torch.tensor([ids(size)])

        def generate(new: int) -> float:
            start = time.perf_counter()
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
            return time.perf_counter() - start

        with torch.inference_mode():
            if task == "prefill":
                return generate(1)
            once = generate(1)
            new = NEW if dtype == "fp32" else 32  # where bf16 products are emulated, 256 take minutes
            return (generate(new + 1) - once) / new

    return run


def bandwidth(dtype: str, folder: Path, threads: int) -> Callable[[str, int], float]:
    """Seconds a byte."""
    import torch

    torch.set_num_threads(threads)
    memory = torch.ones(2**27)

    def run(task: str, size: int) -> float:
        times = []
        for _ in range(8):
            start = time.perf_counter()
            memory.sum()
            times.append((time.perf_counter() - start) / memory.nbytes)
        return min(times)

    return run


ENGINES = {"gemlet": gemlet, "llama.cpp": llama, "transformers": transformers, "bandwidth": bandwidth}


def child(name: str, folder: Path, threads: int) -> None:
    engine, _, dtype = name.partition(" ")
    run = ENGINES[engine](dtype, folder, threads)
    print("ready", flush=True)
    for line in sys.stdin:
        task, size = line.split()
        print(run(task, int(size)), flush=True)


class Child:
    def __init__(self, name: str, folder: Path, arguments: argparse.Namespace):
        python = sys.executable if name.startswith(("gemlet", "bandwidth")) else arguments.peers
        command = [python, "-m", "benchmarks.decode", "--child", name, "--folder", str(folder)]
        command += ["--threads", str(arguments.threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.name, self.ready = name, False

    def _line(self) -> str:
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            if line.strip() == "ready" or line[0].isdigit():
                return line
        raise RuntimeError(f"{self.name} ended")

    def run(self, task: str, size: int) -> float:
        assert self.process.stdin is not None
        if not self.ready:
            self.ready = bool(self._line())
        self.process.stdin.write(f"{task} {size}\n")
        self.process.stdin.flush()
        return float(self._line())

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


# ---- the questions


def rates(tasks: list[str], arguments: argparse.Namespace, folder: Path) -> None:
    """Tokens a second of everyone, and the share of the bandwidth that reading the weights takes."""
    names = [name for name in (*OURS, *PEERS) if name in OURS or arguments.peers]
    names = [name for name in names if not arguments.only or name in arguments.only]
    children = [Child(name, folder, arguments) for name in ("bandwidth", *names)]
    memory, *engines = children
    bytes_of = sizes(folder)
    for task in tasks:
        size, tokens = (PROMPT, 1) if task == "decode" else (PREFILL, PREFILL)
        times: dict[Child, list[float]] = {child: [] for child in children}
        for _ in range(arguments.rounds + 1):
            for child in children:
                times[child].append(child.run(task, size))
        times = {child: measured[1:] for child, measured in times.items()}  # the first one warms up
        floor = statistics.median(times[memory])
        print(f"{task} {size}: the machine reads {1e-9 / floor:.1f} GB/s", flush=True)
        for engine in engines:
            middle = tokens / statistics.median(times[engine])
            least, most = tokens / max(times[engine]), tokens / min(times[engine])
            share = f", {bytes_of[engine.name] * floor * middle:.2f} of the bandwidth" if task == "decode" else ""
            print(f"  {engine.name:18}{middle:8.1f} tokens/s ({least:.1f} to {most:.1f}){share}", flush=True)
    for child in children:
        child.end()


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of weights that a token reads: the embedding once, as the head."""
    weights = (folder / "bf16" / "model.safetensors").stat().st_size // 2
    head = 50_257 * 640
    ours = {
        "gemlet bf16": 2 * weights, "gemlet fp32": 4 * weights, "gemlet int8": weights,
        "gemlet int4": (weights - head) * 18 // 32 + head,
        "transformers bf16": 2 * weights, "transformers fp32": 4 * weights,
    }  # fmt: skip
    return ours | {f"llama.cpp {file.stem}": file.stat().st_size for file in folder.glob("*.gguf")}


def context(arguments: argparse.Namespace, folder: Path) -> None:
    for name in OURS[:2]:
        engine = Child(name, folder, arguments)
        for size in CONTEXTS:
            times = [engine.run("context", size) for _ in range(arguments.rounds)]
            print(f"context {size}: {name}: {1e3 * statistics.median(times):.2f} ms a token", flush=True)
        engine.end()


def memory(arguments: argparse.Namespace, folder: Path) -> None:
    """Peak resident memory of a process that writes 256 tokens, and the parts of it."""
    write = f"import gemlet; lm = gemlet.load({str(folder / 'bf16')!r}, 'cpu')"
    for name, code in {
        "Python and what gemlet imports": "import gemlet; gemlet.load",
        "the same with its model": write,
        "256 tokens, bf16": f"{write}; lm.generate('x', seed=0)",
        "import torch": "import torch",
    }.items():
        subprocess.run([sys.executable, "-c", code], check=True)
        # a child's ru_maxrss would begin at that of its parent
        report = f"{code}\nprint(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
        peak = subprocess.run([sys.executable, "-c", report], check=True, capture_output=True, text=True).stdout
        print(f"memory: {name}: {int(peak.split()[-1]) / 1024:.0f} MiB", flush=True)


def startup(arguments: argparse.Namespace, folder: Path) -> None:
    """From the command to the first character, and to the last of 256 tokens; `--model` is measured, too.

    Three ways in turns: the kernel is there; it is compiled meanwhile, as the first time on a machine; torch alone, as
    where there is no compiler.
    """
    models = {arguments.preset: str(folder / "bf16"), **({arguments.model: arguments.model} if arguments.model else {})}
    for name, model in models.items():
        times: dict[str, list[tuple[float, float]]] = {"kernel": [], "kernel compiled meanwhile": [], "torch alone": []}
        told = set()
        for _ in range(arguments.rounds):
            with tempfile.TemporaryDirectory() as empty:
                fresh = {"XDG_CACHE_HOME": empty}
                for way, changes in zip(times, ({}, fresh, {**fresh, "PATH": "", "CXX": ""}), strict=True):
                    first, last, text = _timed(model, {**os.environ, **changes})
                    times[way].append((first, last))
                    told.add(text)
        assert len(told) == 1, "a text must not depend on the way"
        for way, of_way in times.items():
            first, last = (statistics.median(column) for column in zip(*of_way, strict=True))
            print(f"startup: {name}, {way}: first token {first:.2f} s, all of them {last:.2f} s", flush=True)


def _timed(model: str, environment: dict[str, str]) -> tuple[float, float, bytes]:
    command = [sys.executable, "-m", "gemlet", "generate", "--model", model, "--prompt", "Once", "--seed", "0"]
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    text = process.stdout.read(5)
    first = time.perf_counter() - start
    text += process.stdout.read()
    return first, time.perf_counter() - start, text


def guess(arguments: argparse.Namespace, folder: Path) -> None:
    """Stories of a trained model, `--model`, with and without guessing ahead: the same text, in turns."""
    import gemlet
    from gemlet.native import NativeDecoder

    lm = gemlet.load(arguments.model)
    lm.generate("Once upon a time", seed=0)  # compiles the kernel
    ahead = NativeDecoder.guesses
    for temperature in (0.0, 0.8):
        rates: dict[int, list[float]] = {ahead: [], 0: []}
        for seed in range(4 * arguments.rounds):
            texts = []
            for guesses, of_way in rates.items():
                NativeDecoder.guesses = guesses
                start = time.perf_counter()
                texts.append(lm.generate("Once upon a time", temperature=temperature, seed=seed))
                of_way.append(len(lm.tokenizer.encode(texts[-1])) / (time.perf_counter() - start))
            assert texts[0] == texts[1], "guessing must not change a text"
        gain = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
        middle = ", ".join(f"{g} guesses {statistics.median(of_way):.0f} tokens/s" for g, of_way in rates.items())
        print(f"guess: temperature {temperature}: {middle}, {gain:.2f} times", flush=True)


QUESTIONS = {"context": context, "memory": memory, "startup": startup, "guess": guess}


def prepare(folder: Path, tokenizer: str, peers: bool, preset: str) -> None:
    import torch

    from gemlet.checkpoint import save_model
    from gemlet.config import preset as named
    from gemlet.export.gguf import export_gguf
    from gemlet.model import Gemma, init_weights
    from gemlet.tokenizer import Tokenizer

    if (folder / "fp32").exists():
        return
    known = Tokenizer.load(tokenizer)
    config = named(preset).model.replace(eos_token_id=None)
    model = init_weights(Gemma(config))
    save_model(folder / "bf16", model, known, torch.bfloat16)
    save_model(folder / "fp32", model, known)
    for dtype in ("bf16", "f16", "q8_0", "q4_0") if peers else ():
        export_gguf(folder / "fp32", folder / f"{dtype}.gguf", dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", choices=["decode", "prefill", *QUESTIONS, []])
    parser.add_argument("--tokenizer", default="gpt2")
    parser.add_argument("--preset", default="gemma3-270m-gpt2")
    parser.add_argument("--model", help="a trained model, for guess and startup")
    parser.add_argument("--peers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child")
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments.folder, arguments.threads)
    with tempfile.TemporaryDirectory() as place:
        folder = arguments.folder or Path(place)
        prepare(folder, arguments.tokenizer, bool(arguments.peers), arguments.preset)
        tasks = [question for question in arguments.questions if question in ("decode", "prefill")]
        if tasks:
            rates(tasks, arguments, folder)
        for question in arguments.questions:
            if question not in tasks:
                QUESTIONS[question](arguments, folder)


if __name__ == "__main__":
    main()
