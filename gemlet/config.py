"""Everything that describes a run: the model's shape, its data, its training.

Frozen pydantic models. Unknown keys are errors that name the nearest key, all problems of a configuration are
reported together, and nothing here imports torch, so a mistake costs no waiting. Field names of the model are
those of Hugging Face's Gemma 3 `config.json`; `ModelConfig.to_hf` and `from_hf` are the two directions.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gemlet.errors import GemletError, did_you_mean
from gemlet.records import shown, validated

SLIDING, FULL = "sliding_attention", "full_attention"

_PRESETS = Path(__file__).parent / "presets"

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _tuples(values: Any, *keys: str) -> Any:
    """TOML and JSON have lists where a frozen configuration has tuples."""
    if not isinstance(values, dict):
        return values
    return {k: tuple(v) if k in keys and isinstance(v, list) else v for k, v in values.items()}


class _Strict(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, validate_default=True
    )

    def replace(self, **changes: Any) -> Self:
        """A copy with `changes`, checked again as a whole."""
        return validated(type(self), {**self.model_dump(), **changes}, "the changed configuration")


class ModelConfig(_Strict):
    """The shape of a Gemma 3 text model. The defaults are those of the official 270M model."""

    vocab_size: Annotated[int, Field(ge=2, le=2**24)] = 262_144
    """Rows of the embedding. A run takes it from its tokenizer; for a BPE trained here it is the size to train."""
    hidden_size: Annotated[int, Field(ge=1, le=2**16)] = 640
    """Width of the residual stream (D)."""
    intermediate_size: Annotated[int, Field(ge=1, le=2**20)] = 2048
    """Width of the GeGLU inside a block (F)."""
    num_hidden_layers: Annotated[int, Field(ge=1, le=1024)] = 18
    """Number of blocks."""
    num_attention_heads: Annotated[int, Field(ge=1, le=1024)] = 4
    """Query heads (N)."""
    num_key_value_heads: Annotated[int, Field(ge=1, le=1024)] = 1
    """Key-value heads (K); must divide the query heads."""
    head_dim: Annotated[int, Field(ge=2, le=4096)] = 256
    """Width of one head (H); even, because RoPE rotates pairs."""
    query_pre_attn_scalar: Positive | None = None
    """Queries are scaled by this to the power -1/2. Unset: head_dim."""
    sliding_window: Positive = 512
    """A sliding layer's token attends to itself and the `sliding_window - 1` tokens before it."""
    layer_types: tuple[Literal["sliding_attention", "full_attention"], ...] | None = None
    """The kind of every layer. Unset: five sliding, one full, and so on."""
    rope_theta: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1_000_000.0
    """RoPE base of the full layers."""
    rope_local_base_freq: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10_000.0
    """RoPE base of the sliding layers."""
    rms_norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    """Added to the mean square under the root of every norm."""
    max_position_embeddings: Annotated[int, Field(ge=1, le=2**24)] = 32_768
    """The context: a prompt and its answer never exceed it together."""
    tie_word_embeddings: bool = True
    """Whether the embedding is also the output head."""
    bos_token_id: Annotated[int, Field(ge=0)] | None = None
    """Put before a prompt. A run takes it from its tokenizer."""
    eos_token_id: Annotated[int, Field(ge=0)] | tuple[int, ...] | None = None
    """Ends a story; several for a chat model. A run takes it from its tokenizer."""
    pad_token_id: Annotated[int, Field(ge=0)] | None = None
    """Fills batches in other tools; gemlet never reads it."""

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, values: Any) -> Any:
        return _tuples(values, "layer_types", "eos_token_id")

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_key_value_heads is {self.num_key_value_heads}, but must divide "
                f"num_attention_heads, which is {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            problems.append(f"head_dim is {self.head_dim}, but must be even (RoPE rotates pairs)")
        if self.hidden_size % self.num_attention_heads:
            problems.append(
                f"hidden_size is {self.hidden_size}, but must be a multiple of num_attention_heads "
                f"({self.num_attention_heads}): transformers refuses to load anything else"
            )
        if len(self.layers) != self.num_hidden_layers:
            problems.append(
                f"layer_types names {len(self.layers)} layers, but num_hidden_layers is {self.num_hidden_layers}"
            )
        for name, ids in (("bos", self.bos_token_id), ("eos", self.eos_token_id), ("pad", self.pad_token_id)):
            given = ids if isinstance(ids, tuple) else () if ids is None else (ids,)
            wrong = [token for token in given if not 0 <= token < self.vocab_size]
            if wrong:
                problems.append(f"{name}_token_id is {wrong[0]}, but vocab_size is {self.vocab_size}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def layers(self) -> tuple[str, ...]:
        """`layer_types`, filled in."""
        return layer_pattern(self.num_hidden_layers, 6) if self.layer_types is None else self.layer_types

    @property
    def query_scale(self) -> float:
        """What the dot product of a query and a key is multiplied by."""
        return (self.head_dim if self.query_pre_attn_scalar is None else self.query_pre_attn_scalar) ** -0.5

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a generation."""
        eos = self.eos_token_id
        return frozenset(eos if isinstance(eos, tuple) else () if eos is None else (eos,))

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, the tied embedding counted once."""
        d, h = self.hidden_size, self.head_dim
        attention = 2 * d * h * (self.num_attention_heads + self.num_key_value_heads) + 2 * h
        block = attention + 3 * d * self.intermediate_size + 4 * d
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * block + d

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, None for a full layer."""
        return self.sliding_window if self.layers[layer] == SLIDING else None

    def places(self, layer: int, length: int, spare: int = 0) -> int:
        """Tokens of a text of up to `length` whose keys and values a layer keeps: `spare` more than its window."""
        window = self.window(layer)
        return length if window is None else min(window + spare, length)

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The `config.json` of a Hugging Face folder, with the position keys of both generations of transformers.

        `rope_parameters` and `layer_types` are what transformers 5 reads; `rope_theta`, `rope_local_base_freq` and
        `sliding_window_pattern` are what transformers 4, mlx-lm and older vLLM read.
        """
        values = self.model_dump()
        values["layer_types"] = list(self.layers)
        values["query_pre_attn_scalar"] = self.query_pre_attn_scalar or self.head_dim
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        pattern = next((p for p in range(1, 65) if self.layers == layer_pattern(self.num_hidden_layers, p)), None)
        if pattern is not None:
            values["sliding_window_pattern"] = pattern
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            **values,
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": self.rope_local_base_freq},
                FULL: {"rope_type": "default", "rope_theta": self.rope_theta},
            },
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
            "initializer_range": 0.02,
            "use_cache": True,
            "dtype": dtype,
            "torch_dtype": dtype,
        }

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str = "config.json") -> ModelConfig:
        """Read a Hugging Face `config.json` of either generation; refuse by name what cannot be computed exactly."""
        if values.get("model_type") != "gemma3_text":
            raise GemletError(
                f"{where}: model_type is {shown(values.get('model_type'))}, but gemlet computes 'gemma3_text' only: "
                "Gemma 3 for text alone, such as google/gemma-3-270m or google/gemma-3-1b-it"
            )
        exact: dict[str, tuple[Any, ...]] = {
            "hidden_activation": ("gelu_pytorch_tanh",),
            "attention_bias": (False,),
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
            "partial_rotary_factor": (None, 1.0),
            "auto_map": (None,),
            "quantization_config": (None,),
        }
        for key, allowed in exact.items():
            if key in values and values[key] not in allowed:
                raise GemletError(
                    f"{where}: {key} is {shown(values[key])}, but gemlet computes only "
                    f"{' or '.join(map(repr, allowed))}; it does not load a model approximately"
                )
        unset = ("layer_types", "rope_theta", "rope_local_base_freq")  # null here means that it is derived
        chosen = {
            key: values[key]
            for key in cls.model_fields
            if key in values and (values[key], key in unset) != (None, True)
        }
        chosen.update(_rope_from_hf(values, where))
        layers = chosen.get("num_hidden_layers", 26)
        if "layer_types" not in chosen and type(layers) is int:
            chosen["layer_types"] = layer_pattern(min(layers, 1024), _pattern_from_hf(values, where))
        # What config.json leaves out has the default of transformers' Gemma3TextConfig, not the default above.
        hf_defaults = {
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "max_position_embeddings": 131_072,
        }
        for key, default in hf_defaults.items():
            chosen.setdefault(key, default)
        scalar = chosen["query_pre_attn_scalar"]
        if isinstance(scalar, float) and scalar.is_integer():  # transformers 4 was not strict about it
            chosen["query_pre_attn_scalar"] = int(scalar)
        config = validated(cls, chosen, where)
        # What can be derived stays unset, so that the config reads the same as the one it was written from.
        derived: dict[str, Any] = {}
        if config.query_pre_attn_scalar == config.head_dim:
            derived["query_pre_attn_scalar"] = None
        if config.layers == layer_pattern(config.num_hidden_layers, 6):
            derived["layer_types"] = None
        return config.model_copy(update=derived)


def layer_pattern(layers: int, pattern: int) -> tuple[Literal["sliding_attention", "full_attention"], ...]:
    """Every `pattern`-th layer is full, the others slide (Gemma 3 report, arXiv 2503.19786: pattern 6, i.e. 5:1)."""
    return tuple(FULL if (i + 1) % pattern == 0 else SLIDING for i in range(layers))


def _pattern_from_hf(values: dict[str, Any], where: str) -> int:
    """Which layers are full where `layer_types` does not say it: every n-th.

    transformers writes `_sliding_window_pattern` but reads the key without the underscore, so alone it must be the
    default.
    """
    pattern = values.get("sliding_window_pattern")
    key = "_sliding_window_pattern" if pattern is None else "sliding_window_pattern"
    given = values.get(key, 6)
    if type(given) is not int or given < 1 or (pattern is None and given != 6):
        raise GemletError(f"{where}: {key} is {shown(given)}, which does not tell the layers; give layer_types")
    return given


def _rope_from_hf(values: dict[str, Any], where: str) -> dict[str, float]:
    """The two RoPE bases, from `rope_parameters` (transformers 5) or the older keys; only plain RoPE is computed."""
    if values.get("rope_scaling") is not None:
        raise GemletError(
            f"{where}: rope_scaling is {shown(values['rope_scaling'])}, but gemlet computes plain RoPE only"
        )
    nested = values.get("rope_parameters")
    found = {}
    for kind, key in ((FULL, "rope_theta"), (SLIDING, "rope_local_base_freq")):
        bases = [] if values.get(key) is None else [values[key]]
        if nested is not None:
            rope = nested.get(kind) if isinstance(nested, dict) else None
            if not isinstance(rope, dict) or {**rope, "rope_theta": 0} not in _PLAIN_ROPE or "rope_theta" not in rope:
                raise GemletError(
                    f"{where}: rope_parameters[{kind!r}] is {shown(rope)}, but gemlet computes plain RoPE only: "
                    '{"rope_type": "default", "rope_theta": number}'
                )
            bases.append(rope["rope_theta"])
        for base in bases:
            if type(base) not in (int, float) or not 0 < base < 1e30:
                raise GemletError(f"{where}: {key} is {shown(base)}, but must be a number above 0")
            if base != bases[0]:
                raise GemletError(f"{where}: {key} is {bases[0]} but rope_parameters says {base}; make them equal")
            found[key] = float(base)
    return found


_PLAIN_ROPE = ({"rope_theta": 0}, {"rope_type": "default", "rope_theta": 0})


class DataConfig(_Strict):
    """Where the stories come from and how they become tokens."""

    source: str = "tales"
    """`tales` (written by gemlet, no download), `tinystories` (from the hub), `hub:OWNER/NAME`, a .txt / .jsonl /
    .parquet file (also .gz, .zst), a folder of them, or a folder that `gemlet prepare` wrote."""
    validation: str | None = None
    """Documents to validate on, named like `source`. Unset: about one document in a hundred is held out."""
    text_field: str = "text"
    """The column or key that holds the text, in .jsonl, .parquet and hub data."""
    split: Literal["auto", "endoftext", "blank-lines", "line", "file"] = "auto"
    """What separates documents in a .txt: endoftext, a line `<|endoftext|>`; blank-lines, every blank line; line, every
    line; file, nothing: a file is one document. auto: the end-of-text line if the file has one, else two blank lines
    in a row if it has them, else the whole file is one document."""
    tokenizer: str = "bpe"
    """`bpe` trains one on the documents, `gpt2` is GPT-2's (from the hub); or a folder, a tokenizer.json, or
    OWNER/NAME, a model on the hub that has one."""
    max_documents: Positive | None = None
    """Stop after this many documents. Unset: all of them (tales: 60,000)."""


class TrainConfig(_Strict):
    """How the weights are learned. A step is one optimizer update; a micro-batch one forward and backward pass."""

    max_steps: Positive = 1000
    """Optimizer updates of the whole run."""
    sequence_length: Annotated[int, Field(ge=2)] = 512
    """Tokens in a training sequence (T)."""
    separate_documents: bool = False
    """Whether a token sees its own document alone, instead of all that stands before it in the sequence."""
    batch_size: Positive = 32
    """Sequences in a step, over all micro-batches and ranks."""
    micro_batch_size: Positive | None = None
    """Sequences in a micro-batch on one rank; must divide the batch. Unset: the whole batch."""
    gradient_checkpointing: bool = False
    """Whether the MLPs are computed again on the way back, instead of keeping half of the memory of a long sequence."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: AdamW on everything. muon: Muon on the matrices of the blocks, AdamW on the rest."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3e-3
    """Peak learning rate of AdamW."""
    muon_lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.02
    """Peak learning rate of Muon."""
    min_lr: Rate = 0.0
    """Learning rate of AdamW at the last step; Muon's falls in the same proportion."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps over which the rate rises from 0."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Shape of the fall from the peak to min_lr."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The part of the steps after the warm-up over which the rate falls; before it the rate stays at its peak."""
    weight_decay: Rate = 0.1
    """Decoupled decay of the matrices; norms and embeddings have none."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's decay of the second moment."""
    adam_eps: Annotated[float, Field(gt=0)] = 1e-10
    """AdamW's epsilon."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Muon's momentum."""
    grad_clip: Rate = 1.0
    """Gradients are scaled down to this norm; 0 leaves them as they are."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """What the matrix products compute in; the weights are float32 always. auto: bf16 where the device has it."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the blocks. auto: when a compiler is there and the run is long enough to pay for it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the initial weights, the order of the data and the sample stories."""
    log_every: Positive = 10
    """Steps between lines of metrics."""
    eval_every: Positive = 250
    """Steps between validations; the last step is always validated."""
    eval_tokens: Positive = 65_536
    """About how many tokens of the validation documents are scored; always the same ones."""
    save_every: Positive = 250
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: Positive = 2
    """Numbered checkpoints kept, besides the best."""
    sample_every: Annotated[int, Field(ge=0)] = 500
    """Steps between sample stories; 0 tells none."""
    sample_prompts: tuple[str, ...] = ("Once upon a time",)
    """Beginnings of the sample stories."""

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, values: Any) -> Any:
        return _tuples(values, "sample_prompts")

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = []
        if self.min_lr > self.lr:
            problems.append(
                f"min_lr is {self.min_lr:g}, above lr, which is {self.lr:g}: the rate would rise; give min_lr <= lr"
            )
        if self.warmup_steps >= self.max_steps:
            problems.append(f"warmup_steps is {self.warmup_steps}, but must be below max_steps ({self.max_steps})")
        if self.batch_size % self.micro_batch:
            problems.append(
                f"micro_batch_size is {self.micro_batch}, but must divide batch_size, which is {self.batch_size}"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def micro_batch(self) -> int:
        """`micro_batch_size`, filled in."""
        return self.batch_size if self.micro_batch_size is None else self.micro_batch_size

    @property
    def tokens_per_step(self) -> int:
        """Targets in one optimizer step."""
        return self.batch_size * self.sequence_length


class RunConfig(_Strict):
    """A whole run: what `config.toml` in the run's folder holds, and what resuming it reads."""

    model: ModelConfig = ModelConfig()
    """The model's shape."""
    data: DataConfig = DataConfig()
    """The data and the tokenizer."""
    train: TrainConfig = TrainConfig()
    """The training."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.train.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"train.sequence_length is {self.train.sequence_length}, but model.max_position_embeddings is "
                f"{self.model.max_position_embeddings}"
            )
        return self

    def to_toml(self) -> str:
        """The file that `from_toml` reads; unset fields are left out."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))

    @classmethod
    def from_toml(cls, text: str, where: str = "config.toml") -> RunConfig:
        """Parse and check; `where` names the file in errors."""
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise GemletError(f"{where} is not valid TOML: {error}") from None
        return validated(cls, values, where)


def presets() -> list[str]:
    """Names of the presets in the package."""
    return sorted(path.stem for path in _PRESETS.glob("*.toml"))


def preset(name: str) -> RunConfig:
    """A preset by name, or a TOML file by path."""
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise GemletError(f"no configuration file {name}; presets in the package: {', '.join(presets())}")
        return RunConfig.from_toml(Path(name).read_text(encoding="utf-8", errors="replace"), name)
    if name not in presets():
        raise GemletError(
            f"unknown preset {name!r}{did_you_mean(name, presets())} (the presets are {', '.join(presets())}; "
            "a path to a .toml file works too)"
        )
    return RunConfig.from_toml((_PRESETS / f"{name}.toml").read_text(encoding="utf-8"), f"preset {name}")
