"""Prompts that are read piece by piece."""

import copy

import pytest
import torch
from models import kept_entries, left_padded, lookahead_model, prompt_ids

from lkq_hf import LookaheadCache
from lkq_hf.cache import guards
from lkq_hf.compat import later_chunks_work
from lkq_hf.scoring import SnapKVScorer

needs_chunked_turns = pytest.mark.skipif(
    not later_chunks_work(), reason="this transformers begins at the start when it reads a later turn in chunks"
)
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def generate(model, ids, cache, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = GREEDY | {"max_new_tokens": 6} | options
    output = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    return output.sequences, torch.stack(output.logits, dim=1)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("chunk", [9, 16, 57])
def test_chunks_with_parking_equal_a_prompt_read_at_once(architecture, chunk):
    model = lookahead_model(architecture, "sdpa")
    ids, mask = left_padded([prompt_ids(1, 57)[0], prompt_ids(1, 50, seed=1)[0]])
    whole, pieces = LookaheadCache(7), LookaheadCache(7, park="cpu")
    expected, expected_logits = generate(model, ids, whole, mask)
    found, logits = generate(model, ids, pieces, mask, prefill_chunk_size=chunk)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
    for layer, kept in kept_entries(whole).items():
        assert torch.equal(kept_entries(pieces)[layer], kept)


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 6}], ids=["growing", "static"])
@pytest.mark.parametrize("chunk", [4, 8, 14, 20, 52, 56])
@pytest.mark.parametrize("padding", [0, 7, 30])
def test_snapkv_observes_the_last_tokens_in_whichever_pieces_they_are(chunk, padding, options):
    """A window of 6 tokens, and last pieces of 1 to 17."""
    model = lookahead_model("llama", "sdpa")
    ids, mask = left_padded([prompt_ids(1, 57)[0], prompt_ids(1, 57 - padding, seed=1)[0]])
    scorer = SnapKVScorer(window=6)
    whole, pieces = LookaheadCache(9, scorer, **options), LookaheadCache(9, scorer, park="cpu", **options)
    expected, expected_logits = generate(model, ids, whole, mask)
    found, logits = generate(model, ids, pieces, mask, prefill_chunk_size=chunk)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
    for layer, kept in kept_entries(whole).items():
        assert torch.equal(kept_entries(pieces)[layer], kept)


def later_turns(scorer, budget, question, chunk, **first_options):
    """Tokens and logits of a turn after one of 40 tokens, read at once and in chunks, and the entries stored."""
    model = lookahead_model("llama", "sdpa")
    for options in ({}, {"prefill_chunk_size": chunk}):
        cache = LookaheadCache(budget, scorer, park="cpu")
        text, _ = generate(model, prompt_ids(1, 40), cache, **first_options)
        yield *generate(model, torch.cat([text, question], 1), cache, **options), cache.summary()["entries_stored"]


@needs_chunked_turns
def test_pieces_of_a_later_turn_do_not_observe_the_turn_before():
    question, options = prompt_ids(1, 5, seed=4), {"max_new_tokens": 1, "prefill_chunk_size": 30}
    (expected, expected_logits, _), (found, logits, _) = later_turns(SnapKVScorer(window=8), 9, question, 2, **options)
    assert torch.equal(expected, found)
    torch.testing.assert_close(expected_logits, logits, atol=1e-4, rtol=1e-4)


def test_a_window_that_spans_pieces_is_kept_without_parking():
    model = lookahead_model("llama", "sdpa")
    cache = LookaheadCache(9, SnapKVScorer(window=6))
    generate(model, prompt_ids(1, 57), cache, prefill_chunk_size=14, max_new_tokens=1)
    for kept in kept_entries(cache).values():
        assert kept[..., -6:].all(), "the last piece has one token"


@pytest.mark.parametrize("scorer", ["lookahead", "snapkv"])
def test_without_parking_several_budgets_are_held_until_the_last_chunk(scorer):
    model = lookahead_model("llama", "sdpa")
    ids = prompt_ids(2, 90)
    cache = LookaheadCache(7, scorer)
    stored = []
    handle = model.model.register_forward_hook(
        lambda *_: stored.append(cache.summary()["entries_stored"]), always_call=True
    )
    generate(model, ids, cache, prefill_chunk_size=20)
    handle.remove()
    # The hook runs after the cache's own.
    assert stored[:5] == [20, 28, 28, 28, 7]


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 20}], ids=["growing", "static"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_may_be_shorter_than_the_lookahead_tokens(chunk, options):
    model = lookahead_model("llama", "sdpa")
    assert model.model.lookahead.active_tokens().shape[1] > chunk
    expected, _ = generate(model, prompt_ids(2, 40), LookaheadCache(7))
    found, _ = generate(model, prompt_ids(2, 40), LookaheadCache(7, park="cpu", **options), prefill_chunk_size=chunk)
    assert torch.equal(found, expected)


def test_forwards_of_ones_own():
    model = lookahead_model("llama", "sdpa")
    ids = prompt_ids(2, 90)
    expected, cache = LookaheadCache(7), LookaheadCache(7)
    generate(model, ids, expected, prefill_chunk_size=30, max_new_tokens=1)
    cache.begin_turn(length=90)
    with torch.no_grad():
        for chunk in ids.split(30, dim=1):
            model(chunk, past_key_values=cache)
    for layer, kept in kept_entries(expected).items():
        assert torch.equal(kept_entries(cache)[layer], kept)


@needs_chunked_turns
def test_a_later_turn_in_chunks():
    results = list(later_turns("lookahead", 7, prompt_ids(1, 50, seed=4), 20))
    (expected, expected_logits, _), (found, logits, _) = results
    assert [stored for *_, stored in results] == [7 + 5] * 2
    assert torch.equal(expected, found)
    torch.testing.assert_close(expected_logits, logits, atol=1e-4, rtol=1e-4)


def test_a_later_turn_in_chunks_is_refused_where_transformers_cannot(monkeypatch):
    monkeypatch.setattr(guards, "later_chunks_work", lambda: False)
    model, cache = lookahead_model(), LookaheadCache(7)
    text, _ = generate(model, prompt_ids(1, 40), cache)
    with pytest.raises(
        NotImplementedError, match="begins at the start of the text when it reads a later turn in chunks"
    ):
        generate(model, torch.cat([text, prompt_ids(1, 50, seed=4)], 1), cache, prefill_chunk_size=20)


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 20}], ids=["growing", "static"])
@pytest.mark.parametrize("turn", [1, pytest.param(2, marks=needs_chunked_turns)])
def test_a_last_chunk_of_one_token_ends_the_reading(turn, options):
    model = lookahead_model("llama", "sdpa")
    ids, cache = prompt_ids(1, 41), LookaheadCache(7, park="cpu", **options)
    if turn == 2:
        text, _ = generate(model, ids, cache)
        ids = torch.cat([text[:, :-1], prompt_ids(1, 41, seed=4)], dim=1)
    whole = copy.deepcopy(cache)
    expected, _ = generate(model, ids, whole)
    found, _ = generate(model, ids, cache, prefill_chunk_size=20)
    assert cache.summary()["entries_stored"] == whole.summary()["entries_stored"] == 7 + 5
    assert torch.equal(found, expected)


@needs_chunked_turns
@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 20}], ids=["growing", "static"])
def test_all_chunks_of_a_first_prompt_are_evicted_where_later_turns_are_not(options):
    model = lookahead_model("llama", "sdpa")
    cache = LookaheadCache(7, evict_later_turns=False, **options)
    text, _ = generate(model, prompt_ids(1, 57), cache, prefill_chunk_size=20)
    assert cache.summary()["entries_stored"] == 7 + 5
    options = {"prefill_chunk_size": 20} if later_chunks_work() else {}
    generate(model, torch.cat([text, prompt_ids(1, 30, seed=4)], dim=1), cache, **options)
    assert cache.summary()["entries_stored"] == 7 + 6 + 30 + 5


@needs_chunked_turns
def test_a_refresh_between_chunks_of_a_turn_that_is_kept_whole():
    """With static shapes, whose masks are made before a forward begins."""
    model = lookahead_model("llama", "sdpa")
    results = []
    for options in ({}, {"max_new_tokens": 40}):
        cache = LookaheadCache(30, refresh_every=3, evict_later_turns=False, **options)
        text, logits = generate(model, prompt_ids(1, 60), cache, prefill_chunk_size=8)
        text = torch.cat([text, prompt_ids(1, 20, seed=4)], dim=1)
        results += [(text, logits), generate(model, text, cache, prefill_chunk_size=5)]
    for (text, logits), (expected, expected_logits) in zip(results[:2], results[2:], strict=True):
        assert torch.equal(text, expected)
        torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)


def test_chunks_of_nothing_are_refused():
    with pytest.raises(ValueError, match="prefill_chunk_size must be at least 1"):
        generate(lookahead_model(), prompt_ids(1, 40), LookaheadCache(7), prefill_chunk_size=0)
