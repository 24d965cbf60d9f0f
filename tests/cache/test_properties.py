"""The cache's arithmetic of lengths, offsets and indices, against lists of Python objects.

Every entry is a key that names its row, its head and its position, so that what the cache returns can be read.
"""

import copy

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

from lkq_hf import LookaheadCache
from lkq_hf.cache.layers import EvictedLayer

HEADS, WINDOW = 2, 8
SETTINGS = settings(
    max_examples=60,
    stateful_step_count=14,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.data_too_large],
)
MORE = settings(SETTINGS, max_examples=2000, stateful_step_count=40, derandomize=False)


class CacheMachine(RuleBasedStateMachine):
    """Reads a prompt and does to the cache what the decodings of transformers do, in any order.

    ``rows`` is the text of each row, as the names of its tokens; ``kept`` the positions of the prompt that each
    full-attention layer has kept, for each row and head, or None if it kept all.
    """

    architecture = "llama"

    @initialize(
        batch=st.integers(1, 3),
        length=st.integers(1, 30),
        budget=st.one_of(st.integers(1, 40), st.floats(0.01, 1.0)),
        suffix=st.integers(0, 3),
        room=st.one_of(st.none(), st.integers(1, 9)),
        records_past=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def read_a_prompt(self, batch, length, budget, suffix, room, records_past, seed):
        self.cache = LookaheadCache(budget, max_new_tokens=room)
        if records_past:
            self.cache.activate_past_recording()
        self.names = batch
        self.read(batch, length, suffix, seed)

    def read(self, batch, length, suffix, seed):
        config = tiny_config(self.architecture)
        config._attn_implementation = "sdpa"
        self.cache.build_layers(config)
        self.rows = [[(row, 0, position) for position in range(length)] for row in range(batch)]
        self.kept, self.waiting = {}, {}
        self.evicted_length = 0
        budget = self.cache.entries_to_keep(length)
        assert 1 <= budget <= length
        if budget == length:
            for layer in range(len(self.cache.layers)):
                self.cache.update(*self.states(self.rows), layer)
            return
        generator = torch.Generator().manual_seed(seed)
        states = self.states([[*row, *[(-1, -1, -1)] * suffix] for row in self.rows])
        for index, layer in enumerate(self.cache.layers):
            if not isinstance(layer, EvictedLayer):
                layer.begin_prefill(length)
                self.cache.update(*states, index)
                continue
            layer.begin_prefill()
            key, value = self.cache.update(*states, index)
            # Few different scores, so that some are equal.
            scores = torch.randint(0, 9, (batch, HEADS, length), generator=generator).float()
            layer.evict(key, value, scores, budget, defer=self.cache.records_past)
            if self.cache.records_past:
                self.waiting[index] = (scores.tolist(), budget)
            else:
                self.choose(index, scores.tolist(), budget)

    def choose(self, index, scores, budget):
        self.kept[index] = [
            [sorted(sorted(range(len(head)), key=lambda position: -head[position])[:budget]) for head in row]
            for row in scores
        ]
        self.evicted_length = len(scores[0][0])

    def states(self, rows):
        """Keys ``[batch, heads, length, 4]`` that name each token and head, and values that are minus those."""
        named = [[[(*token, head) for token in row] for head in range(HEADS)] for row in rows]
        key = torch.tensor(named, dtype=torch.float32)
        return key, -key

    @property
    def length(self):
        return len(self.rows[0])

    def expected(self, index, row, head):
        """The tokens that a full-attention layer should hold."""
        text = self.rows[row]
        if index not in self.kept:
            return text
        return [text[position] for position in self.kept[index][row][head]] + text[self.evicted_length :]

    @rule(count=st.integers(1, 12))
    def append(self, count):
        self.names += 1
        for index, row in enumerate(self.rows):
            row += [(index, self.names, position) for position in range(count)]
        states = self.states([row[-count:] for row in self.rows])
        for index, layer in enumerate(self.cache.layers):
            columns, offset = self.cache.get_mask_sizes(count, index)
            keys, values = self.cache.update(*states, index)
            assert columns == keys.shape[-2] == values.shape[-2], "the mask has a column for every key"
            assert torch.equal(keys, -values)
            self.compare(index, layer, keys, int(offset), count)

    def compare(self, index, layer, keys, offset, count):
        """Column ``j`` of the mask stands for position ``offset + j``, which decides what a query may see."""
        static = getattr(layer, "has_static_storage", False)
        end = self.length - offset if static else keys.shape[-2]
        assert offset + end == self.length
        for row in range(len(self.rows)):
            for head in range(HEADS):
                found = [tuple(map(int, token[:3])) for token in keys[row, head, :end].tolist()]
                assert keys[row, head, :end, 3].eq(head).all()
                if isinstance(layer, EvictedLayer):
                    assert found == self.expected(index, row, head)
                else:
                    assert found == self.rows[row][offset:]
                    assert offset <= max(self.length - count - WINDOW + 1, 0), "every query sees its whole window"

    @rule(count=st.integers(0, 14))
    def crop(self, count):
        """To a length before which entries are gone it is refused, and then changes nothing."""
        length = max(self.length - count, 0)
        first = min(self.evicted_length, self.length) if length else 1
        if first > length or not self.windows_allow(length):
            with pytest.raises(ValueError, match="cannot remove"):
                self.cache.crop(length - self.length if length else -self.length - 1)
            return
        self.cache.crop(length - self.length)
        self.windows_are_cut(length)
        for row in self.rows:
            del row[length:]
        for index, (scores, budget) in self.waiting.items():
            scored = min(length, len(scores[0][0]))
            if budget < scored:
                self.choose(index, [[head[:scored] for head in row] for row in scores], budget)
        self.waiting = {}

    def windows_allow(self, length):
        return True

    def windows_are_cut(self, length):
        pass

    @rule(data=st.data())
    def reorder(self, data):
        self.pick(data, self.cache.reorder_cache, same_size=True)

    @rule(data=st.data())
    def select(self, data):
        self.pick(data, self.cache.batch_select_indices, same_size=False)

    def pick(self, data, operation, same_size):
        batch = len(self.rows)
        sizes = {"min_size": batch if same_size else 1, "max_size": batch}
        chosen = data.draw(st.lists(st.integers(0, batch - 1), **sizes))
        operation(torch.tensor(chosen))
        self.take(chosen)

    @precondition(lambda self: len(self.rows) <= 3)
    @rule(repeats=st.integers(1, 3))
    def repeat(self, repeats):
        self.cache.batch_repeat_interleave(repeats)
        self.take([row for row in range(len(self.rows)) for _ in range(repeats)])

    def take(self, chosen):
        self.rows = [list(self.rows[row]) for row in chosen]
        self.kept = {index: [rows[row] for row in chosen] for index, rows in self.kept.items()}
        self.waiting = {
            index: ([scores[row] for row in chosen], budget) for index, (scores, budget) in self.waiting.items()
        }

    @rule()
    def work_on_a_copy(self):
        self.cache = copy.deepcopy(self.cache)

    @rule(batch=st.integers(1, 3), length=st.integers(1, 30), suffix=st.integers(0, 3), seed=st.integers(0, 2**16))
    def start_again(self, batch, length, suffix, seed):
        self.cache.reset()
        assert self.cache.get_seq_length() == 0 and self.cache.nbytes == 0 and not self.cache.has_prompt
        self.read(batch, length, suffix, seed)

    @invariant()
    def lengths_are_those_of_the_text(self):
        assert self.cache.has_prompt
        for index, layer in enumerate(self.cache.layers):
            assert int(self.cache.get_seq_length(index)) == self.length
            if isinstance(layer, EvictedLayer):
                assert layer.stored == len(self.expected(index, 0, 0))
            if index in self.kept:
                assert layer.kept_indices.tolist() == self.kept[index]
        assert self.cache.summary()["tokens_seen"] == self.length


class SlidingCacheMachine(CacheMachine):
    """With a sliding-window layer, whose growing form cannot go back unless it records the past."""

    architecture = "gemma3"

    def windows_allow(self, length):
        first = self.cache.layers[0]
        if getattr(first, "has_static_storage", False):
            return length >= first._first_croppable_length()
        if max(length - WINDOW + 1, 0) < self.window_start:
            return False
        return self.cache.records_past or self.length < WINDOW

    def windows_are_cut(self, length):
        if self.length >= WINDOW:
            self.window_start = max(self.window_start, length - WINDOW + 1)

    def read(self, *arguments, **options):
        self.window_start = 0
        super().read(*arguments, **options)

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
