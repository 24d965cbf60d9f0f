"""The kernels of weights that are refined: Triton (in its interpreter without a GPU) against the references."""

import pytest
import torch

from lkq_hf.kernels import grid_positions


@pytest.fixture(autouse=True)
def force_triton(use_kernels):
    use_kernels("triton")


def random_weight(rows, columns, size, largest, device, fixed=False):
    generator = torch.Generator().manual_seed(0)
    groups = rows, columns // size
    position = torch.rand(rows, columns, generator=generator) * (largest + 0.98) - 0.49
    start = position.round().clamp(0, largest).to(torch.uint8)
    scale = torch.rand(groups, generator=generator) - 0.5
    zero = torch.rand(groups, generator=generator) * largest
    return [tensor.to(device) for tensor in (start if fixed else position, scale, zero, start)]


shapes = pytest.mark.parametrize(("rows", "columns", "size"), [(5, 192, 64), (3, 96, 96), (130, 32, 32)])


@shapes
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_is_that_of_the_reference(rows, columns, size, fixed, dtype, device):
    position, scale, zero, _ = random_weight(rows, columns, size, 3, device, fixed)
    found = grid_positions.value(position, scale, zero, 3, dtype)
    assert found.dtype == dtype
    expected = grid_positions.value_reference(position, scale, zero, 3, dtype)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    torch.testing.assert_close(found, expected, rtol=0 if dtype == torch.float32 else 2**-7, atol=0)


@shapes
@pytest.mark.parametrize("of_position", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_reference(rows, columns, size, of_position, dtype, device):
    position, scale, zero, _ = random_weight(rows, columns, size, 15, device)
    gradient = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    found = grid_positions.gradients(gradient, position, scale, zero, 15, of_position)
    expected = grid_positions.gradients_reference(gradient, position, scale, zero, 15, of_position)
    assert (found[0] is None) == (not of_position)
    for one, other in zip(found[not of_position :], expected[not of_position :], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@shapes
def test_positions_move_as_in_the_reference(rows, columns, size, device):
    position, scale, _, start = random_weight(rows, columns, size, 3, device)
    generator = torch.Generator().manual_seed(1)
    gradient, of_rows, of_columns = (
        torch.rand(shape, generator=generator).to(device) for shape in ((rows, columns), rows, columns)
    )
    gradient = (gradient - 0.5) * 0.1
    of_columns[2] = 0  # an input that is always 0
    expected, before = position.clone(), position.clone()
    grid_positions.move_reference(expected, gradient, scale, start, (of_rows, of_columns), 0.4, 0.75, 3, 0.49)
    grid_positions.move(position, gradient, scale, start, (of_rows, of_columns), 0.4, 0.75, 3, 0.49)
    torch.testing.assert_close(position, expected, rtol=1e-5, atol=1e-5)
    assert (position - start).abs().max() <= 0.75 and not torch.equal(position, before)


def test_wide_groups_take_the_reference(device):
    # The kernel would not find them: their size is none that Triton takes.
    position, scale, zero, _ = random_weight(1, 2 * grid_positions.WIDEST, 2 * grid_positions.WIDEST, 3, device)
    found = grid_positions.value(position, scale, zero, 3, torch.float32)
    assert torch.equal(found, grid_positions.value_reference(position, scale, zero, 3, torch.float32))
