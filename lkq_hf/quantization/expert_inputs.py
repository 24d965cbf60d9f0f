"""What fused experts receive over the calibration data: the tokens, and which of them each expert computes."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lkq_hf.quantization.activations import Activations
from lkq_hf.quantization.capture import BlockCall, Stop

Tokens = tuple[Tensor, Tensor | None, Tensor]
"""Inputs in the quantized model `[tokens, hidden]`, those in the full-precision model, and the weights `[tokens]`."""

# Bytes of tokens that are gathered for experts at once, in each of the two models.
GATHERED = 1 << 29


@dataclass(frozen=True)
class _Routes:
    """The pairs of a token and one of its experts in one batch, sorted by expert.

    `tokens` and `weights` are `[pairs]`; those of an expert lie from `starts[expert]` to `starts[expert + 1]`.
    """

    tokens: Tensor
    weights: Tensor
    starts: list[int]

    def of(self, experts: range) -> slice:
        return slice(self.starts[experts.start], self.starts[experts.stop])


class ExpertInputs:
    """The tokens that a module of fused experts receives, and the experts to which its router sends them.

    A token counts for an expert with the square of its gate, since an error of the expert's output reaches the
    model's hidden states multiplied by the gate. Routes and gates are those of the model quantized so far.

    Args:
        num_experts: number of experts.
        device: where tokens are handed out.
        offload: where they wait, see `Activations`.
        with_full: whether the inputs of the full-precision model are kept as well.
        expected_bytes: size of all tokens.
    """

    def __init__(
        self, num_experts: int, device: torch.device, offload: str, with_full: bool, expected_bytes: int = 0
    ) -> None:
        self.num_experts = num_experts
        self.device = device
        self._quantized = Activations(device, offload, expected_bytes)
        self._full = Activations(device, offload, expected_bytes) if with_full else None
        self._weights: list[Tensor] = []  # of each token, summed over its experts
        self._routes: list[_Routes] = []

    def add(self, hidden: Tensor, index: Tensor, gates: Tensor, full: Tensor | None = None) -> None:
        """Adds the tokens of one call.

        Args:
            hidden: `[tokens, hidden]`, in the quantized model.
            index: the experts of each token, int64 `[tokens, k]`.
            gates: their gates, `[tokens, k]`.
            full: the same tokens in the full-precision model. Where they are not the same ones, deviations are done
                without.
        """
        hidden = hidden.detach().flatten(0, -2)
        if self._full is not None:
            if full is None or full.shape.numel() != hidden.shape.numel():
                self._full = None
            else:
                self._full.append(full.detach().reshape(hidden.shape))
        squares = gates.detach().float().square().reshape(len(hidden), -1)
        self._quantized.append(hidden)
        self._weights.append(squares.sum(1))
        expert, order = index.reshape(-1).sort(stable=True)
        counts = torch.bincount(expert, minlength=self.num_experts)[: self.num_experts].tolist()
        self._routes.append(
            _Routes(order // squares.shape[1], squares.view(-1)[order], list(accumulate(counts, initial=0)))
        )

    def all_tokens(self) -> Iterator[Tokens]:
        """Every token, batch by batch, with the sum of its weights."""
        for batch, weights in enumerate(self._weights):
            yield self._rows(batch, slice(None), weights)

    def of_experts(self, experts: range) -> Iterator[tuple[int, Tokens]]:
        """The tokens that some experts compute, expert by expert.

        A batch's tokens are gathered for all these experts at once, and as many batches as `GATHERED` allows are
        handed out together. An expert comes again if there are more, and not at all if it computes no token.
        """
        together: list[int] = []
        size = 0
        for batch in range(len(self._routes)):
            size += self._bytes(batch, experts)
            if together and size > GATHERED:
                yield from self._gathered(experts, together)
                together, size = [], self._bytes(batch, experts)
            together.append(batch)
        yield from self._gathered(experts, together)

    def sample(self, step: int) -> Iterator[Tokens]:
        """One of every `step` tokens of each batch, with the sum of its weights, all at once."""
        parts = [
            self._rows(batch, slice(None, None, step), weights[::step]) for batch, weights in enumerate(self._weights)
        ]
        if parts:
            yield _joined(parts)

    def _bytes(self, batch: int, experts: range) -> int:
        """The size of one batch's tokens for some experts."""
        inside = self._routes[batch].of(experts)
        return (inside.stop - inside.start) * self._quantized.row_bytes(batch)

    def _gathered(self, experts: range, batches: Sequence[int]) -> Iterator[tuple[int, Tokens]]:
        routes = [self._routes[batch] for batch in batches]
        parts = [
            self._rows(batch, each.tokens[each.of(experts)], each.weights[each.of(experts)])
            for batch, each in zip(batches, routes, strict=True)
        ]
        for expert in experts:
            own = []
            for (x, full, weights), each in zip(parts, routes, strict=True):
                start = each.starts[experts.start]
                rows = slice(each.starts[expert] - start, each.starts[expert + 1] - start)
                if rows.stop > rows.start:
                    own.append((x[rows], None if full is None else full[rows], weights[rows]))
            if own:
                yield expert, _joined(own)

    def _rows(self, batch: int, rows: Tensor | slice, weights: Tensor) -> Tokens:
        full = None if self._full is None else self._full.rows(batch, rows)
        return self._quantized.rows(batch, rows), full, weights.to(self.device)


def _joined(parts: Sequence[Tokens]) -> Tokens:
    """Tokens of several batches as those of one."""
    x, full, weights = zip(*parts, strict=True)
    whole = None if full[0] is None else torch.cat(full)
    return torch.cat(x), whole, torch.cat(weights)


@torch.no_grad()
def calls_of_experts(
    block: nn.Module, name: str, call: BlockCall, hidden: Tensor, batch: int, once: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, experts and gates of each call of one experts module in one forward pass of its block.

    Args:
        name: the experts, as a name inside the block.
        hidden: one batch, `[batch, length, hidden]`.
        once: whether they run once, so that the pass may end there.
    """
    experts = block.get_submodule(name)
    # They are called by position or by name, and the names differ between models.
    signature = inspect.signature(experts.forward)
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def hook(_: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        tokens, index, gates, *_rest = signature.bind(*args, **kwargs).arguments.values()
        calls.append((tokens, index, gates))
        if once:
            raise Stop

    handle = experts.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(Stop):
            call.run(block, hidden, batch)
    finally:
        handle.remove()
    return calls
