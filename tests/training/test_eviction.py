import threading

import pytest
import torch
from models import left_padded, prompt_ids, tiny_model
from peft import get_peft_model
from torch.nn import functional as F

from lkq_hf import LookaheadKVConfig
from lkq_hf.cache.prepare import get_decoder
from lkq_hf.training.eviction import eviction_gates, response_divergence, response_logits
from lkq_hf.training.importance import PromptCache, lookahead_importance, mean_over_query_heads
from lkq_hf.training.soft_allocation import soft_top_k


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


def test_a_budget_beyond_the_length_leaves_all_open():
    gates = soft_top_k(
        torch.randn(1, 10, generator=torch.Generator().manual_seed(5)), budget=100, temperature=0.3
    ).exp()
    assert gates.min() > 0.99


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


def test_gradients_are_those_of_a_threshold_that_keeps_the_sum():
    scores = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    temperature, step = 0.4, 1e-5
    start = torch.special.logit(soft_top_k(scores, 4, temperature).exp()).detach()

    def with_moved_threshold(change):
        low, high = torch.tensor(-1.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
        for _ in range(60):
            middle = (low + high) / 2
            too_many = torch.sigmoid(start + (change - middle) / temperature).sum() > torch.sigmoid(start).sum()
            low, high = (middle, high) if too_many else (low, middle)
        return F.logsigmoid(start + (change - middle) / temperature)

    jacobian = torch.autograd.functional.jacobian(lambda x: soft_top_k(x, 4, temperature), scores)
    for entry, change in enumerate(step * torch.eye(12, dtype=torch.float64)):
        expected = (with_moved_threshold(change) - with_moved_threshold(-change)) / (2 * step)
        assert jacobian[:, entry] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("row_power", [1.0, 2.0])
def test_gates_are_of_the_logarithm_of_the_power_mean_over_query_heads(row_power):
    scores = torch.rand(2, 4, 30, requires_grad=True)
    mean = (scores.pow(row_power)[:, 0::2] + scores.pow(row_power)[:, 1::2]) / 2
    expected = soft_top_k(mean.log() / row_power, 6, 0.3)
    found = eviction_gates({5: scores}, {5: 2}, 6, 0.3, row_power, "uniform")[5]
    assert found.detach() == pytest.approx(expected.detach(), abs=1e-6)
    weight = torch.randn(found.shape)
    wanted, gradient = (torch.autograd.grad((gates * weight).sum(), scores)[0] for gates in (expected, found))
    assert gradient == pytest.approx(wanted, abs=1e-4)


def test_gates_choose_by_the_mean_over_query_heads():
    scores = {0: torch.rand(2, 4, 30), 3: torch.rand(2, 4, 30)}
    gates = eviction_gates(scores, {0: 2, 3: 2}, budget=6, temperature=1e-3, allocation="uniform")
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
    gates = eviction_gates(scores, {layer: prompt.kv_heads(layer) for layer in scores}, 4, 0.3, row_power)
    response = prompt_ids(2, 5, seed=3)
    full = response_logits(model, decoder, prompt, response).detach()
    response_divergence(full, response_logits(model, decoder, prompt, response, gates=gates)).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_divergence_is_the_mean_over_responses_of_the_mean_over_tokens():
    generator = torch.Generator().manual_seed(4)
    full, evicted = (torch.randn(2, 3, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    mask = torch.tensor([[True, True, True], [True, False, False]])
    p, q = full.softmax(-1), evicted.softmax(-1)
    each = (p * (p / q).log()).sum(-1)
    assert response_divergence(full, evicted, mask) == pytest.approx((each[0].mean() + each[1, 0]) / 2)
    assert response_divergence(full, evicted) == pytest.approx(each.mean())
    assert torch.autograd.gradcheck(lambda x: response_divergence(full, x, mask), evicted.requires_grad_())


def test_no_attention_has_gradients_for_its_bias_alone(monkeypatch):
    # CUDA's memory-efficient attention cannot do that; see _embeddings_with_gradients.
    model = tiny_model().requires_grad_(False)
    model.set_attn_implementation("sdpa")
    decoder = get_decoder(model)
    prompt = PromptCache(decoder, prompt_ids(1, 12, seed=1))
    layers, kv_heads = decoder.config.num_hidden_layers, decoder.config.num_key_value_heads
    gates = {layer: torch.zeros(1, kv_heads, 12, requires_grad=True) for layer in range(layers)}
    attend, seen = F.scaled_dot_product_attention, []

    def record(query, key, value, attn_mask=None, **options):
        seen.append((attn_mask.requires_grad, query.requires_grad))
        return attend(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    logits = response_logits(model, decoder, prompt, prompt_ids(1, 5, seed=2), gates=gates)
    assert seen == [(True, True)] * layers
    logits.logsumexp(-1).sum().backward()
    assert all(gate.grad.any() for gate in gates.values())
    embedding = decoder.get_input_embeddings()
    assert not embedding._forward_hooks
    assert not embedding(torch.tensor([1])).requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("count", [5, 32])
def test_gradients_through_the_gates_on_a_gpu(count):
    model = tiny_model().requires_grad_(False)
    layers, kv_heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    gate = torch.rand(2, kv_heads, 24, generator=torch.Generator().manual_seed(0)).log()
    gradients = []
    for attention, dtype in (("eager", torch.float32), ("sdpa", torch.bfloat16)):
        model = model.to("cuda", dtype)
        model.set_attn_implementation(attention)
        decoder = get_decoder(model)
        ids, response = prompt_ids(2, 24, seed=1).cuda(), prompt_ids(2, count, seed=2).cuda()
        gates = {layer: gate.cuda().requires_grad_() for layer in range(layers)}
        prompt = PromptCache(decoder, ids)
        full = response_logits(model, decoder, prompt, response).detach()
        response_divergence(full, response_logits(model, decoder, prompt, response, gates=gates)).backward()
        gradients.append(torch.stack([gate.grad for gate in gates.values()]).flatten())
    assert F.cosine_similarity(*gradients, dim=0) > 0.9


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_reading_layers_again_changes_no_gradient(architecture):
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(architecture), LookaheadKVConfig(num_lookahead_tokens=4, r=2))
    decoder = get_decoder(model)
    for name, parameter in model.named_parameters():
        if "lookahead_kv_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids, mask = left_padded([prompt_ids(1, length, seed=length)[0] for length in (18, 12)])
    prompt = PromptCache(decoder, ids, mask)
    response = prompt_ids(2, 5, seed=3)
    full = response_logits(model, decoder, prompt, response).detach()

    def gradients(recompute):
        held = 0

        def hold(tensor):
            nonlocal held
            held += tensor.nbytes
            return tensor

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            tokens = decoder.lookahead.active_tokens()
            scores = lookahead_importance(model, decoder, prompt, tokens, recompute=recompute)
            gates = eviction_gates(scores, {layer: prompt.kv_heads(layer) for layer in scores}, 4, 0.3)
            evicted = response_logits(model, decoder, prompt, response, gates=gates, recompute=recompute)
        loss = response_divergence(full, evicted) + sum(layer[0].square().sum() for layer in scores.values())
        # As on a GPU, where another thread runs the backward pass, which knows nothing of this one's contexts.
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}, held

    (expected, everything), (found, little) = gradients(False), gradients(True)
    assert all(value.any() for value in expected.values())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert little < everything / 2
    assert all("forward" not in layer.__dict__ for layer in decoder.layers)
