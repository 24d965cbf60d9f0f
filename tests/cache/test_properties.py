"""The cache's arithmetic of lengths, offsets and places, against lists of Python objects.

Every entry is a key that names its row, its head and its position, so that what the cache returns can be read.
"""

import copy
import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from models import tiny_config
from shares import naive_shares

from lkq_hf import LookaheadCache
from lkq_hf.cache import static
from lkq_hf.cache.layers import EvictedLayer

pytestmark = pytest.mark.one_version

HEADS = 2
SETTINGS = settings(
    max_examples=60,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.data_too_large],
)
MORE = settings(SETTINGS, max_examples=2000, stateful_step_count=40, derandomize=False)


@pytest.fixture(autouse=True)
def little_storage(monkeypatch):
    """Static storage that is soon full."""
    monkeypatch.setattr(static, "SLOTS_MULTIPLE", 4)
    monkeypatch.setattr(static, "LEAST_GROWTH", 4)


Token = tuple[int, int, int]


@dataclass
class Model:
    """What a cache should hold.

    ``rows`` is the text of each row, as the names of its tokens, and ``real`` which of them are no padding; ``kept``
    the positions that each full-attention layer has kept of the first ``evicted_length``, for each row and head, or
    nothing if it kept all. ``waiting`` are scores of an eviction that is put off until a crop.
    """

    rows: list[list[Token]]
    real: list[list[bool]]
    kept: dict[int, list[list[list[int]]]] = field(default_factory=dict)
    evicted_length: int = 0
    waiting: dict[int, list] = field(default_factory=dict)
    window_start: int = 0

    @property
    def length(self):
        return len(self.rows[0])

    def entries(self, index, row, head):
        """Positions of what a full-attention layer stores, and can choose from."""
        first = self.kept[index][row][head] if index in self.kept else range(self.evicted_length)
        return [*first, *range(self.evicted_length, self.length)]

    def take(self, chosen):
        self.rows = [list(self.rows[row]) for row in chosen]
        self.real = [list(self.real[row]) for row in chosen]
        self.kept = {index: [rows[row] for row in chosen] for index, rows in self.kept.items()}
        self.waiting = {index: [scores[row] for row in chosen] for index, scores in self.waiting.items()}


class CacheMachine(RuleBasedStateMachine):
    """Reads prompts and does to the cache what the decodings of transformers do, in any order."""

    architecture = "llama"

    @initialize(
        batch=st.integers(1, 3),
        length=st.integers(1, 30),
        window=st.sampled_from([3, 8, 25]),
        budget=st.one_of(st.integers(1, 12), st.integers(1, 40), st.floats(0.01, 1.0)),
        allocation=st.sampled_from(["global", "global", "layer", "uniform"]),
        suffix=st.integers(0, 3),
        room=st.one_of(st.none(), st.integers(1, 9)),
        records_past=st.sampled_from([False, False, True]),
        padded=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def read_a_prompt(self, batch, length, window, budget, allocation, suffix, room, records_past, padded, seed):
        self.window, self.budget, self.allocation = window, budget, allocation
        self.cache = LookaheadCache(budget, max_new_tokens=room, allocation=allocation)
        if records_past:
            self.cache.activate_past_recording()
        self.names, self.other = 0, None
        self.begin(batch, length, suffix, padded, seed)

    def begin(self, batch, length, suffix, padded, seed):
        config = tiny_config(self.architecture, **self.changes())
        config._attn_implementation = "sdpa"
        self.cache.build_layers(config)
        self.decoder = torch.nn.Module()  # says whether processes divide its heads
        self.decoder.config = config
        generator = torch.Generator().manual_seed(seed)
        real = [[True] * length for _ in range(batch)]
        if padded:
            for row in real[1:]:
                gone = int(torch.randint(0, length, (), generator=generator))
                row[:gone] = [False] * gone
        self.model = Model([[] for _ in range(batch)], [[] for _ in range(batch)])
        assert not self.cache.has_prompt
        self.turn(length, suffix, real, generator)

    def changes(self):
        """Of the model's config."""
        return {}

    def share(self, length):
        """Entries that a text of this length keeps for each head on average."""
        if isinstance(self.budget, int):
            return min(self.budget, length)
        return min(max(round(self.budget * length), 1), length)

    def turn(self, count, suffix, real, generator):
        """Reads tokens, and evicts unless everything fits into the budget."""
        evicts = self.share(self.model.length + count) < self.model.length + count
        assert self.cache.will_read(count) == evicts
        if evicts:
            self.read(count, suffix, 0, real, generator)
        else:
            self.append(count, real)

    def read(self, count, suffix, recent, real, generator):
        new = self.name(count, real)
        states = self.states([[*row, *[(-1, -1, -1)] * suffix] for row in new])
        for layer in self.cache.layers:
            layer.begin_reading(suffix)
        sizes = self.mask_sizes(count + suffix)
        total = self.model.length
        mask = torch.tensor(self.model.real)
        eviction, tails, scores = self.cache.begin_eviction(self.decoder, total), {}, {}
        for index, layer in enumerate(self.cache.layers):
            keys, values = self.cache.update(*states, index)
            assert torch.equal(keys, -values)
            columns, offset = sizes[index]
            assert columns == keys.shape[-2] and offset + columns == total + suffix
            self.compare(index, layer, keys, int(offset), total - int(offset), count)
            if not isinstance(layer, EvictedLayer):
                continue
            assert layer.returned(keys, values) and not layer.returned(keys.clone(), values)
            tail = keys.shape[-2] - suffix
            candidates = layer.candidates(keys, values, tail, mask if not mask.all() or suffix % 2 else None)
            self.compare_candidates(index, candidates)
            # Few different scores, so that some are equal.
            given = torch.randint(0, 9, candidates.positions.shape, generator=generator).float()
            given[torch.rand(given.shape, generator=generator) < 0.05] = math.inf
            scores[index] = given
            if self.cache.records_past:
                tails[index] = keys[:, :, :tail].clone(), values[:, :, :tail].clone()
                self.model.waiting[index] = given.tolist()
                continue
            if recent:
                candidates, given = candidates.without_last(recent), given[..., : given.shape[-1] - recent]
            eviction.add(index, candidates, given)
        if self.cache.records_past:
            for layer in self.cache.layers:
                layer.end_reading()
            self.cache.defer(eviction, tails, scores, total, None if mask.all() else mask)
            return
        prefixes = eviction.settle(total - recent, self.cache.pools())
        for layer in self.cache.layers:
            layer.end_reading()
        self.cache.evict_to(prefixes, recent)
        by_place = {index: self.by_place(index, given) for index, given in scores.items()}
        self.choose(by_place, self.share(total), total - recent)

    def by_place(self, index, scores):
        """``{position: score}`` for each row and head, of what is no padding."""
        model = self.model
        places = [[model.entries(index, row, head) for head in range(HEADS)] for row in range(len(model.rows))]
        # The tail ends the candidates of all heads; before a head's prefix there may be what is none.
        width = scores.shape[-1]
        found = []
        for row, heads in enumerate(places):
            found.append([])
            for head, entries in enumerate(heads):
                columns = range(width - len(entries), width)
                values = scores[row, head].tolist()
                pairs = zip(entries, (values[column] for column in columns), strict=True)
                found[-1].append({place: score for place, score in pairs if model.real[row][place]})
        return found

    def choose(self, by_place, budget, length):
        """Evicts from the first ``length`` tokens."""
        kept = {index: [] for index in by_place}
        for row in range(len(self.model.rows)):
            scores = [
                [[head.get(place, -math.inf) for place in range(length)] for head in rows[row]]
                for rows in by_place.values()
            ]
            shares = naive_shares(scores, budget, self.allocation, 4 * budget)
            for index, layer in zip(kept, shares, strict=True):
                kept[index].append(layer)
        self.model.kept, self.model.evicted_length = kept, length

    def mask_sizes(self, count):
        """Of all layers, before any is updated: models make their masks first."""
        return [self.cache.get_mask_sizes(count, index) for index in range(len(self.cache.layers))]

    def name(self, count, real=None):
        """New tokens of each row, which become part of the text."""
        self.names += 1
        for index, row in enumerate(self.model.rows):
            row += [(index, self.names, position) for position in range(count)]
            self.model.real[index] += [True] * count if real is None else real[index]
        return [row[len(row) - count :] for row in self.model.rows]

    def states(self, rows):
        """Keys ``[batch, heads, length, 4]`` that name each token and head, and values that are minus those."""
        named = [[[(*token, head) for token in row] for head in range(HEADS)] for row in rows]
        key = torch.tensor(named, dtype=torch.float32)
        return key, -key

    @rule(count=st.integers(1, 12))
    def append(self, count, real=None):
        states = self.states(self.name(count, real))
        sizes = self.mask_sizes(count)
        for index, layer in enumerate(self.cache.layers):
            columns, offset = sizes[index]
            keys, values = self.cache.update(*states, index)
            assert columns == keys.shape[-2] == values.shape[-2], "the mask has a column for every key"
            assert torch.equal(keys, -values)
            slots = getattr(layer, "has_static_storage", False)
            end = self.model.length - int(offset) if slots else keys.shape[-2]
            self.compare(index, layer, keys, int(offset), end, count)

    def compare(self, index, layer, keys, offset, end, count):
        """Column ``j`` of the mask stands for position ``offset + j``, which decides what a query may see."""
        assert offset + end == self.model.length
        for row in range(len(self.model.rows)):
            for head in range(HEADS):
                found = [tuple(map(int, token[:3])) for token in keys[row, head, :end].tolist()]
                assert keys[row, head, :end, 3].eq(head).all()
                assert found == self.model.rows[row][offset:]
        if isinstance(layer, EvictedLayer):
            assert offset == self.model.evicted_length, "the prefix has all before the tail"
        else:
            first = max(self.model.length - count - self.window + 1, 0)
            assert offset <= first, "every query sees its whole window"

    def compare_candidates(self, index, candidates):
        model, count = self.model, candidates.positions.shape[-1]
        for row, text in enumerate(model.rows):
            for head in range(HEADS):
                valid = [True] * count
                if candidates.valid is not None:
                    valid = candidates.valid.expand(-1, HEADS, -1)[row, head].tolist()
                places = candidates.positions[row, head].tolist()
                chosen = [place for place, ok in zip(places, valid, strict=True) if ok and model.real[row][place]]
                expected = [place for place in model.entries(index, row, head) if model.real[row][place]]
                assert chosen == expected
                names = candidates.keys[row, head, :count, :3].tolist()
                for place, name, ok in zip(places, names, valid, strict=True):
                    assert not ok or tuple(map(int, name)) == text[place]

    @precondition(lambda self: not self.cache.records_past)
    @rule(
        count=st.integers(1, 20),
        suffix=st.integers(0, 3),
        padded=st.booleans(),
        given_up_after=st.one_of(st.none(), st.integers(0, 3)),
        seed=st.integers(0, 2**16),
    )
    def read_a_later_turn(self, count, suffix, padded, given_up_after, seed):
        if given_up_after is not None:
            self.give_up_reading(count, suffix, given_up_after)
        generator = torch.Generator().manual_seed(seed)
        real = None
        if padded:
            real = (torch.rand(len(self.model.rows), count, generator=generator) > 0.3).tolist()
            for row in real:
                row[-1] = True
        self.cache.begin_turn()
        self.turn(count, suffix, real, generator)
        self.cache.end_turn_begin()

    @precondition(lambda self: not self.cache.records_past and self.model.length > 1)
    @rule(suffix=st.integers(1, 3), recent=st.integers(0, 9), seed=st.integers(0, 2**16))
    def choose_again(self, suffix, recent, seed):
        """Reads nothing but tokens that leave no trace; the last tokens of the tail are not up for eviction."""
        recent = min(recent, self.model.length - max(self.model.evicted_length, 1))
        self.read(0, suffix, recent, None, torch.Generator().manual_seed(seed))

    def give_up_reading(self, count, suffix, layers):
        """In the middle of a forward."""
        states = self.states([[(-2, -2, -2)] * (count + suffix) for _ in self.model.rows])
        for layer in self.cache.layers:
            layer.begin_reading(suffix)
        self.mask_sizes(count + suffix)
        for index in range(layers):
            self.cache.update(*states, index)
        for layer in self.cache.layers:
            layer.abandon_reading()

    @rule(count=st.integers(0, 14))
    def crop(self, count):
        """To a length before which entries are gone it is refused, and then changes nothing."""
        model = self.model
        length = max(model.length - count, 0)
        first = min(model.evicted_length, model.length) if length else 1
        if first > length or not self.windows_allow(length):
            with pytest.raises(ValueError, match="cannot remove"):
                self.cache.crop(length - model.length if length else -model.length - 1)
            return
        self.cache.crop(length - model.length)
        self.windows_are_cut(length)
        waiting, model.waiting = model.waiting, {}
        if waiting:
            scored = min(length, len(next(iter(waiting.values()))[0][0]))
            by_place = {
                index: [
                    [{place: head[place] for place in range(scored) if model.real[row][place]} for head in rows[row]]
                    for row in range(len(rows))
                ]
                for index, rows in waiting.items()
            }
            if self.share(scored) < scored:
                self.choose(by_place, self.share(scored), scored)
        for row, real in zip(model.rows, model.real, strict=True):
            del row[length:], real[length:]

    def windows_allow(self, length):
        return True

    def windows_are_cut(self, length):
        pass

    @rule(data=st.data(), operation=st.sampled_from(["reorder", "select", "repeat"]))
    def choose_rows(self, data, operation):
        batch = len(self.model.rows)
        if operation == "repeat" and batch <= 3:
            repeats = data.draw(st.integers(1, 3))
            self.cache.batch_repeat_interleave(repeats)
            self.model.take([row for row in range(batch) for _ in range(repeats)])
            return
        sizes = {"min_size": batch if operation == "reorder" else 1, "max_size": batch}
        chosen = data.draw(st.lists(st.integers(0, batch - 1), **sizes))
        choose = self.cache.reorder_cache if operation == "reorder" else self.cache.batch_select_indices
        choose(torch.tensor(chosen))
        self.model.take(chosen)

    @rule(back=st.booleans())
    def work_on_a_copy(self, back):
        """The cache that was copied is not changed by it, and may be gone back to."""
        if back and self.other is not None:
            self.other, (self.cache, self.model) = (self.cache, self.model), self.other
        else:
            self.other = self.cache, self.model
            self.cache, self.model = copy.deepcopy(self.other)

    @rule(
        batch=st.integers(1, 3),
        length=st.integers(1, 30),
        suffix=st.integers(0, 3),
        padded=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def start_again(self, batch, length, suffix, padded, seed):
        self.cache.reset()
        assert self.cache.get_seq_length() == 0 and self.cache.nbytes == 0 and not self.cache.has_prompt
        self.begin(batch, length, suffix, padded, seed)

    @invariant()
    def everything_is_that_of_the_text(self):
        check(self.cache, self.model)
        if self.other is not None:
            check(*self.other)


def check(cache, model):
    assert cache.has_prompt and cache.has_prefix == bool(model.kept)
    summary, batch = cache.summary(), len(model.rows)
    assert summary["tokens_seen"] == model.length
    assert cache.evicted_layers() == [i for i, layer in enumerate(cache.layers) if isinstance(layer, EvictedLayer)]
    for index, layer in enumerate(cache.layers):
        assert int(cache.get_seq_length(index)) == model.length
        if not isinstance(layer, EvictedLayer):
            continue
        stored = [[len(model.entries(index, row, head)) for row in range(batch)] for head in range(HEADS)]
        assert layer.entries_by_head() == pytest.approx([sum(head) / batch for head in stored])
        assert summary["layers"][index]["entries"] == layer.entries_by_head()
        assert layer.evicted_length == model.evicted_length
        assert layer.tail_length == model.length - model.evicted_length
        if index not in model.kept:
            assert layer.prefix is None and layer.kept() is None
            continue
        compare_prefix(layer, model, index)
    heads = [each for index in cache.evicted_layers() for each in summary["layers"][index]["entries"]]
    assert summary["entries_stored"] == pytest.approx(sum(heads) / len(heads))


def compare_prefix(layer, model, index):
    prefix = layer.prefix
    kept, (keys, values, positions, valid) = layer.kept(), prefix.padded()
    assert kept.shape == (len(model.rows), HEADS, model.evicted_length)
    assert prefix.lengths.dtype == torch.int32 and prefix.starts.dtype == torch.int64
    assert int(prefix.lengths.max()) <= prefix.longest == valid.shape[-1]
    assert int((prefix.starts + prefix.lengths).max()) <= prefix.pool.keys.shape[0]
    for row, text in enumerate(model.rows):
        for head in range(HEADS):
            expected, here = model.kept[index][row][head], valid[row, head]
            assert expected or not any(model.real[row][: model.evicted_length]), "every head keeps something"
            assert kept[row, head].nonzero()[:, 0].tolist() == positions[row, head][here].tolist() == expected
            assert int(prefix.lengths[row, head]) == int(here.sum())
            names = [(*map(int, token),) for token in keys[row, head][here].tolist()]
            assert names == [(*text[place], head) for place in expected]
            assert torch.equal(keys[row, head][here], -values[row, head][here])


class SlidingCacheMachine(CacheMachine):
    """With a sliding-window layer, whose growing form cannot go back unless it records the past."""

    architecture = "gemma3"

    def changes(self):
        return {"sliding_window": self.window}

    def windows_allow(self, length):
        first = self.cache.layers[0]
        if getattr(first, "has_static_storage", False):
            return length >= first._first_croppable_length()
        if max(length - self.window + 1, 0) < self.model.window_start:
            return False
        return self.cache.records_past or self.model.length < self.window

    def windows_are_cut(self, length):
        if self.model.length >= self.window:
            self.model.window_start = max(self.model.window_start, length - self.window + 1)

    @precondition(lambda self: not self.cache.records_past)
    @rule(count=st.integers(1, 300))
    def append_many(self, count):
        self.append(count)


TestCache = CacheMachine.TestCase
TestSlidingCache = SlidingCacheMachine.TestCase
TestCache.settings = TestSlidingCache.settings = SETTINGS


@pytest.mark.slow
@pytest.mark.parametrize("machine", [CacheMachine, SlidingCacheMachine])
def test_longer_and_at_random(machine):
    run_state_machine_as_test(machine, settings=MORE)
