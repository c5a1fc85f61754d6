"""A model made ready to write: which decoder is the fastest one here, and its weights in the format asked for."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from gemlet.decoder import Decoder
from gemlet.errors import GemletError
from gemlet.folder import StoredModel
from gemlet.kernels.build import library
from gemlet.native import NativeDecoder, NativeWeights
from gemlet.quantise import FORMATS

if TYPE_CHECKING:
    from gemlet.model import Gemma

ROOM = 256
"""A decoder that is kept has room for a multiple of so many tokens: the next text may be longer."""


class Ready:
    """A model whose weights are kept in a format, for any number of decoders; they must not change meanwhile.

    `source` is a model, or one in its folder that is mapped where it is written with on a CPU, and loaded into torch
    only where that is needed. `weights` is auto (as the model has them, shared, not copied), or one of
    `quantise.FORMATS`. Unless told to `wait`, it does not wait for the kernel to be compiled, which happens once on a
    machine and takes some seconds: the decoders are in plain torch until then.
    """

    def __init__(self, source: "Gemma | StoredModel", weights: str = "auto", wait: bool = False):
        self.source, self.config = source, source.config
        self.format = self._format(weights)
        self._wait = wait
        self._native: NativeWeights | None = None
        self._rounded: Gemma | None = None
        self._returned: list[Decoder] = []  # at most one

    @cached_property
    def model(self) -> "Gemma":
        """The model in torch; one in its folder on the same memory, to compute in float32."""
        if not isinstance(self.source, StoredModel):
            return self.source
        from gemlet.eager import model_of

        return model_of(self.config, self.source.arrays)

    def decoder(self, slots: int, max_length: int) -> Decoder:
        """The fastest there is here now; `max_length` is at most the model's context."""
        kernel = library("decode", self._wait) if self._on_cpu else None
        if kernel is not None:
            self._rounded = None
            self._native = self._native or NativeWeights(kernel, self.config, self._arrays(), self.format)
            return NativeDecoder(self._native, slots, max_length)
        from gemlet.eager import BatchDecoder, TorchDecoder, cache_dtype

        self._rounded = self._rounded or self.rounded()
        kind = TorchDecoder if self._on_cpu else BatchDecoder
        return kind(self._rounded, slots, max_length, cache_dtype(self.format))

    @contextmanager
    def lent(self, slots: int, max_length: int) -> Iterator[Decoder]:
        """A decoder for a text. On a GPU, where one is made in the time of 60 tokens, it is kept for the next text."""
        if self._on_cpu:
            yield self.decoder(slots, max_length)
            return
        decoder = None
        with suppress(IndexError):  # popped, not looked at first: two threads never get the same one
            decoder = self._returned.pop()
        if decoder is None or decoder.slots != slots or decoder.max_length < max_length:
            decoder = None  # freed before another one takes its memory
            room = min(-(-max_length // ROOM) * ROOM, self.config.max_position_embeddings)
            decoder = self.decoder(slots, room)
        try:
            yield decoder
        finally:
            self._returned[:] = [decoder]

    def rounded(self) -> "Gemma":
        """The model in plain torch, with the values that the format keeps: what any of the decoders computes."""
        from gemlet.eager import rounded

        return rounded(self.model, self.format)

    def outruns(self, decoder: Decoder) -> bool:
        """Whether `decoder` would now be made as a faster one."""
        return decoder.stands_in and library("decode", wait=False) is not None

    def not_finite(self, ids: Sequence[int]) -> GemletError:
        """What to say where the logits behind these tokens are not finite: where such values come from."""
        from gemlet.eager import not_finite

        return not_finite(self.model, ids)

    @property
    def _on_cpu(self) -> bool:
        return isinstance(self.source, StoredModel) or self.source.device.type == "cpu"

    def _format(self, weights: str) -> str:
        if weights == "auto":
            if isinstance(self.source, StoredModel):
                return self.source.format
            from gemlet.eager import own_format

            return own_format(self.source)
        if weights not in FORMATS:
            raise GemletError(f"weights is {weights!r}, but must be auto, {', '.join(FORMATS)}")
        return weights

    def _arrays(self) -> Mapping[str, np.ndarray]:
        if isinstance(self.source, StoredModel):
            return self.source.arrays
        from gemlet.eager import arrays

        return arrays(self.source)


def decoder(model: "Gemma", slots: int, max_length: int, weights: str = "auto") -> Decoder:
    """One decoder for a model: see `Ready`, which makes several of the same weights."""
    return Ready(model, weights, wait=True).decoder(slots, max_length)
