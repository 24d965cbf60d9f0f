import copy

import pytest
import torch
from models import tiny_config
from transformers.cache_utils import DynamicCache

from lkq_hf import LookaheadCache
from lkq_hf.cache.layers import EvictedLayer, UncompressedSlidingLayer
from lkq_hf.cache.prefix import Pool, Prefix, stack_prefixes
from lkq_hf.cache.static import StaticEvictedLayer, StaticSlidingLayer

# What each row and head has kept of a text of 20 tokens.
KEPT = [[[0, 3, 4, 9, 15, 19], [7]], [[1, 2, 18], [5, 8]]]


def states(batch=2, heads=2, length=20, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, length, size)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def prefix_of(key, value, kept, source_length, longest=None):
    """A prefix that lies in its pool in an order of its own, between what belongs to others."""
    batch, heads = key.shape[:2]
    starts, lengths = torch.zeros(batch, heads).long(), torch.zeros(batch, heads).int()
    keys, values, positions = [], [], []
    for row, head in reversed([(row, head) for row in range(batch) for head in range(heads)]):
        keys += [torch.full((2, key.shape[-1]), torch.nan), key[row, head, kept[row][head]]]
        values += [torch.full((2, value.shape[-1]), torch.nan), value[row, head, kept[row][head]]]
        positions += [torch.tensor([-1, -1]), torch.tensor(kept[row][head])]
        lengths[row, head] = len(kept[row][head])
        starts[row, head] = sum(map(len, keys)) - len(kept[row][head])
    pool = Pool(torch.cat(keys), torch.cat(values), torch.cat(positions).int())
    return Prefix(pool, starts, lengths, longest or int(lengths.max()), source_length)


def as_mask(kept, length=20):
    mask = torch.zeros(len(kept), len(kept[0]), length, dtype=torch.bool)
    for row, heads in enumerate(kept):
        for head, entries in enumerate(heads):
            mask[row, head, entries] = True
    return mask


def evicted(kind=EvictedLayer, **options):
    """A layer that has read 20 tokens, and their keys and values."""
    layer = kind(16) if kind is StaticEvictedLayer else kind()
    key, value = states()
    layer.begin_reading(0)
    layer.update(key, value)
    layer.end_reading()
    layer.evict_to(prefix_of(key, value, KEPT, 20, **options))
    return layer, key, value


def assert_holds(layer, key, value, kept):
    """Of the text whose keys and values are given, the prefix and the whole tail."""
    length = layer.evicted_length
    keys, values, positions, valid = layer.prefix.padded()
    assert torch.equal(layer.kept(), as_mask(kept, length))
    for row, heads in enumerate(kept):
        for head, entries in enumerate(heads):
            here = valid[row, head]
            assert positions[row, head][here].tolist() == entries
            assert torch.equal(keys[row, head][here], key[row, head, entries])
            assert torch.equal(values[row, head][here], value[row, head, entries])
    tail = key.shape[2] - length
    assert torch.equal(layer.keys[:, :, :tail], key[:, :, length:])
    assert torch.equal(layer.values[:, :, :tail], value[:, :, length:])
    assert layer.tail_length == tail and int(layer.get_seq_length()) == key.shape[2]


both_kinds = pytest.mark.parametrize("kind", [EvictedLayer, StaticEvictedLayer])


@both_kinds
def test_reading_returns_everything_and_stores_nothing(kind):
    layer = kind(16) if kind is StaticEvictedLayer else kind()
    key, value = states(length=23)
    layer.begin_reading(3)
    assert layer.get_mask_sizes(23) == (23, 0)
    returned = layer.update(key, value)
    assert returned[0] is key and returned[1] is value
    assert layer.returned(key, value)
    assert not layer.returned(key.clone(), value) and not layer.returned(key, value.clone())
    layer.end_reading()
    assert layer.get_seq_length() == 0 and layer.prefix is None and not layer.returned(key, value)


@both_kinds
def test_a_later_reading_returns_the_tail_with_what_is_new(kind):
    layer, *_ = evicted(kind)
    key, value = states(length=5, seed=3)
    layer.update(key, value)
    new = states(length=4, seed=4)
    layer.begin_reading(1)
    assert tuple(map(int, layer.get_mask_sizes(4))) == (9, 20)
    keys, values = layer.update(*new)
    assert torch.equal(keys, torch.cat([key, new[0]], 2)) and torch.equal(values, torch.cat([value, new[1]], 2))
    assert layer.returned(keys, values)
    layer.abandon_reading()
    assert int(layer.get_seq_length()) == 25 and torch.equal(layer.keys[:, :, :5], key)


def test_candidates_of_a_first_reading_are_all_its_tokens():
    layer, (key, value) = EvictedLayer(), states(length=23)
    found = layer.candidates(key, value, 20, None)
    assert found.keys is key and found.values is value and found.valid is None
    assert found.one_mask_for_all_heads() is None
    assert torch.equal(found.positions, torch.arange(20).int().expand(2, 2, -1))
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :7] = False
    found = layer.candidates(key, value, 20, mask)
    assert torch.equal(found.valid, mask[:, None]) and torch.equal(found.one_mask_for_all_heads(), mask)
    shorter = found.without_last(3)
    assert shorter.positions.shape == (2, 2, 17) and torch.equal(shorter.valid, mask[:, None, :17])
    assert layer.candidates(key, value, 20, None).without_last(3).valid is None


@pytest.mark.parametrize("longest", [None, 11])
def test_candidates_of_a_later_reading_are_the_prefix_and_the_tail(longest):
    layer, key, value = evicted(longest=longest)
    tail = states(length=6, seed=3)
    mask = torch.ones(2, 25, dtype=torch.bool)
    mask[0, 21] = False  # a shorter second turn
    found = layer.candidates(*tail, 5, mask)
    width = (longest or 6) + 5
    assert found.positions.shape == found.valid.shape == (2, 2, width)
    assert found.keys.shape[2] == width + 1, "and what is not to be chosen"
    assert torch.equal(found.one_mask_for_all_heads(), found.valid)
    for row, heads in enumerate(KEPT):
        for head, entries in enumerate(heads):
            here = found.valid[row, head]
            later = [20, 22, 23, 24] if row == 0 else [20, 21, 22, 23, 24]
            assert found.positions[row, head][here].tolist() == entries + later
            places = torch.tensor(later) - 20
            expected = torch.cat([key[row, head, entries], tail[0][row, head, places]])
            assert torch.equal(found.keys[row, head, :width][here], expected)
            expected = torch.cat([value[row, head, entries], tail[1][row, head, places]])
            assert torch.equal(found.values[row, head, :width][here], expected)


@both_kinds
def test_each_head_keeps_its_own_entries_in_order(kind):
    layer, key, value = evicted(kind)
    assert_holds(layer, key, value, KEPT)
    assert layer.entries_by_head() == [4.5, 1.5], "means over the rows"
    layer.update(*states(length=5, seed=3))
    assert layer.entries_by_head() == [9.5, 6.5]


@both_kinds
def test_evicted_again_the_layer_holds_the_last_choice(kind):
    layer, key, value = evicted(kind)
    text = [torch.cat(pair, 2) for pair in zip((key, value), states(length=5, seed=3), strict=True)]
    layer.update(text[0][:, :, 20:], text[1][:, :, 20:])
    # The last two tokens stay in the tail.
    kept = [[[0, 22], [7, 20, 21]], [[18], [5]]]
    layer.evict_to(prefix_of(text[0][:, :, :23], text[1][:, :, :23], kept, 23), recent=2)
    assert_holds(layer, *text, kept)
    new = states(length=1, seed=5)
    keys, values = layer.update(*new)
    assert torch.equal(keys[:, :, :3], torch.cat([text[0][:, :, 23:], new[0]], 2))
    assert torch.equal(values[:, :, :3], torch.cat([text[1][:, :, 23:], new[1]], 2))
    if kind is EvictedLayer:
        assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes, "what was evicted is freed"


def test_the_logical_length_is_reported_and_masks_end_at_the_true_position():
    layer, *_ = evicted()
    assert layer.get_seq_length() == 20
    assert layer.get_mask_sizes(1) == (1, 20)
    layer.update(*states(length=5))
    assert layer.get_seq_length() == 25 and layer.keys.shape[-2] == 5
    assert layer.get_mask_sizes(2) == (7, 20)
    assert sum(layer.get_mask_sizes(2)) == 25 + 2


def test_an_untouched_layer_is_a_dynamic_layer():
    layer = EvictedLayer()
    assert layer.get_seq_length() == 0 and layer.get_mask_sizes(5) == (5, 0)
    key, value = states(length=5)
    assert torch.equal(layer.update(key, value)[0], key)
    assert layer.get_seq_length() == 5 and layer.kept() is None and layer.evicted_length == 0
    assert layer.entries_by_head() == [5, 5]


@both_kinds
@pytest.mark.parametrize("argument", [-3, torch.tensor(-3), 22, torch.tensor(22)])
def test_crop_takes_back_what_followed_the_prompt(argument, kind):
    layer, key, value = evicted(kind)
    new = states(length=5, seed=3)
    layer.update(*new)
    layer.crop(argument)
    text = [torch.cat([old, tail[:, :, :2]], 2) for old, tail in zip((key, value), new, strict=True)]
    assert_holds(layer, *text, KEPT)


@both_kinds
def test_crop_to_a_length_beyond_what_was_read_changes_nothing(kind):
    layer, key, value = evicted(kind)
    layer.crop(30)
    assert_holds(layer, key, value, KEPT)


@both_kinds
@pytest.mark.parametrize("argument", [-6, -25, 19, 1])
def test_crop_below_the_evicted_prompt_is_refused_and_changes_nothing(argument, kind):
    layer, key, value = evicted(kind)
    new = states(length=5)
    layer.update(*new)
    with pytest.raises(ValueError, match=r"cannot remove .*first 20 "):
        layer.crop(argument)
    assert_holds(layer, *(torch.cat(pair, 2) for pair in zip((key, value), new, strict=True)), KEPT)


def deferring_cache(length=20, budget=6):
    """A cache whose full-attention layers wait for the crop that takes drafts back, with keys and scores."""
    cache, config = LookaheadCache(budget, allocation="uniform"), tiny_config("llama")
    cache.activate_past_recording()
    cache.build_layers(config)
    (key, value), tails, scores = states(length=length), {}, {}
    for index in range(3):
        tails[index] = key + index, value - index
        scores[index] = torch.rand(2, 2, length, generator=torch.Generator().manual_seed(index))
    decoder = torch.nn.Module()
    decoder.config = config
    cache.defer(cache.begin_eviction(decoder, length), tails, scores, length, None)
    return cache, tails, scores


def test_an_eviction_waits_for_the_crop_that_takes_drafts_back():
    cache, tails, scores = deferring_cache()
    assert cache.get_seq_length() == 20 and not cache.has_prefix
    assert all(layer.keys.shape[-2] == 20 and layer.kept() is None for layer in cache.layers)
    cache.crop(-4)
    assert cache.get_seq_length() == 16
    for index, layer in enumerate(cache.layers):
        best = scores[index][..., :16].topk(6).indices.sort().values
        assert_holds(layer, *(tensor[:, :, :16] for tensor in tails[index]), best.tolist())
    with pytest.raises(ValueError, match="first 16 were evicted"):
        cache.crop(-1)


def test_what_came_after_the_prompt_is_not_evicted_by_the_crop_that_it_waited_for():
    cache, tails, scores = deferring_cache()
    new = states(length=5, seed=7)
    for index in range(3):
        cache.update(*new, index)
    cache.crop(-2)
    for index, layer in enumerate(cache.layers):
        best = scores[index].topk(6).indices.sort().values
        text = [torch.cat([old, later[:, :, :3]], 2) for old, later in zip(tails[index], new, strict=True)]
        assert_holds(layer, *text, best.tolist())


def test_a_crop_that_leaves_no_more_than_the_budget_evicts_nothing():
    cache, tails, _ = deferring_cache()
    cache.crop(-14)
    for index, layer in enumerate(cache.layers):
        assert layer.kept() is None and torch.equal(layer.keys, tails[index][0][:, :, :6])
    cache.crop(-6)


@both_kinds
def test_reset_forgets_everything(kind):
    layer, *_ = evicted(kind)
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.kept() is None and layer.prefix is None
    key, value = states(length=3)
    assert torch.equal(layer.update(key, value)[0][:, :, :3], key)


ROWS = [
    (lambda layer: layer.reorder_cache(torch.tensor([1, 1])), [1, 1]),
    (lambda layer: layer.reorder_cache(torch.tensor([1, 0])), [1, 0]),
    (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1]),
    (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
]


@both_kinds
@pytest.mark.parametrize("tail", [0, 3])
def test_rows_share_their_prefixes(kind, tail):
    for change, order in ROWS:
        layer, *text = evicted(kind)
        if tail:
            new = states(length=tail, seed=3)
            layer.update(*new)
            text = [torch.cat(pair, 2) for pair in zip(text, new, strict=True)]
        pool = layer.prefix.pool
        change(layer)
        assert layer.prefix.pool is pool, "entries are not copied"
        assert_holds(layer, *(tensor[order] for tensor in text), [KEPT[row] for row in order])


def test_rows_move_while_an_eviction_waits():
    for change, order in ROWS:
        cache, tails, scores = deferring_cache()
        change(cache)
        cache.crop(-2)
        for index, layer in enumerate(cache.layers):
            best = scores[index][order, :, :18].topk(6).indices.sort().values
            assert_holds(layer, *(tensor[order, :, :18] for tensor in tails[index]), best.tolist())


@both_kinds
def test_a_copy_is_evicted_without_the_original(kind):
    layer, key, value = evicted(kind)
    other = copy.deepcopy(layer)
    text = [torch.cat(pair, 2) for pair in zip((key, value), states(length=5, seed=3), strict=True)]
    other.update(text[0][:, :, 20:], text[1][:, :, 20:])
    kept = [[[0, 24], [1]], [[2], [3]]]
    other.evict_to(prefix_of(*text, kept, 25))
    assert_holds(other, *text, kept)
    assert_holds(layer, key, value, KEPT)


def test_prefixes_are_stacked_along_the_batch():
    """Those of layers of one size in one pool, of others in theirs."""
    rows, texts = [], []
    for seed in range(3):
        small, large = states(length=20, seed=seed), states(length=20, size=6, seed=10 + seed)
        texts.append([small, large])
        # One of the caches has both layers of a size in one pool.
        one = prefix_of(*small, KEPT, 20, longest=6 + seed)
        other = Prefix(one.pool, one.starts.flip(0), one.lengths.flip(0), one.longest, 20)
        rows.append({0: one, 1: prefix_of(*large, KEPT[::-1], 20), 4: other})
    stacked = stack_prefixes(rows)
    assert stacked[0].pool is stacked[4].pool is not stacked[1].pool and stacked[0].longest == 8
    for index, kept, which in ((0, KEPT, 0), (1, KEPT[::-1], 1)):
        layer = EvictedLayer()
        layer.evict_to(stacked[index])
        assert_holds(layer, *(torch.cat([text[which][part] for text in texts]) for part in (0, 1)), kept * 3)
    assert torch.equal(stacked[4].lengths.view(3, 2, 2).flip(1).view(6, 2), stacked[0].lengths)


def test_a_prefix_has_no_other_entries_than_its_own():
    layer, key, _ = evicted(longest=9)
    keys, values, positions, valid = layer.prefix.padded()
    assert valid.shape == positions.shape == (2, 2, 9) and valid.sum(-1).tolist() == [[6, 1], [3, 2]]
    assert not keys[valid].isnan().any() and not values[valid].isnan().any()
    empty = Pool.empty(4, key, key)
    assert not empty.keys.any() and not empty.values.any() and empty.nbytes == 4 * (4 * 4 * 2 + 4)


@pytest.mark.parametrize("kind", [UncompressedSlidingLayer, StaticSlidingLayer])
def test_a_sliding_layer_stores_its_window_of_the_prompt_only(kind):
    layer = kind(16, 8) if kind is StaticSlidingLayer else kind(8)
    plain = DynamicCache(config=tiny_config("gemma3")).layers[0]
    key, value = states(length=23)
    layer.begin_reading(3)
    returned = layer.update(key, value)
    layer.end_reading()
    plain.update(key[:, :, :20], value[:, :, :20])
    if kind is UncompressedSlidingLayer:
        assert returned[0] is key
        assert layer.get_mask_sizes(1) == plain.get_mask_sizes(1)
    assert torch.equal(layer.keys[:, :, :7], plain.keys) and torch.equal(layer.values[:, :, :7], plain.values)
    assert int(layer.get_seq_length()) == plain.get_seq_length() == 20
    following = states(length=1, seed=5)
    for found, expected in zip(layer.update(*following), plain.update(*following), strict=True):
        assert torch.equal(found[:, :, :8], expected)


@pytest.mark.parametrize("count", [0, 2, 12])
@pytest.mark.parametrize("kind", [UncompressedSlidingLayer, StaticSlidingLayer])
def test_a_sliding_layer_reads_a_later_turn(kind, count):
    """The window before it, the new tokens and those that leave no trace."""
    layer = kind(16, 8) if kind is StaticSlidingLayer else kind(8)
    plain = DynamicCache(config=tiny_config("gemma3")).layers[0]
    first, later = states(length=20), states(length=count + 3, seed=1)
    layer.update(*first)
    plain.update(*first)
    window = plain.keys.clone()
    layer.begin_reading(3)
    columns, offset = layer.get_mask_sizes(count + 3)
    keys, _ = layer.update(*later)
    assert torch.equal(keys, torch.cat([window, later[0]], 2))
    assert (int(columns), int(offset)) == (7 + count + 3, 13)
    layer.end_reading()
    if count:
        plain.update(*(tensor[:, :, :count] for tensor in later))
    assert torch.equal(layer.keys[:, :, :7], plain.keys) and int(layer.get_seq_length()) == 20 + count


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("kind", [UncompressedSlidingLayer, StaticSlidingLayer])
def test_a_sliding_layer_goes_back_when_a_reading_is_given_up(kind, read_before):
    layer = kind(16, 8) if kind is StaticSlidingLayer else kind(8)
    first = states(length=20)
    if read_before:
        layer.update(*first)
    layer.begin_reading(3)
    layer.update(*states(length=13, seed=1))
    layer.abandon_reading()
    assert int(layer.get_seq_length()) == (20 if read_before else 0)
    if read_before:
        assert torch.equal(layer.keys[:, :, :7], first[0][:, :, -7:])
    following = states(length=1, seed=5)
    keys, values = layer.update(*following)
    end = 8 if read_before else 1
    assert torch.equal(keys[:, :, end - 1 : end], following[0])
    assert torch.equal(values[:, :, end - 1 : end], following[1])


@pytest.mark.parametrize("given_up", [False, True])
def test_a_static_sliding_layer_reads_more_than_it_has_room_for(given_up):
    """Before its window is full, storage is as large as what was read needs it."""
    layer, plain = StaticSlidingLayer(4, 110), UncompressedSlidingLayer(110)
    first, later = states(length=20), states(length=103, seed=1)
    for each in (layer, plain):
        each.update(*first)
    assert layer.keys.shape[2] == 64
    for turn in [True, False] if given_up else [False]:
        layer.begin_reading(3)
        keys = layer.update(*later)[0]
        if turn:
            layer.abandon_reading()
            assert int(layer.get_seq_length()) == 20 and torch.equal(layer.keys[:, :, :20], first[0])
        else:
            layer.end_reading()
    plain.begin_reading(3)
    assert torch.equal(keys, plain.update(*later)[0])
    plain.end_reading()
    assert int(layer.get_seq_length()) == 120 and layer.free_slots() >= 4
    assert torch.equal(layer.keys[:, :, :109], plain.keys) and torch.equal(layer.values[:, :, :109], plain.values)


def test_layers_follow_the_config():
    cache = LookaheadCache(4)
    cache.build_layers(tiny_config("gemma3"))
    assert [type(layer) for layer in cache.layers] == [UncompressedSlidingLayer, EvictedLayer, EvictedLayer]
    assert cache.layers[0].sliding_window == 8 and cache.evicted_layers() == [1, 2]


def test_a_cache_that_no_model_prepared_is_refused():
    with pytest.raises(ValueError, match="load_adapter"):
        LookaheadCache(4).update(*states(), layer_idx=0)
