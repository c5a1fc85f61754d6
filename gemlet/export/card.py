"""The model card: README.md of an exported folder, as the Hugging Face hub shows it.

It says what the files of the run say and nothing else. Of a folder that comes from no run it gives the shape and the
way to use it, and no history. Paths of the machine are left out: of a file with text its name is told.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from gemlet.checkpoint import STATE, read_state
from gemlet.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from gemlet.errors import GemletError
from gemlet.folder import read_config
from gemlet.hub import may_be_name
from gemlet.metrics import read_metrics
from gemlet.prepare import Meta, load_meta
from gemlet.sources import hub_name

PLOT = "loss.png"


@dataclass(frozen=True)
class Run:
    """What is known of the run that a checkpoint comes from."""

    folder: Path
    config: RunConfig
    step: int
    """The step at which the checkpoint was saved."""
    records: list[dict[str, Any]]
    """Of metrics.jsonl, up to that step."""
    tokens: Meta | None
    """What the data were, if they are still there."""

    def last(self, key: str) -> tuple[int, float] | None:
        """The step and the value of a metric when it was last measured."""
        found = ((r["step"], r[key]) for r in reversed(self.records) if isinstance(r.get(key), int | float))
        return next(found, None)


def find_run(folder: Path) -> Run | None:
    """The run that a model's folder, RUN/checkpoints/step-*, belongs to; None for any other folder."""
    folder = folder.resolve()
    run, file = folder.parent.parent, folder.parent.parent / "config.toml"
    if folder.parent.name != "checkpoints" or not file.is_file() or not (folder / STATE).is_file():
        return None
    config, state = RunConfig.from_toml(file.read_text("utf-8"), str(file)), read_state(folder)
    if config.model.to_hf() != read_config(folder).to_hf():
        raise GemletError(f"{folder} is not a checkpoint of the run {run}: its config.json is another model's")
    records = [record for record in read_metrics(run / "metrics.jsonl") if record["step"] <= state["step"]]
    return Run(run, config, state["step"], records, _tokens(run, config.data, state["data"]))


def _tokens(run: Path, data: DataConfig, fingerprint: str) -> Meta | None:
    """What is known of the tokens that a checkpoint saw, if they are where they were and still the same."""
    for folder in (run / "tokens", Path(data.source)):
        with suppress(GemletError):
            meta = load_meta(folder)
            if meta.fingerprint == fingerprint:
                return meta
    return None


def model_card(
    name: str, config: ModelConfig, run: Run | None, *, license: str | None = None, language: str | None = None
) -> str:
    """The text of README.md for a model that is to be called `name`.

    `license` is one of the hub's identifiers (apache-2.0, mit, cc-by-4.0, ...): only the author can choose it, so
    there is none by default. `language` is a code such as en; unset, it is told where the data tell it.
    """
    for key, value in (("license", license), ("language", language)):
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", value):
            example = {"license": "apache-2.0", "language": "en"}[key]
            raise GemletError(f"{key} is {value[:60]!r}, but must be an identifier of the hub, such as {example}")
    sections = [f"# {name.rpartition('/')[2]}", _what(config, run, license), _shape(config)]
    if run is not None:
        sections += [_data(run), _recipe(run), _measured(run)]
    sections += [_usage(name, run)]
    if run is not None:
        sections += [_whole_configuration(run)]
    return "\n\n".join([_front_matter(run, license, language), *sections]) + "\n"


def _front_matter(run: Run | None, license: str | None, language: str | None) -> str:
    """The YAML that the hub reads; what is not known is left out."""
    from huggingface_hub import ModelCardData

    source = "" if run is None else run.config.data.source
    dataset = hub_name(source)
    values = ModelCardData(
        language=language or ("en" if source in ("tales", "tinystories") else None),
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        datasets=None if dataset is None else ["/".join(dataset.split("/")[:2])],
        tags=["gemlet"],
    )
    return f"---\n{values.to_yaml()}\n---"


def _what(config: ModelConfig, run: Run | None, license: str | None) -> str:
    if run is None:
        return (
            f"A text model of the Gemma 3 architecture with {config.num_parameters:,} parameters, written in this form "
            "by gemlet. Nothing beside its weights tells how it was trained, on what, by whom, or under which license "
            "it may be used: look where the weights come from."
        )
    return (
        f"A small language model of {config.num_parameters:,} parameters, trained with gemlet. It is Gemma-3-class: "
        "its architecture is that of Gemma 3 ([technical report](https://arxiv.org/abs/2503.19786)), its weights were "
        "trained from scratch. It holds no weights of Google's, does not come from Google, and Google does not "
        "endorse it.\n\n"
        "It continues text of the kind it was trained on. Nothing was done to make what it writes true or harmless, "
        "and it follows no instructions." + ("\n\nIts author has named no license." if license is None else "")
    )


def _shape(config: ModelConfig) -> str:
    full = config.layers.count("full_attention")
    return "## Shape\n\n" + _table(
        {
            "parameters": f"{config.num_parameters:,}",
            "layers": f"{config.num_hidden_layers} ({config.num_hidden_layers - full} sliding, {full} full attention)",
            "width": config.hidden_size,
            "heads": f"{config.num_attention_heads} for queries, {config.num_key_value_heads} for keys and values, "
            f"{config.head_dim} wide",
            "feed-forward width": f"{config.intermediate_size:,}",
            "sliding window": f"{config.sliding_window:,} tokens",
            "context": f"{config.max_position_embeddings:,} tokens",
            "vocabulary": f"{config.vocab_size:,}",
            "output head": "the embedding" if config.tie_word_embeddings else "of its own",
        }
    )


def _data(run: Run) -> str:
    data, rows = run.config.data, {}
    rows["source"] = _source(data)
    if data.validation is not None:
        rows["validation"] = f"`{_public(data.validation)}`"
    for name, split in ({} if run.tokens is None else run.tokens.splits).items():
        rows[f"documents for {'training' if name == 'train' else name}"] = (
            f"{split.documents:,} ({split.tokens:,} tokens, {split.bytes:,} bytes of text)"
        )
    rows["tokenizer"] = {
        "bpe": f"byte-level BPE of {run.config.model.vocab_size:,} tokens, trained on the same documents",
        "gpt2": "GPT-2's",
    }.get(data.tokenizer, f"`{_public_tokenizer(data.tokenizer)}`")
    return "## Data\n\n" + _table(rows)


def _source(data: DataConfig) -> str:
    if data.source == "tales":
        return "`tales`: small stories written by gemlet's own grammar"
    if data.source == "tinystories":
        return (
            "[TinyStories](https://huggingface.co/datasets/roneneldan/TinyStories) "
            "(Eldan and Li 2023, [arXiv 2305.07759](https://arxiv.org/abs/2305.07759)), CDLA-Sharing-1.0"
        )
    name = hub_name(data.source)
    if name is not None:
        return f"[{name}](https://huggingface.co/datasets/{'/'.join(name.split('/')[:2])}) on the Hugging Face hub"
    return f"`{_public(data.source)}`, text of the author's choice"


def _recipe(run: Run) -> str:
    c: TrainConfig = run.config.train
    seen = run.step * c.tokens_per_step
    read = run.tokens.splits["train"].tokens if run.tokens is not None else 0
    rows = {
        "steps": f"{run.step:,}" + (f" of {c.max_steps:,}" if run.step < c.max_steps else ""),
        "tokens": f"{seen:,}" + (f" ({seen / read:.2f} times the training data)" if read else ""),
        "batch": f"{c.batch_size} sequences of {c.sequence_length:,} tokens",
        "optimizer": "AdamW"
        if c.optimizer == "adamw"
        else "Muon for the matrices of the blocks, AdamW for everything else",
        "learning rate": f"{c.lr:g}" + ("" if c.optimizer == "adamw" else f" (AdamW), {c.muon_lr:g} (Muon)"),
        "schedule": f"{c.warmup_steps:,} steps of warm-up, then {c.schedule} to {c.min_lr:g}"
        + ("" if c.decay_fraction == 1 else f" over the last {c.decay_fraction:.0%} of the steps after it"),
        "weight decay": f"{c.weight_decay:g}",
        "gradient norm": f"clipped at {c.grad_clip:g}" if c.grad_clip else "not clipped",
        "precision": "float32"
        if c.precision == "fp32"
        else f"weights in float32, matrix products in {_PRECISIONS[c.precision]}",
        "seed": c.seed,
    }
    return "## Recipe\n\n" + _table(rows)


_PRECISIONS = {"auto": "bfloat16 where the device has it", "bf16": "bfloat16", "fp16": "float16"}


def _measured(run: Run) -> str:
    """The losses in metrics.jsonl; a figure that was measured before the checkpoint's step says at which."""
    names = {
        "train/loss": "training loss, nats per token of the last batch",
        "val/loss": "validation loss, nats per token",
        "val/ppl": "validation perplexity, per token",
        "val/bpb": "validation loss, bits per byte",
    }
    rows = {}
    for key, name in names.items():
        if (last := run.last(key)) is not None:
            step, value = last
            rows[name] = f"{value:.4g}" + ("" if step == run.step else f" (at step {step:,})")
    if not rows:
        return "## Measured\n\nNothing was measured up to this step."
    told = (
        f"Measured while training, on weights in float32; validation is on up to about "
        f"{run.config.train.eval_tokens:,} tokens of text that was not trained on."
    )
    plot = f"\n\n![Loss of the training run over its steps]({PLOT})" if (run.folder / PLOT).is_file() else ""
    return f"## Measured\n\n{_table(rows)}\n\n{told}{plot}"


def _usage(name: str, run: Run | None) -> str:
    prompts = () if run is None else run.config.train.sample_prompts
    prompt = json.dumps((*prompts, "Once upon a time")[0], ensure_ascii=False)
    called = json.dumps(name, ensure_ascii=False)
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {called}  # the path of this folder, or the model's name on the hub
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
inputs = tokenizer({prompt}, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=200, do_sample=True, temperature=0.8)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

With gemlet:

```python
import gemlet

lm = gemlet.load({called})
print(lm.generate({prompt}, max_new_tokens=200, temperature=0.8))
```"""


def _whole_configuration(run: Run) -> str:
    data = run.config.data
    shown = run.config.replace(
        data=data.replace(
            source=_public(data.source),
            validation=None if data.validation is None else _public(data.validation),
            tokenizer=_public_tokenizer(data.tokenizer),
        )
    )
    return (
        "<details><summary>The whole configuration of the run</summary>\n\n"
        f"```toml\n{shown.to_toml().strip()}\n```\n\n</details>"
    )


def _public(source: str) -> str:
    """A source without what it tells of the machine: of a path its last part."""
    return source if hub_name(source) is not None else PurePath(source).name


def _public_tokenizer(tokenizer: str) -> str:
    """The same for a tokenizer, which may be that of a model on the hub."""
    return tokenizer if may_be_name(tokenizer) else PurePath(tokenizer).name


def _table(rows: Mapping[str, object]) -> str:
    lines = [f"| {key} | {str(value).replace('|', chr(92) + '|')} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
