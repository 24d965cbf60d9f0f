import pytest
import torch
from models import left_padded, prompt_ids, tiny_model
from peft import get_peft_model
from torch.nn import functional as F

from lkq_hf import LookaheadKVConfig
from lkq_hf.cache.prefill import get_decoder
from lkq_hf.training.eviction import eviction_gates, response_divergence, response_logits, soft_top_k
from lkq_hf.training.importance import PromptCache, lookahead_importance, mean_over_query_heads


def test_the_largest_scores_are_open_and_padding_is_closed():
    scores = torch.randn(3, 2, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores[1, :, :7] = -torch.inf
    gates = soft_top_k(scores, budget=9, temperature=0.3).exp()
    assert torch.equal(gates > 0.5, torch.zeros_like(gates, dtype=bool).scatter_(-1, scores.topk(9).indices, True))
    assert not gates[1, :, :7].any()
    assert gates[0].sum(-1) == pytest.approx(torch.full((2,), 9.0), rel=0.2)
    assert soft_top_k(scores, budget=9, temperature=0.01).exp()[0].sum(-1) == pytest.approx(
        torch.full((2,), 9.0), abs=0.1
    )


def test_gates_depend_on_the_order_alone():
    scores = torch.randn(2, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(soft_top_k(scores, 5, 0.3), soft_top_k(1e-3 * scores + 7, 5, 0.3))


def test_what_one_gate_gains_others_lose():
    scores = torch.randn(1, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    (total,) = torch.autograd.grad(soft_top_k(scores, 5, 0.5).exp().sum(), scores)
    assert total == pytest.approx(torch.zeros(1, 20), abs=1e-12)
    for entry in range(20):
        (found,) = torch.autograd.grad(soft_top_k(scores, 5, 0.5)[0, entry], scores)
        assert found[0, entry] > 0
        assert (found[0, torch.arange(20) != entry] < 0).all()


def test_gates_choose_by_the_mean_over_query_heads():
    scores = {0: torch.rand(2, 4, 30), 3: torch.rand(2, 4, 30)}
    gates = eviction_gates(scores, kv_heads=2, budget=6, temperature=1e-3)
    for layer, importance in scores.items():
        best = mean_over_query_heads(importance, 2).topk(6).indices
        assert gates[layer].exp().gather(-1, best).min() > 0.4
        assert gates[layer].shape == (2, 2, 30)


def test_closed_gates_hide_entries_from_the_response():
    model = tiny_model()
    decoder = get_decoder(model)
    ids, mask = left_padded([prompt_ids(1, length, seed=length)[0] for length in (18, 12)])
    response = prompt_ids(2, 5, seed=3)
    prompt = PromptCache(decoder, ids, mask)
    hidden = torch.zeros(2, 18, dtype=torch.bool)
    hidden[:, 8:11] = True
    kv_heads, layers = decoder.config.num_key_value_heads, decoder.config.num_hidden_layers
    gate = torch.zeros(2, kv_heads, 18).masked_fill((hidden | ~mask.bool())[:, None], -torch.inf)
    with torch.no_grad():
        found = response_logits(model, decoder, prompt, response, gates=dict.fromkeys(range(layers), gate))
        full = response_logits(model, decoder, prompt, response)
        seen = {**prompt.inputs(response), "input_ids": response}
        seen["attention_mask"] = F.pad((mask.bool() & ~hidden).long(), (0, 5), value=1)
        expected = model(**seen).logits
    assert found == pytest.approx(expected, abs=1e-5)
    assert (found - full).abs().max() > 1e-4
    assert response_divergence(full, found) > 0
    assert response_divergence(full, full) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("row_power", [1.0, 2.0])
def test_the_loss_reaches_every_weight_of_the_adapter(row_power):
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(), LookaheadKVConfig(num_lookahead_tokens=4, r=2, row_power=row_power))
    decoder = get_decoder(model)
    for name, parameter in model.named_parameters():
        if "lookahead_kv_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids, mask = left_padded([prompt_ids(1, length, seed=length)[0] for length in (18, 12)])
    prompt = PromptCache(decoder, ids, mask)
    scores = lookahead_importance(model, decoder, prompt, decoder.lookahead.active_tokens(), row_power)
    gates = eviction_gates(scores, decoder.config.num_key_value_heads, 4, 0.3, row_power)
    response = prompt_ids(2, 5, seed=3)
    full = response_logits(model, decoder, prompt, response).detach()
    response_divergence(full, response_logits(model, decoder, prompt, response, gates=gates)).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
