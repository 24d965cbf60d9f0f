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

    def rows_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The batch of keys or values, wherever they are."""
        return tensor if self.rows is None else tensor[self.rows.to(tensor.device)]


@dataclass(eq=False)
class ParkedEntries:
    """One layer's entries of the whole text but its latest tokens.

    Copies to and from a GPU run on streams of their own, beside the work of other layers.
    """

    _chunks: list[_Chunk] = field(default_factory=list)
    _fetched: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, repr=False)
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
        parked = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in (key, value)]
        current, stream = torch.cuda.current_stream(key.device), _side_stream(key.device, "out")
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # Copies on the device are quick: the whole tensors need not stay until they have crossed the bus.
            copies = [tensor.clone(memory_format=torch.contiguous_format) for tensor in (key, value)]
            current.wait_stream(stream)
            for there, here in zip(parked, copies, strict=True):
                there.copy_(here, non_blocking=True)
            copied = stream.record_event()
        self._chunks.append(_Chunk(parked[0], parked[1], None, copied))

    def restore(self, key: torch.Tensor, value: torch.Tensor, device: torch.device) -> None:
        """Takes over entries in main memory, ``[batch, kv_heads, count, features]``, that ``device`` will fetch."""
        if device.type == "cuda":
            key, value = key.pin_memory(), value.pin_memory()
        self._chunks.append(_Chunk(key, value, None))

    def chunks(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of everything, in main memory, in pieces that follow each other."""
        for chunk in self._chunks:
            if chunk.copied is not None:
                chunk.copied.synchronize()
        return [(chunk.rows_of(chunk.keys), chunk.rows_of(chunk.values)) for chunk in self._chunks]

    def prefetch(self, device: torch.device, room: int) -> None:
        """Begins to copy everything to a GPU, for a `fetch` with the same arguments."""
        if device.type == "cuda" and self._chunks and self._fetched is None:
            self._begin_fetch(device, room)

    def fetch(self, device: torch.device, room: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of everything on ``device``, ``[batch, kv_heads, length + room, features]``.

        The last ``room`` entries are yet to be written.
        """
        fetched = self._fetched or self._begin_fetch(device, room)
        self._drop_fetched()
        return fetched

    def _begin_fetch(self, device: torch.device, room: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, length = self._chunks[0], self.length + room
        batch = first.keys.shape[0] if first.rows is None else len(first.rows)
        # Of the main stream's memory, so that the next layers can use it again without waiting for the host.
        keys, values = (
            torch.empty(batch, like.shape[1], length, like.shape[3], dtype=like.dtype, device=device)
            for like in (first.keys, first.values)
        )
        if device.type != "cuda":
            self._copy_into(keys, values)
        else:
            stream = _side_stream(device, "in")
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                self._copy_into(keys, values)
                self._ready = stream.record_event()
        self._fetched = keys, values
        return keys, values

    def _copy_into(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        start = 0
        for chunk in self._chunks:
            if chunk.copied is not None:
                torch.cuda.current_stream(keys.device).wait_event(chunk.copied)
            end = start + chunk.keys.shape[2]
            for whole, part in ((keys, chunk.keys), (values, chunk.values)):
                whole[:, :, start:end].copy_(chunk.rows_of(part.to(whole.device, non_blocking=True)))
            start = end

    def _drop_fetched(self) -> None:
        """Makes the current stream wait for the copy, behind which the memory may be read and used again."""
        if self._fetched is not None and self._ready is not None:
            torch.cuda.current_stream(self._fetched[0].device).wait_event(self._ready)
        self._fetched = self._ready = None

    def cut(self, length: int) -> None:
        """Forgets what was parked beyond ``length`` tokens."""
        self._drop_fetched()
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


_side_streams: dict[tuple[torch.device, str], Any] = {}


def _side_stream(device: torch.device, direction: str) -> Any:
    if (device, direction) not in _side_streams:
        _side_streams[device, direction] = torch.cuda.Stream(device)
    return _side_streams[device, direction]
