import pytest
import torch

from lkq_hf.scoring import (
    SCORERS,
    LookaheadScorer,
    OracleScorer,
    PrefillAttention,
    RandomScorer,
    SnapKVScorer,
    StreamingScorer,
    get_scorer,
)
from lkq_hf.scoring.pooling import pool_scores


def prefill(length=24, suffix=0, budget=6, batch=2, heads=4, kv_heads=2, size=8, softcap=None, padding=None, layer=0):
    generator = torch.Generator().manual_seed(0)
    total = length + suffix
    mask = None
    if padding is not None:
        mask = torch.arange(length) >= torch.tensor(padding)[:, None]
    return PrefillAttention(
        query=torch.randn(batch, heads, total, size, generator=generator),
        key=torch.randn(batch, kv_heads, total, size, generator=generator),
        value=torch.randn(batch, kv_heads, total, size, generator=generator),
        length=length,
        suffix_length=suffix,
        budget=budget,
        scaling=size**-0.5,
        softcap=softcap,
        mask=mask,
        layer_index=layer,
    )


def naive_probabilities(attention):
    """Attention ``[batch, heads, total, total]`` in float64, causal, without padding."""
    groups = attention.query.shape[1] // attention.key.shape[1]
    key = attention.key.double().repeat_interleave(groups, dim=1)
    logits = attention.query.double() @ key.mT * attention.scaling
    if attention.softcap is not None:
        logits = attention.softcap * torch.tanh(logits / attention.softcap)
    total = key.shape[2]
    allowed = torch.ones(total, total, dtype=torch.bool).tril()[None, None].repeat(key.shape[0], 1, 1, 1)
    if attention.mask is not None:
        allowed[..., : attention.length] &= attention.mask[:, None, None]
    return logits.masked_fill(~allowed, -torch.inf).softmax(-1)


def group_mean(scores, kv_heads=2):
    return scores.unflatten(1, (kv_heads, -1)).mean(2).float()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("padding", [None, [0, 9]])
def test_lookahead_is_the_mean_attention_of_the_appended_tokens(softcap, padding):
    attention = prefill(suffix=5, softcap=softcap, padding=padding)
    scores = LookaheadScorer(kernel_size=1).score(attention)
    expected = group_mean(naive_probabilities(attention)[:, :, 24:, :24].mean(2))
    real = torch.ones(2, 2, 24, dtype=torch.bool) if padding is None else attention.mask[:, None].expand(-1, 2, -1)
    assert scores.dtype == torch.float32 and scores.shape == (2, 2, 24)
    torch.testing.assert_close(scores[real], expected[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", [None, [0, 5]])
def test_snapkv_is_the_mean_attention_of_the_window_and_keeps_it(padding):
    attention = prefill(budget=8, padding=padding)
    scores = SnapKVScorer(window=4, kernel_size=1).score(attention)
    expected = group_mean(naive_probabilities(attention)[:, :, 20:, :20].mean(2))
    real = torch.ones(2, 2, 20, dtype=torch.bool)
    if padding is not None:
        real = attention.mask[:, None, :20].expand(-1, 2, -1)
    torch.testing.assert_close(scores[..., :20][real], expected[real], atol=1e-5, rtol=1e-5)
    assert (scores[..., 20:] == torch.inf).all()


def test_the_window_of_snapkv_is_at_most_the_budget():
    scores = SnapKVScorer(window=32).score(prefill(budget=6))
    assert (scores == torch.inf).sum(-1).unique().tolist() == [6]


def test_the_oracle_takes_the_mean_over_each_rows_response():
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    attention = prefill(suffix=5)
    probabilities = naive_probabilities(attention)[:, :, 24:, :24]
    expected = torch.stack([probabilities[0].mean(1), probabilities[1, :, :2].mean(1)])
    scores = OracleScorer(torch.ones(2, 5, dtype=torch.long), mask).score(attention)
    torch.testing.assert_close(scores, group_mean(expected), atol=1e-5, rtol=1e-5)


def test_streaming_keeps_the_first_real_tokens_and_the_last():
    for padding, first in ((None, (0, 0)), ([0, 9], (0, 9))):
        attention = prefill(padding=padding)
        scores = StreamingScorer(sinks=2).score(attention)
        if padding is not None:
            # What the cache does with every scorer's result.
            scores = scores.masked_fill(~attention.mask[:, None], -torch.inf)
        kept = scores.topk(6).indices.sort().values
        for row in range(2):
            expected = [first[row], first[row] + 1, 20, 21, 22, 23]
            assert kept[row].tolist() == [expected] * 2


def test_random_scores_repeat_for_a_seed_and_differ_between_layers_heads_and_seeds():
    one = RandomScorer(seed=1).score(prefill())
    assert torch.equal(one, RandomScorer(seed=1).score(prefill()))
    assert not torch.equal(one, RandomScorer(seed=2).score(prefill()))
    assert not torch.equal(one, RandomScorer(seed=1).score(prefill(layer=1)))
    assert not torch.equal(one[:, 0], one[:, 1])


@pytest.mark.parametrize("pooling", ["max", "avg"])
@pytest.mark.parametrize("width", [1, 3, 7])
def test_pooling_over_neighbors(pooling, width):
    scores = torch.rand(2, 2, 10, generator=torch.Generator().manual_seed(0))
    reduce = torch.amax if pooling == "max" else torch.mean
    half = width // 2
    expected = torch.stack([reduce(scores[..., max(0, i - half) : i + half + 1], dim=-1) for i in range(10)], dim=-1)
    torch.testing.assert_close(pool_scores(scores, width, pooling), expected)


@pytest.mark.parametrize("weight", [0.2, 1.0])
@pytest.mark.parametrize("width", [1, 3, 5])
def test_a_weighted_sum_of_neighbors(weight, width):
    scores = torch.rand(2, 2, 10, generator=torch.Generator().manual_seed(0))
    half = width // 2
    expected = scores.clone()
    for i in range(10):
        for j in {*range(max(0, i - half), min(10, i + half + 1))} - {i}:
            expected[..., i] += weight * scores[..., j]
    torch.testing.assert_close(pool_scores(scores, width, "sum", weight), expected)


def test_pooling_does_not_spread_padding():
    scores = torch.tensor([[[-torch.inf, -torch.inf, 0.5, 0.25]]])
    assert torch.equal(pool_scores(scores, 3, "max")[0, 0, 2:], torch.tensor([0.5, 0.5]))
    assert torch.isfinite(pool_scores(scores, 3, "avg")).all()
    torch.testing.assert_close(pool_scores(scores, 3, "sum", 0.5)[0, 0], torch.tensor([0.0, 0.25, 0.625, 0.5]))


def test_every_name_leads_to_its_scorer():
    for name, kind in SCORERS.items():
        assert type(get_scorer(name)) is kind
    own = SnapKVScorer(window=3)
    assert get_scorer(own) is own


@pytest.mark.parametrize(
    "make",
    [
        lambda: LookaheadScorer(kernel_size=2),
        lambda: LookaheadScorer(kernel_size=0),
        lambda: SnapKVScorer(window=0),
        lambda: SnapKVScorer(kernel_size=4),
        lambda: SnapKVScorer(pooling="median"),
        lambda: SnapKVScorer(pooling="sum", neighbor_weight=0),
        lambda: SnapKVScorer(neighbor_weight=0.5),
        lambda: LookaheadScorer(pooling="avg"),
        lambda: StreamingScorer(sinks=-1),
        lambda: OracleScorer(torch.ones(5, dtype=torch.long)),
        lambda: OracleScorer(torch.ones(2, 0, dtype=torch.long)),
        lambda: OracleScorer(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool)),
        lambda: OracleScorer(torch.ones(1, 2, dtype=torch.long), torch.tensor([[False, True]])),
    ],
)
def test_parameters_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match=r"must|needs|belongs"):
        make()
