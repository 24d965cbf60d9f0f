"""Entries in main memory: every turn reads the whole text, and answers with the best entries for its question."""

import copy

import pytest
import torch
from models import (
    ARCHITECTURES,
    Graphs,
    base_and_adapted,
    compiled_by,
    evicted_logits,
    kept_entries,
    left_padded,
    lookahead_model,
    prompt_ids,
    tiny_model,
)
from torch.nn import functional as F

from lkq_hf import LookaheadCache, prepare_model_for_eviction
from lkq_hf.cache import parking
from lkq_hf.scoring import SnapKVScorer

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def generate(model, ids, cache, mask=None, new_tokens=6, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    output = model.generate(
        ids, attention_mask=mask, past_key_values=cache, **GREEDY | {"max_new_tokens": new_tokens} | options
    )
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, dim=1)


def everything(kept, length):
    """What a forward sees that reads a text after ``length`` tokens."""
    return {layer: torch.ones(*entries.shape[:2], length, dtype=torch.bool) for layer, entries in kept.items()}


def converse(model, cache, ids, mask, turns=3, new_tokens=6, **options):
    """The conversation, and for each turn where its answer begins, its tokens, logits, and what was kept."""
    answers = []
    for turn in range(turns):
        tokens, logits = generate(model, ids, cache, mask, new_tokens, **options)
        answers.append((ids.shape[1], tokens, logits, kept_entries(cache)))
        ids = torch.cat([ids, tokens, prompt_ids(ids.shape[0], 4 + turn, seed=20 + turn)], dim=1)
        mask = F.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    return ids, mask, answers


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 20}], ids=["growing", "static"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_turns_read_everything_and_answers_see_what_was_kept(architecture, attention, options):
    base, model = base_and_adapted(architecture)
    model.set_attn_implementation(attention)
    ids, mask = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 25, seed=1)[0]])
    cache = LookaheadCache(budget=7, park="cpu", **options)
    ids, mask, answers = converse(model, cache, ids, mask)
    stages, read = [], 0
    for length, tokens, logits, kept in answers:
        stages += [everything(kept, read), kept]
        text = ids[:, : length + tokens.shape[1]]
        expected = evicted_logits(base, text, mask[:, : text.shape[1]], stages)[:, length - 1 : -1]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(expected.argmax(-1), tokens)
        read = length + tokens.shape[1] - 1
    assert cache.summary()["entries_stored"] == 7 + 6 - 1, "the device holds the budget and the last answer"
    assert cache.layers[-1].parked.length == answers[-1][0], "main memory holds the rest"


@pytest.mark.parametrize("scorer", ["lookahead", SnapKVScorer(window=4), "streaming", "random"], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_turns_of_one_new_token_equal_a_fresh_cache_that_reads_the_whole_conversation(architecture, scorer):
    model = lookahead_model(architecture, "sdpa")
    ids, mask = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 25, seed=1)[0]])
    cache = LookaheadCache(budget=7, scorer=scorer, park="cpu")
    ids, mask, answers = converse(model, cache, ids, mask, turns=4, new_tokens=1)
    for length, tokens, logits, kept in answers:
        fresh = LookaheadCache(budget=7, scorer=scorer)
        expected_tokens, expected_logits = generate(model, ids[:, :length], fresh, mask[:, :length], new_tokens=1)
        assert torch.equal(tokens, expected_tokens)
        torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
        assert all(torch.equal(kept[layer], entries) for layer, entries in kept_entries(fresh).items())


@pytest.mark.parametrize("change", ["beams", "copy", "crop", "select"])
def test_changes_of_the_batch_reach_main_memory(change):
    model = lookahead_model("llama", "sdpa")
    ids = prompt_ids(2, 40)
    cache, expected = LookaheadCache(budget=7, park="cpu"), LookaheadCache(budget=7, park="cpu")
    question = prompt_ids(2, 5, seed=9)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        order = [0, 1]
        if change == "beams":
            order = [1, 1]
            cache.reorder_cache(torch.tensor(order))
        elif change == "copy":
            used, cache = cache, copy.deepcopy(cache)
            model(prompt_ids(2, 9, seed=3), past_key_values=used)
            assert cache.layers[0].parked.length == 40
        elif change == "crop":
            for token in range(3):
                model(torch.full((2, 1), 5 + token), past_key_values=cache)
            cache.crop(-3)
        else:
            order = [1]
            cache.batch_select_indices(torch.tensor(order))
        found = model(question[: len(order)], past_key_values=cache).logits
        model(ids[order], past_key_values=expected)
        reference = model(question[: len(order)], past_key_values=expected).logits
    torch.testing.assert_close(found, reference, atol=1e-5, rtol=1e-5)
    for layer, kept in kept_entries(expected).items():
        assert torch.equal(kept_entries(cache)[layer], kept)


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 20}], ids=["growing", "static"])
def test_a_crop_after_a_refresh_reaches_main_memory(options):
    """A refresh parks the tokens that it keeps as well, so that they are up for a crop."""
    model = lookahead_model("llama", "sdpa")
    cache = LookaheadCache(budget=7, park="cpu", refresh_every=3, **options)
    tokens, _ = generate(model, prompt_ids(1, 40), cache, new_tokens=8)
    assert cache.layers[0].parked.length == 46 and cache.layers[0].evicted_length == 43
    cache.crop(-3)
    assert cache.layers[0].parked.length == int(cache.get_seq_length()) == 44
    ids = torch.cat([prompt_ids(1, 40), tokens[:, :4], prompt_ids(1, 6, seed=4)], dim=1)
    again, kept = generate(model, ids, copy.deepcopy(cache)), kept_entries(cache)
    fresh = LookaheadCache(budget=7, park="cpu", refresh_every=3, **options)
    with torch.no_grad():
        model(prompt_ids(1, 40), past_key_values=fresh)
        for token in tokens[:, :4].unbind(1):
            model(token[:, None], past_key_values=fresh)
    torch.testing.assert_close(generate(model, ids, fresh)[1], again[1], atol=1e-4, rtol=1e-4)
    assert all(entries.shape[-1] == 43 for entries in kept.values())


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 20}], ids=["growing", "static"])
def test_a_turn_of_one_token_reads_everything(options):
    model = lookahead_model("llama", "sdpa")
    cache = LookaheadCache(budget=7, park="cpu", **options)
    tokens, _ = generate(model, prompt_ids(1, 40), cache, new_tokens=1)
    fresh = LookaheadCache(budget=7)
    ids = torch.cat([prompt_ids(1, 40), tokens], dim=1)
    found, logits = generate(model, ids, cache)
    expected, expected_logits = generate(model, ids, fresh)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
    assert cache.summary()["entries_stored"] == 7 + 5


def test_a_parked_conversation_is_compiled_once(reset_compiler):
    model, graphs = lookahead_model("llama", "sdpa"), Graphs()
    ids = prompt_ids(1, 40)
    growing = converse(model, LookaheadCache(7, park="cpu"), ids, torch.ones_like(ids))
    cache = LookaheadCache(7, park="cpu", max_new_tokens=20)
    static = converse(model, cache, ids, torch.ones_like(ids), **compiled_by(graphs))
    for (_, tokens, logits, _), (_, expected_tokens, expected_logits, _) in zip(static[2], growing[2], strict=True):
        assert torch.equal(tokens, expected_tokens)
        torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
    assert graphs.count == 1


def test_memory_that_runs_out_leaves_the_cache_usable(monkeypatch):
    model = lookahead_model("llama", "sdpa")
    ids, question = prompt_ids(1, 40), prompt_ids(1, 5, seed=9)
    cache, untouched = LookaheadCache(7, park="cpu"), LookaheadCache(7, park="cpu")
    with torch.no_grad():
        for each in (cache, untouched):
            model(ids, past_key_values=each)
        append, calls = parking.ParkedEntries.append, []

        def fail(*arguments):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("cannot pin memory")
            append(*arguments)

        monkeypatch.setattr(parking.ParkedEntries, "append", fail)
        with pytest.raises(RuntimeError, match="pin"):
            model(question, past_key_values=cache)
        monkeypatch.undo()
        assert [layer.parked.length for layer in cache.layers] == [40] * 3
        found = model(question, past_key_values=cache).logits
        torch.testing.assert_close(found, model(question, past_key_values=untouched).logits)


def test_what_is_parked_is_counted_and_forgotten():
    model = tiny_model("llama", "sdpa")
    prepare_model_for_eviction(model)
    cache = LookaheadCache(7, "snapkv", park="cpu")
    generate(model, prompt_ids(2, 40), cache)
    entry = 3 * 2 * 2 * 16 * 4 * 2  # layers, keys and values, KV heads, head_dim, float32, batch
    assert cache.summary()["bytes_parked"] == 40 * entry
    cache.reset()
    assert cache.summary()["bytes_parked"] == 0


@pytest.mark.parametrize("place", ["gpu", "disk", True])
def test_other_places_are_refused(place):
    with pytest.raises(ValueError, match=r"park must be .*got"):
        LookaheadCache(7, park=place)


def test_what_is_fetched_leaves_room_behind_it():
    entries, parts = parking.ParkedEntries(), [torch.randn(2, 3, length, 4) for length in (5, 1, 7)]
    for part in parts:
        entries.append(part, -part[..., :2])
    entries.take_rows(torch.tensor([1, 1, 0]))
    entries.cut(8)
    entries.append(torch.ones(3, 3, 2, 4), torch.ones(3, 3, 2, 2))
    keys, values = entries.fetch(torch.device("cpu"), room=6)
    whole = torch.cat(parts, 2)[[1, 1, 0], :, :8]
    assert keys.shape == (3, 3, 16, 4) and values.shape == (3, 3, 16, 2)
    assert torch.equal(keys[:, :, :8], whole) and torch.equal(values[:, :, :8], -whole[..., :2])
    assert (keys[:, :, 8:10] == 1).all() and entries.length == 10
    again, _ = entries.fetch(torch.device("cpu"), room=0)
    assert again.shape[2] == 10 and again.data_ptr() != keys.data_ptr(), "one layer's may be written into"
