import pytest
import torch
from models import tiny_config
from transformers.cache_utils import DynamicCache

from lkq_hf import LookaheadCache
from lkq_hf.cache.layers import EvictedLayer, UncompressedSlidingLayer


def states(batch=2, heads=2, length=20, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, length, size)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def evicted(length=20, budget=6, appended=0, defer=False):
    layer = EvictedLayer()
    key, value = states(length=length + appended)
    scores = torch.rand(2, 2, length, generator=torch.Generator().manual_seed(1))
    layer.begin_prefill()
    returned = layer.update(key, value)
    assert returned[0] is key and returned[1] is value
    assert layer.awaits_eviction_of(key, value)
    assert not layer.awaits_eviction_of(key.clone(), value) and not layer.awaits_eviction_of(key, value.clone())
    layer.evict(key, value, scores, budget, defer)
    return layer, key, value, scores


def test_the_best_entries_of_each_head_stay_in_order():
    layer, key, value, scores = evicted(appended=3)
    best = scores.topk(6).indices.sort().values
    assert torch.equal(layer.kept_indices, best)
    index = best[..., None].expand(-1, -1, -1, 4)
    assert torch.equal(layer.keys, key.gather(2, index))
    assert torch.equal(layer.values, value.gather(2, index))


def test_the_logical_length_is_reported_and_masks_end_at_the_true_position():
    layer, *_ = evicted()
    assert layer.get_seq_length() == 20
    assert layer.get_mask_sizes(1) == (7, 14)
    layer.update(*states(length=5))
    assert layer.get_seq_length() == 25
    assert layer.keys.shape[-2] == 11
    assert layer.get_mask_sizes(2) == (13, 14)
    assert sum(layer.get_mask_sizes(2)) == 25 + 2


def test_an_untouched_layer_is_a_dynamic_layer():
    layer = EvictedLayer()
    assert layer.get_seq_length() == 0 and layer.get_mask_sizes(5) == (5, 0)
    key, value = states(length=5)
    assert torch.equal(layer.update(key, value)[0], key)
    assert layer.get_seq_length() == 5 and layer.kept_indices is None


@pytest.mark.parametrize("argument", [-3, torch.tensor(-3), 22, torch.tensor(22)])
def test_crop_takes_back_what_followed_the_prompt(argument):
    layer, *_ = evicted()
    key, value = states(length=5, seed=3)
    layer.update(key, value)
    layer.crop(argument)
    assert layer.get_seq_length() == 22
    assert layer.keys.shape[-2] == 8
    assert torch.equal(layer.keys[..., -2:, :], key[..., :2, :])


def test_crop_to_a_length_beyond_what_was_read_changes_nothing():
    layer, *_ = evicted()
    layer.crop(30)
    assert layer.get_seq_length() == 20 and layer.keys.shape[-2] == 6


@pytest.mark.parametrize("argument", [-6, -25, 19, 1])
def test_crop_below_the_evicted_prompt_is_refused_and_changes_nothing(argument):
    layer, *_ = evicted()
    layer.update(*states(length=5))
    before = layer.keys.clone()
    with pytest.raises(ValueError, match="first 20 were evicted"):
        layer.crop(argument)
    assert torch.equal(layer.keys, before) and layer.get_seq_length() == 25


def test_an_eviction_waits_for_the_crop_that_takes_drafts_back():
    layer, key, _, scores = evicted(defer=True)
    assert layer.keys.shape[-2] == 20 and layer.kept_indices is None
    layer.crop(-4)
    assert layer.get_seq_length() == 16
    best = scores[..., :16].topk(6).indices.sort().values
    assert torch.equal(layer.kept_indices, best)
    assert torch.equal(layer.keys, key.gather(2, best[..., None].expand(-1, -1, -1, 4)))
    with pytest.raises(ValueError, match="first 16 were evicted"):
        layer.crop(-1)


def test_reset_forgets_everything():
    layer, *_ = evicted()
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.kept_indices is None
    key, value = states(length=3)
    assert torch.equal(layer.update(key, value)[0], key)


def test_batch_operations_move_the_kept_indices_with_the_entries():
    for change, order in (
        (lambda layer: layer.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
    ):
        for defer in (False, True):
            layer, key, _, scores = evicted(defer=defer)
            change(layer)
            if defer:
                layer.crop(-2)
                best = scores[order, :, :18].topk(6).indices.sort().values
            else:
                best = scores[order].topk(6).indices.sort().values
            assert torch.equal(layer.kept_indices, best)
            assert torch.equal(layer.keys, key[order].gather(2, best[..., None].expand(-1, -1, -1, 4)))


def test_a_sliding_layer_stores_its_window_of_the_prompt_only():
    layer, plain = UncompressedSlidingLayer(8), DynamicCache(config=tiny_config("gemma3")).layers[0]
    key, value = states(length=23)
    layer.begin_prefill(20)
    returned = layer.update(key, value)
    assert returned[0] is key
    plain.update(key[:, :, :20], value[:, :, :20])
    assert torch.equal(layer.keys, plain.keys) and torch.equal(layer.values, plain.values)
    assert layer.get_seq_length() == plain.get_seq_length() == 20
    assert layer.get_mask_sizes(1) == plain.get_mask_sizes(1)
    following = states(length=1, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(layer.update(*following), plain.update(*following), strict=True))


def test_layers_follow_the_config():
    cache = LookaheadCache(4)
    cache.build_layers(tiny_config("gemma3"))
    assert [type(layer) for layer in cache.layers] == [UncompressedSlidingLayer, EvictedLayer, EvictedLayer]
    assert cache.layers[0].sliding_window == 8


def test_a_cache_that_no_model_prepared_is_refused():
    with pytest.raises(ValueError, match="load_adapter"):
        LookaheadCache(4).update(*states(), layer_idx=0)
