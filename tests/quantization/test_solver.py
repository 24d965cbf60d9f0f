"""The arithmetic of one layer against naive float64 references."""

import copy

import pytest
import torch

from lkq_hf.quantization import descent, solve, stage1, stage2
from lkq_hf.quantization import gptq as gptq_module
from lkq_hf.quantization import hessian as hessian_module
from lkq_hf.quantization.grid import minmax_grid, nearest, reconstruct, stored
from lkq_hf.quantization.hessian import InputMoments, damped
from lkq_hf.quantization.solve import (
    CannotBeQuantized,
    SolverSettings,
    quantize_weight,
    quantize_weights,
    resolve_group_size,
)

pytestmark = pytest.mark.one_version

ROWS, COLUMNS, GROUP = 24, 256, 64


def of_one(function):
    """A step of the solver, which takes batches, for one weight."""

    def call(*args, **kwargs):
        result = function(*(arg.unsqueeze(0) if isinstance(arg, torch.Tensor) else arg for arg in args), **kwargs)
        return result[0] if isinstance(result, torch.Tensor) else tuple(each[0] for each in result)

    return call


search_scales = of_one(stage1.search_scales)
inverse_factor = of_one(hessian_module.inverse_factor)
costliest_first_order = of_one(gptq_module.costliest_first_order)
group_aware_order = of_one(gptq_module.group_aware_order)
gptq = of_one(gptq_module.gptq)
refine_scales = of_one(stage2.refine_scales)
joint_descent = of_one(descent.joint_descent)
corrected_target = of_one(solve.corrected_target)


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) * 0.1
    x = torch.randn(3000, COLUMNS, generator=generator) @ (mixing + torch.eye(COLUMNS))
    x[:, 7] *= 10
    x_tilde = x + 0.1 * torch.randn(x.shape, generator=generator)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * 0.05
    weight[:, :GROUP] += 0.05  # an asymmetric group
    moments = InputMoments(COLUMNS)
    moments.add(x_tilde, x)
    return weight, moments, x, x_tilde


def settings(**changes):
    values = {
        "bits": 3,
        "group_size": GROUP,
        "sym": False,
        "stages": ("stage1", "descent"),
        "scale_search": "minmax",
        "round_to_nearest": False,
        "column_order": "costliest_first",
        "damp_percent": 0.01,
        "alpha": 0.25,
        "corrected_target": True,
        "corrected_residual": True,
        "sweeps": 2,
    }
    return SolverSettings(**{**values, **changes})


def objective(weight, hessian, approximation):
    error = weight.double() - approximation.double()
    return ((error @ hessian.double()) * error).sum(1)


def test_moments_are_streaming_means_in_batches_of_any_size(problem):
    _, moments, x, x_tilde = problem
    streamed = InputMoments(COLUMNS)
    for start, end in ((0, 1), (1, 700), (700, 3000)):
        streamed.add(x_tilde[start:end].view(1, -1, COLUMNS), x[start:end].view(1, -1, COLUMNS))
    exact_h = x_tilde.double().T @ x_tilde.double() / 3000
    exact_r = (x - x_tilde).double().T @ x_tilde.double() / 3000
    for found in (moments, streamed):
        assert found.tokens == 3000
        torch.testing.assert_close(found.hessian.double(), exact_h, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.deviation.double(), exact_r, rtol=1e-4, atol=1e-4)


def test_inverse_factor_is_the_upper_cholesky_factor_of_the_inverse(problem):
    hessian = damped(problem[1].hessian, 0.01).double()
    hessian = (hessian + hessian.T) / 2
    factor = inverse_factor(hessian)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(hessian))


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128, COLUMNS])
def test_stage1_is_never_worse_than_minmax_on_its_own_objective(problem, bits, sym, group_size):
    weight, moments, _, _ = problem

    def losses(scales, zeros):
        integers = nearest(weight, scales, zeros, bits, group_size)
        error = (reconstruct(integers, scales, zeros, group_size) - weight).view(ROWS, -1, group_size).double()
        blocks = moments.hessian.double().view(COLUMNS // group_size, group_size, -1, group_size)
        return torch.stack(
            [((error[:, g] @ blocks[g, :, g]) * error[:, g]).sum(1) for g in range(error.shape[1])], dim=1
        )

    scales, zeros = search_scales(weight, bits, group_size, sym, moments.hessian)
    found, plain = losses(scales, zeros), losses(*minmax_grid(weight, bits, group_size, sym))
    assert (found <= plain * (1 + 1e-4)).all()
    if bits <= 3:
        assert found.sum() < 0.9 * plain.sum()
    assert torch.equal(stored(scales), scales)
    assert zeros.min() >= 0 and zeros.max() <= 2**bits - 1 and torch.equal(zeros, zeros.round())
    if sym:
        assert (zeros == 2 ** (bits - 1)).all()


def test_stage1_finds_what_an_exhaustive_search_over_the_coarse_grid_finds(problem):
    weight, moments, _, _ = problem
    weight, bits = weight[:4, :GROUP], 2
    hessian = moments.hessian[:GROUP, :GROUP]
    scales, zeros = search_scales(weight, bits, GROUP, False, hessian)
    found = objective(weight, hessian, reconstruct(nearest(weight, scales, zeros, bits, GROUP), scales, zeros, GROUP))
    best = torch.full((4,), torch.inf, dtype=torch.float64)
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    for percent in range(20, 101, 5):
        scale = stored((high - low) * percent / 100 / 3)
        for zero in ((-low * percent / 100 / scale).floor(), (-low * percent / 100 / scale).ceil()):
            zero = zero.clamp(0, 3)
            value = objective(weight, hessian, scale * ((weight / scale + zero).round().clamp(0, 3) - zero))
            best = torch.minimum(best, value)
    assert (found <= best * (1 + 1e-5)).all()


def naive_gptq(target, hessian, scales, zeros, bits, group_size, order):
    """Column by column in float64, with the inverse Hessian of the remaining columns formed anew each time."""
    work, hessian = target.double().clone(), hessian.double()
    integers = torch.zeros_like(work)
    remaining = order.tolist()
    while remaining:
        column, rest = remaining[0], remaining
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        s, z = scales[:, column // group_size].double(), zeros[:, column // group_size].double()
        integers[:, column] = (work[:, column] / s + z).round().clamp(0, 2**bits - 1)
        error = (work[:, column] - s * (integers[:, column] - z)) / inverse[0, 0]
        work[:, rest] -= error.unsqueeze(1) * inverse[0]
        remaining = remaining[1:]
    return integers


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("column_order", ["stored", "group_aware", "costliest_first"])
def test_gptq_equals_the_naive_elimination(problem, bits, column_order):
    weight, moments, _, _ = problem
    hessian = damped(moments.hessian, 0.01)
    scales, zeros = minmax_grid(weight, bits, GROUP, False)
    order = {
        "stored": torch.arange(COLUMNS),
        "group_aware": group_aware_order(hessian.diagonal(), GROUP),
        "costliest_first": costliest_first_order(inverse_factor(hessian)),
    }[column_order]
    # A factor of float64, rounded: one of float32 puts more values on the other side of a rounding boundary.
    factor = inverse_factor(hessian.double(), order).float()
    found = gptq(weight, factor, scales, zeros, bits, GROUP, order)
    reference = naive_gptq(weight, hessian, scales, zeros, bits, GROUP, order)
    # A value that lies on a rounding boundary may fall to either side, and changes what follows in its row.
    assert (found == reference).double().mean() > 0.99
    approximation = reconstruct(found, scales, zeros, GROUP)
    reference_loss = objective(weight, hessian, reconstruct(reference, scales.double(), zeros.double(), GROUP))
    torch.testing.assert_close(
        objective(weight, hessian, approximation).sum(), reference_loss.sum(), rtol=1e-3, atol=0
    )
    rounded = reconstruct(nearest(weight, scales, zeros, bits, GROUP), scales, zeros, GROUP)
    assert objective(weight, hessian, approximation).sum() < 0.9 * objective(weight, hessian, rounded).sum()


def test_group_aware_order_keeps_groups_together_and_starts_with_the_most_important():
    diagonal = torch.tensor([1.0, 3.0, 9.0, 2.0, 5.0, 4.0])
    assert group_aware_order(diagonal, 2).tolist() == [2, 3, 4, 5, 1, 0]


def test_costliest_first_order_sorts_by_the_diagonal_of_the_inverse(problem):
    _, moments, _, _ = problem
    hessian = damped(moments.hessian, 0.01)
    order = costliest_first_order(inverse_factor(hessian))
    costs = 1 / hessian.double().inverse().diagonal()[order]
    assert (costs.diff() <= 1e-4 * costs[:-1]).all()
    assert not torch.equal(order, torch.arange(len(order)))


def naive_stage2(target, hessian, integers, scales, zeros, group_size, sweeps):
    """The closed-form update of each scale in float64, from the definition, row by row."""
    target, hessian, scales = target.double(), hessian.double(), scales.double().clone()
    level = (integers.view(target.shape[0], -1, group_size) - zeros.unsqueeze(-1)).double()
    for row in range(target.shape[0]):
        for _ in range(sweeps):
            for group in range(scales.shape[1]):
                inside = slice(group * group_size, (group + 1) * group_size)
                v = level[row, group]
                error = target[row] - (level[row] * scales[row].unsqueeze(1)).flatten()
                new = scales[row, group] + (v @ hessian[inside] @ error) / (v @ hessian[inside, inside] @ v)
                scales[row, group] = stored(new.float()).double()
    return scales


@pytest.mark.parametrize("sweeps", [1, 3])
def test_stage2_equals_the_naive_coordinate_descent_and_lowers_every_row(problem, sweeps):
    weight, moments, _, _ = problem
    hessian, bits = moments.hessian, 2
    scales, zeros = minmax_grid(weight, bits, GROUP, False)
    integers = nearest(weight, scales, zeros, bits, GROUP)
    found = refine_scales(weight, hessian, integers, scales, zeros, GROUP, sweeps)
    torch.testing.assert_close(
        found.double(), naive_stage2(weight, hessian, integers, scales, zeros, GROUP, sweeps), rtol=2e-3, atol=0
    )
    before = objective(weight, hessian, reconstruct(integers, scales, zeros, GROUP))
    after = objective(weight, hessian, reconstruct(integers, found, zeros, GROUP))
    assert (after <= before).all() and after.sum() < 0.9 * before.sum()
    assert torch.equal(stored(found), found) and (found > 0).all()


def test_stage2_is_monotone_in_the_number_of_sweeps(problem):
    weight, moments, _, _ = problem
    scales, zeros = minmax_grid(weight, 2, 32, True)
    integers = nearest(weight, scales, zeros, 2, 32)
    last = objective(weight, moments.hessian, reconstruct(integers, scales, zeros, 32))
    for sweeps in (1, 2, 4):
        new = refine_scales(weight, moments.hessian, integers, scales, zeros, 32, sweeps)
        loss = objective(weight, moments.hessian, reconstruct(integers, new, zeros, 32))
        assert (loss <= last * (1 + 1e-5)).all()
        last = loss


def test_stage2_leaves_undetermined_and_sign_flipping_scales_alone(problem):
    weight, moments, _, _ = problem
    scales, zeros = minmax_grid(weight, 2, GROUP, True)
    integers = nearest(weight, scales, zeros, 2, GROUP)
    integers[:, :GROUP] = zeros[:, :1]  # all levels 0
    level = integers.view(ROWS, -1, GROUP) - zeros.unsqueeze(-1)
    opposite = -(level * scales.unsqueeze(-1)).view(ROWS, COLUMNS)  # wants every scale negative
    found = refine_scales(opposite, moments.hessian, integers, scales, zeros, GROUP, 2)
    assert torch.equal(found[:, 0], scales[:, 0]) and (found > 0).all() and torch.isfinite(found).all()


def naive_descent(target, hessian, integers, scales, zeros, bits, group_size):
    """One sweep in float64 that tries every integer of every column, then solves for the group's scale."""
    target, hessian = target.double(), hessian.double()
    integers, scales = integers.double().clone(), scales.double().clone()
    for group in range(scales.shape[1]):
        z = zeros[:, group].double()
        inside = slice(group * group_size, (group + 1) * group_size)
        for column in range(inside.start, inside.stop):
            losses = []
            for candidate in range(2**bits):
                integers_try = integers.clone()
                integers_try[:, column] = candidate
                losses.append(
                    objective(target, hessian, reconstruct(integers_try, scales, zeros.double(), group_size))
                )
            integers[:, column] = torch.stack(losses).argmin(0).double()
        v = integers[:, inside] - z.unsqueeze(1)
        error = target - reconstruct(integers, scales, zeros.double(), group_size)
        gain = ((error @ hessian[:, inside]) * v).sum(1) / ((v @ hessian[inside, inside]) * v).sum(1)
        scales[:, group] = stored((scales[:, group] + gain).float()).double()
    return integers, scales


@pytest.mark.parametrize("group_size", [16, 64])
def test_descent_equals_trying_every_integer(problem, group_size):
    weight, moments, _, _ = problem
    weight, hessian, bits = weight[:6, :64], moments.hessian[:64, :64].contiguous(), 3
    scales, zeros = minmax_grid(weight, bits, group_size, False)
    integers = nearest(weight, scales, zeros, bits, group_size)
    found_integers, found_scales = joint_descent(weight, hessian, integers, scales, zeros, bits, group_size, sweeps=1)
    expected_integers, expected_scales = naive_descent(weight, hessian, integers, scales, zeros, bits, group_size)
    assert torch.equal(found_integers.double(), expected_integers)
    torch.testing.assert_close(found_scales.double(), expected_scales, rtol=2e-3, atol=0)


@pytest.mark.parametrize("group_size", [32, COLUMNS])
def test_descent_never_raises_a_rows_objective_and_leaves_its_inputs_alone(problem, group_size):
    weight, moments, _, _ = problem
    bits = 2
    scales, zeros = minmax_grid(weight, bits, group_size, False)
    integers = nearest(weight, scales, zeros, bits, group_size)
    kept = integers.clone(), scales.clone()
    last = objective(weight, moments.hessian, reconstruct(integers, scales, zeros, group_size))
    first = last.sum()
    for sweeps in (1, 2, 4):
        q, s = joint_descent(weight, moments.hessian, integers, scales, zeros, bits, group_size, sweeps=sweeps)
        loss = objective(weight, moments.hessian, reconstruct(q, s, zeros, group_size))
        assert (loss <= last * (1 + 1e-5)).all()
        assert q.min() >= 0 and q.max() <= 2**bits - 1 and torch.equal(stored(s), s)
        last = loss
    assert last.sum() < 0.6 * first
    assert torch.equal(integers, kept[0]) and torch.equal(scales, kept[1])


def test_corrected_target_is_the_least_squares_answer_on_disturbed_inputs(problem):
    weight, moments, x, x_tilde = problem
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3))
    factor = inverse_factor(damped(moments.hessian, 1e-6), order)
    found = corrected_target(weight, weight @ moments.deviation, factor, order, alpha=1.0)
    expected = torch.linalg.lstsq(x_tilde.double(), x.double() @ weight.double().T).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(corrected_target(weight, weight @ moments.deviation, factor, order, alpha=0.0), weight)


def test_the_target_of_a_layer_that_writes_to_the_residual_stream_answers_for_the_stream(problem):
    weight, _, x, x_tilde = problem
    residual = torch.randn(len(x), ROWS, generator=torch.Generator().manual_seed(7))
    disturbed = residual + 0.1 * x_tilde[:, :ROWS]
    moments = InputMoments(COLUMNS, out_features=ROWS)
    for part in range(0, len(x), 700):
        tokens = slice(part, part + 700)
        sums = (residual[tokens] + x[tokens] @ weight.T, disturbed[tokens] + x_tilde[tokens] @ weight.T)
        moments.add(x_tilde[tokens], *sums)
    order = torch.arange(COLUMNS)
    factor = inverse_factor(damped(moments.hessian, 1e-6))
    found = corrected_target(weight, moments.output_deviation(weight), factor, order, alpha=1.0)
    wanted = (residual - disturbed).double() + x.double() @ weight.double().T
    expected = torch.linalg.lstsq(x_tilde.double(), wanted).solution.T
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    some = moments.of_rows(slice(2, 5))
    assert torch.equal(some.output_deviation(weight[2:5]), moments.deviation[2:5])
    with pytest.raises(ValueError, match="needs the full-precision values"):
        moments.add(x_tilde, x)


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
def test_every_step_lowers_the_loss_and_the_result_fits_the_format(problem, bits, sym, group_size):
    weight, moments, _, _ = problem
    stages = ("stage1", "stage2", "descent")
    solution = quantize_weight(weight, moments, settings(bits=bits, sym=sym, group_size=group_size, stages=stages))
    totals = [float(loss.sum()) for loss in solution.losses.values()]
    assert list(solution.losses) == ["nearest", "gptq", "stage2", "descent"]
    assert totals == sorted(totals, reverse=True)
    result = solution.weight
    assert result.integers.dtype == torch.int32 and result.scales.dtype == torch.float16
    assert result.integers.min() >= 0 and result.integers.max() <= 2**bits - 1
    assert result.zeros.min() >= 0 and result.zeros.max() <= 2**bits - 1
    assert torch.isfinite(result.scales).all() and (result.scales != 0).all()
    assert result.group_size == (COLUMNS if group_size == -1 else group_size)
    last = float(solution.losses["descent"].sum() / solution.energy.sum())
    target_error = objective(weight, moments.hessian, result.dequantize()).sum() / solution.energy.sum()
    assert last < float(target_error) * 1.5 + 1e-3  # the reported loss is about the weight that is returned


def test_stages_off_is_plain_gptq_and_nearest_is_nearest(problem):
    weight, moments, _, _ = problem
    plain = settings(stages=(), column_order="stored", alpha=0.0, corrected_target=False)
    scales, zeros = minmax_grid(weight, 3, GROUP, False)
    factor = inverse_factor(damped(moments.hessian, 0.01))
    expected = gptq(weight, factor, scales, zeros, 3, GROUP, torch.arange(COLUMNS))
    assert torch.equal(quantize_weight(weight, moments, plain).weight.integers, expected.int())
    nearest_only = settings(stages=(), round_to_nearest=True, alpha=0.0)
    found = quantize_weight(weight, moments, nearest_only).weight
    assert torch.equal(found.integers, nearest(weight, scales, zeros, 3, GROUP).int())
    error = (found.dequantize() - weight).view(ROWS, -1, GROUP).abs().amax(-1)
    assert (error <= found.scales.float() * 0.501 + 1e-3 * found.scales.float()).all()


def test_the_mse_search_lowers_the_unweighted_error(problem):
    weight, moments, _, _ = problem
    plain = settings(bits=2, stages=(), round_to_nearest=True, alpha=0.0)
    searched = settings(bits=2, stages=(), round_to_nearest=True, alpha=0.0, scale_search="mse")
    errors = [
        (quantize_weight(weight, moments, s).weight.dequantize() - weight).square().sum() for s in (plain, searched)
    ]
    assert errors[1] < 0.9 * errors[0]


def test_rows_are_independent(problem):
    weight, moments, _, _ = problem
    whole = quantize_weight(weight, moments, settings()).weight
    upper = quantize_weight(weight[:10], moments, settings()).weight
    assert (whole.integers[:10] == upper.integers).float().mean() > 0.999
    torch.testing.assert_close(whole.scales[:10], upper.scales, rtol=1e-2, atol=0)


def random_layers(count, seed=5):
    """Weights of one shape, each with moments of its own; the last saw nothing."""
    generator = torch.Generator().manual_seed(seed)
    weights, moments = [], []
    for index in range(count):
        weights.append(torch.randn(ROWS, COLUMNS, generator=generator) * 0.05 * (index + 1))
        moments.append(InputMoments(COLUMNS))
        if index < count - 1:
            x = torch.randn(300, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
            moments[-1].add(x, x + 0.1 * torch.randn(x.shape, generator=generator))
    return weights, moments


def assert_same_solutions(found, expected):
    """But for ties: a value half-way between two integers changes what follows in its row."""
    assert found.losses.keys() == expected.losses.keys()
    for step, loss in expected.losses.items():
        torch.testing.assert_close(found.losses[step], loss, rtol=0.05, atol=1e-6)
        torch.testing.assert_close(found.losses[step].sum(), loss.sum(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(found.energy, expected.energy)
    assert (found.weight.integers == expected.weight.integers).float().mean() > 0.99
    assert (found.weight.scales == expected.weight.scales).float().mean() > 0.99
    assert (found.weight.zeros == expected.weight.zeros).float().mean() > 0.99


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stages": ("stage1", "stage2"), "sym": True},
        {"column_order": "group_aware", "group_size": -1},
        {"column_order": "stored", "stages": (), "scale_search": "mse"},
        {"round_to_nearest": True},
    ],
)
def test_weights_solved_together_come_out_as_alone(changes):
    weights, moments = random_layers(4)
    moments[1].deviation = None
    together = quantize_weights(weights, moments, settings(**changes))
    assert together.weight.integers.shape == (4, ROWS, COLUMNS)
    for weight, own, found in zip(weights, moments, together.unbind(), strict=True):
        expected = quantize_weight(weight, own, settings(**changes))
        assert_same_solutions(found, expected)
        assert found.weight.dequantize().shape == weight.shape and found.energy.shape == (ROWS,)


def indefinite(moments, below):
    """The same moments, but for one eigenvalue: so far below 0, as a part of the mean diagonal."""
    broken = copy.copy(moments)
    values, vectors = torch.linalg.eigh(moments.hessian.double())
    values[0] = -below * values.mean()
    broken.hessian = (vectors * values @ vectors.T).float()
    return broken


@pytest.mark.parametrize("below", [0.015, 0.05, 0.5])
def test_only_moments_that_need_it_are_damped_more(below, monkeypatch):
    weights, moments = random_layers(4)
    moments[2] = indefinite(moments[2], below)
    factored = []
    original = hessian_module.inverse_factor
    spy = lambda matrix, order=None: factored.append(len(matrix)) or original(matrix, order)  # noqa: E731
    monkeypatch.setattr(solve, "inverse_factor", spy)
    together = quantize_weights(weights, moments, settings()).unbind()
    # Moments are damped by 0.01 before anything is tried.
    tries = [4] + [1] * sum(0.01 + 1.01 * damping < below for damping in (0.0, *solve.EXTRA_DAMPING))
    assert factored == tries + tries
    for index, (weight, own) in enumerate(zip(weights, moments, strict=True)):
        expected = quantize_weight(weight, own, settings())
        if index != 2:  # whose loss is no sum of squares
            assert_same_solutions(together[index], expected)
        assert (together[index].weight.integers == expected.weight.integers).float().mean() > 0.98


def test_of_weights_solved_together_the_one_that_cannot_be_is_told():
    weights, moments = random_layers(4)
    assert torch.isfinite(inverse_factor(damped(moments[2].hessian, 0.01))).all()
    singular = [*moments[:2], indefinite(moments[2], 3), moments[3]]
    assert inverse_factor(damped(singular[2].hessian, 1.0)).isnan().all()
    too_large, broken = [each.clone() for each in weights], [each.clone() for each in weights]
    too_large[3][0, 1] = 1e6
    broken[1][0, 1] = torch.nan
    overflown = [*moments[:2], copy.copy(moments[2]), moments[3]]
    overflown[2].hessian = torch.full_like(moments[2].hessian, torch.inf)
    cases = [
        (weights, singular, 2, "stay singular"),
        (too_large, moments, 3, "float16"),
        (broken, moments, 1, "weight contains NaN"),
        (weights, overflown, 2, "calibration inputs contain NaN"),
    ]
    for case_weights, case_moments, index, message in cases:
        with pytest.raises(CannotBeQuantized, match=message) as error:
            quantize_weights(case_weights, case_moments, settings())
        assert error.value.index == index


def test_dead_inputs_zero_groups_and_a_layer_that_saw_nothing():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500, 128, generator=generator)
    x[:, 5] = 0
    x[:, 64:96] = 0
    weight = torch.randn(32, 128, generator=generator) * 0.1
    weight[:, 32:64] = 0
    moments = InputMoments(128)
    moments.add(x, x)
    for case in (moments, InputMoments(128)):
        for sym in (False, True):
            solution = quantize_weight(weight, case, settings(group_size=32, sym=sym, bits=4))
            restored = solution.weight.dequantize()
            assert torch.isfinite(restored).all()
            assert (restored[:, 32:64] == 0).all()
            assert (restored - weight).abs().max() < 0.2


@pytest.mark.parametrize("size", [1e-9, 1e3])
def test_scales_neither_vanish_nor_overflow_in_float16(problem, size):
    _, moments, _, _ = problem
    weight = torch.randn(8, COLUMNS, generator=torch.Generator().manual_seed(4)) * size
    result = quantize_weight(weight, moments, settings(bits=8)).weight
    assert torch.isfinite(result.scales).all() and (result.scales != 0).all()
    if size > 1:
        assert (result.dequantize() - weight).abs().max() < 0.1 * size


def test_what_cannot_be_quantized_is_refused(problem):
    weight, moments, _, _ = problem
    broken = weight.clone()
    broken[3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        quantize_weight(broken, moments, settings())
    overflowing = InputMoments(COLUMNS)
    overflowing.hessian.fill_(torch.inf)
    with pytest.raises(ValueError, match="calibration inputs contain NaN"):
        quantize_weight(weight, overflowing, settings())
    with pytest.raises(ValueError, match="float16"):
        quantize_weight(weight * 1e7, moments, settings())
    with pytest.raises(ValueError, match=r"in_features=96 .* group sizes that fit: 32, -1"):
        resolve_group_size(96, 64)
    with pytest.raises(ValueError, match="full-precision values"):
        InputMoments(4).add(torch.ones(2, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [2, 4])
def test_a_gpu_finds_what_the_cpu_finds(problem, bits):
    weight, moments, x, x_tilde = problem
    on_gpu = InputMoments(COLUMNS, "cuda")
    on_gpu.add(x_tilde.cuda(), x.cuda())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # TF32 would show in the moments
    try:
        found = quantize_weight(weight, on_gpu, settings(bits=bits))
    finally:
        torch.set_float32_matmul_precision(before)
    expected = quantize_weight(weight, moments, settings(bits=bits))
    torch.testing.assert_close(on_gpu.hessian.cpu(), moments.hessian, rtol=1e-4, atol=1e-4)
    for step, loss in expected.losses.items():
        torch.testing.assert_close(found.losses[step].sum().cpu(), loss.sum(), rtol=0.02, atol=0)
    assert (found.weight.integers.cpu() == expected.weight.integers).float().mean() > 0.9
