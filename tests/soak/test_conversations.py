"""Thousands of conversations drawn at random: turns, chunks, refreshes, parking, changes of the cache between turns.

Every token equals that of a full cache in which what was evicted is masked. ``converse(models, seed)`` repeats one.
"""

import copy
import random
from contextlib import contextmanager

import pytest
import torch
from models import ARCHITECTURES, evicted_logits, kept_entries
from test_soak import ALLOCATIONS, CLOSE, SCORERS, assert_best, draw_following, draw_prompt

from lkq_hf import LookaheadCache
from lkq_hf.cache.reading import Reading
from lkq_hf.compat import later_chunks_work


def draw_cache(draw):
    return LookaheadCache(
        draw.choice([1, 3, 7, 12, 30, 0.1, 0.3, 0.8]),
        draw.choice(SCORERS),
        max_new_tokens=draw.choice([None, None, 1, 6, 20]),
        allocation=draw.choice(ALLOCATIONS),
        evict_later_turns=draw.random() < 0.85,
        refresh_every=draw.choice([None, None, 1, 2, 5]),
        park=draw.choice([None, "cpu"]),
    )


class Reference:
    """What each token of a conversation saw: after which length of the text, which entries of the text before.

    Attributes:
        stages: pairs of ``{layer: bool [batch, kv_heads, length]}`` and the position of the first token that saw them.
    """

    def __init__(self):
        self.stages = []
        self.evictions = 0

    @contextmanager
    def recording(self, patch):
        start, evict_to = Reading.start, LookaheadCache.evict_to

        def started(reading):
            seen = int(reading.cache.get_seq_length())
            kept = kept_entries(reading.cache)
            if reading.cache.park and reading.new_length and kept:  # what is parked is seen again while this reads
                whole = {layer: entries.new_ones(*entries.shape[:2], seen) for layer, entries in kept.items()}
                self.stages.append((whole, seen))
            start(reading)

        def evicted(cache, *arguments):
            evict_to(cache, *arguments)
            self.evictions += 1
            self.stages.append((kept_entries(cache), int(cache.get_seq_length())))

        with patch.context() as here:
            here.setattr(Reading, "start", started)
            here.setattr(LookaheadCache, "evict_to", evicted)
            yield

    def crop(self, length):
        self.stages = [(kept, min(begin, length)) for kept, begin in self.stages]

    def take(self, rows):
        self.stages = [({layer: kept[rows] for layer, kept in stage.items()}, begin) for stage, begin in self.stages]

    def logits(self, base, ids, mask):
        return evicted_logits(base, ids, mask, self.stages or [{}])


class Conversation:
    """One conversation, its cache and its reference.

    Attributes:
        read: length of the text at the end of the last prompt.
    """

    def __init__(self, draw, models, device):
        self.draw, self.device = draw, device
        self.architecture = draw.choice(ARCHITECTURES)
        self.base, self.model = models[self.architecture]
        self.model.set_attn_implementation(draw.choice(["eager", "sdpa"]))
        self.cache, self.reference = draw_cache(draw), Reference()
        self.ids, self.mask = (each.to(device) for each in draw_prompt(draw))
        self.trimmed = False

    def answer(self, patch):
        draw, cache = self.draw, self.cache
        length = self.read = self.ids.shape[1]
        seen = int(cache.get_seq_length()) if cache.has_prompt else 0
        given = self.ids[:, seen:] if draw.random() < 0.3 and not self.trimmed else self.ids
        new_tokens, before = draw.randint(1, 12), self.reference.evictions
        with self.reference.recording(patch):
            output = self.model.generate(
                given, attention_mask=self.mask, past_key_values=cache, max_new_tokens=new_tokens, do_sample=False,
                prefill_chunk_size=self.draw_chunk(seen), output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        self.trimmed = False
        tokens = output.sequences[:, given.shape[1] :]
        self.ids = torch.cat([self.ids, tokens], dim=1)
        self.mask = torch.nn.functional.pad(self.mask, (0, new_tokens), value=1)
        expected = self.reference.logits(self.base, self.ids, self.mask)[:, length - 1 : -1]
        torch.testing.assert_close(torch.stack(output.logits, dim=1), expected, atol=CLOSE, rtol=CLOSE)
        assert_best(expected, tokens)
        budget = cache.entries_to_keep(length)
        if budget < length and (seen == 0 or cache.evict_later_turns):
            assert self.reference.evictions > before, "what does not fit into the budget is evicted"
            most = cache.entries_to_keep(length + new_tokens) + new_tokens - 1
            assert cache.summary()["entries_stored"] <= most + 1e-6, "and the budget is kept"
            assert cache.park is None or cache.summary()["entries_parked"] >= length

    def draw_chunk(self, seen):
        """Every chunk of every row has to end with a token that is no padding."""
        chunk = self.draw.choice([None, None, 5, 16, 33])
        chunk = chunk if seen == 0 or later_chunks_work() else None
        return chunk if chunk is not None and self.mask[:, seen + chunk - 1 :: chunk].all() else None

    def change(self, patch, directory):
        """Something that may happen to a cache between two turns."""
        kind = self.draw.choice(["nothing", "nothing", "copy", "crop", "trim", "select", "repeat", "save"])
        cache, seen = self.cache, int(self.cache.get_seq_length())
        if kind == "copy":
            self.cache = copy.deepcopy(cache)
        elif kind in ("crop", "trim"):
            first = max([self.read, *(layer.evicted_length for layer in map(self._layer, cache.evicted_layers()))])
            if self.architecture == "gemma3" or first >= seen:
                return  # a sliding window cannot go back
            length = self.draw.randint(first, seen - 1)
            if kind == "crop":
                cache.crop(length - seen)
            self.trimmed = kind == "trim"  # the cache goes back by itself, when it is given a text that differs there
            self.reference.crop(length)
            self.ids, self.mask = self.ids[:, :length], self.mask[:, :length]
        elif kind in ("select", "repeat"):
            batch = self.ids.shape[0]
            if kind == "select":
                rows = torch.tensor(self.draw.choices(range(batch), k=self.draw.randint(1, 3)))
                cache.batch_select_indices(rows)
            else:
                rows = torch.arange(batch).repeat_interleave(2)
                cache.batch_repeat_interleave(2)
            self.ids, self.mask = self.ids[rows], self.mask[rows]
            self.reference.take(rows)
        elif kind == "save":
            cache.save_pretrained(directory)
            self.cache = LookaheadCache.from_pretrained(directory, self.model)

    def _layer(self, index):
        return self.cache.layers[index]

    def ask(self):
        last = self.ids.shape[1]
        longer = draw_following(self.draw, self.ids.cpu(), self.mask.cpu())
        self.ids, self.mask = (each.to(self.device) for each in longer)
        if self.trimmed:  # no row may go on as its answer did, and padding is not compared
            known = self.cache.text.known(self.ids.shape[0], last + 1)[:, last]
            self.ids[:, last] = (known + 1) % 150 + 3
            self.mask[:, last] = 1


def converse(models, seed, patch, directory, device="cpu"):
    draw = random.Random(seed)
    conversation = Conversation(draw, models, device)
    try:
        conversation.answer(patch)
        for _ in range(draw.randint(1, 4)):
            conversation.change(patch, directory)
            conversation.ask()
            conversation.answer(patch)
    except BaseException as error:
        error.add_note(f"seed {seed}: {conversation.architecture}, {vars(conversation.cache)}")
        raise
    return conversation.reference.evictions


def test_forty_conversations(models, monkeypatch, tmp_path):
    assert sum(converse(models, seed, monkeypatch, tmp_path) for seed in range(40)) > 80


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_conversations_on_a_gpu(models_on_gpu, monkeypatch, tmp_path):
    for seed in range(150):
        converse(models_on_gpu, seed, monkeypatch, tmp_path, "cuda")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_conversations(models, monkeypatch, tmp_path):
    for seed in range(2000):
        converse(models, seed, monkeypatch, tmp_path)
