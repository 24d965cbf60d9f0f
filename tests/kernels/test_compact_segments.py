import pytest
import torch

from lkq_hf.kernels.compact_segments import compact_segments


def make_inputs(device, batch=2, kv_heads=3, n=70, share=0.5, dtype=torch.float32, head_dim=64, value_dim=64):
    torch.manual_seed(0)
    keep = torch.rand(batch, kv_heads, n) < share
    counts = keep.sum(-1)
    order = torch.randperm(batch * kv_heads)  # segments lie in any order, with gaps
    ends = torch.cumsum(counts.flatten()[order] + 2, 0)
    starts = torch.empty_like(ends)
    starts[order] = ends - counts.flatten()[order]
    capacity = int(ends[-1]) + 4
    return {
        "keep": keep.to(device),
        "key": torch.randn(batch, kv_heads, n, head_dim).to(device, dtype),
        "value": torch.randn(batch, kv_heads, n, value_dim).to(device, dtype),
        "positions": torch.randint(0, 10_000, (batch, kv_heads, n), dtype=torch.int32).to(device),
        "starts": starts.view(batch, kv_heads).to(device),
        "out_keys": torch.full((capacity, head_dim), -1.0).to(device, dtype),
        "out_values": torch.full((capacity, value_dim), -1.0).to(device, dtype),
        "out_positions": torch.full((capacity,), -1, dtype=torch.int32).to(device),
    }


def definition(keep, key, value, positions, starts, out_keys, out_values, out_positions):
    """One entry at a time; returns what the outputs should hold."""
    outputs = [tensor.clone() for tensor in (out_keys, out_values, out_positions)]
    for row in range(keep.shape[0]):
        for head in range(keep.shape[1]):
            place = int(starts[row, head])
            for entry in range(keep.shape[2]):
                if keep[row, head, entry]:
                    for output, source in zip(outputs, (key, value, positions), strict=True):
                        output[place] = source[row, head, entry]
                    place += 1
    return outputs


def check(use_kernels, implementation, inputs):
    use_kernels(implementation)
    expected = definition(**inputs)
    compact_segments(**inputs)
    for name, wanted in zip(("out_keys", "out_values", "out_positions"), expected, strict=True):
        torch.testing.assert_close(inputs[name], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["torch"])
@pytest.mark.parametrize("n", [0, 1, 70])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_numbers_of_entries(device, use_kernels, implementation, n, share):
    check(use_kernels, implementation, make_inputs(device, n=n, share=share))
