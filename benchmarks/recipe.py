"""Which recipe learns most from the same tokens: `python -m benchmarks.recipe --data TEXT --valid TEXT --out FOLDER`.

One model (`shape`), the same data, and for every seed the same initial weights and order of the data. `seed` is the
recipe that this project set out from; `ours` is Muon in small batches (the presets differ); every other name is `ours`
with one lever moved.
A run becomes a line of FOLDER/runs.jsonl and is not run again; table and plot are drawn from all lines.

Losses are nats per token of whole held-out documents (`gemlet.evaluate`): the curve on the first CURVE_DOCUMENTS of
them, the figure in the table on all. Tokens are counted and time is not: the speed of the machine does not matter.
"""

import argparse
import json
import math
import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from torch import Tensor

import gemlet.optim
from gemlet.config import DataConfig, ModelConfig, TrainConfig, preset
from gemlet.data import TokenStream, batch, document_starts
from gemlet.device import DTYPES, pick_precision
from gemlet.evaluate import evaluate_tokens
from gemlet.kernels import muon
from gemlet.loss import linear_cross_entropy
from gemlet.model import Gemma, init_weights
from gemlet.optim import Muon, lr_at, make_optimizers, set_lr
from gemlet.prepare import prepare
from gemlet.tokenizer import Tokenizer

VOCABULARY = 2048
T = 256
EVENED, AVAILABLE = Muon.evened, muon.available
JORDAN = ((3.4445, -4.7750, 2.0315),)
"""The polynomial of Newton and Schulz as Muon began with it (Jordan et al. 2024)."""
CURVE_DOCUMENTS = 40
COLORS = ("#3b76c4", "#c8403f", "#e0a030", "#3f9a6b", "#8250b4", "#6b7280")


def shape(model: str) -> ModelConfig:
    """The quick start's model at some width (at 128 it is just that), or the model of a preset."""
    if not model.isdecimal():
        return preset(model).model.replace(vocab_size=VOCABULARY)
    width = int(model)
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=width // 2,
        sliding_window=256,
        max_position_embeddings=1024,
        layer_types=("sliding_attention", "full_attention", "sliding_attention", "full_attention"),
    )


@dataclass(frozen=True)
class Recipe:
    """A training configuration, and what no configuration can say."""

    train: dict[str, Any] = field(default_factory=dict)
    """Fields of TrainConfig."""
    tokens: float = 1
    """How many times the tokens of `--tokens` it gets."""
    warmup: float = 0.1
    """The part of the steps over which the rate rises."""
    rises: bool = False
    """The rate rises, along a half cosine, from a fifth of the peak to the peak."""
    bf16_weights: bool = False
    """The weights are rounded to bfloat16 after every update: what weights kept in bfloat16 lose, on any machine."""
    decays_all: bool = False
    """Weight decay for embeddings and norms, too."""
    post_norm_gain: float = 1
    """Initial gain of the norms behind attention and MLP."""
    embedding_scale: float = 1
    """Times the initial embedding."""
    ema: float = 0
    """Scored is an average of the weights over about this part of the steps."""
    polynomials: tuple[tuple[float, float, float], ...] = gemlet.optim.POLYNOMIALS
    """Those by which Muon orthogonalises."""
    evened: bool = True
    """Muon evens out what it has orthogonalised."""
    aligned: bool = False
    """Every sequence begins with a document."""

    def but(self, train: dict[str, Any] | None = None, **changes: Any) -> "Recipe":
        """This recipe with something changed."""
        return replace(self, train={**self.train, **(train or {})}, **changes)

    def config(self, tokens: int, seed: int) -> TrainConfig:
        """The configuration of a run on about `tokens` tokens."""
        values: dict[str, Any] = {"batch_size": 8, "seed": seed, **self.train}
        steps = round(tokens * self.tokens / values["batch_size"] / T)
        return TrainConfig(**values, sequence_length=T, max_steps=steps, warmup_steps=round(steps * self.warmup))


OURS = Recipe(
    {
        "optimizer": "muon",
        "lr": 0.008,
        "muon_lr": 0.04,
        "momentum": 0.85,
        "schedule": "linear",
        "decay_fraction": 0.6,
        "weight_decay": 0.0,
        "batch_size": 4,
    }
)
# AdamW at a rate that rises by mistake, large batches, bfloat16 weights, decay of everything. 1e-4 is reached after
# 0.7 % of the tokens, and the rise fills whatever number of tokens there is, which is the kindest reading.
# Clipping, epsilon and the shape of the rise are assumed: what is at hand of that recipe does not give them.
SEED = Recipe(
    {"optimizer": "adamw", "lr": 5e-4, "batch_size": 512, "weight_decay": 0.1, "grad_clip": 0.5, "adam_eps": 1e-9},
    tokens=2.5,
    warmup=0.007,
    rises=True,
    bf16_weights=True,
    decays_all=True,
)
RECIPES = {
    "ours": OURS,
    "seed": SEED,
    "seed, 10 times the tokens": SEED.but(tokens=10),
    "seed, 4 sequences a step": SEED.but({"batch_size": 4}, tokens=1),
    "AdamW instead of Muon, rate 0.004": OURS.but({"optimizer": "adamw", "lr": 0.004}),
    "AdamW instead of Muon, rate 0.01": OURS.but({"optimizer": "adamw", "lr": 0.01}),
    "AdamW instead of Muon, rate 0.02": OURS.but({"optimizer": "adamw", "lr": 0.02}),
    "Muon's rate x 0.5": OURS.but({"muon_lr": 0.02}),
    "Muon's rate x 2": OURS.but({"muon_lr": 0.08}),
    "AdamW's rate x 0.5": OURS.but({"lr": 0.004}),
    "AdamW's rate x 2": OURS.but({"lr": 0.016}),
    "batch x 0.5": OURS.but({"batch_size": 2}),
    "batch x 2": OURS.but({"batch_size": 8}),
    "batch x 2, post-norm gain 0.2": OURS.but({"batch_size": 8}, post_norm_gain=0.2),
    "batch x 4": OURS.but({"batch_size": 16}),
    "constant rate": OURS.but({"min_lr": 0.008}),
    "rate falls over all steps": OURS.but({"decay_fraction": 1.0}),
    "rate falls over the last 30 %": OURS.but({"decay_fraction": 0.3}),
    "rate falls along a cosine": OURS.but({"schedule": "cosine"}),
    "warm-up 3 % instead of 10 %": OURS.but(warmup=0.03),
    "post-norm gain 0.5": OURS.but(post_norm_gain=0.5),
    "post-norm gain 0.2": OURS.but(post_norm_gain=0.2),
    "post-norm gain 0.1": OURS.but(post_norm_gain=0.1),
    "embedding x 0.3": OURS.but(embedding_scale=0.3),
    "embedding x 3": OURS.but(embedding_scale=3),
    "average of the weights, 3 %": OURS.but(ema=0.03),
    "average of the weights, 10 %, constant rate": OURS.but({"min_lr": 0.008}, ema=0.1),
    "weight decay 0.1": OURS.but({"weight_decay": 0.1}),
    "beta2 0.99": OURS.but({"beta2": 0.99}),
    "Muon's momentum 0.7": OURS.but({"momentum": 0.7}),
    "Muon's momentum 0.95": OURS.but({"momentum": 0.95}),
    "Muon's first polynomial, three times": OURS.but(polynomials=3 * JORDAN),
    "Muon's first polynomial, five times": OURS.but(polynomials=5 * JORDAN),
    "Muon's updates as they are orthogonalised": OURS.but(evened=False),
    "no clipping": OURS.but({"grad_clip": 0.0}),
    "sequences begin with a document": OURS.but(aligned=True),
    "a token sees its document alone": OURS.but({"separate_documents": True}),
}
PLOTTED = {
    "ours": "ours",
    "seed, 10 times the tokens": "the recipe we set out from",
    "seed, 4 sequences a step": "the same in our small batches",
    "AdamW instead of Muon, rate 0.01": "ours with AdamW instead of Muon",
}


def run(name: str, seed: int, tokens: int, model_name: str, data: Path, compiled: bool) -> dict[str, Any]:
    """Train by a recipe; its curve [(tokens, loss)] and its loss at the end."""
    recipe = RECIPES[name]
    config = recipe.config(tokens, seed)
    stream, tokenizer = TokenStream.open(data, "train"), Tokenizer.load(data)
    documents = list(TokenStream.open(data, "validation").documents())
    documents = [d[1:] if d[:1] == tokenizer.prompt_ids("")[:1] else d for d in documents]
    n_bytes = sum(len(tokenizer.decode(ids).encode()) for ids in documents)
    begins = beginnings(stream) if recipe.aligned else None

    model = init_weights(Gemma(shape(model_name)), seed)
    for key, p in model.named_parameters():
        if "post_" in key:
            p.data.fill_(recipe.post_norm_gain - 1)
        if "embed_tokens" in key:
            p.data.mul_(recipe.embedding_scale)
    average = init_weights(Gemma(shape(model_name)), seed) if recipe.ema else model
    for each in (model, average):
        each.compute_in(DTYPES[pick_precision("auto", each.device)])
    if compiled:
        for block in model.model.layers:
            block.compile(dynamic=False)
    optimizers = make_optimizers(model, config)
    gemlet.optim.POLYNOMIALS = recipe.polynomials
    muon.available = AVAILABLE if recipe.evened else lambda x: False  # only plain torch can do without
    Muon.evened = EVENED if recipe.evened else lambda self, params, updates: updates.new_ones(1)
    if recipe.decays_all:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["weight_decay"] = config.weight_decay

    curve, train_losses, due = [], [], 2**14
    for step in range(config.max_steps):
        x, y = batch(stream, config, step) if begins is None else aligned_batch(stream, begins, config, step)
        total = 0.0
        for xs, ys in zip(x.split(8), y.split(8), strict=True):
            starts = document_starts(xs, stream.begin_token_id) if config.separate_documents else None
            part = linear_cross_entropy(model.model(xs, starts=starts), model.head_weight, ys) / y.numel()
            part.backward()
            total += part.item()
        train_losses.append(total)
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        set_lr(optimizers, rising(step, config) if recipe.rises else lr_at(step, config))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if recipe.bf16_weights:
            for p in model.parameters():
                p.data.copy_(p.data.bfloat16())
        if recipe.ema:
            # the average begins as a plain mean of the steps so far
            weight = max(1 / (step + 1), 1 / (recipe.ema * config.max_steps))
            for p, q in zip(average.parameters(), model.parameters(), strict=True):
                p.data.lerp_(q.data, weight)
        seen = (step + 1) * config.tokens_per_step
        if seen >= due and step + 1 < config.max_steps:
            few = evaluate_tokens(average, tokenizer, documents[:CURVE_DOCUMENTS], n_bytes)
            curve.append((seen, few.nats_per_token))
            due = seen * 1.4
    few = evaluate_tokens(average, tokenizer, documents[:CURVE_DOCUMENTS], n_bytes)
    curve.append((config.max_steps * config.tokens_per_step, few.nats_per_token))
    all_of_them = evaluate_tokens(average, tokenizer, documents, n_bytes)
    return {
        "recipe": name,
        "seed": seed,
        "tokens": config.max_steps * config.tokens_per_step,
        "steps": config.max_steps,
        "loss": all_of_them.nats_per_token,
        "bits_per_byte": all_of_them.bits_per_byte,
        "curve": curve,
        "train": [round(v, 3) for v in train_losses],
        "config": asdict(recipe),
    }


def rising(step: int, config: TrainConfig) -> float:
    """A fifth of the peak after the warm-up, the peak at the last step."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps / 5
    done = (step - config.warmup_steps) / (config.max_steps - 1 - config.warmup_steps)
    return 1 - 0.8 * (1 + math.cos(math.pi * done)) / 2


def beginnings(stream: TokenStream) -> Tensor:
    """Where the documents begin that have a whole sequence before the end of the stream."""
    tokens = torch.from_numpy(stream.slice(0, len(stream)))
    starts = torch.cat((torch.zeros(1, dtype=torch.long), (tokens == stream.eos_token_id).nonzero().squeeze(1) + 1))
    return starts[starts + T + 1 <= len(stream)]


def aligned_batch(stream: TokenStream, begins: Tensor, config: TrainConfig, step: int) -> tuple[Tensor, Tensor]:
    """Like `gemlet.data.batch`, but every row begins with a document."""
    rows = []
    for row in range(step * config.batch_size, (step + 1) * config.batch_size):
        epoch, index = divmod(row, len(begins))
        order = torch.randperm(len(begins), generator=torch.Generator().manual_seed(config.seed * 1000 + epoch))
        rows.append(torch.from_numpy(stream.slice(int(begins[order[index]]), T + 1)))
    tokens = torch.stack(rows)
    return tokens[:, :-1], tokens[:, 1:]


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: what every recipe reached, and by how much that is more than ours with the same seeds."""
    lines = ["| recipe | runs | tokens | nats per token | bits per byte | against ours |", "|---|---|---|---|---|---|"]
    ours = {r["seed"]: r["loss"] for r in runs if r["recipe"] == "ours"}
    rows = []
    for name in RECIPES:
        of_name = [r for r in runs if r["recipe"] == name]
        if not of_name:
            continue
        mean = statistics.mean(r["loss"] for r in of_name)
        bits = statistics.mean(r["bits_per_byte"] for r in of_name)
        apart = [r["loss"] - ours[r["seed"]] for r in of_name if r["seed"] in ours]
        against = f"{statistics.mean(apart):+.3f}" if apart and name != "ours" else ""
        if len(apart) > 1 and against:
            against += f" ({min(apart):+.3f} to {max(apart):+.3f})"
        rows.append(
            (mean, f"| {name} | {len(of_name)} | {of_name[0]['tokens']:,} | {mean:.3f} | {bits:.3f} | {against} |")
        )
    return "\n".join([*lines, *(line for _, line in sorted(rows))]) + "\n"


def overtaken(ours: list[dict[str, Any]], other: dict[str, Any]) -> float:
    """Tokens after which ours is, on the mean of its seeds, where the other recipe ends (on the curve's documents).

    If ours is there at the first point of its curve, that point: it may have been there before.
    """
    goal = other["curve"][-1][1]
    before = None
    for points in zip(*(r["curve"] for r in ours), strict=True):
        after = (points[0][0], statistics.mean(loss for _, loss in points))
        if after[1] <= goal:
            if before is None:
                return after[0]
            part = (before[1] - goal) / (before[1] - after[1])
            return before[0] + part * (after[0] - before[0])
        before = after
    return math.inf


def plot(runs: list[dict[str, Any]], names: dict[str, str], file: Path) -> None:
    """Validation loss against tokens, of the recipes in `names` (name -> label), every seed a line."""
    figure = Figure(figsize=(9, 5), dpi=160, facecolor="white", layout="constrained")
    axes = figure.subplots()
    for color, (name, label) in zip(COLORS, names.items(), strict=False):
        curves = [r["curve"] for r in runs if r["recipe"] == name]
        for i, curve in enumerate(curves):
            axes.plot(*zip(*curve, strict=True), color=color, marker=".", label="" if i else label)
    axes.set(xscale="log", xlabel="tokens", ylabel="validation loss, nats per token")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.grid(color="#e5e7eb")
    axes.legend(frameon=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(file)


def read(file: Path) -> list[dict[str, Any]]:
    """The runs so far."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def report(out: Path, tokens: int, model: str) -> None:
    """Write table.md and recipe.png from the runs of this model on this many tokens."""
    runs = [r for r in read(out / "runs.jsonl") if (r["budget"], r["model"]) == (tokens, model)]
    text = table(runs)
    ours = [r for r in runs if r["recipe"] == "ours"]
    for name in (n for n in RECIPES if n.startswith("seed")):
        for r in (r for r in runs if r["recipe"] == name and ours):
            at = overtaken(ours, r)
            text += (
                f"\n{name}, seed {r['seed']}: {r['tokens']:,} tokens; ours is there after {at:,.0f}: "
                f"{r['tokens'] / at:.1f} times fewer\n"
            )
    (out / "table.md").write_text(text)
    plot(runs, PLOTTED, out / "recipe.png")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="documents to train on")
    parser.add_argument("--valid", required=True, help="documents to score")
    parser.add_argument("--out", required=True, type=Path, help="folder of the tokens, the runs, table and plot")
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens of a run (400,000)")
    parser.add_argument("--model", default="64", help="the width of a small model, or a preset (64)")
    parser.add_argument("--seeds", type=int, default=1, help="runs a recipe (1)")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), help="names (all)")
    parser.add_argument("--compile", action="store_true", help="compile the blocks: pays from a few runs on")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    prepare(DataConfig(source=args.data, validation=args.valid), args.out / "tokens", vocab_size=VOCABULARY)
    file = args.out / "runs.jsonl"
    file.touch()
    for seed in range(args.seeds):
        for name in args.recipes:
            done = {(r["recipe"], r["seed"], r["budget"], r["model"]) for r in read(file)}
            if (name, seed, args.tokens, args.model) in done:
                continue
            result = run(name, seed, args.tokens, args.model, args.out / "tokens", args.compile)
            with file.open("a") as f:
                f.write(json.dumps({**result, "budget": args.tokens, "model": args.model}) + "\n")
            print(f"{name:<40} {seed} {result['tokens']:>9,} tokens {result['loss']:.4f}", flush=True)
    report(args.out, args.tokens, args.model)


if __name__ == "__main__":
    main()
