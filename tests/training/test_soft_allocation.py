import pytest
import torch

from lkq_hf.cache.allocation import most_of_a_head, share_out
from lkq_hf.scoring.pooling import pool_scores
from lkq_hf.training.eviction import eviction_gates
from lkq_hf.training.soft_allocation import SOFT_ALLOCATIONS, soft_share_out, soft_top_k


def scores(*heads, length=60, padding=0, seed=0):
    """By layer ``[2, heads, length]``, of heads whose scores are of different size; padding in the second row."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for layer, count in enumerate(heads):
        size = torch.linspace(-4, 4, count, dtype=torch.float64)[:, None] + layer
        every = torch.randn(2, count, length, dtype=torch.float64, generator=generator) + size
        every[1, :, :padding] = -torch.inf
        found.append(every)
    return found


def kept_by_the_cache(every, budget, allocation):
    """Of each head's best, as many as it may hand in at all."""
    most = min(most_of_a_head(budget, allocation), every[0].shape[-1])
    least = [layer.topk(most).values[..., -1:] for layer in every]
    handed_in = [layer.masked_fill(layer < low, -torch.inf) for layer, low in zip(every, least, strict=True)]
    return share_out(handed_in, budget, allocation)


@pytest.mark.parametrize("allocation", SOFT_ALLOCATIONS)
@pytest.mark.parametrize("budget", [3, 5, 10, 25, 100])
@pytest.mark.parametrize("padding", [0, 13])
def test_open_gates_are_what_the_cache_keeps(allocation, budget, padding):
    every = scores(2, 6, padding=padding)
    kept = kept_by_the_cache(every, budget, allocation)
    for temperature in (1e-3, 0.1):
        gates = soft_share_out(every, budget, allocation, temperature)
        for layer, gate in zip(kept, gates, strict=True):
            assert torch.equal(gate > torch.tensor(0.5).log(), layer)
    assert all(gate[1, :, :padding].exp().eq(0).all() for gate in gates)


def test_the_cases_hold_heads_at_both_limits():
    kept = kept_by_the_cache(scores(2, 6), 3, "global")
    numbers = torch.cat([layer.sum(-1) for layer in kept], 1)
    assert numbers.min() == 1 and numbers.max() == 12 and len(numbers.unique()) > 2


def test_uniform_is_the_soft_top_k_of_every_head():
    every = scores(2, 6)
    for layer, gate in zip(every, soft_share_out(every, 7, "uniform", 0.2), strict=True):
        assert torch.equal(gate, soft_top_k(layer, 7, 0.2))


def gradient(every, numbers, allocation, layer, row, head):
    """Of one head's open entries, to all scores."""
    leaves = [each.clone().requires_grad_() for each in every]
    gates = soft_share_out(leaves, numbers, allocation, 0.5)
    gates[layer][row, head].exp().sum().backward()
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def test_heads_gain_what_others_lose_where_they_compete():
    generator = torch.Generator().manual_seed(3)
    every = [torch.randn(2, heads, 60, dtype=torch.float64, generator=generator) for heads in (2, 6)]
    for allocation, own in (("uniform", "head"), ("layer", "layer"), ("global", "all")):
        found = gradient(every, 12, allocation, 1, 0, 4)
        assert sum(float(each.sum()) for each in found) == pytest.approx(0, abs=1e-9)
        assert all(not each[1].any() for each in found)  # another row
        others = {"head": found[1][0, 4], "layer": found[1][0, 3], "all": found[0][0, 1]}
        competes = {"head": ["head"], "layer": ["head", "layer"], "all": ["head", "layer", "all"]}[own]
        assert [bool(part.any()) for part in others.values()] == [name in competes for name in others]


def test_gradients_are_those_of_a_threshold_shared_by_all_heads():
    """Where no limit of a head's own decides."""
    generator = torch.Generator().manual_seed(1)
    every = [torch.randn(1, 3, 40, dtype=torch.float64, generator=generator) for _ in range(2)]
    temperature, step = 0.4, 1e-5
    start = torch.cat(soft_share_out(every, 9, "global", temperature), 1).exp().logit()
    weights = torch.randn(1, 6, 40, dtype=torch.float64, generator=generator)

    def with_moved_threshold(change):
        low, high = -1.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            moved = torch.sigmoid(start + (change - middle) / temperature)
            low, high = (middle, high) if moved.sum() > torch.sigmoid(start).sum() else (low, middle)
        return (moved * weights).sum()

    leaves = [each.clone().requires_grad_() for each in every]
    (torch.cat(soft_share_out(leaves, 9, "global", temperature), 1).exp() * weights).sum().backward()
    found = torch.cat([leaf.grad for leaf in leaves], 1)
    near = start.abs() < 2  # elsewhere the limits of a head may decide
    assert near.sum() > 10
    for place in near.nonzero()[::5]:
        change = torch.zeros_like(start)
        change[tuple(place)] = step
        expected = (with_moved_threshold(change) - with_moved_threshold(-change)) / (2 * step)
        assert found[tuple(place)] == pytest.approx(float(expected), abs=2e-2 * float(found.abs().max()))


def test_gates_choose_by_pooled_scores():
    importance = torch.rand(1, 4, 50, generator=torch.Generator().manual_seed(2))
    pooling = {"kernel_size": 3, "pooling": "sum", "neighbor_weight": 0.5}
    found = eviction_gates({2: importance}, {2: 2}, 8, 1e-3, pooling=pooling)[2]
    mean = importance.unflatten(1, (2, 2)).mean(2)
    (expected,) = share_out([pool_scores(mean, **pooling)], 8, "global")
    assert torch.equal(found > torch.tensor(0.5).log(), expected)
    (bare,) = share_out([mean], 8, "global")
    assert not torch.equal(expected, bare)


def test_an_unknown_allocation_is_refused():
    with pytest.raises(ValueError, match="allocation must be one of"):
        soft_share_out(scores(2), 5, "profile", 0.1)
