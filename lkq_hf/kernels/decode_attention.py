"""Attention of one new token over cached entries, with keys and values shared by groups of heads."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lkq_hf.kernels.dispatch import use_triton


@torch.library.custom_op("lkq_hf::decode_attention", mutates_args=())
def decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Each head's softmax(scaling * query key^T) value, over the entries that the mask lets it see.

    Keys and values are read as they are stored, once for all heads that share them; entries that are hidden from the
    whole of a tile, such as room for tokens to come, are not read. Not differentiable.

    Args:
        query: ``[batch, heads, 1, head_dim]``.
        key: ``[batch, kv_heads, slots, head_dim]``; ``kv_heads`` divides ``heads``.
        value: ``[batch, kv_heads, slots, value_dim]``.
        mask: bool, ``[batch or 1, 1, 1, slots]``, True for what is seen.
        scaling: of the dot products.

    Returns:
        ``[batch, heads, 1, value_dim]`` in the dtype of ``query``; zeros for a token that sees nothing.
    """
    if use_triton(query, key, value, mask):
        from lkq_hf.kernels.decode_attention_triton import decode_attention_triton

        return decode_attention_triton(query, key, value, mask, scaling)
    return _reference(query, key, value, mask, scaling)


def _reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    batch, heads = query.shape[:2]
    # A group's heads as if they were tokens: they see the same entries.
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], -1)
    return scaled_dot_product_attention(grouped, key, value, mask, scale=scaling).reshape(batch, heads, 1, -1)


@decode_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])
