"""Numbers of entries per head that are fixed beforehand."""

import copy

import pytest
import torch
from models import (
    add_lookahead,
    base_and_adapted,
    delete_adapter,
    left_padded,
    lookahead_model,
    prompt_ids,
    save_adapter,
    set_adapter,
    tiny_model,
)

from lkq_hf import LookaheadCache, LookaheadKVConfig, prepare_model_for_eviction
from lkq_hf.cache.allocation import share_out
from lkq_hf.cache.profile import BudgetProfile
from lkq_hf.evaluation.decoding import Answers
from lkq_hf.evaluation.prefill import add_oracle, read_prompts
from lkq_hf.evaluation.profile import measure_profile, set_profile
from lkq_hf.hub import load_adapter
from lkq_hf.scoring import LookaheadScorer, SnapKVScorer

PROFILE = {"8": [[0.5, 1.5], [2.0, 0.25], [1.25, 0.5]], "16": [[1.0, 1.0], [1.5, 0.5], [0.75, 1.25]]}


def numbers(cache):
    return {index: cache.layers[index].prefix.lengths for index in cache.evicted_layers()}


def read(model, ids, cache, mask=None):
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    return cache


@pytest.mark.parametrize("length", [8, 17, 40, 10_000])
@pytest.mark.parametrize("budget", [1, 3, 8, 11, 16, 500])
def test_the_sum_is_exactly_the_budget_and_no_head_has_more_than_there_is(budget, length):
    if budget > length:
        return
    found = BudgetProfile.from_config(PROFILE).numbers(budget, length)
    assert [len(layer) for layer in found] == [2, 2, 2]
    together = torch.cat(found)
    assert together.sum() == 6 * budget
    assert together.min() >= 1 and together.max() <= length


def test_shares_are_those_of_known_budgets_and_between_them_interpolated():
    profile = BudgetProfile.from_config(PROFILE)
    assert torch.cat(profile.numbers(8, 1000)).tolist() == [4, 12, 16, 2, 10, 4]
    assert torch.cat(profile.numbers(16, 1000)).tolist() == [16, 16, 24, 8, 12, 20]
    # Outside of what is known, the nearest.
    assert torch.cat(profile.numbers(4, 1000)).tolist() == [2, 6, 8, 1, 5, 2]
    assert torch.cat(profile.numbers(160, 1000)).tolist() == [160, 160, 240, 80, 120, 200]
    # Half way in the logarithm; 11 is nearly there.
    middle = 11 * torch.tensor([0.75, 1.25, 1.75, 0.375, 1.0, 0.875])
    assert (torch.cat(profile.numbers(11, 1000)) - middle).abs().max() < 1


def test_what_a_head_cannot_hold_goes_to_the_others():
    found = torch.cat(BudgetProfile.from_config(PROFILE).numbers(8, 10))
    assert found.sum() == 48 and found.max() == 10
    assert found[0] > 4 and found[3] > 2


@pytest.mark.parametrize("stages", [{}, {"max_new_tokens": 4}])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_each_head_keeps_its_own_best_entries(architecture, stages):
    model = lookahead_model(architecture, attention="sdpa")
    layers = 3 if architecture == "llama" else 2
    rows = [[0.5, 1.5], [1.75, 0.25], [1.25, 0.75]][:layers]
    set_profile(model, {"8": rows})
    ids = prompt_ids(1, 40)
    cache = read(model, ids, LookaheadCache(budget=8, allocation="profile", **stages))
    assert [layer.tolist() for layer in numbers(cache).values()] == [[[int(8 * s) for s in row]] for row in rows]
    # The best of a head are the first of all that a larger uniform budget keeps.
    larger = read(model, ids, LookaheadCache(budget=14, allocation="uniform"))
    for index in cache.evicted_layers():
        for head in range(2):
            few, many = cache.layers[index].kept()[0, head], larger.layers[index].kept()[0, head]
            assert (few & many).sum() == min(few.sum(), many.sum())
    longer = torch.cat([ids, prompt_ids(1, 3, seed=4)], dim=1)
    model.generate(longer, past_key_values=copy.deepcopy(cache), max_new_tokens=4)


def test_rows_of_a_padded_batch_have_the_same_numbers():
    model = lookahead_model()
    set_profile(model, PROFILE)
    ids, mask = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 30, seed=1)[0]])
    cache = read(model, ids, LookaheadCache(budget=8, allocation="profile"), mask)
    assert torch.cat(list(numbers(cache).values()), dim=1).tolist() == [[4, 12, 16, 2, 10, 4]] * 2
    alone = read(model, ids[1:, 10:], LookaheadCache(budget=8, allocation="profile"))
    for index in cache.evicted_layers():
        assert torch.equal(cache.layers[index].kept()[1:, :, 10:], alone.layers[index].kept())


def test_later_turns_drafts_and_refreshes_keep_to_the_profile():
    model = lookahead_model(attention="sdpa")
    set_profile(model, PROFILE)
    ids = prompt_ids(1, 40)
    expected = [4, 12, 16, 2, 10, 4]
    cache = LookaheadCache(budget=8, allocation="profile")
    first = model.generate(ids, past_key_values=cache, max_new_tokens=3)
    model.generate(torch.cat([first, prompt_ids(1, 9, seed=5)], 1), past_key_values=cache, max_new_tokens=3)
    assert torch.cat(list(numbers(cache).values()), dim=1).tolist() == [expected]
    repetitive = prompt_ids(1, 10).repeat(1, 4)
    cache = LookaheadCache(budget=8, allocation="profile")
    model.generate(repetitive, past_key_values=cache, max_new_tokens=6, prompt_lookup_num_tokens=3)
    assert torch.cat(list(numbers(cache).values()), dim=1).tolist() == [expected]
    cache = LookaheadCache(budget=8, allocation="profile", refresh_every=4)
    model.generate(ids, past_key_values=cache, max_new_tokens=20)
    assert torch.cat(list(numbers(cache).values()), dim=1).tolist() == [expected]
    assert cache.layers[0].evicted_length > 40


def test_the_profile_belongs_to_the_active_adapter():
    model = add_lookahead(tiny_model(), budget_profile=PROFILE)
    add_lookahead(model, "other", seed=3)
    set_adapter(model, "other")
    ids = prompt_ids(1, 40)
    with pytest.raises(ValueError, match=r"'other' has no budget_profile.*lkq-hf profile"):
        read(model, ids, LookaheadCache(budget=8, allocation="profile"))
    set_adapter(model, "default")
    cache = read(model, ids, LookaheadCache(budget=8, allocation="profile", scorer="snapkv"))
    assert torch.cat(list(numbers(cache).values()), dim=1).tolist() == [[4, 12, 16, 2, 10, 4]]
    delete_adapter(model, "default")
    assert "default" not in model.model.lookahead.budget_profiles


def test_a_scorer_on_a_model_without_an_adapter_is_refused_before_any_work():
    model, calls = tiny_model(), []
    model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with prepare_model_for_eviction(model), pytest.raises(ValueError, match=r"from a LOOKAHEAD_KV adapter.*has none"):
        read(model, prompt_ids(1, 30), LookaheadCache(budget=6, scorer="snapkv", allocation="profile"))
    assert not calls


@pytest.mark.parametrize(
    ("profile", "said"),
    [({"8": [[1.0, 1.0]]}, "for 1 layers.* 3 that are evicted"), ({"8": [[1.0]] * 3}, "for 1 KV heads .* has 2")],
)
def test_a_profile_of_another_model_is_refused(profile, said):
    model = add_lookahead(tiny_model(), budget_profile=profile)
    cache = LookaheadCache(budget=8, allocation="profile")
    with pytest.raises(ValueError, match=said):
        read(model, prompt_ids(1, 30), cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    "profile",
    [
        [], {}, "8", {8: [[1.0]]}, {"0": [[1.0]]}, {"-1": [[1.0]]}, {"1e3": [[1.0]]}, {"9" * 12: [[1.0]]},
        {"²": [[1.0]]},
        {"8": []}, {"8": [[]]}, {"8": [1.0]}, {"8": [["1"]]}, {"8": [[True]]}, {"8": [[0.0, 2.0]]}, {"8": [[5.0]]},
        {"8": [[float("nan")]]}, {"8": [[-1.0, 3.0]]}, {"8": [[0.5, 0.5]]}, {"8": [[1.0]], "16": [[1.0], [1.0]]},
        {str(budget): [[1.0]] for budget in range(1, 100)}, {"8": [[1.0] * 1000] * 100},
    ],
)  # fmt: skip
def test_profiles_out_of_range_are_refused(profile):
    with pytest.raises(ValueError, match="budget_profile must map"):
        LookaheadKVConfig(budget_profile=profile)


def test_without_numbers_nothing_can_be_shared_out():
    with pytest.raises(ValueError, match="number of entries that each head keeps, got None"):
        share_out([torch.rand(1, 2, 5)], 2, "profile")


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_profile_is_the_mean_of_what_competing_heads_keep(architecture):
    model = lookahead_model(architecture, attention="sdpa")
    prompts = [prompt_ids(1, length, seed=length)[0].tolist() for length in (20, 40, 50, 90)]
    profile = measure_profile(model, prompts, budgets=[8, 16, 512], progress=False)
    assert list(profile) == ["8", "16"]  # no prompt has four times 512 tokens
    for budget, lengths in ((8, (40, 50, 90)), (16, (90,))):
        kept = [
            torch.cat(list(numbers(read(model, prompt_ids(1, n, seed=n), LookaheadCache(budget))).values()))
            for n in lengths
        ]
        mean = torch.stack(kept).float().mean(0) / budget
        torch.testing.assert_close(torch.tensor(profile[str(budget)]), mean, atol=1e-3, rtol=0)
        assert mean.std() > 0.05  # heads do differ
    assert measure_profile(model, prompts, budgets=[100], progress=False) is None


def test_a_profile_is_saved_and_loaded_with_its_adapter(tmp_path):
    base, model = base_and_adapted()
    set_profile(model, PROFILE)
    save_adapter(model, tmp_path)
    load_adapter(base, tmp_path)
    assert base.peft_config["default"].budget_profile == PROFILE
    caches = [read(each, prompt_ids(1, 40), LookaheadCache(8, allocation="profile")) for each in (model, base)]
    assert all(torch.equal(caches[0].layers[index].kept(), caches[1].layers[index].kept()) for index in range(3))


def test_every_scorer_of_one_prefill_keeps_to_the_profile():
    model = lookahead_model()
    set_profile(model, PROFILE)
    ids = prompt_ids(1, 40)
    scorers = {"lookahead": LookaheadScorer(), "snapkv": SnapKVScorer(window=4)}
    prefill = read_prompts(model, ids, torch.ones_like(ids), scorers, [8, 16], "profile")
    answers = Answers(prompt_ids(1, 3, seed=9), torch.ones(1, 3, dtype=torch.bool))
    oracle = add_oracle(model, prefill, answers, [8], "profile").oracle
    for (_, budget), cache in (prefill.caches | {("oracle", 8): oracle[8]}).items():
        found = torch.cat(list(numbers(cache).values()), dim=1).tolist()
        assert found == [[4, 12, 16, 2, 10, 4] if budget == 8 else [16, 16, 24, 8, 12, 20]]
