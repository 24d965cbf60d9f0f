"""The hidden states between two blocks, kept where there is room for them."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

OFFLOADS = ("auto", "cpu", "disk")
# "auto" keeps activations on the GPU while both paths' take less than this part of its free memory.
DEVICE_SHARE = 0.2


class Activations:
    """A list of hidden states, one tensor a batch, on the compute device, in main memory or in mapped files.

    Args:
        device: where `get` delivers.
        offload: `"auto"` (the device if they are small beside its free memory, else main memory), `"cpu"` or `"disk"`
            (a temporary directory that disappears with this object).
        expected_bytes: size of all batches together, for `"auto"`.
    """

    def __init__(self, device: torch.device, offload: str = "auto", expected_bytes: int = 0) -> None:
        self.device = device
        self._directory = tempfile.TemporaryDirectory(prefix="activations-") if offload == "disk" else None
        self._home = torch.device("cpu")
        if offload == "auto" and device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if 2 * expected_bytes < DEVICE_SHARE * free:
                self._home = device
        self._batches: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._batches)

    def row_bytes(self, index: int) -> int:
        """The size of one row of a batch."""
        batch = self._batches[index]
        return batch[:1].numel() * batch.element_size()

    def get(self, index: int) -> Tensor:
        """A copy of a batch on the compute device: blocks may write into their input."""
        return self._batches[index].to(self.device, copy=True)

    def copy_to(self, index: int, into: Tensor) -> None:
        """Overwrites a tensor on the compute device with a batch of its shape."""
        into.copy_(self._batches[index])

    def rows(self, index: int, rows: Tensor | slice) -> Tensor:
        """A copy of some rows of a batch on the compute device."""
        batch = self._batches[index]
        return batch[rows.to(batch.device) if isinstance(rows, Tensor) else rows].to(self.device, copy=True)

    def append(self, value: Tensor) -> None:
        self._batches.append(self._keep(len(self._batches), value))

    def replace(self, index: int, value: Tensor) -> None:
        """Overwrites a batch in place: the store never holds two generations of activations."""
        if self._directory is not None:
            self._batches[index].copy_(value)
        else:
            self._batches[index] = self._keep(index, value)

    def _keep(self, index: int, value: Tensor) -> Tensor:
        if self._directory is None:
            return value.to(self._home)
        path = Path(self._directory.name) / str(index)
        mapped = torch.from_file(str(path), shared=True, size=value.numel(), dtype=value.dtype).view(value.shape)
        return mapped.copy_(value)
