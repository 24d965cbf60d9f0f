"""One budget shared out among heads, against lists of Python objects."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shares import naive_shares

from lkq_hf.cache.allocation import share_out
from lkq_hf.cache.eviction import Eviction
from lkq_hf.cache.layers import Candidates

pytestmark = pytest.mark.one_version

ALLOCATIONS = ("global", "layer", "uniform")
SETTINGS = settings(max_examples=120, deadline=None, derandomize=True)

# Shapes of the layers' scores: rows, and for each layer its KV heads and its candidates.
batches = st.integers(1, 3)
layers = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 12)), min_size=1, max_size=3)


def random_scores(draw, batch, shapes):
    """Scores of layers: some equal, some infinite, and with padding; every row has one candidate at least."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from(["different", "few", "equal"]))
    infinite, padding = draw(st.sampled_from([0.0, 0.2, 0.8])), draw(st.sampled_from([0.0, 0.3, 0.95]))
    scores = []
    for heads, count in shapes:
        shape = (batch, heads, count)
        if kind == "different":
            layer = torch.randn(shape, generator=generator)
        else:
            layer = torch.randint(0, 4 if kind == "few" else 1, shape, generator=generator).float()
        layer[torch.rand(shape, generator=generator) < infinite] = math.inf
        layer[torch.rand(shape, generator=generator) < padding] = -math.inf
        layer[..., -1] = layer[..., -1].clamp(min=0.0)
        scores.append(layer)
    return scores


def places(keep):
    """The places of True, for each layer and head of the first row."""
    return [[head.nonzero()[:, 0].tolist() for head in layer[0]] for layer in keep]


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@SETTINGS
@given(data=st.data(), batch=batches, shapes=layers, budget=st.integers(1, 14))
def test_shares_are_those_of_the_definition(allocation, data, batch, shapes, budget):
    scores = random_scores(data.draw, batch, shapes)
    given_scores = [layer.clone() for layer in scores]
    keep = share_out(scores, budget, allocation)
    again = share_out(scores, budget, allocation)
    for index, layer in enumerate(scores):
        assert keep[index].dtype == torch.bool and keep[index].shape == layer.shape
        assert torch.equal(keep[index], again[index]) and torch.equal(layer, given_scores[index])
        assert not (keep[index] & (layer == -math.inf)).any()
    for row in range(batch):
        one = [layer[row].tolist() for layer in scores]
        assert places([layer[row : row + 1] for layer in keep]) == naive_shares(one, budget, allocation)
        alone = share_out([layer[row : row + 1] for layer in scores], budget, allocation)
        assert places(alone) == places([layer[row : row + 1] for layer in keep]), "rows do not compete"


@SETTINGS
@given(data=st.data(), batch=batches, shapes=layers, budget=st.integers(1, 14))
def test_the_whole_budget_is_used(data, batch, shapes, budget):
    scores = random_scores(data.draw, batch, shapes)
    groups = {
        "global": [scores],
        "layer": [[layer] for layer in scores],
        "uniform": [[layer[:, head : head + 1]] for layer in scores for head in range(layer.shape[1])],
    }
    for allocation in ALLOCATIONS:
        kept = share_out(scores, budget, allocation)
        flat = iter(head for layer in kept for head in layer.unbind(1))
        for group in groups[allocation]:
            heads = sum(layer.shape[1] for layer in group)
            candidates = sum((layer > -math.inf).sum((1, 2)) for layer in group)
            total = sum(next(flat).sum(-1) for _ in range(heads))
            assert torch.equal(total, candidates.clamp(max=budget * heads))


@pytest.mark.parametrize("value", [math.inf, torch.finfo(torch.float32).max])
@pytest.mark.parametrize("budget", [1, 3, 10])
def test_no_score_takes_what_a_head_keeps_for_itself(budget, value):
    """As attention sinks, of which each head may have more than the budget."""
    scores = [torch.rand(2, 2, 30, generator=torch.Generator().manual_seed(layer)) for layer in range(3)]
    for layer in scores[:2]:
        layer[..., :20] = value
    kept = torch.stack(share_out(scores, budget, "global"))
    own = max(1, round(0.2 * budget))
    assert kept.sum(-1).amin() == own and (kept.sum((0, 2, 3)) == budget * 6).all()
    assert torch.equal(kept[2].sum(-1), torch.full((2, 2), own)), "the least important layer has its best few"
    assert kept[2].gather(-1, scores[2].topk(own).indices).all()


def test_numbers_fixed_beforehand():
    scores = [torch.rand(2, 2, 9, generator=torch.Generator().manual_seed(layer)) for layer in range(2)]
    scores[0][1, :, :6] = -math.inf
    kept = share_out(scores, 4, "profile", [torch.tensor([1, 7]), torch.tensor([3, 5])])
    assert [layer.sum(-1).tolist() for layer in kept] == [[[1, 7], [1, 3]], [[3, 5], [3, 5]]]
    assert torch.equal(kept[1][:, 0], scores[1][:, 0] >= scores[1][:, 0].topk(3).values[..., -1:])


def candidates_of(batch, heads, count, appended, generator):
    """Candidates whose keys name their head and place, some of them padding."""
    key = torch.arange(heads)[:, None] * 1000.0 + torch.arange(count + appended)
    key = key.expand(batch, heads, -1)[..., None].repeat(1, 1, 1, 2)
    places = torch.arange(count, dtype=torch.int32).expand(batch, heads, -1) * 2  # as between entries that are gone
    valid = torch.rand(batch, heads, count, generator=generator) > 0.2
    valid[..., -1] = True
    return Candidates(key, -key, places, valid)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("budget", [1, 2, 5, 8])
def test_an_eviction_keeps_no_more_of_a_head_than_four_times_the_mean(budget, allocation, static):
    generator, batch, heads, count = torch.Generator().manual_seed(budget), 2, 3, 60
    eviction, scores, given_candidates = Eviction(budget, allocation, static=static), [], []
    for index in (0, 2, 5):
        layer = torch.randint(0, 5, (batch, heads, count), generator=generator).float()
        if index == 2:
            layer[:, 1] += 5  # more important than all others
        given_candidates.append(candidates_of(batch, heads, count, 3, generator))
        scores.append(layer.masked_fill(~given_candidates[-1].valid, -math.inf))
        eviction.add(index, given_candidates[-1], layer)
    assert eviction.layers == [0, 2, 5]
    prefixes = eviction.settle(source_length=120)
    assert list(prefixes) == [0, 2, 5] and len({id(prefix.pool) for prefix in prefixes.values()}) == 1
    most = budget if allocation == "uniform" else 4 * budget
    longest = 0
    for row in range(batch):
        expected = naive_shares([layer[row].tolist() for layer in scores], budget, allocation, most)
        assert sum(len(head) for layer in expected for head in layer) == budget * 9
        for place, prefix in enumerate(prefixes.values()):
            keys, values, positions, valid = prefix.padded()
            assert torch.equal(valid.sum(-1), prefix.lengths) and prefix.lengths.max() <= prefix.longest
            assert prefix.source_length == 120
            for head in range(heads):
                entries = expected[place][head]
                longest = max(longest, len(entries))
                here = valid[row, head]
                assert positions[row, head][here].tolist() == [2 * entry for entry in entries]
                assert keys[row, head][here].tolist() == [[1000 * head + entry] * 2 for entry in entries]
                assert torch.equal(values[row, head][here], -keys[row, head][here])
    own = max(1, round(0.2 * budget))  # of each of the others
    assert longest == min(most, {"global": 9 * budget - 8 * own, "layer": 3 * budget - 2 * own}.get(allocation, most))
    if static:
        assert {prefix.longest for prefix in prefixes.values()} == {64}
        assert next(iter(prefixes.values())).pool.keys.shape[0] == batch * 64 * 9
    else:
        assert next(iter(prefixes.values())).pool.keys.shape[0] == batch * budget * 9


def test_layers_of_different_sizes_have_pools_of_their_own():
    generator, eviction = torch.Generator().manual_seed(0), Eviction(3, "global")
    for index, size in enumerate((2, 4, 2)):
        key = torch.randn(2, 2, 20, size, generator=generator)
        places = torch.arange(20, dtype=torch.int32).expand(2, 2, -1)
        eviction.add(index, Candidates(key, key, places, None), torch.rand(2, 2, 20, generator=generator))
    prefixes = eviction.settle(20)
    assert [prefixes[index].pool.keys.shape[1] for index in range(3)] == [2, 4, 2]
    assert prefixes[0].pool is prefixes[2].pool is not prefixes[1].pool
    assert sum(int(prefix.lengths.sum()) for prefix in prefixes.values()) == 2 * 3 * 6


def test_a_pool_is_written_again_where_it_fits():
    def evict(budget, batch, reuse):
        eviction = Eviction(budget, "global", static=True)
        generator = torch.Generator().manual_seed(batch)
        for index in range(2):
            eviction.add(
                index,
                candidates_of(batch, 2, 20, 0, generator),
                torch.rand(batch, 2, 20, generator=generator),
            )
        return eviction.settle(40, reuse)[1].pool

    first = evict(5, 2, ())
    assert evict(7, 2, [first]) is first, "budgets up to 64 have the same static shapes"
    assert evict(5, 3, [first]) is not first and evict(70, 2, [first]) is not first
