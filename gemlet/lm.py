"""Text in, text out: a model with its tokenizer, loaded from a folder or the hub.

    lm = load("runs/tales")
    story = "Once upon a time" + lm.generate("Once upon a time", seed=0)

`generate` and `stream` give the continuation, without the prompt; the pieces of a stream, joined, are what `generate`
returns for the same arguments.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack, overload

from gemlet.errors import GemletError, did_you_mean
from gemlet.folder import PICKLES, StoredModel, pickle_error, read_config
from gemlet.generate import generate, generate_samples
from gemlet.host import may_have_gpu
from gemlet.hub import may_be_name, repository
from gemlet.ready import Ready
from gemlet.sampling import SamplingOptions, SamplingParams
from gemlet.tokenizer import IncrementalDecoder, Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gemlet.config import ModelConfig
    from gemlet.model import Gemma


def load(source: str | Path, device: str = "auto", dtype: "str | torch.dtype" = "auto") -> "LM":
    """Load a model with its tokenizer.

    `source` is a checkpoint folder, any Gemma 3 text folder that transformers wrote, a run's folder (its best
    checkpoint) or, if there is no such folder, a model on the hub: OWNER/NAME. `device` is auto, cpu, cuda, cuda:1 or
    mps. `dtype` is that of the weights: fp32, bf16 or fp16; auto is the one they are stored in. int8 and int4 are how
    matrices are kept for writing text on a CPU; everything else goes on as with auto. A CPU computes in float32
    whatever the dtype. Raises GemletError for anything that is not such a model.
    """
    if isinstance(dtype, str) and dtype not in WEIGHTS:
        raise GemletError(f"dtype is {dtype!r}, but must be {', '.join(WEIGHTS)}, or torch's dtype for one of them")
    if dtype in MAPPED and (device == "cpu" or (device == "auto" and not may_have_gpu())):
        folder, tokenizer = _found(source)
        return LM(StoredModel(folder), tokenizer, str(dtype))  # without torch, which takes seconds to load
    import torch

    from gemlet.checkpoint import load_model
    from gemlet.device import DTYPES, pick_device

    place = pick_device(device)
    if dtype in ("int8", "int4") and place.type != "cpu":
        raise GemletError(f"{dtype} is for a CPU, but the device is {place}; take bf16, or the device cpu")
    weights = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if weights not in (None, *DTYPES.values()):
        raise GemletError(f"dtype is {dtype}, but must be one of {', '.join(map(str, DTYPES.values()))}")
    folder, tokenizer = _found(source)
    if weights is None and place.type == "cpu":
        return LM(StoredModel(folder), tokenizer, str(dtype))
    if weights is None:
        model = Ready(StoredModel(folder)).model.to(place)
        model.compute_in(None)
        return LM(model, tokenizer)
    model = load_model(folder, place, weights)
    if place.type == "cpu":
        model.compute_in(torch.float32)
    return LM(model, tokenizer)


MAPPED = ("auto", "int8", "int4")
"""What `dtype` may be that leaves the weights as they are stored."""
WEIGHTS = ("auto", "fp32", "bf16", "fp16", "int8", "int4")


def _found(source: str | Path) -> tuple[Path, Tokenizer]:
    """The model's folder and its tokenizer, which comes before the weights: what reading a large one takes for a moment
    is not on top of them.
    """
    folder = model_folder(source)
    read_config(folder)
    return folder, Tokenizer.load(folder)


class LM:
    """A language model: `model` and `tokenizer`, and text through both.

    `weights` says how the matrices are kept for writing on a CPU: auto (as they are), or one of `quantise.FORMATS`.
    """

    def __init__(self, model: "Gemma | StoredModel", tokenizer: Tokenizer, weights: str = "auto"):
        self.tokenizer = tokenizer
        self.ready = Ready(model, weights)
        """The model made ready to write."""

    @property
    def model(self) -> "Gemma":
        """The model in torch, which is loaded when it is first asked for."""
        return self.ready.model

    @property
    def config(self) -> "ModelConfig":
        """The model's shape."""
        return self.ready.config

    @overload
    def generate(
        self,
        prompt: str = "",
        *,
        stop: str | Iterable[str] = (),
        num_samples: Literal[1] = 1,
        **sampling: Unpack[SamplingOptions],
    ) -> str: ...
    @overload
    def generate(
        self, prompt: str = "", *, stop: str | Iterable[str] = (), num_samples: int, **sampling: Unpack[SamplingOptions]
    ) -> list[str]: ...
    def generate(
        self,
        prompt: str = "",
        *,
        stop: str | Iterable[str] = (),
        num_samples: int = 1,
        **sampling: Unpack[SamplingOptions],
    ) -> str | list[str]:
        """Continue a prompt; the continuation alone is returned, for several samples a list of them.

        An empty prompt lets the model begin by itself. A continuation ends with the model's end token, before the
        first of the `stop` strings, or when `max_new_tokens` or the context is used up. The other arguments are the
        fields of `gemlet.sampling.SamplingParams`: max_new_tokens, temperature, top_k, top_p, min_p,
        repetition_penalty, seed. Sample i is what seed + i gives alone.
        """
        texts = [""] * (num_samples if isinstance(num_samples, int) else 0)
        for i, piece in self.stream_samples(prompt, num_samples, stop=stop, **sampling):
            texts[i] += piece
        return texts[0] if num_samples == 1 else texts

    def stream_samples(
        self, prompt: str, num_samples: int, *, stop: str | Iterable[str] = (), **sampling: Unpack[SamplingOptions]
    ) -> Iterator[tuple[int, str]]:
        """`generate` with `num_samples`, in pieces as they are written, all side by side: pairs (sample, piece)."""
        ids, stops, params = self.tokenizer.prompt_ids(prompt), stop_strings(stop), sampling_params(sampling)
        if not isinstance(num_samples, int) or num_samples < 1:
            raise GemletError(f"num_samples is {num_samples!r}, but must be a whole number, 1 or more")
        writers = [TextWriter(self.tokenizer.decoder(), stops) for _ in range(num_samples)]
        tokens = generate_samples(self.ready, ids, params, num_samples, lambda i: writers[i].ended)
        return _sample_pieces(tokens, writers)

    def stream(
        self, prompt: str = "", *, stop: str | Iterable[str] = (), **sampling: Unpack[SamplingOptions]
    ) -> Iterator[str]:
        """`generate`, in pieces as they are written: whole characters, and never a part of a stop string."""
        tokens = generate(self.ready, self.tokenizer.prompt_ids(prompt), sampling_params(sampling))
        return _pieces(tokens, TextWriter(self.tokenizer.decoder(), stop_strings(stop)))

    def logits(self, ids: "Sequence[int] | Tensor") -> "Tensor":
        """The logits [B, T, V], float32, of what follows each token of `ids`: one sequence, or a LongTensor [B, T].

        The ids are taken as they are: begin with `tokenizer.bos_token_id` what the model should see as a beginning.
        """
        import torch

        batch = torch.as_tensor(ids)
        batch = batch[None] if batch.ndim == 1 else batch
        vocabulary, context = self.config.vocab_size, self.config.max_position_embeddings
        if batch.ndim != 2 or not batch.numel() or batch.dtype.is_floating_point or batch.dtype == torch.bool:
            raise GemletError(f"ids are {batch.dtype} {list(batch.shape)}; give whole numbers, a list or [B, T]")
        if batch.min() < 0 or batch.max() >= vocabulary:
            wrong = int(batch.min()) if batch.min() < 0 else int(batch.max())
            raise GemletError(f"ids hold {wrong}, but the model's vocabulary is 0 to {vocabulary - 1}")
        if batch.shape[1] > context:
            raise GemletError(f"ids have {batch.shape[1]} tokens, but the model's context is {context}; give fewer")
        with torch.no_grad():
            return self.model(batch.to(self.model.device, torch.long))


class TextWriter:
    """Tokens in, text out, ended before the stop string that begins first; what may be part of one is held back."""

    def __init__(self, decoder: IncrementalDecoder, stops: tuple[str, ...]):
        self.decoder, self.stops = decoder, stops
        self.held = ""
        self.ended = False

    def push(self, token: int) -> str:
        """The text that is certain now."""
        return self._release(self.decoder.push(token), last=False)

    def flush(self) -> str:
        """The rest, at the end of the tokens."""
        return "" if self.ended else self._release(self.decoder.flush(), last=True)

    def _release(self, piece: str, last: bool) -> str:
        held = self.held + piece
        stop = min((at for s in self.stops if (at := held.find(s)) >= 0), default=len(held) + 1)
        # where a stop string may have begun of which the rest is still to come
        longest = max(map(len, self.stops), default=0)
        tails = () if last else range(max(0, len(held) - longest + 1), len(held))
        begun = next((at for at in tails if any(s.startswith(held[at:]) for s in self.stops)), len(held))
        self.ended = stop <= begun
        end = min(stop, begun)
        self.held = held[end:]
        return held[:end]


def _pieces(tokens: Iterator[int], writer: TextWriter) -> Iterator[str]:
    for token in tokens:
        if piece := writer.push(token):
            yield piece
        if writer.ended:
            return
    if piece := writer.flush():
        yield piece


def _sample_pieces(tokens: Iterator[tuple[int, int]], writers: list[TextWriter]) -> Iterator[tuple[int, str]]:
    for i, token in tokens:
        if piece := writers[i].push(token):
            yield i, piece
    for i, writer in enumerate(writers):
        if piece := writer.flush():
            yield i, piece


def stop_strings(stop: str | Iterable[str]) -> tuple[str, ...]:
    """The texts that end a continuation, checked."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not isinstance(s, str) or not s for s in stops):
        raise GemletError(f"stop is {stop!r:.100}, but must be a text or several, none of them empty")
    return stops


def sampling_params(sampling: SamplingOptions) -> SamplingParams:
    """Keyword arguments as `SamplingParams`; one that there is not is refused by name."""
    allowed = SamplingParams.__dataclass_fields__
    for name in sampling:
        if name not in allowed:
            raise GemletError(
                f"unknown argument {name!r}{did_you_mean(name, allowed)} (there are {', '.join(allowed)})"
            )
    return SamplingParams(**sampling)


def model_folder(source: str | Path) -> Path:
    """The folder that holds the model: the one named, the best checkpoint of a run, or the cached copy of the hub's."""
    path = Path(source).expanduser()
    if path.is_dir():
        run = () if (path / "config.json").exists() else (path / "checkpoints" / "best", path / "checkpoints" / "last")
        return next((inside for inside in run if inside.is_dir()), path)
    if not may_be_name(source):
        raise GemletError(f"no model folder {source}: give a run, a checkpoint, or a hub name, OWNER/NAME")
    name = str(source)
    model = repository(name, "model")
    if "config.json" not in model.files:
        raise GemletError(f"the hub's model {name} has no config.json: it is not a Hugging Face model folder")
    files = [file for file in model.files if "/" not in file]
    pickles = [file for file in files if file.endswith(tuple(PICKLES))]
    if pickles and not any(file.endswith(".safetensors") for file in files):
        raise pickle_error(f"{pickles[0]} of the hub's model {name}")
    folder = model.fetch("config.json").parent
    read_config(folder)  # refuse what is not a Gemma 3 text model before its weights are downloaded
    for file in files:
        if file.endswith((".json", ".safetensors")) or file in _BESIDE:
            model.fetch(file)
    return folder


_BESIDE = ("merges.txt", "tokenizer.model", "chat_template.jinja", "README.md")
"""What else belongs to a model on the hub, and goes along when it is exported."""
