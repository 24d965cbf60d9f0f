"""A used cache goes on with the text that it has read, in one generation at a time, and refuses anything else."""

import copy
import pickle
import threading

import pytest
import torch
from models import Graphs, compiled_by, kept_entries, left_padded, lookahead_model, prompt_ids
from small_checkpoint import small_tokenizer
from transformers import pipeline

from lkq_hf import LookaheadCache
from lkq_hf.cache.history import ReadText


def generate(model, ids, cache, new_tokens=5, **options):
    """The conversation with the answer."""
    options = {"do_sample": False, "max_new_tokens": new_tokens} | options
    return model.generate(ids, past_key_values=cache, **options)


def followed(ids, seed=9):
    return torch.cat([ids, prompt_ids(ids.shape[0], 6, seed)], dim=1)


def used(model, ids=None, **options):
    """A cache that has read a prompt and answered, and the whole text."""
    cache = LookaheadCache(7, **options)
    return cache, generate(model, prompt_ids(1, 40) if ids is None else ids, cache)


def assert_goes_on(model, cache, text):
    """A turn more is that of an untouched copy."""
    expected = generate(model, followed(text), copy.deepcopy(cache))
    assert torch.equal(generate(model, followed(text), cache), expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("options", [{}, {"park": "cpu"}, {"max_new_tokens": 20}, {"refresh_every": 2}], ids=str)
def test_another_text_is_refused(architecture, options):
    model = lookahead_model(architecture, "sdpa")
    cache, text = used(model, **options)
    other = followed(text)
    other[0, 17] += 1
    with pytest.raises(ValueError, match=r"the first 17 of its 51 tokens agree with the 44 that were read"):
        generate(model, other, cache)
    with pytest.raises(ValueError, match=r"the first 0 of its 60 tokens agree"):
        generate(model, prompt_ids(1, 60, seed=5), cache)
    assert_goes_on(model, cache, text)


@pytest.mark.parametrize("length", [1, 30, 40])
def test_a_shorter_text_is_refused(length):
    model = lookahead_model()
    cache, text = used(model)
    with pytest.raises(
        ValueError, match=rf"the first {length} of its {length} tokens agree.*attention_mask.*deepcopy"
    ):
        generate(model, text[:, :length], cache)
    assert_goes_on(model, cache, text)


def test_new_ids_with_the_whole_mask_and_embeddings_are_not_compared():
    model = lookahead_model()
    cache, text = used(model)
    expected = generate(model, followed(text), copy.deepcopy(cache))[:, 51:]
    new = followed(text)[:, 44:]
    mask = torch.ones(1, 51, dtype=torch.long)
    by_mask = copy.deepcopy(cache)
    found = generate(model, new, by_mask, attention_mask=mask)
    assert torch.equal(found[:, new.shape[1] :], expected)
    embeddings = model.get_input_embeddings()(followed(text)).detach()
    by_embeddings = copy.deepcopy(cache)
    assert torch.equal(generate(model, None, by_embeddings, inputs_embeds=embeddings, attention_mask=mask), expected)
    # What came as new ids is known, what came as embeddings is not.
    for_both = torch.cat([followed(text), expected], dim=1)
    for_both[0, 47] += 1
    with pytest.raises(ValueError, match=r"the first 47 of its 62 tokens"):
        generate(model, followed(for_both), by_mask)
    generate(model, followed(for_both), by_embeddings)


@pytest.mark.parametrize("options", [{}, {"park": "cpu"}, {"max_new_tokens": 20}], ids=str)
@pytest.mark.parametrize("changed", [41, 43])
def test_where_the_answer_differs_the_cache_goes_back(options, changed):
    """As after a chat template that trims an answer."""
    model = lookahead_model("llama", "sdpa")
    cache, text = used(model, **options)
    cropped = copy.deepcopy(cache)
    cropped.crop(changed - 44)
    other = followed(text[:, :changed], seed=3)
    other[0, changed] = (text[0, changed] + 1) % 150
    expected = generate(model, other, cropped)
    assert torch.equal(generate(model, other, cache), expected)
    assert all(torch.equal(kept_entries(cache)[layer], kept) for layer, kept in kept_entries(cropped).items())


def test_an_answer_that_cannot_be_taken_back_is_refused():
    model = lookahead_model("gemma3", "sdpa")
    cache, text = used(model)
    other = followed(text)
    other[0, 42] += 1
    with pytest.raises(ValueError, match=r"the first 42 of its 51 tokens.*could not go back: .*window"):
        generate(model, other, cache)
    assert_goes_on(model, cache, text)


def other_rows(cache, text):
    yield "deepcopy", copy.deepcopy(cache), text
    yield "pickle", pickle.loads(pickle.dumps(cache)), text
    for name, order, change in (
        ("reorder_cache", [1, 0], lambda each: each.reorder_cache(torch.tensor([1, 0]))),
        ("batch_select_indices", [1], lambda each: each.batch_select_indices(torch.tensor([1]))),
        ("batch_repeat_interleave", [0, 0, 1, 1], lambda each: each.batch_repeat_interleave(2)),
        ("crop", [0, 1], lambda each: each.crop(-2)),
    ):
        changed = copy.deepcopy(cache)
        change(changed)
        yield name, changed, text[order]


def test_copies_and_other_rows_know_their_text():
    model = lookahead_model(attention="sdpa")
    cache, text = used(model, prompt_ids(2, 40))
    for name, changed, rows in other_rows(cache, text):
        other = followed(rows)
        other[-1, 20] += 1
        with pytest.raises(ValueError, match="the first 20 of"):
            generate(model, other, changed)
        assert torch.equal(generate(model, followed(rows), changed)[:, :45], rows), name


def test_padding_is_not_compared():
    model = lookahead_model(attention="sdpa")
    ids, mask = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 25, seed=1)[0]])
    cache = LookaheadCache(7)
    text = followed(generate(model, ids, cache, attention_mask=mask))
    mask = torch.nn.functional.pad(mask, (0, text.shape[1] - 40), value=1)
    expected = generate(model, text, copy.deepcopy(cache), attention_mask=mask)[:, 51:]
    text = torch.where(mask.bool(), text, 99)
    assert torch.equal(generate(model, text, cache, attention_mask=mask)[:, 51:], expected)


def test_of_beams_the_prompt_is_compared():
    model = lookahead_model(attention="sdpa")
    cache, text = used(model, max_new_tokens=None)
    beams = LookaheadCache(7)
    best = generate(model, prompt_ids(1, 40), beams, num_beams=3, num_return_sequences=3)
    other = followed(best)
    other[:, 30] += 1
    with pytest.raises(ValueError, match="the first 30 of"):
        generate(model, other, beams)
    generate(model, followed(best), beams)
    # Beams over what one row has read.
    cache.batch_repeat_interleave(3)
    generate(model, followed(text), cache, num_beams=3)


def test_drafts_and_chunks_are_compared():
    model = lookahead_model(attention="sdpa")
    ids = prompt_ids(1, 20).repeat(1, 2)
    for options in ({"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 15}):
        cache = LookaheadCache(7, park="cpu")
        text = generate(model, ids, cache, new_tokens=9, **options)
        other = followed(text)
        other[0, 35] += 1
        with pytest.raises(ValueError, match="the first 35 of its 55"):
            generate(model, other, cache)
        generate(model, followed(text), cache)


def test_forwards_of_ones_own_are_compared():
    model = lookahead_model()
    cache = LookaheadCache(7)
    with torch.no_grad():
        model(prompt_ids(1, 40), past_key_values=cache)
        model(torch.full((1, 1), 5), past_key_values=cache)  # a token of a decode, which is not noted
    other = torch.cat([prompt_ids(1, 40), prompt_ids(1, 9, seed=4)], dim=1)
    generate(model, other, copy.deepcopy(cache))
    other[0, 39] += 1
    with pytest.raises(ValueError, match="the first 39 of its 49"):
        generate(model, other, cache)


def test_a_compiled_decode_is_compared(reset_compiler):
    model, graphs = lookahead_model("llama", "sdpa"), Graphs()
    cache = LookaheadCache(7, max_new_tokens=20)
    text = generate(model, prompt_ids(1, 40), cache, **compiled_by(graphs))
    other = followed(text)
    other[0, 30] += 1
    with pytest.raises(ValueError, match="the first 30 of its 51"):
        generate(model, other, cache)
    generate(model, followed(text), cache, **compiled_by(graphs))
    assert graphs.count == 1


def test_a_saved_cache_knows_its_text(tmp_path):
    model = lookahead_model()
    cache, text = used(model)
    cache.save_pretrained(tmp_path)
    loaded = LookaheadCache.from_pretrained(tmp_path, model)
    other = followed(text)
    other[0, 30] += 1
    with pytest.raises(ValueError, match="its 51 tokens do not begin with those that were read"):
        generate(model, other, loaded)
    with pytest.raises(ValueError, match="its 40 tokens do not begin with those"):
        generate(model, text[:, :40], loaded)
    with pytest.raises(ValueError, match="cache of another text"):
        LookaheadCache.from_pretrained(tmp_path, model, input_ids=other)
    assert_goes_on(model, loaded, text)
    loaded.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not begin with those"):
        generate(model, followed(other), LookaheadCache.from_pretrained(tmp_path, model))


def test_a_failed_forward_is_forgotten():
    model = lookahead_model()
    cache, text = used(model)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, followed(text, seed=1), cache)
    handle.remove()
    assert_goes_on(model, cache, text)


def test_another_batch_is_refused():
    model = lookahead_model()
    cache, text = used(model)
    with pytest.raises(ValueError, match="a batch of 1 rows, and these inputs have 2"):
        generate(model, followed(text).repeat(2, 1), cache)
    with pytest.raises(ValueError, match=r"these inputs have 1, each 3 times \(num_beams"):
        generate(model, followed(text), cache, num_beams=3)
    assert_goes_on(model, cache, text)


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 20}], ids=["growing", "static"])
@pytest.mark.parametrize("parts", ["reading", "decoding"])
def test_a_model_that_was_moved_is_refused(parts, options):
    model = lookahead_model()
    cache, text = used(model, **options)
    before = copy.deepcopy(cache)
    model.to("meta")
    ids = followed(text)[:, 44:] if parts == "reading" else text[:, 44:]
    with pytest.raises(ValueError, match=r"holds layer 0 on cpu, and the model computes it on meta.*Move it back"):
        model(ids.to("meta"), past_key_values=cache)
    assert_goes_on(lookahead_model(), cache, text)
    assert before.get_seq_length() == 44


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_pipeline_with_several_prompts_and_one_cache_is_refused(batch_size):
    tokenizer = small_tokenizer()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "left"
    model = lookahead_model(vocab_size=1024)
    ask = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=batch_size)
    prompts = ["a long text about licenses " * 3, "You must include a copy", "Redistribution of the Work"]
    with pytest.raises(ValueError, match="so does each prompt"):
        ask(prompts, past_key_values=LookaheadCache(7), max_new_tokens=4, do_sample=False)
    for prompt in prompts:
        ask(prompt, past_key_values=LookaheadCache(7), max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 40}], ids=["growing", "static"])
def test_the_tokens_of_a_decode_are_noted_at_its_end(options, monkeypatch):
    """So that a GPU is not waited for."""
    model = lookahead_model(attention="sdpa")
    calls = []
    record, known = ReadText.record, ReadText.known
    monkeypatch.setattr(ReadText, "record", lambda *given: calls.append("record") or record(*given))
    monkeypatch.setattr(ReadText, "known", lambda *given: calls.append("known") or known(*given))
    for new_tokens in (3, 30):
        cache, calls[:] = LookaheadCache(7, **options), []
        text = generate(model, prompt_ids(1, 40), cache, new_tokens)
        assert calls == ["record", "record"], "by the prefill, and at the end"
        generate(model, followed(text), cache, new_tokens)
        assert calls == ["record", "record", "known", "record", "record"]


def in_another_thread(function):
    """The error that a function raises there, or None."""
    raised = []

    def run():
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return raised[0] if raised else None


def test_a_second_generation_at_once_is_refused():
    model = lookahead_model()
    cache, text = used(model)
    own = copy.deepcopy(cache)
    errors = []

    def meanwhile(*_):
        if not errors:
            errors.append(in_another_thread(lambda: generate(model, followed(text), cache)))
            errors.append(in_another_thread(lambda: model(followed(text)[:, 44:], past_key_values=cache)))
            errors.append(in_another_thread(lambda: generate(model, followed(text), copy.deepcopy(own))))
            copied = pickle.loads(pickle.dumps(copy.deepcopy(own)))
            errors.append(in_another_thread(lambda: generate(model, followed(text), copied)))

    handle = model.lm_head.register_forward_hook(meanwhile)
    found = generate(model, followed(text), cache)
    handle.remove()
    assert [type(error) for error in errors] == [RuntimeError, RuntimeError, type(None), type(None)]
    assert "copy.deepcopy(cache)" in str(errors[0])
    assert torch.equal(found, generate(model, followed(text), own)), "the first one is not disturbed"


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_generation_that_fails_lets_the_next_one_in(error):
    model = lookahead_model()
    cache, text = used(model)

    def fail(*_):
        raise error("injected")

    handle = model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(error, match="injected"):
        generate(model, followed(text), cache)
    handle.remove()
    assert in_another_thread(lambda: generate(model, followed(text), cache)) is None


def test_a_refused_text_lets_the_next_one_in():
    model = lookahead_model()
    cache, text = used(model)
    assert isinstance(in_another_thread(lambda: generate(model, prompt_ids(1, 60, seed=8), cache)), ValueError)
    assert in_another_thread(lambda: generate(model, followed(text), cache)) is None


def test_a_copy_made_during_a_generation_is_free():
    model = lookahead_model()
    cache, text = used(model)
    copies = []
    handle = model.lm_head.register_forward_hook(lambda *_: copies.append(copy.deepcopy(cache)))
    generate(model, followed(text), cache, new_tokens=1)
    handle.remove()
    assert in_another_thread(lambda: generate(model, followed(followed(text)), copies[0])) is None


def test_a_generation_within_a_generation_of_the_same_thread_is_let_in():
    model = lookahead_model()
    cache = LookaheadCache(7)
    with cache.generation.under_way():
        generate(model, prompt_ids(1, 40), cache)
        assert isinstance(in_another_thread(cache.generation.refuse_other_thread), RuntimeError)
    assert in_another_thread(cache.generation.refuse_other_thread) is None
