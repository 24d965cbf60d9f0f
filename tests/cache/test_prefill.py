import copy
import weakref

import pytest
import torch
from models import (
    ARCHITECTURES,
    base_and_adapted,
    full_layers,
    kept_entries,
    left_padded,
    lookahead_attention,
    lookahead_model,
    prompt_ids,
    scores_of,
    tiny_model,
    top_entries,
)
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lkq_hf.attention
from lkq_hf import LookaheadCache, prepare_model_for_eviction
from lkq_hf.attention import thread_state
from lkq_hf.cache import prepare
from lkq_hf.scoring import LookaheadScorer


class RecordingScorer(LookaheadScorer):
    """Keeps the scores that the cache asked for."""

    recorded: dict = {}  # noqa: RUF012

    def score(self, attention):
        scores = super().score(attention)
        self.recorded[attention.layer_index] = scores
        return scores


@pytest.fixture(autouse=True)
def nothing_left_behind():
    RecordingScorer.recorded.clear()
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    yield
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == before
    assert lkq_hf.attention._renamed == {}
    assert thread_state.attend is None
    assert thread_state.lookahead_length == 0
    assert prepare._thread.forward is None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_and_kept_entries_are_those_of_the_definition(architecture, attention):
    base, adapted = base_and_adapted(architecture)
    adapted.set_attn_implementation(attention)
    ids = prompt_ids(2, 40)
    cache = LookaheadCache(budget=9, scorer=RecordingScorer(kernel_size=1), allocation="uniform")
    with torch.no_grad():
        adapted(ids, past_key_values=cache)
    expected = {layer: scores_of(value) for layer, value in lookahead_attention(base, adapted, ids).items()}
    assert RecordingScorer.recorded.keys() == expected.keys() == set(full_layers(base))
    kept = kept_entries(cache)
    for layer, scores in expected.items():
        torch.testing.assert_close(RecordingScorer.recorded[layer], scores, atol=1e-5, rtol=1e-5)
        assert torch.equal(kept[layer], top_entries(scores, 9))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_of_a_padded_batch_are_those_of_the_definition(architecture):
    base, adapted = base_and_adapted(architecture)
    ids, mask = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 17, seed=1)[0]])
    cache = LookaheadCache(budget=9, scorer=RecordingScorer(kernel_size=1), allocation="uniform")
    with torch.no_grad():
        adapted(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), past_key_values=cache)
    for layer, attention in lookahead_attention(base, adapted, ids, mask).items():
        expected, found = scores_of(attention), RecordingScorer.recorded[layer]
        real = mask.bool()[:, None].expand_as(found)
        torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-5)
        assert torch.equal(cache.layers[layer].kept(), top_entries(expected, 9, mask))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stored_entries_are_those_of_the_full_cache(architecture):
    base, adapted = base_and_adapted(architecture)
    ids = prompt_ids(2, 30)
    cache, full = LookaheadCache(budget=6), DynamicCache(config=base.config)
    with torch.no_grad():
        adapted(ids, past_key_values=cache)
        base(ids, past_key_values=full)
    for layer in range(base.config.num_hidden_layers):
        found, expected = cache.layers[layer], full.layers[layer]
        if layer not in kept_entries(cache):
            torch.testing.assert_close(found.keys, expected.keys, atol=1e-5, rtol=1e-5)
            continue
        keys, values, positions, valid = found.prefix.padded()
        for row, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
            here = positions[row, head][valid[row, head]].long()
            assert torch.equal(here, kept_entries(cache)[layer][row, head].nonzero()[:, 0]), "in the order of the text"
            for stored, whole in ((keys, expected.keys), (values, expected.values)):
                torch.testing.assert_close(
                    stored[row, head][valid[row, head]], whole[row, head][here], atol=1e-5, rtol=1e-5
                )


def test_no_layer_keeps_the_prompt_alive():
    model = lookahead_model("gemma3")
    cache = LookaheadCache(budget=6)
    with torch.no_grad():
        model(prompt_ids(1, 60), past_key_values=cache)
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_while_a_prompt_is_read_no_layer_but_one_is_held_in_full(architecture):
    class NotingScorer(LookaheadScorer):
        def score(self, attention):
            read.append(weakref.ref(attention.key))
            return super().score(attention)

    read, held = [], []
    model = lookahead_model(architecture)
    for layer in model.get_decoder().layers:
        layer.register_forward_hook(lambda *_: held.append(sum(key() is not None for key in read)))
    with torch.no_grad():
        model(prompt_ids(2, 40), past_key_values=LookaheadCache(budget=4, scorer=NotingScorer()))
    assert read
    assert held == [0] * len(held)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_of_the_prompt_do_not_see_the_lookahead_tokens(architecture, attention):
    base, adapted = base_and_adapted(architecture)
    base.set_attn_implementation(attention)
    adapted.set_attn_implementation(attention)
    ids, mask = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 23, seed=1)[0]])
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = base(ids, attention_mask=mask, position_ids=places).logits
        found = adapted(ids, attention_mask=mask, position_ids=places, past_key_values=LookaheadCache(budget=5)).logits
    assert found.shape == expected.shape
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)


def test_position_ids_may_be_left_out():
    model = lookahead_model()
    ids = prompt_ids(1, 30)
    one, other = LookaheadCache(budget=6), LookaheadCache(budget=6)
    with torch.no_grad():
        model(ids, past_key_values=one)
        model(ids, position_ids=torch.arange(30)[None], attention_mask=torch.ones_like(ids), past_key_values=other)
    assert all(torch.equal(a, kept_entries(other)[layer]) for layer, a in kept_entries(one).items())


def test_positional_arguments_are_understood():
    model = lookahead_model()
    ids = prompt_ids(1, 30)
    one, other = LookaheadCache(budget=6), LookaheadCache(budget=6)
    with torch.no_grad():
        model(ids, past_key_values=one)
        model.model(ids, None, None, other)
    assert other.get_seq_length() == 30
    assert torch.equal(one.layers[2].prefix.pool.keys, other.layers[2].prefix.pool.keys)


def test_inputs_embeds_give_what_ids_give():
    model = lookahead_model()
    ids = prompt_ids(1, 30)
    one, other = LookaheadCache(budget=6), LookaheadCache(budget=6)
    with torch.no_grad():
        expected = model(ids, past_key_values=one).logits
        found = model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=other).logits
    torch.testing.assert_close(found, expected)
    assert torch.equal(one.layers[1].kept(), other.layers[1].kept())


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_hidden_states_and_attentions_have_the_prompts_length(architecture):
    base, adapted = base_and_adapted(architecture)
    ids = prompt_ids(2, 30)
    with torch.no_grad():
        expected = base(ids, output_hidden_states=True, output_attentions=True)
        found = adapted(
            ids, past_key_values=LookaheadCache(budget=6), output_hidden_states=True, output_attentions=True
        )
    assert len(found.hidden_states) == len(expected.hidden_states)
    assert len(found.attentions) == len(expected.attentions)
    for a, b in zip(found.hidden_states + found.attentions, expected.hidden_states + expected.attentions, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_outputs_as_a_tuple_are_trimmed_as_well():
    model = lookahead_model()
    with torch.no_grad():
        output = model(prompt_ids(1, 30), past_key_values=LookaheadCache(budget=6), return_dict=False)
    assert output[0].shape[1] == 30


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_exception_leaves_nothing_behind_and_the_cache_can_be_used_again(attention):
    model = lookahead_model(attention=attention)
    ids = prompt_ids(1, 30)
    expected = LookaheadCache(budget=6)
    with torch.no_grad():
        model(ids, past_key_values=expected)
    entries = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    hooks = {name: (list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()}

    def fail(*_):
        raise RuntimeError("out of memory")

    cache = LookaheadCache(budget=6)
    handle = model.model.layers[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"), torch.no_grad():
        model(ids, past_key_values=cache)
    handle.remove()
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == entries
    assert lkq_hf.attention._renamed == {}
    assert thread_state.attend is None and thread_state.lookahead_length == 0
    assert hooks == {name: (list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()}
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert torch.equal(cache.layers[2].kept(), expected.layers[2].kept())


def test_an_exception_in_the_scorer_leaves_nothing_behind():
    class Broken(LookaheadScorer):
        def score(self, attention):
            raise RuntimeError("broken scorer")

    model, cache = lookahead_model(), LookaheadCache(budget=6, scorer=Broken())
    with pytest.raises(RuntimeError, match="broken scorer"), torch.no_grad():
        model(prompt_ids(1, 30), past_key_values=cache)
    assert cache.get_seq_length() == 0
    # nothing_left_behind checks the rest


def test_after_an_interrupt_the_next_forward_is_a_plain_one():
    base, model = base_and_adapted()
    ids = prompt_ids(1, 30)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(ids, past_key_values=LookaheadCache(budget=6))
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base(ids).logits)


def test_the_model_config_is_not_changed():
    model = lookahead_model("gemma3")
    before = copy.deepcopy(model.config.to_dict())
    model.generate(prompt_ids(1, 30), past_key_values=LookaheadCache(budget=6), max_new_tokens=3)
    assert model.config.to_dict() == before


def test_padding_on_the_right_is_refused_before_any_work():
    model = lookahead_model()
    calls = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 20:] = 0
    with pytest.raises(ValueError, match=r"padded on the right.*left"):
        model(prompt_ids(2, 30), attention_mask=mask, past_key_values=LookaheadCache(budget=6))
    handle.remove()
    assert not calls


@pytest.mark.parametrize("shape", [(1, 1, 30, 30), (1, 25)])
def test_other_masks_are_refused(shape):
    model = lookahead_model()
    with pytest.raises(ValueError, match="attention_mask"):
        model(prompt_ids(1, 30), attention_mask=torch.ones(shape), past_key_values=LookaheadCache(budget=6))


def test_a_missing_adapter_is_named_before_any_work():
    model = tiny_model()
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="load_adapter"):
        model(prompt_ids(1, 30), past_key_values=LookaheadCache(budget=6))
    with prepare_model_for_eviction(model), pytest.raises(ValueError, match="needs a LOOKAHEAD_KV adapter"):
        model(prompt_ids(1, 30), past_key_values=LookaheadCache(budget=6))
    assert not calls


def test_preparing_twice_adds_nothing_and_removing_restores():
    model = tiny_model()
    before = len(model.model._forward_pre_hooks), len(model.model._forward_hooks)
    first, second = prepare_model_for_eviction(model), prepare_model_for_eviction(model)
    assert len(model.model._forward_pre_hooks) == before[0] + 1
    second.remove()
    assert len(model.model._forward_pre_hooks) == before[0] + 1
    first.remove()
    first.remove()
    assert (len(model.model._forward_pre_hooks), len(model.model._forward_hooks)) == before


def test_what_is_no_language_model_is_refused():
    with pytest.raises(TypeError, match="decoder"):
        prepare_model_for_eviction(torch.nn.Linear(2, 2))


def test_a_model_with_sliding_windows_only_is_refused():
    model = tiny_model("mistral", sliding_window=8)
    with prepare_model_for_eviction(model), pytest.raises(NotImplementedError, match="nothing to evict"):
        model(prompt_ids(1, 30), past_key_values=LookaheadCache(budget=6, scorer="snapkv"))
