"""Prompts of every shape, later turns, copies of a cache, and models whose positions depend on the length."""

import copy
import io
import multiprocessing

import pytest
import torch
from models import (
    ARCHITECTURES,
    add_lookahead,
    base_and_adapted,
    kept_entries,
    left_padded,
    lookahead_model,
    prompt_ids,
    tiny_model,
)
from reference import GREEDY, assert_as_masked, generate
from torch.nn import functional as F
from transformers import DynamicCache

from lkq_hf import LookaheadCache

item = pytest.mark.item
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@item("left-padded batches of very unequal lengths")
@every_architecture
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float], ids=["long", "bool", "float"])
def test_rows_equal_each_row_alone(architecture, attention, dtype):
    base, model = base_and_adapted(architecture)
    model.set_attn_implementation(attention)
    rows = [prompt_ids(1, length, seed=length)[0] for length in (90, 1, 8, 33)]
    ids, mask = left_padded(rows)
    cache = LookaheadCache(budget=9)
    tokens, logits = generate(model, ids, cache, mask=mask.to(dtype))
    assert_as_masked(base, ids, tokens, logits, cache, mask)
    for index, row in enumerate(rows):
        alone, alone_logits = generate(model, row[None], LookaheadCache(budget=9))
        assert torch.equal(tokens[index], alone[0])
        torch.testing.assert_close(logits[index], alone_logits[0], atol=1e-4, rtol=1e-4)


@item("padding on the right or in the middle, rows of padding only", refused='padding_side="left", no empty rows')
@pytest.mark.parametrize(
    ("first", "last", "said"), [(30, 40, "on the right"), (0, 40, "row 1.*padding only"), (10, 12, "in the middle")]
)
def test_other_padding(first, last, said):
    model, cache = lookahead_model(), LookaheadCache(budget=7)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, first:last] = 0
    with pytest.raises(ValueError, match=said):
        model.generate(prompt_ids(2, 40), attention_mask=mask, past_key_values=cache, max_new_tokens=2)
    assert cache.get_seq_length() == 0


@item("prompts shorter than the budget, prompts of one token")
@every_architecture
@pytest.mark.parametrize("length", [1, 2, 9])
def test_short_prompts(architecture, length):
    model = lookahead_model(architecture)
    ids, cache = prompt_ids(2, length), LookaheadCache(budget=9)
    tokens, logits = generate(model, ids, cache)
    expected, expected_logits = generate(model, ids, DynamicCache(config=model.config))
    assert torch.equal(tokens, expected) and torch.equal(logits, expected_logits)
    assert not kept_entries(cache)


@item("empty prompts", refused="pass at least one token, or no input_ids at all to start from the BOS token")
@pytest.mark.parametrize("how", ["ids", "embeddings", "forward"])
def test_an_empty_prompt(how):
    model, cache = lookahead_model(), LookaheadCache(budget=7)
    ids = torch.zeros(1, 0, dtype=torch.long)
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"prompt is empty.*at least one token"):
        if how == "forward":
            model(ids, past_key_values=cache)
        else:
            given = {"input_ids": ids} if how == "ids" else {"inputs_embeds": torch.zeros(1, 0, 64)}
            model.generate(**given, past_key_values=cache, max_new_tokens=2)
    assert not calls


@item("empty prompts", refused="pass at least one token, or no input_ids at all to start from the BOS token")
def test_no_prompt_starts_from_the_bos_token():
    model = lookahead_model()
    options = {"max_new_tokens": 12, "do_sample": False}
    found = model.generate(past_key_values=LookaheadCache(budget=4), **options)
    assert torch.equal(found, model.generate(**options))


@item("inputs_embeds")
@every_architecture
def test_embeddings_instead_of_ids(architecture):
    base, model = base_and_adapted(architecture)
    ids = prompt_ids(2, 40)
    # Gemma scales what it looks up by itself when given ids, and takes embeddings as they are.
    embeds = model.get_input_embeddings()(ids).detach()
    cache = LookaheadCache(budget=7)
    output = model.generate(inputs_embeds=embeds, past_key_values=cache, max_new_tokens=8, **GREEDY)
    assert_as_masked(base, ids, output.sequences, torch.stack(output.logits, 1), cache)


@item("inputs_embeds")
def test_a_second_turn_of_embeddings():
    base, model = base_and_adapted()
    conversation, cache = prompt_ids(1, 60), LookaheadCache(budget=7)
    embeds = model.get_input_embeddings()(conversation).detach()
    with torch.no_grad():
        model(inputs_embeds=embeds[:, :40], past_key_values=cache)
    stages = [kept_entries(cache)]
    output = model.generate(inputs_embeds=embeds, past_key_values=cache, max_new_tokens=8, **GREEDY)
    stages.append(kept_entries(cache))
    assert_as_masked(base, conversation, output.sequences, torch.stack(output.logits, 1), stages)


@item("multi-turn with one cache: all ids, or new ids and the full mask")
@every_architecture
@pytest.mark.parametrize("style", ["all ids", "new ids"])
def test_three_turns_of_a_padded_batch(architecture, style):
    base, model = base_and_adapted(architecture)
    ids, mask = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 14, seed=1)[0]])
    cache, conversation, stages = LookaheadCache(budget=7), ids, []
    for turn in range(3):
        unread = cache.get_seq_length()
        full_mask = F.pad(mask, (0, conversation.shape[1] - 40), value=1)
        given = conversation if style == "all ids" else conversation[:, unread:]
        tokens, logits = generate(model, given, cache, mask=full_mask)
        stages.append(kept_entries(cache))
        assert_as_masked(base, conversation, tokens, logits, stages, full_mask)
        assert cache.summary()["entries_stored"] == 7 + 8 - 1, "each turn returns to the budget"
        conversation = torch.cat([conversation, tokens, prompt_ids(2, 5, seed=turn)], dim=1)


@item("deepcopy: one prefilled cache for many questions")
@every_architecture
def test_copies_of_a_prefilled_cache(architecture):
    base, model = base_and_adapted(architecture)
    document, cache = prompt_ids(1, 40), LookaheadCache(budget=7)
    with torch.no_grad():
        model(document, past_key_values=cache)
    before = copy.deepcopy(cache)
    for seed in range(3):
        ids = torch.cat([document, prompt_ids(1, 6, seed=20 + seed)], dim=1)
        one = copy.deepcopy(cache)
        tokens, logits = generate(model, ids, one)
        assert_as_masked(base, ids, tokens, logits, [kept_entries(cache), kept_entries(one)])
    assert cache.get_seq_length() == 40
    for layer, untouched in zip(cache.layers, before.layers, strict=True):
        assert torch.equal(layer.keys, untouched.keys) and torch.equal(layer.values, untouched.values)
    for index in cache.evicted_layers():
        now, then = cache.layers[index].prefix.padded(), before.layers[index].prefix.padded()
        assert all(torch.equal(one, other) for one, other in zip(now, then, strict=True))


@item("deepcopy: one prefilled cache for many questions")
def test_questions_in_one_batch_over_one_document():
    base, model = base_and_adapted()
    document, cache = prompt_ids(1, 40), LookaheadCache(budget=7)
    with torch.no_grad():
        model(document, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    stages = [kept_entries(cache)]
    ids = torch.cat([document.expand(3, -1), prompt_ids(3, 6, seed=20)], dim=1)
    tokens, logits = generate(model, ids, cache)
    stages.append(kept_entries(cache))
    assert_as_masked(base, ids, tokens, logits, stages)


@item("reset")
@every_architecture
def test_reset(architecture):
    base, model = base_and_adapted(architecture)
    cache = LookaheadCache(budget=7)
    generate(model, prompt_ids(1, 40), cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    ids = prompt_ids(3, 33, seed=5)
    assert_as_masked(base, ids, *generate(model, ids, cache), cache)


@item("saving: torch.save of the cache and of the model")
def test_saved_and_loaded():
    base, model = base_and_adapted()
    ids, cache = prompt_ids(1, 40), LookaheadCache(budget=7)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    buffer = io.BytesIO()
    torch.save((model, cache), buffer)
    buffer.seek(0)
    expected = kept_entries(cache)
    model, cache = torch.load(buffer, weights_only=False)
    stages = [kept_entries(cache)]
    assert all(torch.equal(kept, expected[layer]) for layer, kept in stages[0].items())
    ids = torch.cat([ids, prompt_ids(1, 4, seed=3)], dim=1)
    tokens, logits = generate(model, ids, cache)
    stages.append(kept_entries(cache))
    assert_as_masked(base, ids, tokens, logits, stages)


def _generate_in_a_process(index, queue):
    torch.set_num_threads(1)
    model = lookahead_model("llama", "sdpa")
    tokens, _ = generate(model, prompt_ids(1, 40, seed=index), LookaheadCache(budget=7))
    queue.put((index, tokens.tolist()))


@item("processes")
def test_processes():
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_generate_in_a_process, args=(index, queue)) for index in range(2)]
    for process in processes:
        process.start()
    found = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
        assert process.exitcode == 0
    model = lookahead_model("llama", "sdpa")
    for index in range(2):
        expected, _ = generate(model, prompt_ids(1, 40, seed=index), LookaheadCache(budget=7))
        assert found[index] == expected.tolist()


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": 44,
    "short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "factor": 2.0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}


@item("rotary embeddings that depend on the length (dynamic, longrope)")
@pytest.mark.parametrize("length", [30, 39, 42, 44, 50])
@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=lambda rope: rope["rope_type"])
def test_the_lookahead_tokens_do_not_change_how_the_prompt_is_read(rope, length):
    """Near the switch, the five tokens after the prompt must not be what crosses it."""
    changes = {"rope_parameters": rope, "max_position_embeddings": 44}
    base = tiny_model("llama", **changes)
    model = add_lookahead(copy.deepcopy(base))
    ids = prompt_ids(2, length)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    for given in ({}, {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}):
        cache, full = LookaheadCache(budget=7), DynamicCache(config=base.config)
        with torch.no_grad():
            expected = base(ids, past_key_values=full, **given).logits
            found = model(ids, past_key_values=cache, **given).logits
        real = given.get("attention_mask", torch.ones_like(ids)).bool()
        torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)
        assert sorted(kept_entries(cache)) == [0, 1, 2]
        for layer, kept in kept_entries(cache).items():
            keys, _, _, stored = cache.layers[layer].prefix.padded()
            torch.testing.assert_close(keys[stored], full.layers[layer].keys[kept], atol=1e-4, rtol=1e-4)


@item("labels and logits_to_keep of a forward")
def test_loss_and_last_logits():
    base, model = base_and_adapted()
    ids = prompt_ids(2, 40)
    with torch.no_grad():
        found = model(ids, past_key_values=LookaheadCache(budget=7), labels=ids)
        torch.testing.assert_close(found.loss, base(ids, labels=ids).loss, atol=1e-5, rtol=1e-5)
        last = model(ids, past_key_values=LookaheadCache(budget=7), logits_to_keep=2).logits
    torch.testing.assert_close(last, found.logits[:, -2:], atol=1e-5, rtol=1e-5)
