"""How many prompts a forward of a training step has memory for."""

from typing import Any, cast

import torch

from lkq_hf.training.trainer import LookaheadTrainer

MARGIN = 0.9
"""Share of the memory to plan with: kernels' workspace and fragments take some of it."""


def prompts_that_fit(trainer: LookaheadTrainer, most: int) -> int:
    """How many prompts as long as the longest one fit into one forward of a step, on the fullest GPU of all processes.

    Tries one prompt and then two, without a step of the optimizer, and computes from what the second one takes.

    Args:
        trainer: which has not begun. Under FSDP and DeepSpeed, whose weights are not yet where they will be, and
            without a GPU, nothing is tried.
        most: prompts that are asked for.

    Returns:
        At least 1, at most ``most``.

    Raises:
        torch.OutOfMemoryError: not even one fits.
    """
    device = trainer.args.device
    if device.type != "cuda" or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return most
    longest: Any = max(cast(Any, trainer.train_dataset), key=lambda row: len(row["input_ids"]))
    one = _peak(trainer, [longest])
    try:
        two = _peak(trainer, [longest, longest])
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        fits = min(most, fitting(one, two, free))
    except torch.OutOfMemoryError:
        fits = 1
        torch.cuda.empty_cache()
    return int(trainer.accelerator.gather(torch.tensor([fits], device=device)).min())


def fitting(one: int, two: int, memory: int) -> int:
    """How many prompts of a size fit into ``memory`` bytes, of which one takes ``one`` and two take ``two``."""
    return max(1, 1 + int((MARGIN * memory - one) // max(two - one, 1)))


def _peak(trainer: LookaheadTrainer, rows: list[Any]) -> int:
    """Most bytes of the GPU that torch holds during a step of these prompts."""
    device = trainer.args.device
    torch.cuda.reset_peak_memory_stats(device)
    model = cast(torch.nn.Module, trainer.model)
    inputs = {name: tensor.to(device) for name, tensor in trainer.data_collator(rows).items()}
    try:
        trainer.compute_loss(model, inputs).backward()
    finally:
        model.zero_grad()
    return torch.cuda.max_memory_allocated(device)
