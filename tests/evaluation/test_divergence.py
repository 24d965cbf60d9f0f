import math

import pytest
import torch
from models import tiny_gemma3_with_pictures, tiny_model
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from lkq_hf.evaluation import divergence
from lkq_hf.evaluation.divergence import token_statistics
from lkq_hf.evaluation.journal import Journal
from lkq_hf.evaluation.perplexity import evaluate_perplexity

VOCABULARY = 97


def llama(seed=0, vocabulary=VOCABULARY):
    return tiny_model(vocab_size=vocabulary, seed=seed)


def gemma2():
    # Its logits are squashed after the head.
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, initializer_range=0.5,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=VOCABULARY)).eval()


@pytest.fixture
def windows():
    return torch.randint(0, VOCABULARY, (3, 23), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("make", [llama, gemma2, gpt2])
@pytest.mark.parametrize("positions", [1, 5, 100])
@torch.no_grad()
def test_statistics_are_those_of_whole_logits(windows, make, positions, monkeypatch):
    torch.manual_seed(1)
    model, reference = make(), make()
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    monkeypatch.setattr(divergence, "LOGITS", positions * VOCABULARY * len(windows))
    found = token_statistics(model, windows, reference)
    q, p = (each(windows).logits[:, :-1].log_softmax(-1) for each in (model, reference))
    kl = (p.exp() * (p - q)).sum(-1)
    assert kl.min() > 1e-5
    torch.testing.assert_close(torch.tensor(found["kl"]), kl, rtol=1e-3, atol=1e-6)
    nll = F.cross_entropy(q.transpose(1, 2), windows[:, 1:], reduction="none")
    torch.testing.assert_close(torch.tensor(found["nll"]), nll, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.tensor(found["same_top"]), (p.argmax(-1) == q.argmax(-1)).float())
    assert "forward" not in vars(model.base_model) and "forward" not in vars(reference.base_model)


def test_a_language_model_inside_of_a_multimodal_one():
    model = tiny_gemma3_with_pictures()
    windows = torch.randint(4, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(windows).logits[:, :-1]
    nll = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    torch.testing.assert_close(torch.tensor(token_statistics(model, windows)["nll"]), nll, rtol=1e-5, atol=1e-5)


def test_no_more_logits_exist_than_are_asked_for(windows, monkeypatch):
    model = llama()
    monkeypatch.setattr(divergence, "LOGITS", 4 * VOCABULARY * len(windows))
    sizes = []
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[1]))
    token_statistics(model, windows)
    assert sizes == [1, 4, 4, 4, 4, 4, 2]


def test_a_model_does_not_differ_from_itself(windows):
    model = llama()
    found = token_statistics(model, windows, model)
    assert torch.tensor(found["kl"]).abs().max() < 1e-6 and torch.tensor(found["same_top"]).min() == 1


def test_other_vocabularies_are_refused(windows):
    with pytest.raises(ValueError, match="vocabulary of 97 tokens, found one of 101"):
        token_statistics(llama(), windows, llama(vocabulary=101))


def test_a_row_summarizes_all_tokens(windows, tmp_path):
    model, reference = llama(), llama(seed=1)
    journal = Journal(tmp_path, {"any": "arguments"})
    (row,) = evaluate_perplexity(model, windows, journal, 2, reference)["rows"]
    parts = token_statistics(model, windows, reference)
    kl = torch.tensor(parts["kl"], dtype=torch.float64).flatten()
    assert row["tokens"] == kl.numel() == 66
    assert row["kl"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert row["kl_p99"] == pytest.approx(kl.quantile(0.99).item(), rel=1e-5) and row["kl_p99"] > row["kl"]
    assert row["same_top"] == pytest.approx(torch.tensor(parts["same_top"]).mean().item())
    assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
