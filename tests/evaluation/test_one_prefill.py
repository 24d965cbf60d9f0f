import copy

import pytest
import torch
from models import base_and_adapted, full_layers, left_padded, lookahead_model, prompt_ids, scores_of, tiny_model
from transformers import DynamicCache

from lkq_hf import LookaheadCache, prepare_model_for_eviction
from lkq_hf.evaluation.decoding import answer_greedily, pad_left, score_answers
from lkq_hf.evaluation.eviction import EvictionEvaluator
from lkq_hf.evaluation.prefill import add_oracle, cache_bytes, kept_entries, read_prompts, stack_caches
from lkq_hf.scoring import LookaheadScorer, OracleScorer, SnapKVScorer, StreamingScorer

# The window of 12 does not fit into the smaller budget: SnapKV scores differently at each.
SCORERS = {"lookahead": LookaheadScorer(), "snapkv": SnapKVScorer(window=12), "streaming": StreamingScorer()}
BUDGETS = [6, 16]


def prompts(padded):
    if padded:
        return left_padded([prompt_ids(1, 40, seed=1)[0], prompt_ids(1, 27, seed=2)[0]])
    ids = prompt_ids(2, 40)
    return ids, torch.ones_like(ids)


def position_ids(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def read_alone(model, ids, mask, cache):
    with torch.no_grad():
        return model(
            input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), past_key_values=cache
        ).logits[:, -1]


def assert_same_cache(found, expected):
    assert len(found.layers) == len(expected.layers)
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        torch.testing.assert_close(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
    assert found.evicted_layers() == expected.evicted_layers()
    for layer, kept in kept_entries(expected).items():
        assert torch.equal(kept_entries(found)[layer], kept)
        (*ours, stored), (*theirs, also_stored) = (cache.layers[layer].prefix.padded() for cache in (found, expected))
        assert torch.equal(stored, also_stored) and int(stored.sum()) == int(kept.sum())
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one[stored], other[stored])


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_one_prefill_fills_the_cache_of_every_scorer_and_budget(architecture, padded):
    model = lookahead_model(architecture)
    ids, mask = prompts(padded)
    prefill = read_prompts(model, ids, mask, SCORERS, BUDGETS)
    assert len(prefill.caches) == 6
    for (name, budget), cache in prefill.caches.items():
        alone = LookaheadCache(budget=budget, scorer=SCORERS[name])
        logits = read_alone(model, ids, mask, alone)
        assert_same_cache(cache, alone)
        torch.testing.assert_close(prefill.logits, logits)
        assert set(kept_entries(cache)) == set(full_layers(model))
        assert cache_bytes(cache) == alone.nbytes
    whole = DynamicCache(config=model.config)
    read_alone(model, ids, mask, whole)
    real = mask[:, None, :, None].bool() if architecture == "llama" else None
    for ours, theirs in zip(prefill.full.layers, whole.layers, strict=True):
        if real is not None:
            torch.testing.assert_close(ours.keys * real, theirs.keys * real)
        assert ours.keys.shape == theirs.keys.shape
        assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_oracle_from_the_full_cache_is_the_oracle_of_a_prefill(architecture, padded):
    model = lookahead_model(architecture)
    ids, mask = prompts(padded)
    prefill = read_prompts(model, ids, mask, SCORERS, BUDGETS)
    free = answer_greedily(model, prefill.logits, mask, copy.deepcopy(prefill.full), 7)
    # The first answer ends early, with a token that the second does not have.
    model.generation_config.eos_token_id = next(t for t in free.ids[0, 1:].tolist() if t not in free.ids[1])
    answers = answer_greedily(model, prefill.logits, mask, copy.deepcopy(prefill.full), 7)
    assert not answers.mask.all()
    full = add_oracle(model, prefill, answers, BUDGETS)
    assert full.nll.shape == answers.ids.shape
    # The full cache chose these tokens itself.
    assert torch.equal(full.chosen[answers.mask], answers.ids[answers.mask])
    for budget, cache in full.oracle.items():
        alone = LookaheadCache(budget=budget, scorer=OracleScorer(answers.ids, answers.mask))
        read_alone(model, ids, mask, alone)
        assert_same_cache(cache, alone)


@pytest.mark.parametrize("padded", [False, True])
def test_answers_are_those_of_generate(padded):
    model = lookahead_model()
    ids, mask = prompts(padded)
    prefill = read_prompts(model, ids, mask, SCORERS, BUDGETS)
    expected = {}
    for (name, budget), cache in prefill.caches.items():
        alone = LookaheadCache(budget=budget, scorer=SCORERS[name])
        generated = model.generate(ids, attention_mask=mask, past_key_values=alone, max_new_tokens=6, do_sample=False)
        expected[name, budget] = generated[:, ids.shape[1] :]
        found = answer_greedily(model, prefill.logits, mask, copy.deepcopy(cache), 6)
        assert torch.equal(found.ids, expected[name, budget])
    six = [prefill.caches[name, 6] for name in SCORERS]
    together = answer_greedily(model, prefill.logits.repeat(3, 1), mask.repeat(3, 1), stack_caches(six), 6)
    assert torch.equal(together.ids, torch.cat([expected[name, 6] for name in SCORERS]))
    # Otherwise the comparisons above would say little.
    assert len({tuple(tokens.flatten().tolist()) for tokens in expected.values()}) > 1


def test_answers_end_with_the_first_end_token():
    model = tiny_model()
    prepare_model_for_eviction(model)
    ids, mask = prompts(padded=False)
    free = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, ids.shape[1] :]
    model.generation_config.eos_token_id = free[0, 2].item()
    prefill = read_prompts(model, ids, mask, {"streaming": StreamingScorer()}, [8])
    answers = answer_greedily(model, prefill.logits, mask, prefill.full, 8)
    first = free[0].tolist()
    assert answers.tokens()[0] == first[: first.index(free[0, 2].item()) + 1]


def test_scores_are_the_likelihood_of_prompt_and_answer_read_at_once():
    model = tiny_model()
    prepare_model_for_eviction(model)
    ids, mask = prompts(padded=True)
    prefill = read_prompts(model, ids, mask, {"streaming": StreamingScorer()}, [8])
    answers = answer_greedily(model, prefill.logits, mask, copy.deepcopy(prefill.full), 5)
    answers.ids[0, 3] = 77
    nll, chosen = score_answers(model, prefill.logits, mask, prefill.full, answers)
    both, both_mask = torch.cat([ids, answers.ids], 1), torch.cat([mask, torch.ones_like(answers.ids)], 1)
    with torch.no_grad():
        logits = model(both, attention_mask=both_mask, position_ids=position_ids(both_mask)).logits[:, 39:-1]
    expected = -logits.log_softmax(-1).gather(-1, answers.ids[..., None])[..., 0]
    torch.testing.assert_close(nll, expected)
    assert torch.equal(chosen, logits.argmax(-1))
    assert chosen[0, 3] != 77


class NoTokenizer:
    pad_token_id = 0

    def batch_decode(self, ids, skip_special_tokens):
        return [str(tokens) for tokens in ids]


def test_what_is_kept_is_compared_with_what_the_full_caches_answer_attends_to():
    """Recall of the oracle's entries, and attention on what was kept: means over all heads, by their definitions."""
    base, model = base_and_adapted()
    evaluator = EvictionEvaluator(model, NoTokenizer(), ["lookahead", "streaming", "oracle"], [6])
    rows = [prompt_ids(1, 40, seed=1), prompt_ids(1, 27, seed=2)]
    about = {"kind": "task", "document": 0, "reference": []}
    records = evaluator.measure([about | {"input_ids": row[0].tolist()} for row in rows], 5)
    for row, record in zip(rows, records, strict=True):
        length, answer = row.shape[1], torch.tensor([record["caches"]["full cache"]["tokens"]])
        with torch.no_grad():
            attentions = base(torch.cat([row, answer], 1), output_attentions=True).attentions
        mass = torch.stack([scores_of(each[:, :, length:, :length])[0] for each in attentions])
        kept = {}
        for name, scorer in (("lookahead", "lookahead"), ("streaming", "streaming"), ("oracle", OracleScorer(answer))):
            cache = LookaheadCache(6, scorer)
            read_alone(model, row, torch.ones_like(row), cache)
            kept[name] = torch.stack([layer.kept()[0] for layer in cache.layers])
        for name, entries in kept.items():
            found = record["caches"][f"{name}/6"]
            share = (mass * entries).sum(-1) / mass.sum(-1)
            recall = (entries & kept["oracle"]).sum(-1) / kept["oracle"].sum(-1)
            assert found["retained_attention_mass"] == pytest.approx(share.mean().item(), rel=1e-4)
            assert found["topk_recall"] == pytest.approx(recall.mean().item())


def test_a_budget_that_evicts_nothing_is_refused():
    model = lookahead_model()
    ids, mask = prompts(padded=True)
    with pytest.raises(ValueError, match="27 tokens"):
        read_prompts(model, ids, mask, SCORERS, [16, 27])
    with pytest.raises(ValueError, match="budgets"):
        read_prompts(model, ids, mask, SCORERS, [])


def test_two_scorers_with_a_suffix_are_refused():
    model = lookahead_model()
    ids, mask = prompts(padded=False)
    scorers = {"lookahead": LookaheadScorer(), "oracle": OracleScorer(ids[:, :3])}
    with pytest.raises(ValueError, match="lookahead, oracle"):
        read_prompts(model, ids, mask, scorers, [8])


def test_prompts_are_padded_on_the_left():
    ids, mask = pad_left([[5, 6, 7], [8]], pad_token_id=3)
    assert ids.tolist() == [[5, 6, 7], [3, 3, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_scorers_share_the_tokens_that_they_append():
    model = lookahead_model("llama")
    ids, mask = prompts(False)
    poolings = {"none": LookaheadScorer(kernel_size=1), "3": LookaheadScorer(kernel_size=3)}
    prefill = read_prompts(model, ids, mask, poolings, [6])
    for name, scorer in poolings.items():
        alone = LookaheadCache(budget=6, scorer=scorer)
        read_alone(model, ids, mask, alone)
        assert_same_cache(prefill.caches[name, 6], alone)
    with pytest.raises(ValueError, match="append different tokens"):
        read_prompts(model, ids, mask, {"a": LookaheadScorer(), "b": OracleScorer(prompt_ids(2, 4))}, [6])
