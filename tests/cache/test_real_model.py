"""What needs a trained model, with attention sinks and text that matters: SmolLM2 with the adapter shipped for it."""

from pathlib import Path

import pytest
import torch
from models import evicted_logits, kept_entries, lookahead_attention, scores_of, top_entries
from real_models import load_smollm2
from torch.nn import functional as F
from transformers import DynamicCache

from lkq_hf import LookaheadCache

pytestmark = [pytest.mark.real_model, pytest.mark.one_version]

ADAPTER = Path(__file__).parents[2] / "model_cards" / "smollm2-135m-instruct-lookahead"
OPTIONS = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module")
def base():
    return load_smollm2(attn_implementation="eager")[0]


@pytest.fixture(scope="module")
def adapted():
    model, tokenizer = load_smollm2()
    model.load_adapter(str(ADAPTER))
    return model, tokenizer


@pytest.fixture(scope="module")
def texts():
    filler = "The ferry left the harbour at noon and the gulls followed it past the old lighthouse. "
    question = "\nQuestion: What is the code of the safe?\nAnswer: The code of the safe is"
    return [
        filler * 6 + "The code of the safe is 48151. " + filler * 6 + question,
        filler * 2 + "The code of the safe is 62342. " + filler + question,
    ]


def test_generation_is_that_of_masked_attention_with_the_naive_top_entries(base, adapted, texts):
    model, tokenizer = adapted
    ids = tokenizer(texts[0], return_tensors="pt").input_ids
    cache = LookaheadCache(budget=48, allocation="uniform")
    output = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **OPTIONS)
    kept = kept_entries(cache)
    config = model.peft_config["default"]
    assert (config.pooling, config.pooling_kernel_size) == ("sum", 3)
    for layer, attention in lookahead_attention(base, model, ids).items():
        own = scores_of(attention, kv_heads=3, row_power=config.row_power)
        scores = own + config.neighbor_weight * (F.pad(own[..., :-1], (1, 0)) + F.pad(own[..., 1:], (0, 1)))
        chosen, best = (scores[entries].view(3, 48) for entries in (kept[layer], top_entries(scores, 48)))
        # Where two scores agree to rounding either may be kept.
        torch.testing.assert_close(chosen.sort().values, best.sort().values, atol=1e-5, rtol=1e-3)
    length = ids.shape[1]
    expected = evicted_logits(base, output.sequences, None, kept, length)[:, length - 1 : -1]
    torch.testing.assert_close(torch.stack(output.logits, 1), expected, atol=5e-3, rtol=1e-3)
    assert torch.equal(expected.argmax(-1), output.sequences[:, length:])


def test_a_small_budget_finds_the_fact_that_recency_forgets(adapted, texts):
    model, tokenizer = adapted
    ids = tokenizer(texts[0], return_tensors="pt").input_ids
    answers = {}
    for scorer in ("lookahead", "streaming"):
        cache = LookaheadCache(budget=64, scorer=scorer)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **OPTIONS)
        answers[scorer] = tokenizer.decode(output.sequences[0, ids.shape[1] :])
    assert "48151" in answers["lookahead"]
    assert "48151" not in answers["streaming"]


def test_padded_rows_equal_each_row_alone(adapted, texts):
    model, tokenizer = adapted
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    together = model.generate(**batch, past_key_values=LookaheadCache(budget=48), **OPTIONS)
    for index, text in enumerate(texts):
        alone = model.generate(
            **tokenizer(text, return_tensors="pt"), past_key_values=LookaheadCache(budget=48), **OPTIONS
        )
        assert torch.equal(together.sequences[index, -6:], alone.sequences[0, -6:])
        found, expected = (torch.stack(output.logits, 1) for output in (together, alone))
        torch.testing.assert_close(found[index], expected[0], atol=5e-3, rtol=1e-3)


def test_a_full_budget_equals_a_dynamic_cache(adapted, texts):
    model, tokenizer = adapted
    inputs = tokenizer(texts[1], return_tensors="pt")
    found = model.generate(**inputs, past_key_values=LookaheadCache(budget=1.0), **OPTIONS)
    expected = model.generate(**inputs, past_key_values=DynamicCache(config=model.config), **OPTIONS)
    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_ten_thousand_tokens_are_generated_in_bounded_memory(adapted):
    model, tokenizer = adapted
    budget, every, count = 128, 128, 10_000
    cache = LookaheadCache(budget, refresh_every=every)
    ids = tokenizer("A history of the harbour, from its first lighthouse on:", return_tensors="pt").input_ids
    stored, sizes = [], []

    def measure(*_):
        sizes.append(cache.nbytes)
        if len(sizes) % 50 == 0:
            stored.append(cache.summary()["entries_stored"])

    handle = model.lm_head.register_forward_hook(measure)
    torch.manual_seed(0)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, min_new_tokens=count, max_new_tokens=count,
        do_sample=True,
    )  # fmt: skip
    handle.remove()
    assert output.shape[1] == ids.shape[1] + count
    assert cache.get_seq_length() == ids.shape[1] + count - 1
    assert max(stored) <= budget + 2 * every
    assert len(sizes) >= count and max(sizes[500:]) <= max(sizes[:500]), "memory does not grow"
