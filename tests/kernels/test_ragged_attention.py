import math

import pytest
import torch

from lkq_hf.kernels.ragged_attention import ragged_attention, ragged_attention_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def make_inputs(
    device, lengths, slots, q=1, groups=3, dtype=torch.float32, head_dim=64, value_dim=64, tail_mask=None, seed=0
):
    """Arguments of the operation; ``lengths`` is a list of one list for each row."""
    torch.manual_seed(seed)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    batch, kv_heads = lengths.shape
    gaps = torch.randint(0, 5, (batch * kv_heads,))  # segments need not touch
    starts = (torch.cumsum(lengths.flatten() + gaps, 0) - lengths.flatten()).view(batch, kv_heads)
    capacity = int((lengths + starts).max()) + 3
    return {
        # As modules hand it over: heads are a transposed dimension.
        "query": torch.randn(batch, q, kv_heads * groups, head_dim).transpose(1, 2).to(device, dtype),
        "keys": torch.randn(capacity, head_dim).to(device, dtype),
        "values": torch.randn(capacity, value_dim).to(device, dtype),
        "starts": starts.to(device),
        "lengths": lengths.to(device),
        "longest": int(lengths.max()),
        "tail_key": torch.randn(batch, kv_heads, slots, head_dim).to(device, dtype),
        "tail_value": torch.randn(batch, kv_heads, slots, value_dim).to(device, dtype),
        "tail_mask": None if tail_mask is None else tail_mask.to(device),
        "scaling": head_dim**-0.5,
    }


def definition(
    query,
    keys,
    values,
    starts,
    lengths,
    longest,
    tail_key,
    tail_value,
    tail_mask,
    scaling,
    softcap=None,
    sinks=None,
):
    """One query of one head at a time."""
    batch, heads, q, _ = query.shape
    groups, slots = heads // tail_key.shape[1], tail_key.shape[2]
    output = torch.zeros(batch, heads, q, values.shape[-1], dtype=torch.float64)
    for row in range(batch):
        for head in range(heads):
            start, length = int(starts[row, head // groups]), int(lengths[row, head // groups])
            for token in range(q):
                if tail_mask is None:
                    seen = torch.arange(slots) <= slots - q + token
                else:
                    seen = tail_mask.expand(batch, -1, -1, -1)[row, 0, token].cpu()
                key, value = (
                    torch.cat([pool[start : start + length], tail[row, head // groups][seen.to(tail.device)]]).double()
                    for pool, tail in ((keys, tail_key), (values, tail_value))
                )
                logits = scaling * key @ query[row, head, token].double()
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                weights = logits.exp()
                total = weights.sum() + (0 if sinks is None else math.exp(sinks[head]))
                if len(key):
                    output[row, head, token] = (weights @ value / total).cpu()
    return output


def ways(function):
    return pytest.mark.parametrize("way", ["reference", "torch"])(function)


def check(use_kernels, way, inputs):
    if way == "reference":
        found = ragged_attention_reference(**inputs)
    else:
        use_kernels(way)
        found = ragged_attention(**inputs)
    assert found.dtype == inputs["query"].dtype
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double().cpu(), definition(**inputs), rtol=tolerance, atol=tolerance)


@ways
@pytest.mark.parametrize("q", [1, 3])
def test_lengths(device, use_kernels, way, q):
    check(use_kernels, way, make_inputs(device, [[0, 1, 130], [64, 7, 65]], slots=5, q=q))
