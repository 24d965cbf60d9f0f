"""Entries in main memory: everything that was read, so that nothing is lost when a GPU keeps a part of it."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

PLACES = ("cpu",)
"""Where entries can be parked."""


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Entries that were read by one forward; never changed, so that copies of a cache share them.

    Attributes:
        keys, values: ``[rows, kv_heads, count, features]`` in main memory, pinned if they came from a GPU.
        rows: which of its rows make up the batch now, ``[batch]``; None for all in order.
        copied: when the copy from the GPU is done.
    """

    keys: torch.Tensor
    values: torch.Tensor
    rows: torch.Tensor | None
    copied: Any = None


@dataclass(eq=False)
class ParkedEntries:
    """One layer's entries of the whole text but its latest tokens.

    Copies to and from a GPU run on a stream of their own, beside the work of other layers.
    """

    _chunks: list[_Chunk] = field(default_factory=list)
    _fetched: list[tuple[torch.Tensor, torch.Tensor]] | None = field(default=None, repr=False)
    _ready: Any = field(default=None, repr=False)

    @property
    def length(self) -> int:
        """Tokens of the text that are parked."""
        return sum(chunk.keys.shape[2] for chunk in self._chunks)

    @property
    def nbytes(self) -> int:
        """Bytes in main memory."""
        return sum(chunk.keys.nbytes + chunk.values.nbytes for chunk in self._chunks)

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Parks the entries that follow, ``[batch, kv_heads, count, features]``.

        Raises:
            RuntimeError: main memory is full; nothing was parked.
        """
        if key.device.type != "cuda":
            self._chunks.append(_Chunk(key.clone(), value.clone(), None))
            return
        stream = _side_stream(key.device)
        stream.wait_stream(torch.cuda.current_stream(key.device))
        parked = []
        with torch.cuda.stream(stream):
            for tensor in (key, value):
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                copy.copy_(tensor, non_blocking=True)
                tensor.record_stream(stream)
                parked.append(copy)
            copied = torch.cuda.Event()
            copied.record(stream)
        self._chunks.append(_Chunk(parked[0], parked[1], None, copied))

    def restore(self, key: torch.Tensor, value: torch.Tensor, device: torch.device) -> None:
        """Takes over entries in main memory, ``[batch, kv_heads, count, features]``, that ``device`` will fetch."""
        if device.type == "cuda":
            key, value = key.pin_memory(), value.pin_memory()
        self._chunks.append(_Chunk(key, value, None))

    def chunks(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of everything, in main memory, in pieces that follow each other."""
        return [_rows_of(chunk, torch.device("cpu")) for chunk in self._chunks]

    def prefetch(self, device: torch.device) -> None:
        """Begins to copy everything to ``device``."""
        if self._fetched is not None or not self._chunks:
            return
        if device.type != "cuda":
            self._fetched = [_rows_of(chunk, device) for chunk in self._chunks]
            return
        stream = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._fetched = [_rows_of(chunk, device) for chunk in self._chunks]
            self._ready = torch.cuda.Event()
            self._ready.record(stream)

    def fetch(self, device: torch.device) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of everything on ``device``, in pieces that follow each other."""
        self.prefetch(device)
        fetched, self._fetched = self._fetched or [], None
        if self._ready is not None:
            stream = torch.cuda.current_stream(device)
            stream.wait_event(self._ready)
            for pair in fetched:
                for tensor in pair:
                    tensor.record_stream(stream)
            self._ready = None
        return fetched

    def cut(self, length: int) -> None:
        """Forgets what was parked beyond ``length`` tokens."""
        self._fetched = self._ready = None
        while self._chunks and self.length > length:
            last = self._chunks.pop()
            if (left := length - self.length) > 0:
                self._chunks.append(replace(last, keys=last.keys[:, :, :left], values=last.values[:, :, :left]))

    def take_rows(self, index: torch.Tensor) -> None:
        """Makes the batch of these rows, ``[batch]`` int64; nothing is copied."""
        index = index.cpu()
        self._chunks = [
            replace(chunk, rows=index if chunk.rows is None else chunk.rows[index]) for chunk in self._chunks
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> "ParkedEntries":
        return ParkedEntries(list(self._chunks))


def _rows_of(chunk: _Chunk, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    if chunk.copied is not None:
        chunk.copied.synchronize()  # done long ago, but for a reading right after another
    pair = chunk.keys.to(device, non_blocking=True), chunk.values.to(device, non_blocking=True)
    if chunk.rows is None:
        return pair
    rows = chunk.rows.to(device)
    return pair[0][rows], pair[1][rows]


_side_streams: dict[torch.device, Any] = {}


def _side_stream(device: torch.device) -> Any:
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    return _side_streams[device]
