"""The attention masks that a LookaheadCache understands."""

from typing import Any

import torch


def padding_mask(attention_mask: Any, seen: int, length: int) -> torch.Tensor | None:
    """``[batch, seen + length]``, True for real tokens; None if there is no padding.

    Args:
        attention_mask: what the model is called with.
        seen: tokens that were read before.
        length: tokens of this forward.

    Raises:
        ValueError: a mask other than one value per token, or padding of a first prompt anywhere but on the left.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        raise ValueError(
            "LookaheadCache needs an attention_mask of shape [batch, length] with one value per token, got "
            + (
                f"shape {tuple(attention_mask.shape)}"
                if isinstance(attention_mask, torch.Tensor)
                else "a prepared mask"
            )
        )
    if attention_mask.shape[1] != seen + length:
        raise ValueError(
            f"the attention_mask covers {attention_mask.shape[1]} tokens, but the prompt has {length}: pass one value "
            "per token of the prompt"
            + (f", and of the {seen} tokens before it, which the cache has read" if seen else "")
        )
    mask = attention_mask.bool()
    if mask.all():
        return None
    if not mask.any(-1).all():
        raise ValueError(
            f"row {int(mask.any(-1).int().argmin())} of the batch is padding only: every prompt needs at least one "
            "token. In chunks (prefill_chunk_size) the first one has to reach a token of every row: use larger chunks."
        )
    if not mask[:, -1].all():
        raise ValueError(
            'the batch is padded on the right. Pad prompts on the left: tokenizer(..., padding_side="left").'
        )
    if seen == 0 and (mask[:, 1:] < mask[:, :-1]).any():
        raise ValueError(
            "the attention_mask hides tokens in the middle of a prompt. Put a row's padding on its left, and leave "
            "tokens out of the prompt that are not to be read."
        )
    return mask


def left_padding(mask: torch.Tensor) -> torch.Tensor | None:
    """How much padding each row of ``mask [batch, length]`` (True for real tokens) begins with, int64 ``[batch]``.

    None if there is padding behind real tokens too, as in later turns of a batch.
    """
    padding = mask.int().argmax(-1)
    return padding if (padding + mask.sum(-1) == mask.shape[1]).all() else None
