"""Scores of a model whose heads have a logit of no key in their softmax."""

import pytest
import torch

from lkq_hf.kernels.lookahead_scores import lookahead_scores

SCALING = 0.3
IMPLEMENTATIONS = ["torch", "triton"]


def inputs(device, length=150, n=8, ratio=3):
    torch.manual_seed(0)
    query = torch.randn(2, 2 * ratio, n, 32, device=device)
    key = torch.randn(2, 2, length + n, 32, device=device)
    return query, key, torch.randn(2 * ratio, device=device) * 3


def definition(query, key, sinks, mask, row_power=1.0, reduce_heads=True):
    n, kv_heads = query.shape[2], key.shape[1]
    length = key.shape[2] - n
    keys = key.repeat_interleave(query.shape[1] // kv_heads, dim=1).double()
    logits = query.double() @ keys.transpose(-1, -2) * SCALING
    hidden = torch.ones(n, length + n, dtype=torch.bool, device=key.device).triu(length + 1)
    logits = logits.masked_fill(hidden, -torch.inf)
    real = mask if mask.dim() == 3 else mask[:, None].expand(-1, kv_heads, -1)
    real = real.repeat_interleave(query.shape[1] // kv_heads, dim=1)
    logits[..., :length] = logits[..., :length].masked_fill(~real[:, :, None], -torch.inf)
    column = sinks.double()[None, :, None, None].expand(2, -1, n, 1)
    shares = torch.cat([logits, column], dim=-1).softmax(-1)[..., :length].pow(row_power).mean(2)
    if reduce_heads:
        shares, real = shares.unflatten(1, (kv_heads, -1)).mean(2), real[:, :: query.shape[1] // kv_heads]
    return shares.pow(1 / row_power).masked_fill(~real, -torch.inf)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduce_heads", [True, False])
@pytest.mark.parametrize("row_power", [1.0, 2.0])
@pytest.mark.parametrize("heads_differ", [False, True])
def test_sinks_take_their_share(device, use_kernels, implementation, reduce_heads, row_power, heads_differ):
    query, key, sinks = inputs(device)
    mask = torch.arange(150, device=device) >= torch.tensor([0, 90], device=device)[:, None]
    if heads_differ:
        mask = torch.stack([mask, mask & (torch.arange(150, device=device) % 3 > 0)], dim=1)
    use_kernels(implementation)
    options = {"row_power": row_power, "reduce_heads": reduce_heads}
    found = lookahead_scores(query, key, SCALING, mask=mask, sinks=sinks, **options)
    torch.testing.assert_close(found.double(), definition(query, key, sinks, mask, **options), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, lookahead_scores(query, key, SCALING, mask=mask, **options), rtol=1e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients(device, use_kernels, implementation):
    query, key, sinks = inputs(device)
    mask = torch.ones(2, 150, dtype=torch.bool, device=device)
    weights = torch.randn(2, 2, 150, device=device)
    leaves = query.clone().requires_grad_(), key.clone().requires_grad_()
    expected = torch.autograd.grad(definition(*leaves, sinks, mask).float(), leaves, weights)
    use_kernels(implementation)
    leaves = query.clone().requires_grad_(), key.clone().requires_grad_()
    found = torch.autograd.grad(lookahead_scores(*leaves, SCALING, sinks=sinks), leaves, weights)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


def test_sinks_of_other_heads_are_refused(device):
    query, key, sinks = inputs(device)
    with pytest.raises(ValueError, match=r"sinks must be \[6\] or \[2, 6\], found \[5\]"):
        lookahead_scores(query, key, SCALING, sinks=sinks[:5])
