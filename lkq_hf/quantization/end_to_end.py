"""End-to-end tuning: the scales of all blocks, by gradient of the divergence of the logits."""

import logging
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lkq_hf.quantization.activations import Activations
from lkq_hf.quantization.capture import capture_block_calls
from lkq_hf.quantization.gradient_steps import (
    changed_parameters,
    compute_dtype,
    precision,
    take_steps,
)
from lkq_hf.quantization.head import Head
from lkq_hf.quantization.linear import QuantizedLinear
from lkq_hf.quantization.precision import tf32
from lkq_hf.quantization.processes import Processes
from lkq_hf.quantization.refine import with_weights
from lkq_hf.quantization.refined_weight import RefinedWeight
from lkq_hf.quantization.refinement import EndToEnd
from lkq_hf.quantization.weight import QuantizedWeight

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EndToEndReport:
    """The mean divergence from the original model on held-out windows, in nats, and whether the tuning was kept."""

    before: float
    after: float

    @property
    def accepted(self) -> bool:
        return self.after < self.before


def tune_end_to_end(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    batches: Sequence[Tensor],
    store: Activations,
    teacher: Activations,
    held_out: Sequence[Tensor],
    settings: EndToEnd,
    processes: Processes,
) -> EndToEndReport:
    """Minimizes `KL(original || quantized)` over the packed layers of `blocks`, in place.

    Every block is run twice, without and with gradients (checkpointing), and logits are taken for some tokens at a
    time, so that on the device are a byte a weight, one block's activations and one batch's hidden states.

    Args:
        model: on the device where it is tuned, with `QuantizedLinear` layers in its blocks.
        blocks: of the model.
        batches: token ids, int64 `[windows, length]` each.
        store: of one tensor a batch, to be filled with the hidden states that enter the first block.
        teacher: the original model's hidden states after its last block, one tensor a batch.
        held_out: which windows of each batch are held out.

    Returns:
        The divergence before and after; what was tuned is kept only if it fell. The layers may be on the CPU then.
    """
    device = teacher.device
    hidden, calls = capture_block_calls(model, blocks, batches)
    for batch, state in enumerate(hidden):
        store.replace(batch, state)
    del hidden
    head = Head(model, blocks, calls)
    packed = [{name: m for name, m in block.named_modules() if isinstance(m, QuantizedLinear)} for block in blocks]
    layers = [
        {name: RefinedWeight(module.quantized_weight(), settings) for name, module in inside.items()}
        for inside in packed
    ]
    tuned_weights = [weight for inside in layers for weight in inside.values()]
    changed = changed_parameters(tuned_weights)
    dtype = model.dtype
    used = compute_dtype(dtype, device, settings)
    # bfloat16 would round logits above 16 by up to 0.06.
    logits_in = nullcontext if used == dtype else tf32

    def hidden_states(batch: int, weights: Sequence[dict[str, RefinedWeight]], weight_dtype: torch.dtype) -> Tensor:
        state = store.get(batch).requires_grad_(torch.is_grad_enabled())
        for block, call, inside in zip(blocks, calls, weights, strict=True):

            def run(state: Tensor, block=block, call=call, inside=inside) -> Tensor:
                dense = {name: weight(weight_dtype) for name, weight in inside.items()}
                return call.run(with_weights(block, dense), state, batch)

            state = checkpoint(run, state, use_reentrant=False) if torch.is_grad_enabled() else run(state)
        return state

    def gradients(batch: int) -> Sequence[Tensor | None]:
        kept = (~held_out[batch]).nonzero().flatten().to(device)
        with precision(dtype, device, settings):
            state = hidden_states(batch, layers, used)
        gradient = torch.zeros_like(state)
        with logits_in():
            gradient[kept] = divergence_gradient(head, state.detach()[kept], teacher.get(batch)[kept])
        progress.update()
        return torch.autograd.grad(state, changed, gradient / state.shape[:2].numel(), allow_unused=True)

    @torch.no_grad()
    def error() -> float:
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for batch, chosen in enumerate(held_out):
            if bool(chosen.any()):
                inside = chosen.to(device)
                state = hidden_states(batch, layers, dtype)[inside]
                sums[0] += divergence(head, state, teacher.get(batch)[inside])
                sums[1] += state.shape[0] * state.shape[1]
        processes.sum(sums)
        return (sums[0] / sums[1].clamp(min=1)).item()

    for block, inside in zip(blocks, packed, strict=True):
        for name, module in inside.items():
            _set_module(block, name, _shell(module))
            module.to("cpu")  # its integers are there twice
    try:
        before = error()
        with tqdm(total=settings.steps, desc="tuning", unit="step", disable=not processes.is_main) as progress:
            take_steps(tuned_weights, settings, held_out, gradients, processes)
        tuned = [{name: processes.same(w.quantized()) for name, w in inside.items()} for inside in layers]
        frozen = EndToEnd(steps=0, scale_rate=0, zero_rate=0)
        layers = [{name: RefinedWeight(weight, frozen) for name, weight in inside.items()} for inside in tuned]
        report = EndToEndReport(before, error())
        if report.accepted:
            packed = [
                {name: _packed(module, weights[name]) for name, module in inside.items()}
                for inside, weights in zip(packed, tuned, strict=True)
            ]
    finally:
        for block, inside in zip(blocks, packed, strict=True):
            for name, module in inside.items():
                _set_module(block, name, module)
    logger.info("divergence on held-out windows %.4g nats, tuned %.4g", report.before, report.after)
    return report


@torch.no_grad()
def divergence(head: Head, student: Tensor, teacher: Tensor) -> Tensor:
    """The sum of `KL(teacher || student)` over tokens, float64.

    Args:
        student, teacher: hidden states after the last block, `[windows, length, hidden]`.
    """
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    for state, reference in _pieces(head, student, teacher):
        wanted = head(reference).log_softmax(-1)
        total += F.kl_div(head(state).log_softmax(-1), wanted, reduction="sum", log_target=True)
    return total


def divergence_gradient(head: Head, student: Tensor, teacher: Tensor) -> Tensor:
    """The gradient of `divergence` for `student`, of its shape.

    For the logits it is `softmax(student) - softmax(teacher)`, which takes half the passes over logits that the
    divergence and its derivative take.
    """
    found = []
    for state, reference in _pieces(head, student, teacher):
        leaf = state.detach().requires_grad_()
        with torch.enable_grad():
            logits = head(leaf)
        with torch.no_grad():
            of_logits = logits.softmax(-1).sub_(head(reference).softmax(-1))
        found.append(torch.autograd.grad(logits, leaf, of_logits)[0])
    return torch.cat(found).view_as(student)


def _pieces(head: Head, student: Tensor, teacher: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(*(states.flatten(0, 1).split(head.tokens) for states in (student, teacher)), strict=True)


def _shell(packed: QuantizedLinear) -> nn.Module:
    """A dense layer without a weight, to be run with one that is given."""
    with torch.device("meta"):
        linear = nn.Linear(packed.in_features, packed.out_features, bias=False)
    if packed.bias is not None:
        linear.bias = nn.Parameter(packed.bias, requires_grad=False)
    return linear


def _packed(before: QuantizedLinear, weight: QuantizedWeight) -> QuantizedLinear:
    packed = QuantizedLinear.from_quantized_weight(weight, bias=before.bias)
    packed.replaces = before.replaces
    return packed


def _set_module(block: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(parent), leaf, module)
