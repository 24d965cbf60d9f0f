"""Thousands of generations with options drawn at random: each equals the masked full cache, and none leaves anything
behind. ``run_call(models, seed)`` repeats one of them."""

import copy
import gc
import random
import resource
import weakref
from collections import Counter

import pytest
import torch
from models import (
    ARCHITECTURES,
    evicted_logits,
    kept_entries,
    left_padded,
    positions,
    prompt_ids,
)
from torch._subclasses import FakeTensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lkq_hf.attention
from lkq_hf import LookaheadCache
from lkq_hf.attention import thread_state
from lkq_hf.cache import prepare

CLOSE = 2e-3
SCORERS = ("lookahead", "lookahead", "snapkv", "streaming", "random")
FAILURES = (KeyboardInterrupt, torch.OutOfMemoryError)
ALLOCATIONS = ("global", "global", "layer", "uniform")
SAMPLING = (
    {"temperature": 1.5},
    {"top_k": 7},
    {"top_p": 0.7},
    {"min_p": 0.05},
    {"repetition_penalty": 1.2},
    {"no_repeat_ngram_size": 2},
)


def draw_prompt(draw):
    """Ids and mask of one to three rows of very different lengths."""
    longest = draw.choice([1, 2, 8, 20, 40, 60])
    lengths = [longest, *(draw.randint(1, longest) for _ in range(draw.choice([0, 0, 1, 2])))]
    return left_padded([prompt_ids(1, length, seed=draw.randrange(10**6))[0] for length in lengths])


def draw_cache(draw, model):
    budget = draw.choice([1, 3, 7, 12, 30, 70, 0.1, 0.3, 0.8])
    room = draw.choice([None, None, 1, 6, 20])
    return LookaheadCache(
        budget, draw.choice(SCORERS), max_new_tokens=room, allocation=draw.choice(ALLOCATIONS),
        evict_later_turns=draw.random() < 0.8,
    )  # fmt: skip


def add_stage(stages, cache):
    """What the cache has kept, if it has evicted since the last time: what is generated from now on sees it."""
    kept = kept_entries(cache)
    if kept:
        (length,) = {entries.shape[-1] for entries in kept.values()}
        if not stages or length > stage_length(stages):
            stages.append(kept)


def stage_length(stages):
    """Tokens of the text that the last eviction chose from."""
    return next(iter(stages[-1].values())).shape[-1]


def stages_of(cache):
    """Of one that has read once. With drafted tokens, those that were accepted at once were up for eviction too."""
    stages = []
    add_stage(stages, cache)
    return stages


def check(base, sequences, mask, stages, prompt_length, logits):
    """The logits, unless None, are those of the masked full cache, which are returned."""
    expected = evicted_logits(base, sequences, mask, stages or [{}])[:, prompt_length - 1 : -1]
    if logits is not None:
        torch.testing.assert_close(torch.stack(logits, dim=1), expected, atol=CLOSE, rtol=CLOSE)
    return expected


def assert_best(expected, tokens):
    chosen = expected.gather(-1, tokens[..., None])[..., 0]
    assert (chosen > expected.amax(-1) - CLOSE).all(), "the best token, or one as good"


def draw_following(draw, ids, mask):
    """A text with a few tokens more, which are fewer in some rows."""
    count = draw.randint(1, 6)
    ids = torch.cat([ids, prompt_ids(ids.shape[0], count, seed=draw.randrange(10**6))], dim=1)
    following = torch.ones(mask.shape[0], count, dtype=mask.dtype)
    if draw.random() < 0.3:
        for row in following[1:]:
            row[: draw.randint(0, count - 1)] = 0
    mask = F.pad(mask, (0, ids.shape[1] - count - mask.shape[1]), value=1)
    return ids, torch.cat([mask, following], dim=1)


def greedy_and_more_turns(draw, base, model, cache, ids, mask):
    """One to three turns, of which later ones may begin on a copy, or anew after a reset."""
    options = {"do_sample": False} if draw.random() < 0.5 else {"do_sample": True} | draw.choice(SAMPLING)
    stages = []
    for turn in range(draw.choice([1, 1, 2, 3])):
        torch.manual_seed(draw.randrange(10**6))
        given = ids[:, int(cache.get_seq_length()) :] if turn and draw.random() < 0.5 else ids
        if turn == 0 and draw.random() < 0.2:
            inputs = {"inputs_embeds": model.get_input_embeddings()(ids).detach()}
        else:
            inputs = {"input_ids": given}
        reads = not cache.has_prompt or cache.evict_later_turns
        output = model.generate(
            **inputs, attention_mask=mask, past_key_values=cache, max_new_tokens=draw.randint(1, 8),
            output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        add_stage(stages, cache)
        length = ids.shape[1]
        if reads and cache.entries_to_keep(length) < length:
            assert stage_length(stages) == length, "what does not fit into the budget is evicted"
        tokens = output.sequences[:, 0 if "inputs_embeds" in inputs else given.shape[1] :]
        sequences = torch.cat([ids, tokens], dim=1)
        expected = check(base, sequences, mask, stages, length, output.logits)
        if not options["do_sample"]:
            assert_best(expected, tokens)
        ids, mask = draw_following(draw, sequences, mask)
        if draw.random() < 0.3:
            cache = copy.deepcopy(cache)
        elif draw.random() < 0.2:
            cache.reset()
            stages = []
            mask[:, :length] = mask[:, :length].cummax(-1).values  # a first prompt is padded on its left only
            mask[:, length:] = 1
    return cache


def beams(draw, base, model, cache, ids, mask):
    """Of a prompt, or of a later turn over what was read before."""
    width = draw.choice([2, 3])
    returned = draw.randint(1, width)
    stages, length = [], ids.shape[1]
    if length > 2 and mask[:, : length // 2].any(-1).all() and draw.random() < 0.4:
        first, first_mask = ids[:, : length // 2], mask[:, : length // 2]
        with torch.no_grad():
            model(first, attention_mask=first_mask, position_ids=positions(first_mask), past_key_values=cache)
        add_stage(stages, cache)
        stages = [{layer: kept.repeat_interleave(returned, dim=0) for layer, kept in kept.items()} for kept in stages]
        cache.batch_repeat_interleave(width)
    torch.manual_seed(draw.randrange(10**6))
    output = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=draw.randint(2, 6), num_beams=width,
        num_return_sequences=returned, do_sample=draw.random() < 0.5, return_dict_in_generate=True,
        output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    last = []
    add_stage(last, cache)
    if last and (not stages or stage_length(last) > stage_length(stages)):
        # All beams of a row keep the same entries.
        stages.append({layer: kept[::width].repeat_interleave(returned, dim=0) for layer, kept in last[0].items()})
    mask = mask.repeat_interleave(returned, dim=0)
    expected = check(base, output.sequences, mask, stages, length, None).log_softmax(-1)
    likelihood = expected.gather(-1, output.sequences[:, length:, None])[..., 0].sum(-1)
    torch.testing.assert_close(output.sequences_scores, likelihood, atol=10 * CLOSE, rtol=CLOSE)
    return cache


def several_sequences(draw, base, model, cache, ids, mask):
    count = draw.choice([2, 3])
    torch.manual_seed(draw.randrange(10**6))
    output = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=draw.randint(1, 6), do_sample=True,
        num_return_sequences=count, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    check(base, output.sequences, mask.repeat_interleave(count, dim=0), stages_of(cache), ids.shape[1], output.logits)
    return cache


def prompt_lookup(draw, base, model, cache, ids, mask):
    ids = ids[:1].repeat(1, 2)
    mask = torch.ones_like(ids)
    output = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=draw.randint(2, 12), do_sample=False,
        prompt_lookup_num_tokens=draw.randint(1, 5),
    )  # fmt: skip
    expected = check(base, output, mask, stages_of(cache), ids.shape[1], None)
    assert_best(expected, output[:, ids.shape[1] :])
    return cache


def assistant(draw, base, model, cache, ids, mask):
    ids = ids[:1, mask[0].argmax() :]
    mask = torch.ones_like(ids)
    output = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=draw.randint(2, 8), do_sample=False,
        assistant_model=base,
    )  # fmt: skip
    expected = check(base, output, mask, stages_of(cache), ids.shape[1], None)
    assert_best(expected, output[:, ids.shape[1] :])
    return cache


def interrupted(draw, base, model, cache, ids, mask):
    """Something goes wrong in some module; then the same cache is used."""
    module = draw.choice([model.model.embed_tokens, model.model.norm, *model.model.layers])
    error = draw.choice(FAILURES)

    def fail(*_):
        raise error("injected")

    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(error, match="injected"):
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=2)
    handle.remove()
    cache.reset()  # one without evicted layers has kept what it had read
    return greedy_and_more_turns(draw, base, model, cache, ids, mask)


def refused(draw, base, model, cache, ids, mask):
    options = draw.choice([{"use_cache": False}, {"attention_mask": mask[:, :0]}])
    if ids.shape[1] > 1:
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            model.generate(ids, **{"attention_mask": mask, "past_key_values": cache, "max_new_tokens": 2} | options)
        cache.reset()
    return greedy_and_more_turns(draw, base, model, cache, ids, mask)


KINDS = [greedy_and_more_turns] * 8 + [beams] * 3 + [several_sequences, prompt_lookup, assistant, interrupted, refused]


def run_call(models, seed):
    """One generation; its cache dies with it."""
    draw = random.Random(seed)
    architecture = draw.choice(ARCHITECTURES)
    kind = draw.choice(KINDS)
    if kind is assistant and architecture == "gemma3":
        architecture = "llama"  # with a sliding window, transformers 5.17 cannot take drafts back
    base, model = models[architecture]
    model.set_attn_implementation(draw.choice(["eager", "sdpa"]))
    cache = draw_cache(draw, model)
    ids, mask = draw_prompt(draw)
    try:
        return weakref.ref(kind(draw, base, model, cache, ids, mask))
    except Exception as error:
        error.add_note(f"seed {seed}: {kind.__name__}, {architecture}, {cache!r}, mask {mask.sum(-1).tolist()}")
        raise


def hooks(models):
    return {
        (architecture, index, name): (list(m._forward_hooks), list(m._forward_pre_hooks), set(m.__dict__))
        for architecture, pair in models.items()
        for index, model in enumerate(pair)
        for name, m in model.named_modules()
    }


def alive():
    """How many tensors, caches and layers of caches there are."""
    gc.collect()
    kinds = (torch.Tensor, Cache, CacheLayerMixin)
    found = (kind for kind in map(type, gc.get_objects()) if issubclass(kind, kinds))
    return Counter(kind.__name__ for kind in found if kind is not FakeTensor)  # a compiler's, of other tests


def soak(models, calls, warm):
    entries, before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping), hooks(models)
    counted = grown = None
    for seed in range(calls):
        cache = run_call(models, seed)
        assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == entries and lkq_hf.attention._renamed == {}, seed
        assert thread_state.attend is None and thread_state.lookahead_length == 0, seed
        assert prepare._thread.forward is None, seed
        if seed == warm:
            counted, grown = alive(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gc.collect()
    assert cache() is None
    assert hooks(models) == before
    assert alive() == counted
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown) * 1024


def test_sixty_calls(models):
    soak(models, calls=60, warm=20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_calls(models):
    assert soak(models, calls=2000, warm=400) < 50e6
