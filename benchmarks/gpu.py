"""What a GPU makes of gemlet, beside transformers and a plain port. Each part runs in a process of its own.

    python -m benchmarks.gpu                            # everything; `make gpu` runs the tests of tests/gpu before
    python -m benchmarks.gpu --only decode --only recipe --data stories.txt
    python -m benchmarks.gpu --device cpu --tiny        # a dry run: every part works; its figures mean nothing

Results are appended to a JSON file, one record a part, with the versions and the device that they belong to; a part
that fails leaves its error there, and the others go on. Nothing is fetched from a network.

- throughput: a whole training step (forward, backward, clipping, AdamW), float32 weights, 16-bit products, T = 512,
  the same random tokens for all; tokens/s from the median step, MFU by `metrics.flops_per_token`, the most memory.
- long: the same of one sequence of 32,768; ours also with less memory, at the cost of some products.
- vocabulary: the same with 262,144 tokens, beside a plain cross-entropy over all logits (the port).
- decode: greedy tokens/s behind a short prompt, after a warm-up, all sequences together.
- recipe: `gemlet train` itself with a preset, for a fixed time: as many steps as the time allows at the rate that a
  short run shows, so that the schedule ends with it; fewer where the text would be read more than TIMES_READ times.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemlet.config import ModelConfig, RunConfig, preset
from gemlet.device import DTYPES, pick_precision
from gemlet.metrics import flops_per_token, peak_flops, peak_memory_gib

RIVALS = ("gemlet", "transformers", "transformers compiled", "plain compiled")
TIMED_SECONDS = 10
"""Steps are timed for so long, twenty at most: of 32,768 tokens one takes a peer seconds."""
TIMES_READ = 6
"""What a model of millions of parameters learns from a small text by reading it again, it has learnt by then."""
DECODERS = ("gemlet", "transformers", "transformers static compiled")


def parts(args: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every part by its name."""
    tiny = args.tiny
    model = preset("gemma3-270m-gpt2").model
    large = preset("gemma3-270m").model
    length, long, rows = 512, 32_768, args.batch
    if tiny:
        from gemlet.testing import tiny_config

        model, large = tiny_config(), tiny_config(vocab_size=2048)
        length, long, rows = 16, 64, 2
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for rival in RIVALS:
        found[f"throughput, {rival}"] = lambda r=rival: training(args, model, r, rows, length)
    found["throughput, gemlet with Muon"] = lambda: training(args, model, "gemlet", rows, length, optimizer="muon")
    found["long, gemlet, MLPs computed again"] = lambda: training(
        args, model, "gemlet", 1, long, gradient_checkpointing=True
    )
    for rival in ("gemlet", "transformers", "plain compiled"):
        found[f"long, {rival}"] = lambda r=rival: training(args, model, r, 1, long)
    for rival in ("gemlet", "plain compiled"):
        found[f"vocabulary, {rival}"] = lambda r=rival: training(args, large, r, max(1, rows // 4), length)
    for batch in (1, 2) if tiny else (1, 8, 64, 256):
        for rival in DECODERS:
            found[f"decode {batch}, {rival}"] = lambda r=rival, b=batch: decoding(args, model, r, b)
    for seconds in (1,) if tiny else (60, 120):
        found[f"recipe {seconds} s"] = lambda s=seconds: recipe(args, s)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Training


def training(
    args: argparse.Namespace, model: ModelConfig, rival: str, rows: int, length: int, **changes: Any
) -> dict[str, Any]:
    """Steps of one model on random tokens; `changes` of TrainConfig."""
    device = torch.device(args.device)
    precision = pick_precision("auto", device)
    train = RunConfig().train.replace(
        batch_size=rows, sequence_length=length, device=args.device, precision=precision, **changes
    )
    run = RunConfig(model=model, train=train)
    began = time.perf_counter()
    step = _STEPS[rival.split()[0]](run, device, compiled="compiled" in rival or (rival == "gemlet" and not args.tiny))
    for _ in range(1 if args.tiny else 5):
        step()
    _wait(device)
    warm = time.perf_counter() - began
    times: list[float] = []
    most = 2 if args.tiny else 20
    while len(times) < most and (len(times) < 3 or sum(times) < TIMED_SECONDS):
        began = time.perf_counter()
        step()
        _wait(device)
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times)
    rate, peak = rows * length / seconds, peak_flops(device, precision)
    return {
        "tokens_per_second": rate,
        "mfu": None if peak is None else rate * flops_per_token(model, length) / peak,
        "step_ms": {"median": 1e3 * seconds, "fastest": 1e3 * min(times), "slowest": 1e3 * max(times)},
        "steps": len(times),
        "peak_memory_gib": peak_memory_gib(device),
        "warm_up_seconds": warm,
        "batch": [rows, length],
        "vocabulary": model.vocab_size,
        "precision": precision,
    }


def _gemlet_step(run: RunConfig, device: torch.device, compiled: bool) -> Callable[[], object]:
    from gemlet.data import TokenStream
    from gemlet.train import new_state, speed_up, train_step

    state, t = new_state(run, device), run.train
    if compiled:
        speed_up(state, t)
    size = (64 * t.batch_size + 2) * t.sequence_length
    tokens = np.random.default_rng(0).integers(0, run.model.vocab_size, size).astype(np.uint32)
    stream = TokenStream([tokens], 0)
    return lambda: train_step(state, stream, run)


def _rival_step(
    run: RunConfig, device: torch.device, model: torch.nn.Module, loss_of: Callable[..., torch.Tensor]
) -> Callable[[], object]:
    """The usual loop: autocast, clipping, fused AdamW, the same precision as gemlet's."""
    t, dtype = run.train, DTYPES[run.train.precision]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    shape = (t.batch_size, t.sequence_length + 1)
    tokens = torch.randint(0, run.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))

    def step() -> float:
        batch = tokens.to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(batch[:, :-1], batch[:, 1:])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.item()

    return step


def _transformers_step(run: RunConfig, device: torch.device, compiled: bool) -> Callable[[], object]:
    model = _transformers_model(run.model, device)
    model.train()
    forward = torch.compile(model) if compiled else model
    # transformers shifts labels itself
    return _rival_step(run, device, model, lambda x, y: forward(input_ids=x, labels=x, use_cache=False).loss)


def _plain_step(run: RunConfig, device: torch.device, compiled: bool) -> Callable[[], object]:
    from benchmarks.plain import Plain

    model = Plain(run.model).to(device)
    return _rival_step(run, device, model, torch.compile(model) if compiled else model)


_STEPS = {"gemlet": _gemlet_step, "transformers": _transformers_step, "plain": _plain_step}


def _transformers_model(config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    model: Any = Gemma3ForCausalLM._from_config(Gemma3TextConfig(**config.to_hf()), attn_implementation="sdpa")
    return model.to(device=device, dtype=dtype)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


def decoding(args: argparse.Namespace, config: ModelConfig, rival: str, batch: int) -> dict[str, Any]:
    """Greedy tokens per second of `batch` sequences, behind the same prompt of 32 tokens."""
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    new = 8 if args.tiny else 256
    prompt = torch.randint(2, config.vocab_size, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    config = config.replace(bos_token_id=None, eos_token_id=None)  # so that nothing ends early
    if rival == "gemlet":
        from gemlet.generate import generate_samples
        from gemlet.model import Gemma, init_weights
        from gemlet.ready import Ready
        from gemlet.sampling import SamplingParams

        model = Ready(init_weights(Gemma(config)).to(device, dtype))  # as `gemlet.load` makes it
        params = SamplingParams(max_new_tokens=new, temperature=0)

        def run() -> int:
            return sum(1 for _ in generate_samples(model, prompt, params, batch))
    else:
        theirs = _transformers_model(config, device, dtype).eval()
        theirs.generation_config.eos_token_id = None
        ids = torch.tensor([prompt] * batch, device=device)
        options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        if "static" in rival:
            options["cache_implementation"] = "static"  # with which generate compiles by itself on a GPU

        def run() -> int:
            with torch.inference_mode():
                return theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, len(prompt) :].numel()

    run()
    times = []
    for _ in range(1 if args.tiny else 3):
        _wait(device)
        began = time.perf_counter()
        count = run()
        _wait(device)
        times.append(time.perf_counter() - began)
        assert count == batch * new, f"{count} tokens came, not {batch} x {new}"
    seconds = statistics.median(times)
    return {
        "tokens_per_second": batch * new / seconds,
        "fastest": batch * new / min(times),
        "slowest": batch * new / max(times),
        "new_tokens": new,
        "peak_memory_gib": peak_memory_gib(device),
        "dtype": str(dtype).removeprefix("torch."),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The recipe


def recipe(args: argparse.Namespace, seconds: int) -> dict[str, Any]:
    """A preset trained on real text for a fixed time of training, and what it then scores on held-out documents."""
    from gemlet.evaluate import evaluate
    from gemlet.lm import load
    from gemlet.prepare import load_meta, prepare
    from gemlet.sources import documents
    from gemlet.train import train

    run = preset("tales" if args.tiny else args.preset)
    source = run.data.replace(source=args.data, max_documents=300 if args.tiny else None)
    with tempfile.TemporaryDirectory() as folder:
        tokens = prepare(source, Path(folder, "tokens"), vocab_size=run.model.vocab_size)
        data = run.data.replace(source=str(tokens))
        often = {"sample_every": 0, "device": args.device, "log_every": 5}
        probe = 6 if args.tiny else 120
        train_ = {**often, "max_steps": probe, "warmup_steps": 1, "eval_tokens": 512, "save_every": probe}
        if not args.tiny:
            train_["compile"] = "on"
        short = run.replace(data=data, train=run.train.replace(**train_, eval_every=probe))
        train(short, Path(folder, "short"), quiet=True)
        rate = statistics.median(_logged(Path(folder, "short"), "train/tok_per_sec")[-10:])
        text = sum(shard.tokens for shard in load_meta(tokens).splits["train"].shards)
        steps = max(8, int(min(rate * seconds, TIMES_READ * text) / run.train.tokens_per_step))
        # and if that was too much for the text, the best of eight checkpoints counts
        whole = run.train.replace(
            **often, max_steps=steps, warmup_steps=min(run.train.warmup_steps, steps // 4), eval_every=-(-steps // 8),
            save_every=steps, compile=short.train.compile,
        )  # fmt: skip
        result = train(run.replace(data=data, train=whole), Path(folder, "run"), quiet=True)
        rates = _logged(Path(folder, "run"), "train/tok_per_sec")
        scored = {}
        if args.valid:
            lm = load(result.checkpoint, device=args.device)
            found = evaluate(lm.model, lm.tokenizer, documents(args.valid))
            scored = {"valid": Path(args.valid).name, "valid_bits_per_byte": found.bits_per_byte}
        return {
            **scored,
            "seconds_of_training": steps * run.train.tokens_per_step / statistics.mean(rates),
            "seconds_in_all": result.seconds,
            "steps": steps,
            "tokens": steps * run.train.tokens_per_step,
            "tokens_of_text": text,
            "tokens_per_second": statistics.median(rates),
            "val_loss": result.val_loss,
            "val_bits_per_byte": result.val_bpb,
            "preset": "tales" if args.tiny else args.preset,
            "data": Path(args.data).name,
        }


def _logged(folder: Path, key: str) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record[key] for record in map(json.loads, lines) if key in record]


# ---------------------------------------------------------------------------------------------------------------------
# One process a part


def machine(device: str) -> dict[str, Any]:
    """What the figures belong to."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or None,
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["transformers"] = importlib.metadata.version("transformers")
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(torch.device(device))
        found |= {"device": properties.name, "memory_gib": properties.total_memory / 2**30}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a dry run on shapes that mean nothing")
    parser.add_argument("--only", action="append", default=[], help="parts whose name begins so; may be repeated")
    parser.add_argument("--batch", type=int, default=64, help="sequences of 512 in a training step")
    parser.add_argument("--data", default="tales", help="what the recipe is trained on: a file, a folder, or tales")
    parser.add_argument("--valid", help="documents that the recipe's result is scored on, beside those it holds out")
    parser.add_argument("--preset", default="stories-42m", help="the recipe's preset")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that a part may take")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--part", help=argparse.SUPPRESS)  # in the process of one part
    args = parser.parse_args()
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here; --device cpu --tiny is a dry run", file=sys.stderr)
        return 2
    if args.part:
        print(json.dumps(parts(args)[args.part]()))
        return 0
    names = [n for n in parts(args) if not args.only or n.startswith(tuple(args.only))]
    belongs = machine(args.device)
    print(json.dumps(belongs))
    failed = 0
    for name in names:
        record = {"part": name, **_run(name, args), "on": belongs}
        failed += "error" in record
        print(f"{name:<42}{record.get('error') or _short(record)}", flush=True)
        _append(args.json, record)
    return 1 if failed else 0


def _run(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """A part's figures, or its error."""
    command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:], "--part", name]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=args.timeout, env=os.environ
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {args.timeout:.0f} s"}
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": said[-1][:300] if said else f"exit code {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def _short(record: dict[str, Any]) -> str:
    said = [f"{record['tokens_per_second']:,.0f} tokens/s"]
    if record.get("mfu"):
        said.append(f"MFU {record['mfu']:.1%}")
    if "peak_memory_gib" in record:
        said.append(f"{record['peak_memory_gib']:.2f} GiB")
    if "val_loss" in record:
        said.append(f"validation {record['val_loss']:.4f} nats, {record['val_bits_per_byte']:.4f} bits per byte")
    return "  ".join(said)


def _append(file: Path, record: dict[str, Any]) -> None:
    """The file is a JSON list that is whole after every part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    records = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    file.write_text(json.dumps([*records, record], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
