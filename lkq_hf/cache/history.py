"""What a cache has read, to be compared with the text that the next turn passes."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

UNKNOWN = -1
"""In the place of an id that is not known, such as that of an embedding."""

_lock = threading.Lock()


def digest_of(ids: torch.Tensor) -> str:
    """SHA-256 of ids ``[batch, tokens]``."""
    return hashlib.sha256(ids.detach().long().cpu().contiguous().numpy().tobytes()).hexdigest()


class _Piece(NamedTuple):
    """Ids ``[batch, tokens]``, int32, of the text from ``start`` on."""

    start: int
    ids: torch.Tensor

    @property
    def end(self) -> int:
        return self.start + self.ids.shape[1]


class ReadText:
    """The ids that a cache has read, as far as they are known.

    Ids stay on their device until they are compared, so recording never waits for a GPU.

    Attributes:
        given: length of the text up to the end of the last prompt or turn. What follows was generated.
        saved: length and digest of the beginning, where a saved cache says no more about it.
    """

    def __init__(self) -> None:
        self.given = 0
        self.saved: tuple[int, str] | None = None
        self._pieces: list[_Piece] = []

    def record(self, start: int, ids: torch.Tensor | None, given: int) -> None:
        """Notes a forward or a generation.

        Args:
            start: length of the text before it.
            ids: ``[batch, tokens]``, the text from there on; None where they are not known.
            given: length of the text that was passed, without what was generated.
        """
        self.cut(start)
        if ids is not None:
            self._pieces.append(_Piece(start, ids.detach().to(torch.int32, copy=True)))
        self.given = given

    def cut(self, length: int) -> None:
        """Forgets what is behind ``length`` tokens."""
        self.given = min(self.given, length)
        if self.saved is not None and self.saved[0] > length:
            self.saved = None
        while self._pieces and self._pieces[-1].end > length:
            piece = self._pieces.pop()
            if piece.start < length:
                self._pieces.append(_Piece(piece.start, piece.ids[:, : length - piece.start]))

    def take_rows(self, choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Makes the batch of the rows that ``choose`` takes of a tensor."""
        self.saved = None
        self._pieces = [piece._replace(ids=choose(piece.ids)) for piece in self._pieces]

    def known(self, batch: int, length: int) -> torch.Tensor:
        """The first ``length`` ids, ``[batch, length]`` int32 on the CPU. Waits for the device."""
        ids = np.full((batch, length), UNKNOWN, dtype=np.int32)
        self._pieces = [piece._replace(ids=piece.ids.cpu()) for piece in self._pieces]
        for piece in self._pieces:
            if piece.start < length:
                ids[:, piece.start : piece.end] = piece.ids[:, : length - piece.start].numpy()
        return torch.from_numpy(ids)

    def digest(self, batch: int, length: int) -> str | None:
        """Digest of a text of ``length`` ids; None if one of them is not known."""
        self.cut(length)
        if self.saved is not None and self.saved[0] == length:
            return self.saved[1]
        ids = self.known(batch, length)
        return None if bool((ids == UNKNOWN).any()) else digest_of(ids)

    def agreeing(self, ids: torch.Tensor, mask: torch.Tensor | None, seen: int) -> int | None:
        """How many tokens at the beginning of a text are those that were read, in every row.

        None where a saved cache knows that they are not all that were read, and no more.

        Args:
            ids: ``[batch, tokens]``, the text.
            mask: of the same shape, 0 where an id does not count; None if all count.
            seen: tokens that were read.
        """
        self.cut(seen)  # of a forward that failed
        common = min(ids.shape[1], seen)
        # By numpy: torch would wake all cores for some ten thousand numbers, and wait for busy ones.
        known = self.known(ids.shape[0], common).numpy()
        differs = (known != ids[:, :common].cpu().numpy()) & (known != UNKNOWN)
        if mask is not None:
            differs &= mask[:, :common].cpu().numpy() != 0
        columns = differs.any(0).nonzero()[0]
        agreeing = int(columns[0]) if len(columns) else common
        if self.saved is None:
            return agreeing
        length, digest = self.saved
        return agreeing if common >= length and digest_of(ids[:, :length]) == digest else None


class Generation:
    """Lets one thread at a time generate with a cache. Copies and pickles of it are free."""

    def __init__(self) -> None:
        self._thread: int | None = None
        # Something of its own for each generation; None outside of one.
        self.current: object = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Generation":
        return Generation()

    def __reduce__(self) -> Any:
        return Generation, ()

    def refuse_other_thread(self) -> None:
        """Raises if a generation is under way in another thread.

        Raises:
            RuntimeError: it is.
        """
        if self._thread not in (None, threading.get_ident()):
            raise RuntimeError(
                "this LookaheadCache is in use: a generation with it is under way in another thread. Pass a cache of "
                "its own to each generation: a new one, or a copy.deepcopy(cache) made before either begins."
            )

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Inside, other threads are refused. The same thread may come in again.

        Raises:
            RuntimeError: another thread is inside.
        """
        here = threading.get_ident()
        nested = self._thread == here
        try:
            with _lock:
                self.refuse_other_thread()
                self._thread = here
                self.current = self.current if nested else object()
            yield
        finally:
            if self._thread == here and not nested:
                self._thread = self.current = None
