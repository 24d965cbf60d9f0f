"""A decode with static shapes: the same tokens as with storage that grows, in one compiled graph."""

import copy

import pytest
import torch
from models import ARCHITECTURES, Graphs, compiled_by, lookahead_model, padded_prompts, prompt_ids, tiny_model
from peft import get_peft_model
from transformers.masking_utils import create_masks_for_generate

from lkq_hf import LookaheadCache, LookaheadKVConfig, prepare_model_for_eviction
from lkq_hf.attention import PREFIX, _renamed
from lkq_hf.cache import attend, decode, prepare
from lkq_hf.cache.decode import next_token_mask
from lkq_hf.kernels.ragged_attention import ragged_attention

NEW_TOKENS = 12


@pytest.fixture
def graphs(reset_compiler):
    return Graphs()


def generate(model, ids, cache, mask=None, new_tokens=NEW_TOKENS, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True} | options
    return model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=new_tokens, **options)


def assert_same(found, expected, tolerance=1e-4):
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), atol=tolerance, rtol=tolerance)


def static_cache(budget=7, scorer="lookahead", max_new_tokens=NEW_TOKENS):
    return LookaheadCache(budget, scorer, max_new_tokens=max_new_tokens)


def addresses(cache):
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values, layer._filled, layer._offset)]
    for prefix in (layer.prefix for layer in cache.layers if getattr(layer, "prefix", None) is not None):
        tensors += [prefix.starts, prefix.lengths, prefix.pool.keys, prefix.pool.values]
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("budget", [7, 20, 0.3, 1.0, 10**9])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_of_a_padded_batch_are_those_of_growing_storage(architecture, attention, budget):
    model = lookahead_model(architecture, attention)
    ids, mask = padded_prompts()
    cache = static_cache(budget)
    found = generate(model, ids, cache, mask)
    expected = generate(model, ids, LookaheadCache(budget), mask)
    assert_same(found, expected)
    assert all(layer.has_static_storage for layer in cache.layers)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_generate_compiles_one_graph_for_all_prompts(architecture, graphs):
    model = lookahead_model(architecture, "sdpa")
    for seed, length in enumerate((40, 57)):
        ids, mask = padded_prompts(length, seed=seed)
        expected = generate(model, ids, LookaheadCache(7), mask)
        cache = static_cache()
        assert_same(generate(model, ids, cache, mask, **compiled_by(graphs)), expected)
        cache.reset()
        assert_same(generate(model, ids, cache, mask, **compiled_by(graphs)), expected)
    assert graphs.count == 1


def test_the_last_free_slot_compiles_nothing(graphs):
    model = lookahead_model("llama", "sdpa")
    cache = static_cache(52, max_new_tokens=64)
    generate(model, prompt_ids(1, 80), cache, new_tokens=65, **compiled_by(graphs))
    assert cache.layers[0].free_slots() == 0
    assert graphs.count == 1


@pytest.mark.one_version
def test_storage_that_runs_full_grows_with_one_more_compilation(graphs):
    model = lookahead_model("gemma3", "sdpa")
    ids, mask = padded_prompts()
    cache = static_cache(max_new_tokens=5)
    found = generate(model, ids, cache, mask, new_tokens=300, **compiled_by(graphs))
    assert_same(found, generate(model, ids, LookaheadCache(7), mask, new_tokens=300))
    assert graphs.count == 2
    sliding = cache.layers[0]
    assert sliding._first > 40 - sliding.sliding_window + 1, "what left the window was dropped when storage grew"


def test_nothing_moves_while_tokens_are_generated():
    model = lookahead_model("gemma3", "sdpa")
    cache = static_cache()
    with torch.no_grad():
        model(input_ids=prompt_ids(2, 40), past_key_values=cache)
        before = addresses(cache)
        for token in range(3, 8):
            model(input_ids=torch.full((2, 1), token), past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert [int(layer._filled) for layer in cache.layers] == [7 + 5, 5, 5]
        model(input_ids=prompt_ids(2, 300), past_key_values=cache)
        assert [int(layer._filled) for layer in cache.layers] == [7, 0, 0]
    assert addresses(cache) == before


def test_turns_before_a_sliding_window_is_full():
    """Its storage grows with what is read, and room is made for each answer."""
    model = lookahead_model("gemma3", "sdpa", sliding_window=200)
    cache, growing, ids = static_cache(max_new_tokens=8), LookaheadCache(7), prompt_ids(2, 40)
    for new_tokens, following in ((2, 20), (8, 100), (8, 60), (8, 1)):
        found = generate(model, ids, cache, new_tokens=new_tokens)
        assert_same(found, generate(model, ids, growing, new_tokens=new_tokens))
        ids = torch.cat([found.sequences, prompt_ids(2, following, seed=following)], dim=1)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_compiled_model_outside_of_generate(architecture, graphs):
    model = lookahead_model(architecture, "sdpa")
    ids = prompt_ids(2, 40)
    step = torch.compile(model, backend=graphs, fullgraph=True)
    static, growing = static_cache(), LookaheadCache(7)
    with torch.no_grad():
        for cache in (static, growing):
            model(input_ids=ids, past_key_values=cache)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"lkq_hf.cache.decoding\(model, cache\)"):
            step(input_ids=torch.full((2, 1), 3), past_key_values=static)
        for token in range(3, 9):
            token = torch.full((2, 1), token)
            with decode.decoding(model.model, static):
                found = step(input_ids=token, past_key_values=static).logits
            torch.testing.assert_close(
                found, model(input_ids=token, past_key_values=growing).logits, atol=1e-4, rtol=1e-4
            )
    assert graphs.count == 1
    assert static.get_seq_length() == growing.get_seq_length() == 46


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("whole_conversation", [True, False])
def test_a_second_turn(architecture, whole_conversation, graphs):
    model = lookahead_model(architecture, "sdpa")
    ids, mask = padded_prompts()
    outputs = []
    for cache, options in ((static_cache(), compiled_by(graphs)), (LookaheadCache(7), {})):
        first = generate(model, ids, cache, mask, **options).sequences
        question = prompt_ids(2, 250, seed=9)
        full_mask = torch.cat([mask, torch.ones_like(first[:, ids.shape[1] :]), torch.ones_like(question)], dim=1)
        conversation = torch.cat([first, question], dim=1)
        # The last generated token has not been read yet.
        second = conversation if whole_conversation else conversation[:, first.shape[1] - 1 :]
        outputs.append(generate(model, second, cache, full_mask, **options))
    assert_same(*outputs)
    assert graphs.count == 1, "a later turn returns to the budget, where a compiled decode expects it"


def test_beam_search():
    model = lookahead_model("gemma3", "sdpa")
    ids, mask = padded_prompts()
    found, expected = (
        generate(model, ids, cache, mask, num_beams=3, num_return_sequences=2).sequences
        for cache in (static_cache(), LookaheadCache(7))
    )
    assert torch.equal(found, expected)


def test_assisted_decoding_falls_back_to_growing_storage():
    model = lookahead_model("llama", "sdpa")
    ids = torch.cat([prompt_ids(1, 20)] * 2, dim=1)
    cache = static_cache()
    found, expected = (generate(model, ids, each, prompt_lookup_num_tokens=3) for each in (cache, LookaheadCache(7)))
    assert_same(found, expected)
    assert not cache.is_compileable
    assert not any(hasattr(layer, "has_static_storage") for layer in cache.layers)


def test_storage_is_laid_out_outside_of_a_compiled_prefill(graphs):
    model = lookahead_model("llama", "sdpa")
    ids = prompt_ids(2, 40)
    options = compiled_by(graphs)
    options["compile_config"].fullgraph = False
    found, expected = (
        generate(model, ids, cache, prefill_chunk_size=40, **options)
        for cache, options in ((static_cache(), options), (LookaheadCache(7), {}))
    )
    assert_same(found, expected)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("change", ["crop", "deepcopy", "repeat", "select"])
def test_changes_of_the_cache_between_forwards(architecture, change):
    model = lookahead_model(architecture, "sdpa")
    logits = []
    for cache in (static_cache(), LookaheadCache(7)):
        cache_before = cache
        with torch.no_grad():
            model(input_ids=prompt_ids(2, 40), past_key_values=cache)
            for token in range(3, 8):
                model(input_ids=torch.full((2, 1), token), past_key_values=cache)
            tokens = torch.tensor([[8], [9]])
            if change == "crop":
                if architecture == "gemma3" and cache.max_new_tokens is None:
                    pytest.skip("a growing sliding window cannot go back")
                cache.crop(-4)
            elif change == "deepcopy":
                cache = copy.deepcopy(cache)
                cache_before.reset()
            elif change == "repeat":
                cache.batch_repeat_interleave(2)
                tokens = tokens.repeat_interleave(2, dim=0)
            else:
                cache.batch_select_indices(torch.tensor([1]))
                tokens = tokens[1:]
            logits.append(torch.stack([model(input_ids=tokens, past_key_values=cache).logits for _ in range(3)]))
        assert cache.get_seq_length() == (44 if change == "crop" else 48)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_a_crop_of_a_sliding_window_goes_back_to_what_is_stored():
    model = lookahead_model("gemma3", "sdpa")
    cache = static_cache()
    with torch.no_grad():
        model(input_ids=prompt_ids(1, 40), past_key_values=cache)
        expected = model(input_ids=torch.full((1, 1), 5), past_key_values=cache).logits
        for token in range(6, 12):
            model(input_ids=torch.full((1, 1), token), past_key_values=cache)
        cache.crop(-7)
        found = model(input_ids=torch.full((1, 1), 5), past_key_values=cache).logits
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="cannot remove 2 of 41 tokens"):
        cache.crop(-2)


def test_the_summary_tells_entries_from_slots():
    model = lookahead_model("llama", "sdpa")
    ids = prompt_ids(1, 40)
    static, growing = static_cache(), LookaheadCache(7)
    for cache in (static, growing):
        generate(model, ids, cache)
    found, expected = static.summary(), growing.summary()
    assert found.pop("bytes") == static.nbytes > expected.pop("bytes")
    for row in found["layers"] + expected["layers"]:
        row.pop("bytes")
    assert found == expected
    assert "tokens_seen=51" in repr(static)


def test_a_scorer_without_adapter_and_the_handle_that_undoes_the_preparation():
    model = tiny_model("qwen3", "sdpa")
    ids, mask = padded_prompts()
    plain = generate(model, ids, None, mask)
    with prepare_model_for_eviction(model):
        assert "create_masks_for_generate" in vars(model)
        assert_same(
            generate(copy.deepcopy(model), ids, static_cache(scorer="snapkv"), mask),
            generate(model, ids, LookaheadCache(7, "snapkv"), mask),
        )
        static = generate(model, ids, None, mask, cache_implementation="static")
        assert torch.equal(static.sequences, plain.sequences), "other compileable caches work as before"
    assert "create_masks_for_generate" not in vars(model)


def test_a_peft_model(graphs):
    adapted = get_peft_model(tiny_model("llama", "sdpa"), LookaheadKVConfig(num_lookahead_tokens=5))
    ids, mask = padded_prompts()
    found, expected = (
        adapted.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            **options,
        )
        for cache, options in ((static_cache(), compiled_by(graphs)), (LookaheadCache(7), {}))
    )
    assert torch.equal(found, expected)
    assert graphs.count == 1


def test_attention_that_cannot_mask_slots_is_refused():
    model = lookahead_model("llama", "sdpa")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="expected eager or sdpa, found flash_attention_2"):
        generate(model, prompt_ids(1, 40), static_cache())


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [(0, ValueError, "at least 1, got 0"), (1.5, TypeError, "got 1.5"), (True, TypeError, "got True")],
)
def test_what_is_no_number_of_tokens_is_refused(value, error, message):
    with pytest.raises(error, match=message):
        LookaheadCache(7, max_new_tokens=value)


@pytest.mark.one_version
@pytest.mark.real_model
def test_a_real_model(real_prompts, graphs):
    model, _, ids, mask = real_prompts
    for budget in (48, 48 / ids.shape[1]):
        expected = generate(model, ids, LookaheadCache(budget, "snapkv"), mask, 6)
        found = generate(model, ids, static_cache(budget, "snapkv"), mask, 6, **compiled_by(graphs))
        assert_same(found, expected, tolerance=5e-3)
    assert graphs.count == 1


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_mask_of_the_next_token_is_that_of_transformers(monkeypatch, architecture):
    model = lookahead_model(architecture, "sdpa")
    by_layer_type = architecture == "qwen3"
    compared = []

    def compared_with_transformers(cache, /, **kwargs):
        found = next_token_mask(cache, **kwargs)
        if found is not None:
            expected = create_masks_for_generate(**kwargs)
            assert isinstance(found, dict) == isinstance(expected, dict) == by_layer_type
            if by_layer_type:
                assert found.keys() == expected.keys()
                found_mask, expected_mask = found["full_attention"], expected["full_attention"]
            else:
                found_mask, expected_mask = found, expected
            assert torch.equal(found_mask, expected_mask)
            compared.append(found)
        return found

    monkeypatch.setattr(prepare, "next_token_mask", compared_with_transformers)
    ids, mask = padded_prompts()
    cache = static_cache(20)  # more than the shorter prompt has
    ids = generate(model, ids, cache, mask).sequences
    turn = prompt_ids(2, 5, seed=3)
    ids = torch.cat([ids, turn], 1)
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    generate(model, ids, cache, mask)
    assert len(compared) == 2 * (NEW_TOKENS - 1)


def test_attention_is_ours_while_tokens_are_generated_and_only_then(monkeypatch):
    model = lookahead_model("llama", "sdpa")
    calls = []

    def counted(*arguments, **options):
        assert model.config._attn_implementation == PREFIX + "sdpa"
        calls.append(arguments)
        if len(calls) == 100:
            raise KeyboardInterrupt
        return ragged_attention(*arguments, **options)

    monkeypatch.setattr(attend, "ragged_attention", counted)
    ids, mask = padded_prompts()
    generate(model, ids, static_cache(), mask)
    assert len(calls) == 3 * (NEW_TOKENS - 1)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, static_cache(max_new_tokens=90), mask, new_tokens=90)
    assert model.config._attn_implementation == "sdpa" and _renamed == {}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_decodes_of_one_model_at_a_time(attention):
    model, cache = tiny_model("llama", attention), static_cache()
    with decode.decoding(model.model, cache):
        with decode.decoding(model.model, cache):
            assert model.config._attn_implementation == PREFIX + attention
        assert model.config._attn_implementation == PREFIX + attention
    assert model.config._attn_implementation == attention
