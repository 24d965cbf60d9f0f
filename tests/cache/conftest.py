import pytest


@pytest.fixture
def real_prompts():
    """The first layers of SmolLM2, ready for eviction, its tokenizer, and two prompts of over 48 tokens."""
    from real_models import load_smollm2

    from lkq_hf import prepare_model_for_eviction

    model, tokenizer = load_smollm2(num_hidden_layers=10)
    prepare_model_for_eviction(model)
    filler = "The ferry left the harbour at noon and the gulls followed it past the old lighthouse. "
    texts = [filler * 4 + "The captain said that", filler * 3 + "The lighthouse"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    return model, tokenizer, inputs.input_ids, inputs.attention_mask
