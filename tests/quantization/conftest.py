"""Tiny random models and a tiny tokenizer, made on the spot."""

import copy

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def tokenizer():
    words = {f"w{i}": i + 2 for i in range(126)}
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, **words}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")


@pytest.fixture
def beginning(tokenizer):
    """The tokenizer, with a begin-of-text token that it adds itself."""
    beginning = copy.deepcopy(tokenizer)
    beginning.add_special_tokens({"bos_token": "w0"})
    number = beginning.bos_token_id
    beginning._tokenizer.post_processor = TemplateProcessing(single="w0 $A", special_tokens=[("w0", number)])
    return beginning


@pytest.fixture(scope="session")
def texts():
    generator = torch.Generator().manual_seed(1)
    numbers = torch.randint(0, 126, (40, 60), generator=generator).tolist()
    return [" ".join(f"w{n}" for n in row) for row in numbers]


@pytest.fixture
def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        attention_bias=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=128, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()
