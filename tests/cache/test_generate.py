import copy
import threading

import pytest
import torch
from models import (
    ARCHITECTURES,
    add_lookahead,
    base_and_adapted,
    evicted_logits,
    kept_entries,
    left_padded,
    lookahead_model,
    prompt_ids,
    set_adapter,
    tiny_model,
)
from torch.nn import functional as F
from transformers import DynamicCache

from lkq_hf import LookaheadCache, prepare_model_for_eviction
from lkq_hf.scoring import SCORERS, OracleScorer, SnapKVScorer

GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def generate(model, ids, cache, new_tokens=8, mask=None, **options):
    """Generated ids ``[batch, new]`` and their logits ``[batch, new, vocabulary]``."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = GREEDY | {"max_new_tokens": new_tokens} | options
    output = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, dim=1)


def assert_generation_is_that_of_masked_attention(base, ids, mask, tokens, logits, cache, tolerance=1e-4):
    """What was generated is what an eager model with a full cache and the same entries masked generates."""
    sequence = torch.cat([ids, tokens], dim=1)
    expected = evicted_logits(base, sequence, mask, kept_entries(cache), ids.shape[1])[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(expected.argmax(-1), tokens)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_a_full_budget_everything_is_as_with_a_dynamic_cache(architecture, attention):
    model = lookahead_model(architecture, attention)
    ids, mask = left_padded([prompt_ids(1, 30)[0], prompt_ids(1, 11, seed=1)[0]])
    for budget in (30, 10**9, 1.0):
        tokens, logits = generate(model, ids, LookaheadCache(budget), mask=mask)
        expected_tokens, expected_logits = generate(model, ids, DynamicCache(config=model.config), mask=mask)
        assert torch.equal(tokens, expected_tokens)
        assert torch.equal(logits, expected_logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_is_that_of_a_full_cache_with_evicted_entries_masked(architecture, attention):
    base, adapted = base_and_adapted(architecture)
    adapted.set_attn_implementation(attention)
    ids = prompt_ids(2, 40)
    cache = LookaheadCache(budget=7)
    tokens, logits = generate(adapted, ids, cache, new_tokens=12)
    full_tokens, full_logits = generate(base, ids, DynamicCache(config=base.config), new_tokens=12)
    assert not torch.allclose(logits, full_logits, atol=1e-2), "eviction changed nothing, so nothing is tested"
    assert torch.equal(tokens[:, 0], full_tokens[:, 0]), "the first token comes from the whole prompt"
    assert_generation_is_that_of_masked_attention(base, ids, None, tokens, logits, cache)


@pytest.mark.parametrize("scorer", [*SCORERS, OracleScorer(prompt_ids(2, 6, seed=5))], ids=[*SCORERS, "oracle"])
def test_every_scorer_generates_with_exactly_the_budget(scorer):
    base, adapted = base_and_adapted()
    ids = prompt_ids(2, 40)
    cache = LookaheadCache(budget=7, scorer=scorer)
    tokens, logits = generate(adapted, ids, cache)
    kept = torch.stack([*kept_entries(cache).values()])
    assert kept.sum((0, 2, 3)).tolist() == [7 * 3 * 2] * 2, "as many entries per KV head as the budget, on average"
    assert_generation_is_that_of_masked_attention(base, ids, None, tokens, logits, cache)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("lengths", [(40, 21), (40, 9, 3), (60, 1)])
def test_rows_of_a_padded_batch_equal_each_row_alone(architecture, attention, lengths):
    base, adapted = base_and_adapted(architecture)
    adapted.set_attn_implementation(attention)
    rows = [prompt_ids(1, length, seed=index)[0] for index, length in enumerate(lengths)]
    ids, mask = left_padded(rows)
    cache = LookaheadCache(budget=10)
    tokens, logits = generate(adapted, ids, cache, mask=mask)
    for index, row in enumerate(rows):
        alone_tokens, alone_logits = generate(adapted, row[None], LookaheadCache(budget=10))
        assert torch.equal(tokens[index], alone_tokens[0])
        torch.testing.assert_close(logits[index], alone_logits[0], atol=1e-4, rtol=1e-4)
    assert_generation_is_that_of_masked_attention(base, ids, mask, tokens, logits, cache)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_prompt_within_the_budget_is_cached_whole(length):
    model = lookahead_model()
    ids = prompt_ids(1, length)
    cache, full = LookaheadCache(budget=7), DynamicCache(config=model.config)
    tokens, logits = generate(model, ids, cache)
    expected_tokens, expected_logits = generate(model, ids, full)
    assert torch.equal(logits, expected_logits) and torch.equal(tokens, expected_tokens)
    assert cache.get_seq_length() == full.get_seq_length()
    assert not kept_entries(cache)


def test_a_one_token_budget_and_a_two_token_prompt():
    base, adapted = base_and_adapted()
    ids = prompt_ids(1, 2)
    cache = LookaheadCache(budget=1)
    tokens, logits = generate(adapted, ids, cache)
    assert_generation_is_that_of_masked_attention(base, ids, None, tokens, logits, cache)


def test_a_fraction_keeps_that_share_of_the_prompt():
    model = lookahead_model()
    for budget, kept in ((0.25, 10), (0.01, 1), (0.99, 40), (1.0, 40)):
        cache = LookaheadCache(budget)
        generate(model, prompt_ids(1, 40), cache, new_tokens=1)
        assert cache.summary()["entries_stored"] == kept


def test_eager_and_sdpa_agree():
    eager, sdpa = lookahead_model(attention="eager"), lookahead_model(attention="sdpa")
    ids = prompt_ids(2, 40)
    one, other = LookaheadCache(budget=7), LookaheadCache(budget=7)
    tokens, logits = generate(eager, ids, one)
    other_tokens, other_logits = generate(sdpa, ids, other)
    assert torch.equal(tokens, other_tokens)
    torch.testing.assert_close(logits, other_logits, atol=1e-4, rtol=1e-4)


def test_sampling_is_seeded_and_reads_the_evicted_cache():
    base, adapted = base_and_adapted()
    ids = prompt_ids(2, 40)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        cache = LookaheadCache(budget=7)
        results.append(generate(adapted, ids, cache, do_sample=True, temperature=2.0))
    assert torch.equal(results[0][0], results[1][0])
    tokens, logits = results[1]
    expected = evicted_logits(base, torch.cat([ids, tokens], 1), None, kept_entries(cache), 40)[:, 39:-1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_several_returned_sequences_share_one_prompt():
    base, adapted = base_and_adapted()
    ids = prompt_ids(1, 40)
    torch.manual_seed(3)
    cache = LookaheadCache(budget=7)
    tokens, logits = generate(adapted, ids, cache, do_sample=True, num_return_sequences=3)
    assert tokens.shape == (3, 8) and len({tuple(row) for row in tokens.tolist()}) > 1
    sequence = torch.cat([ids.expand(3, -1), tokens], 1)
    expected = evicted_logits(base, sequence, None, kept_entries(cache), 40)[:, 39:-1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_beam_search_finds_the_beams_of_masked_attention(padded):
    """The score of the best beam is the likelihood of its tokens under the masked full cache."""
    base, adapted = base_and_adapted()
    ids, mask = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 25 if padded else 40, seed=1)[0]])
    cache = LookaheadCache(budget=7)
    output = adapted.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6, num_beams=3, do_sample=False,
        return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    # Rows of a batch keep the same entries in all beams.
    kept = {layer: indices[::3] for layer, indices in kept_entries(cache).items()}
    for layer, indices in kept_entries(cache).items():
        assert torch.equal(indices, kept[layer].repeat_interleave(3, dim=0))
    logits = evicted_logits(base, output.sequences, mask, kept, 40)[:, 39:-1]
    likelihood = logits.log_softmax(-1).gather(-1, output.sequences[:, 40:, None])[..., 0].sum(-1)
    torch.testing.assert_close(output.sequences_scores, likelihood, atol=1e-3, rtol=1e-3)
    greedy, _ = generate(adapted, ids, LookaheadCache(budget=7), new_tokens=6, mask=mask)
    greedy_logits = evicted_logits(base, torch.cat([ids, greedy], 1), mask, kept, 40)[:, 39:-1]
    greedy_likelihood = greedy_logits.log_softmax(-1).gather(-1, greedy[..., None])[..., 0].sum(-1)
    assert (likelihood >= greedy_likelihood - 1e-3).any()


def test_prompt_lookup_decoding_keeps_the_budget_and_is_not_cropped_below_it():
    adapted = lookahead_model()
    ids = prompt_ids(1, 20).repeat(1, 2)  # repeats, so that drafts are found
    cache = LookaheadCache(budget=7)
    output = adapted.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=12, do_sample=False,
        prompt_lookup_num_tokens=4,
    )  # fmt: skip
    tokens = output[:, 40:]
    assert tokens.shape[1] == 12
    kept = kept_entries(cache)
    assert sorted(kept) == [0, 1, 2]
    assert sum(int(layer.sum()) for layer in kept.values()) == 7 * 3 * 2
    generated = cache.get_seq_length() - 40
    assert cache.summary()["entries_stored"] <= 7 + generated
    with pytest.raises(ValueError, match="evicted"):
        cache.crop(-cache.get_seq_length())


def test_prompt_lookup_decoding_within_the_budget_is_plain_greedy():
    model = lookahead_model()
    ids = prompt_ids(1, 20).repeat(1, 2)
    expected, _ = generate(model, ids, DynamicCache(config=model.config), new_tokens=12)
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=LookaheadCache(budget=100), max_new_tokens=12,
        do_sample=False, prompt_lookup_num_tokens=4,
    )  # fmt: skip
    assert torch.equal(found[:, 40:], expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_turns_in_both_calling_styles(architecture, attention):
    base, adapted = base_and_adapted(architecture)
    adapted.set_attn_implementation(attention)
    ids = prompt_ids(1, 40)
    follow_up = prompt_ids(1, 5, seed=9)
    results = []
    for style in ("all ids", "new ids"):
        cache = LookaheadCache(budget=7)
        answer, _ = generate(adapted, ids, cache)
        stages = [kept_entries(cache)]
        conversation = torch.cat([ids, answer, follow_up], dim=1)
        unread = cache.get_seq_length()
        assert unread == 40 + 8 - 1
        given = conversation if style == "all ids" else conversation[:, unread:]
        second, logits = generate(adapted, given, cache, mask=torch.ones_like(conversation))
        results.append((second, logits))
        stages.append(kept_entries(cache))
        assert cache.get_seq_length() == conversation.shape[1] + 8 - 1
        assert cache.summary()["entries_stored"] == 7 + 8 - 1, "a later turn returns to the budget"
        expected = evicted_logits(base, torch.cat([conversation, second], 1), None, stages)
        expected = expected[:, conversation.shape[1] - 1 : -1]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-5, rtol=1e-5)


def test_later_turns_may_be_kept_whole():
    base, adapted = base_and_adapted()
    ids, follow_up = prompt_ids(1, 40), prompt_ids(1, 5, seed=9)
    cache = LookaheadCache(budget=7, evict_later_turns=False)
    answer, _ = generate(adapted, ids, cache)
    conversation = torch.cat([ids, answer, follow_up], dim=1)
    second, logits = generate(adapted, conversation, cache)
    assert cache.summary()["entries_stored"] == 7 + 8 + 5 + 8 - 1
    expected = evicted_logits(base, torch.cat([conversation, second], 1), None, kept_entries(cache))
    torch.testing.assert_close(logits, expected[:, conversation.shape[1] - 1 : -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_short_first_turn_is_kept_whole_and_what_follows_is_evicted(scorer, attention):
    base, adapted = base_and_adapted()
    adapted.set_attn_implementation(attention)
    cache = LookaheadCache(budget=10, scorer=scorer)
    answer, _ = generate(adapted, prompt_ids(1, 6), cache, new_tokens=4)
    assert not kept_entries(cache)
    conversation = torch.cat([prompt_ids(1, 6), answer, prompt_ids(1, 30, seed=4)], dim=1)
    tokens, logits = generate(adapted, conversation, cache)
    assert cache.summary()["entries_stored"] == 10 + 7
    assert_generation_is_that_of_masked_attention(base, conversation, None, tokens, logits, cache)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reading_a_whole_conversation_keeps_what_reading_its_turns_would_if_nothing_was_lost(architecture):
    """A first turn within the budget changes nothing: the second chooses from everything."""
    _, adapted = base_and_adapted(architecture)
    ids = prompt_ids(1, 40)
    whole, turns = LookaheadCache(budget=12), LookaheadCache(budget=12)
    with torch.no_grad():
        expected = adapted(ids, past_key_values=whole).logits[:, 9:]
        adapted(ids[:, :9], past_key_values=turns)
        found = adapted(ids[:, 9:], past_key_values=turns).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(kept, kept_entries(turns)[layer]) for layer, kept in kept_entries(whole).items())


def test_two_turns_of_a_padded_batch():
    base, adapted = base_and_adapted()
    ids, mask = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 14, seed=1)[0]])
    cache = LookaheadCache(budget=7)
    answer, _ = generate(adapted, ids, cache, mask=mask)
    stages = [kept_entries(cache)]
    conversation = torch.cat([ids, answer, prompt_ids(2, 5, seed=9)], dim=1)
    full_mask = F.pad(mask, (0, 13), value=1)
    full_mask[1, 48:50] = 0  # its second turn is shorter too
    second, logits = generate(adapted, conversation, cache, mask=full_mask)
    stages.append(kept_entries(cache))
    expected = evicted_logits(base, torch.cat([conversation, second], 1), full_mask, stages)
    torch.testing.assert_close(logits, expected[:, conversation.shape[1] - 1 : -1], atol=1e-4, rtol=1e-4)


def test_copies_of_one_prefilled_cache_answer_several_questions():
    base, adapted = base_and_adapted()
    document = prompt_ids(1, 40)
    cache = LookaheadCache(budget=7)
    with torch.no_grad():
        adapted(document, past_key_values=cache)
    pool = cache.layers[0].prefix.pool
    before = pool.keys.clone()
    for seed in range(3):
        ids = torch.cat([document, prompt_ids(1, 6, seed=20 + seed)], dim=1)
        one = copy.deepcopy(cache)
        tokens, logits = generate(adapted, ids, one)
        stages = [kept_entries(cache), kept_entries(one)]
        expected = evicted_logits(base, torch.cat([ids, tokens], 1), None, stages)[:, 45:-1]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == 40
    assert cache.layers[0].prefix.pool is pool and torch.equal(pool.keys, before)


def test_after_reset_the_next_prompt_is_compressed_again():
    model = lookahead_model()
    cache, fresh = LookaheadCache(budget=7), LookaheadCache(budget=7)
    generate(model, prompt_ids(1, 40), cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    tokens, _ = generate(model, prompt_ids(2, 33, seed=3), cache)
    expected, _ = generate(model, prompt_ids(2, 33, seed=3), fresh)
    assert torch.equal(tokens, expected)
    assert cache.layers[0].keys.shape == fresh.layers[0].keys.shape == (2, 2, 7, 16)
    assert cache.nbytes == fresh.nbytes


def test_generate_from_embeddings():
    model = lookahead_model()
    ids = prompt_ids(1, 40)
    expected, _ = generate(model, ids, LookaheadCache(budget=7))
    found = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids).detach(), attention_mask=torch.ones_like(ids),
        past_key_values=LookaheadCache(budget=7), max_new_tokens=8, do_sample=False,
    )  # fmt: skip
    assert torch.equal(found, expected)


def test_hidden_states_and_attentions_of_a_generation():
    model, cache = lookahead_model(), LookaheadCache(budget=7)
    output = model.generate(
        prompt_ids(1, 40), past_key_values=cache, max_new_tokens=3, do_sample=False,
        return_dict_in_generate=True, output_hidden_states=True, output_attentions=True,
    )  # fmt: skip
    assert [states[0].shape[1] for states in output.hidden_states] == [40, 1, 1]
    longest = cache.layers[0].prefix.longest
    shapes = [tuple(attention[0].shape[-2:]) for attention in output.attentions]
    assert shapes == [(40, 40), (1, longest + 1), (1, longest + 2)]


def test_two_threads_generate_as_each_alone():
    model = lookahead_model(attention="sdpa")
    prompts = [prompt_ids(1, 60), prompt_ids(1, 45, seed=7), prompt_ids(1, 50, seed=8)]
    budgets = [7, 11, None]

    def answer(index):
        cache = DynamicCache(config=model.config) if budgets[index] is None else LookaheadCache(budgets[index])
        return generate(model, prompts[index], cache, new_tokens=10)[1]

    alone = [answer(index) for index in range(3)]
    together = {}

    def run(index):
        together[index] = [answer(index) for _ in range(6)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(3):
        assert len(together[index]) == 6
        assert all(torch.equal(logits, alone[index]) for logits in together[index])


@pytest.mark.parametrize("budget", [0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_budgets_out_of_range_are_refused(budget):
    with pytest.raises(ValueError, match="budget"):
        LookaheadCache(budget)


@pytest.mark.parametrize("budget", [True, "64", None, [64], torch.tensor(64)])
def test_budgets_that_are_no_numbers_are_refused(budget):
    with pytest.raises(TypeError, match="budget"):
        LookaheadCache(budget)


def test_unknown_scorers_are_refused():
    with pytest.raises(ValueError, match="snapkv"):
        LookaheadCache(8, scorer="h2o")
    with pytest.raises(ValueError, match="OracleScorer"):
        LookaheadCache(8, scorer="oracle")
    with pytest.raises(TypeError, match="Scorer"):
        LookaheadCache(8, scorer=SnapKVScorer)


def test_the_summary_counts_bytes():
    model = lookahead_model()
    cache = LookaheadCache(budget=7)
    assert cache.nbytes == 0
    generate(model, prompt_ids(2, 40), cache, new_tokens=4)
    entry = 3 * 2 * 2 * 16 * 4 * 2  # layers, keys and values, KV heads, head_dim, float32, batch
    positions = 3 * 2 * 4 * 2 * 7  # of what is left of the prompt
    assert cache.nbytes == 10 * entry + positions
    summary = cache.summary()
    assert summary["tokens_seen"] == 43 and summary["entries_stored"] == 10
    assert summary["bytes"] == cache.nbytes == sum(layer["bytes"] for layer in summary["layers"])
    assert summary["bytes_without_eviction"] == 43 * entry
    heads = [number for layer in summary["layers"] for number in layer["entries"]]
    assert len(heads) == 6 and sum(heads) == 60 and len(set(heads)) > 1, "heads keep different numbers"
    for layer in summary["layers"]:
        assert (layer["least"], layer["most"]) == (min(layer["entries"]), max(layer["entries"]))
        assert 3 < layer["least"] <= layer["mean"] <= layer["most"] <= 4 * 7 + 3
    text = repr(cache)
    for part in ("budget=7", "tokens_seen=43", "entries_stored=10", f"{cache.nbytes:,} of {43 * entry:,}"):
        assert part in text


def test_the_scorer_is_shown_with_what_the_adapter_says(tmp_path):
    model = lookahead_model(attention="sdpa")
    add_lookahead(model, "pooled", pooling_kernel_size=3, pooling="avg", row_power=2.0)
    for name, parts in (("default", "kernel_size=1, pooling='max'"), ("pooled", "kernel_size=3, pooling='avg'")):
        set_adapter(model, name)
        cache = LookaheadCache(budget=7)
        assert "kernel_size=None" in repr(cache), "nothing was read yet"
        generate(model, prompt_ids(1, 40), cache)
        assert parts in repr(cache)
    assert "row_power=2.0" in repr(cache)
    assert "row_power=2.0" in repr(copy.deepcopy(cache))
    cache.save_pretrained(tmp_path)
    assert "row_power=2.0" in repr(LookaheadCache.from_pretrained(tmp_path, model))


def test_the_summary_lists_layers_with_a_sliding_window_as_they_are():
    cache = LookaheadCache(budget=7)
    generate(lookahead_model("gemma3"), prompt_ids(2, 40), cache, new_tokens=4)
    summary = cache.summary()
    # A window of 8 stores 7 entries between forwards.
    assert summary["layers"][0]["entries"] == [7, 7]
    assert sum(layer["mean"] for layer in summary["layers"][1:]) == 20
    assert summary["layers"][0]["bytes"] == summary["layers"][0]["bytes_without_eviction"]
    assert summary["entries_stored"] == 10
    for key in ("bytes", "bytes_without_eviction"):
        assert summary[key] == sum(layer[key] for layer in summary["layers"])


def test_a_model_prepared_for_eviction_needs_no_adapter():
    base, prepared = tiny_model(), tiny_model()
    ids = prompt_ids(2, 40)
    cache = LookaheadCache(budget=7, scorer="snapkv")
    with prepare_model_for_eviction(prepared):
        tokens, logits = generate(prepared, ids, cache)
    assert_generation_is_that_of_masked_attention(base, ids, None, tokens, logits, cache)
