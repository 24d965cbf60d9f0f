import pytest
import torch

from lkq_hf.kernels.add_low_rank import add_low_rank


def make_inputs(device, dtype, batch=2, tokens=20, in_features=48, out_features=80, rank=8):
    torch.manual_seed(0)
    shapes = (batch, tokens, out_features), (batch, tokens, in_features), (rank, in_features), (out_features, rank)
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def definition(result, x, down, up, scaling, length):
    expected = result.double()
    hidden = (x[:, -length:].double() @ down.double().T).to(x.dtype).double()
    expected[:, -length:] += scaling * hidden @ up.double().T
    return expected.to(result.dtype)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("sizes", "length"),
    [
        ({}, 20),
        ({}, 7),
        ({"batch": 1, "tokens": 50, "in_features": 130, "out_features": 65, "rank": 3}, 33),
        ({"batch": 3, "tokens": 5, "in_features": 1030, "out_features": 1, "rank": 17}, 1),
        ({"in_features": 64, "rank": 70}, 4),
        ({"batch": 1, "tokens": 3, "in_features": 5000, "out_features": 4}, 2),
    ],
    ids=str,
)
def test_matches_the_definition(device, use_kernels, implementation, dtype, sizes, length):
    result, x, down, up = make_inputs(device, dtype, **sizes)
    expected = definition(result, x, down, up, 0.3, length)
    before = result.clone()
    use_kernels(implementation)
    add_low_rank(result, x, down, up, 0.3, length)
    # Sums of another order round the short factor elsewhere now and then.
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    kept = result.shape[1] - length
    assert torch.equal(result[:, :kept], before[:, :kept])


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_strided_inputs(device, use_kernels, implementation):
    result, x, down, up = make_inputs(device, torch.bfloat16, in_features=80)
    expected = definition(result, x, down, up, 2.0, 5)
    use_kernels(implementation)
    strided = [each.transpose(-1, -2).contiguous().transpose(-1, -2) for each in (result, x, down, up)]
    add_low_rank(*strided, 2.0, 5)
    torch.testing.assert_close(strided[0], expected, rtol=3e-2, atol=0.5)
