"""Evictions between the tokens of a long answer."""

import pytest
import torch
from models import (
    Graphs,
    base_and_adapted,
    compiled_by,
    evicted_logits,
    kept_entries,
    left_padded,
    lookahead_model,
    prompt_ids,
)

from lkq_hf import LookaheadCache
from lkq_hf.cache.cache import LookaheadCache as Cache
from lkq_hf.scoring import SCORERS

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture
def stages(monkeypatch):
    """What was kept after each eviction, and from which position on that is seen, in order."""
    found, evict_to = [], Cache.evict_to

    def recorded(cache, *arguments):
        evict_to(cache, *arguments)
        found.append((kept_entries(cache), int(cache.get_seq_length())))

    monkeypatch.setattr(Cache, "evict_to", recorded)
    return found


def generate(model, ids, cache, mask=None, new_tokens=30, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    output = model.generate(
        ids, attention_mask=mask, past_key_values=cache, **GREEDY | {"max_new_tokens": new_tokens} | options
    )
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, dim=1)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_token_sees_what_the_last_eviction_kept_and_all_since(architecture, scorer, attention, stages):
    base, model = base_and_adapted(architecture)
    model.set_attn_implementation(attention)
    ids, mask = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 25, seed=1)[0]])
    cache = LookaheadCache(budget=7, scorer=scorer, refresh_every=4)
    tokens, logits = generate(model, ids, cache, mask)
    lengths = [next(iter(kept.values())).shape[-1] for kept, _ in stages]
    # The last 4 tokens stay, so that the next eviction comes 4 tokens later.
    assert lengths == [40, *range(44, 40 + 29 - 4 + 1, 4)]
    assert all(int(kept.sum()) > 0 for stage, _ in stages for kept in stage.values())
    assert 7 + 4 <= cache.summary()["entries_stored"] <= 7 + 8
    expected = evicted_logits(base, torch.cat([ids, tokens], 1), mask, stages)[:, 39:-1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(expected.argmax(-1), tokens)


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 30}], ids=["growing", "static"])
@pytest.mark.parametrize("scorer", SCORERS)
def test_an_answer_after_a_prompt_within_the_budget_is_evicted_too(scorer, options, stages):
    base, model = base_and_adapted()
    model.set_attn_implementation("sdpa")
    ids, cache = prompt_ids(1, 6), LookaheadCache(budget=10, scorer=scorer, refresh_every=4, **options)
    tokens, logits = generate(model, ids, cache)
    assert len(stages) > 2
    expected = evicted_logits(base, torch.cat([ids, tokens], 1), None, stages)[:, 5:-1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("park", [None, "cpu"])
def test_a_refresh_never_recompiles(architecture, park, stages, reset_compiler):
    model, graphs = lookahead_model(architecture, "sdpa"), Graphs()
    ids, mask = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 25, seed=1)[0]])
    tokens, logits = generate(model, ids, LookaheadCache(7, refresh_every=4, park=park), mask)
    growing = list(stages)
    stages.clear()
    cache = LookaheadCache(7, refresh_every=4, park=park, max_new_tokens=30)
    static_tokens, static_logits = generate(model, ids, cache, mask, **compiled_by(graphs))
    assert graphs.count == 1
    assert torch.equal(static_tokens, tokens)
    torch.testing.assert_close(static_logits, logits, atol=1e-4, rtol=1e-4)
    for (found, _), (expected, _) in zip(stages, growing, strict=True):
        assert all(torch.equal(found[layer], kept) for layer, kept in expected.items())


def test_beams_are_refreshed():
    model = lookahead_model("llama", "sdpa")
    ids = prompt_ids(2, 40)
    cache = LookaheadCache(budget=7, refresh_every=4)
    model.generate(ids, past_key_values=cache, max_new_tokens=20, num_beams=3, do_sample=False)
    assert cache.summary()["entries_stored"] <= 7 + 8


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)])
def test_what_is_no_number_of_tokens_is_refused(value, error):
    with pytest.raises(error, match="refresh_every"):
        LookaheadCache(7, refresh_every=value)
