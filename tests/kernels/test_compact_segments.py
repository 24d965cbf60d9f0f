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


def implementations(function):
    return pytest.mark.parametrize("implementation", ["torch", "triton"])(function)


@implementations
@pytest.mark.parametrize("n", [0, 1, 70])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_numbers_of_entries(device, use_kernels, implementation, n, share):
    check(use_kernels, implementation, make_inputs(device, n=n, share=share))


@implementations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 16), (80, 80), (192, 128)])
def test_dtypes_and_head_sizes(device, use_kernels, implementation, dtype, head_dim, value_dim):
    if implementation == "triton" and dtype == torch.float64:
        pytest.skip("the kernel does not take float64")
    check(use_kernels, implementation, make_inputs(device, 1, 2, 40, 0.5, dtype, head_dim, value_dim))


@implementations
def test_strided_inputs_and_outputs(device, use_kernels, implementation):
    inputs = make_inputs(device)
    for name in ("key", "value", "positions", "keep"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    both = torch.cat([inputs["out_keys"], inputs["out_values"]], 1)
    inputs["out_keys"], inputs["out_values"] = both[:, :64], both[:, 64:]
    check(use_kernels, implementation, inputs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keep": torch.zeros(2, 3, 5)}, TypeError, "keep must be bool, found torch.float32"),
        ({"key": torch.zeros(2, 3, 6, 8)}, ValueError, r"key must be \[2, 3, 5, 8\], found \[2, 3, 6, 8\]"),
        ({"positions": torch.zeros(2, 3, 5, dtype=torch.int64)}, TypeError, "positions must be torch.int32"),
        ({"starts": torch.zeros(6, dtype=torch.int64)}, ValueError, r"starts must be \[2, 3\]"),
        ({"out_values": torch.zeros(20, 8)}, ValueError, r"out_values must be \[20, 4\]"),
        ({"out_keys": torch.zeros(20, 8).half()}, TypeError, "out_keys must be torch.float32"),
    ],
)
def test_errors(change, error, message):
    inputs = {
        "keep": torch.zeros(2, 3, 5, dtype=torch.bool),
        "key": torch.zeros(2, 3, 5, 8),
        "value": torch.zeros(2, 3, 5, 4),
        "positions": torch.zeros(2, 3, 5, dtype=torch.int32),
        "starts": torch.zeros(2, 3, dtype=torch.int64),
        "out_keys": torch.zeros(20, 8),
        "out_values": torch.zeros(20, 4),
        "out_positions": torch.zeros(20, dtype=torch.int32),
    }
    with pytest.raises(error, match=message):
        compact_segments(**inputs | change)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_nothing_waits_for_the_device(device, use_kernels, share):
    inputs = make_inputs(device, 4, 8, 4096, share, torch.bfloat16, 128, 128)
    torch.cuda.set_sync_debug_mode("error")
    try:
        use_kernels("triton")
        compact_segments(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("key", "value", "positions"):
        output, source = inputs[f"out_{name.removesuffix('s')}s"], inputs[name]
        for row in range(4):
            for head in range(8):
                kept = source[row, head][inputs["keep"][row, head]]
                start = int(inputs["starts"][row, head])
                assert torch.equal(output[start : start + len(kept)], kept)
