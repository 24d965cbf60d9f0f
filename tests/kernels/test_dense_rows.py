import pytest
import torch

from lkq_hf.kernels.dense_rows import dense_rows

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("implementation", ["triton", "torch"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("inputs", "outputs"), [(512, [64]), (1536, [40, 8, 24]), (700, [5, 17]), (96, [1, 3, 9]), (513, [8])]
)
def test_products_are_those_of_the_definition(inputs, outputs, dtype, implementation, device, use_kernels):
    use_kernels(implementation)
    torch.manual_seed(0)
    row = torch.randn(1, inputs).to(device, dtype)
    weights = [torch.randn(count, inputs).to(device, dtype) for count in outputs]
    found = dense_rows(row, weights)
    expected = torch.cat([row.double() @ weight.double().T for weight in weights], dim=1)
    assert found.shape == (1, sum(outputs)) and found.dtype == dtype
    assert (found.double() - expected).abs().max() < TOLERANCE[dtype] * expected.abs().max()


def test_compilers_know_the_shape():
    with torch.device("meta"):
        found = dense_rows(torch.empty(1, 64), [torch.empty(8, 64), torch.empty(3, 64)])
    assert found.shape == (1, 11)
