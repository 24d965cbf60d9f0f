import copy
import pickle

import pytest
import torch
from models import (
    ARCHITECTURES,
    add_adapter,
    add_lookahead,
    base_and_adapted,
    delete_adapter,
    kept_entries,
    lookahead_attention,
    lookahead_model,
    prompt_ids,
    randomize_adapter,
    scores_of,
    set_adapter,
    switch_adapters,
    tiny_config,
    tiny_model,
    top_entries,
)
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from lkq_hf import LookaheadCache, LookaheadKVConfig, LookaheadKVModel
from lkq_hf.adapter import LookaheadKVLinear
from lkq_hf.adapter.model import adapter_parameters
from lkq_hf.attention import lookahead_positions

CONFIG = {"num_lookahead_tokens": 5, "r": 4}

LLAMA_3_1_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip
LLAMA_3_2_1B = LlamaConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
QWEN3_8B = Qwen3Config(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128,
)  # fmt: skip


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def kept(model, ids=None, **options):
    """Which entries each layer and head keeps, bool ``[layers, batch, kv_heads, length]``."""
    cache = LookaheadCache(budget=6, **options)
    with torch.no_grad():
        model(prompt_ids(1, 40) if ids is None else ids, past_key_values=cache)
    entries = torch.stack([layer.kept() for layer in cache.layers])
    assert entries.sum() == 6 * entries[..., 0].numel(), "the budget, on average over the heads"
    return entries


@pytest.mark.parametrize(
    ("config", "millions"),
    [(LLAMA_3_1_8B, 20.6), (LLAMA_3_2_1B, 5.4), (QWEN3_8B, 21.5)],
    ids=["llama-3.1-8b", "llama-3.2-1b", "qwen3-8b"],
)
def test_parameter_counts_are_those_of_the_paper(config, millions):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        model = get_peft_model(model, LookaheadKVConfig())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert round(trainable / 1e6, 1) == millions
    assert trainable == sum(p.numel() for p in adapter_parameters(model, "default").values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_linear_of_the_layers_and_of_the_last_one_only_queries_and_keys(architecture):
    model = lookahead_model(architecture)
    wrapped = {name for name, module in model.named_modules() if isinstance(module, LookaheadKVLinear)}
    linear = {
        name.removesuffix(".base_layer")
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }
    names = {"qkv_proj"} if architecture == "phi3" else {"q_proj", "k_proj"}
    last = {name for name in linear if ".layers.2." in name and name.rpartition(".")[2] in names}
    assert wrapped == {name for name in linear if ".layers.2." not in name} | last
    assert last


def test_modules_can_be_chosen():
    def names(**config):
        model = tiny_model()
        add_adapter(model, LookaheadKVConfig(**CONFIG, **config))
        return [name for name, module in model.named_modules() if isinstance(module, LookaheadKVLinear)]

    assert len(names(last_layer_modules="all")) == 3 * 7
    assert len(names(target_modules=["q_proj", "up_proj"])) == 2 * 2 + 1
    assert len(names(target_modules=["q_proj", "up_proj"], last_layer_modules=["up_proj"])) == 2 * 2 + 1
    assert names(target_modules=[]) == []


def test_tokens_without_a_lora_still_choose():
    base = tiny_model()
    model = tiny_model()
    add_adapter(model, LookaheadKVConfig(**CONFIG, target_modules=[]))
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lookahead_kv_" not in n)
    assert kept(model).shape == (3, 1, 2, 40)
    assert torch.equal(logits(model, prompt_ids(1, 20)), logits(base, prompt_ids(1, 20)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_a_lookahead_cache_the_outputs_are_the_bases_bit_for_bit(architecture):
    base, adapted = base_and_adapted(architecture)
    # An adapter freezes its base, and torch multiplies by frozen weights in another order.
    base.requires_grad_(False)
    ids = prompt_ids(2, 30)
    assert torch.equal(logits(adapted, ids), logits(base, ids))
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    one, other = adapted.generate(ids, **options), base.generate(ids, **options)
    assert all(torch.equal(a, b) for a, b in zip(one.logits, other.logits, strict=True))


def test_the_lora_acts_on_the_last_positions_only():
    model = lookahead_model()
    linear = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = linear(x)
        with lookahead_positions(4, x.shape[:2]):
            changed = linear(x)
    expected = plain.clone()
    down, up = linear.lookahead_kv_A["default"], linear.lookahead_kv_B["default"]
    expected[:, -4:] += 32 / 4 * (x[:, -4:] @ down.T @ up.T).detach()
    assert torch.equal(changed[:, :-4], plain[:, :-4])
    torch.testing.assert_close(changed, expected)
    assert not torch.allclose(changed[:, -4:], plain[:, -4:], atol=1e-3)
    with lookahead_positions(4, x.shape[:2]):
        torch.testing.assert_close(linear(x), expected)  # with gradients, another path


def test_the_lora_knows_the_positions_of_tokens_in_one_list():
    linear = lookahead_model().model.layers[0].mlp.up_proj
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    with lookahead_positions(4, (2, 9)):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                torch.testing.assert_close(linear(x.flatten(0, 1)), linear(x).flatten(0, 1))
        with pytest.raises(NotImplementedError, match=r"7 of 18 tokens.*target_modules"):
            linear(x.flatten(0, 1)[:7])


def test_a_fresh_lora_changes_nothing_and_only_the_adapter_is_trainable():
    model = get_peft_model(tiny_model(), LookaheadKVConfig(**CONFIG))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_parameters(model, "default"))
    assert all((p == 0).all() for name, p in adapter_parameters(model, "default").items() if "kv_B" in name)


def test_half_precision_bases_take_adapters_in_float32():
    model = tiny_model().to(torch.bfloat16)
    add_lookahead(model)
    assert kept(model).shape == (3, 1, 2, 40)
    assert logits(model, prompt_ids(1, 5)).dtype == torch.bfloat16


def test_several_adapters_and_which_one_is_active():
    model = lookahead_model()
    first = kept(model)
    add_lookahead(model, "other", seed=11, num_lookahead_tokens=7, r=2)
    set_adapter(model, "other")
    second = kept(model)
    assert not torch.equal(first, second)
    set_adapter(model, "default")
    assert torch.equal(kept(model), first)
    set_adapter(model, ["default", "other"])
    with pytest.raises(ValueError, match=r"only one LOOKAHEAD_KV adapter can be active.*default, other"):
        kept(model)


def test_disabled_adapters_are_refused_and_come_back():
    model = lookahead_model()
    before = kept(model)
    switch_adapters(model, False)
    with pytest.raises(ValueError, match="enable_adapters"):
        kept(model)
    assert kept(model, scorer="snapkv").shape == before.shape
    switch_adapters(model, True)
    assert torch.equal(kept(model), before)


def test_disabling_in_a_context():
    peft_model = get_peft_model(tiny_model(), LookaheadKVConfig(**CONFIG))
    before = kept(peft_model)
    with peft_model.disable_adapter(), pytest.raises(ValueError, match="switched off"):
        kept(peft_model)
    assert torch.equal(kept(peft_model), before)


def test_a_deleted_adapter_is_gone():
    model = lookahead_model()
    first = kept(model)
    add_lookahead(model, "other", seed=11)
    delete_adapter(model, "other")
    assert not any("other" in name for name, _ in model.named_parameters())
    set_adapter(model, "default")
    assert torch.equal(kept(model), first)
    delete_adapter(model, "default")
    assert not adapter_parameters(model, "default")
    with pytest.raises(ValueError, match="adapter"):
        kept(model)


def test_unload_gives_the_base_back():
    base = tiny_model()
    peft_model = get_peft_model(copy.deepcopy(base), LookaheadKVConfig(**CONFIG))
    found = peft_model.unload()
    assert found.state_dict().keys() == base.state_dict().keys()
    assert [type(m) for m in found.modules()] == [type(m) for m in base.modules()]
    assert torch.equal(logits(found, prompt_ids(1, 20)), logits(base, prompt_ids(1, 20)))
    with pytest.raises(ValueError, match="LOOKAHEAD_KV adapter"):
        kept(found)


def test_merging_is_refused():
    peft_model = get_peft_model(tiny_model(), LookaheadKVConfig(**CONFIG))
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        peft_model.merge_and_unload()
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        peft_model.merge_adapter()


LORA = LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False)


def state(model, name):
    return {key: value.clone() for key, value in get_peft_model_state_dict(model, adapter_name=name).items()}


@pytest.mark.parametrize("lora_first", [True, False])
def test_beside_an_ordinary_lora(lora_first):
    def with_lora(model):
        torch.manual_seed(5)
        add_adapter(model, LORA, "style")
        return model

    alone_lora, alone_lookahead = with_lora(tiny_model()), add_lookahead(tiny_model(), "lookahead")
    both = tiny_model()
    if lora_first:
        add_lookahead(with_lora(both), "lookahead")
    else:
        with_lora(add_lookahead(both, "lookahead"))
    set_adapter(both, ["style", "lookahead"])
    ids = prompt_ids(1, 40)
    torch.testing.assert_close(logits(both, ids), logits(alone_lora, ids))
    assert not torch.allclose(logits(both, ids), logits(alone_lookahead, ids), atol=1e-2)
    assert kept(both).shape == (3, 1, 2, 40)
    for name, alone in (("style", alone_lora), ("lookahead", alone_lookahead)):
        if lora_first and name == "style":
            continue  # PEFT names what a LoRA inside another tuner saves after its place in there.
        found, expected = state(both, name), state(alone, name)
        assert found.keys() == expected.keys()
        assert all(found[key].shape == expected[key].shape for key in expected)
    # The LoRA's own forward takes part in what the lookahead tokens see.
    merged = copy.deepcopy(alone_lora)
    for module in merged.modules():
        if hasattr(module, "get_delta_weight"):
            module.get_base_layer().weight.data += module.get_delta_weight("style")
    switch_adapters(merged, False)
    plain = tiny_model()
    plain.load_state_dict(
        {key.replace(".base_layer", ""): value for key, value in merged.state_dict().items() if "lora_" not in key}
    )
    add_lookahead(plain, "lookahead")
    with torch.no_grad():
        for key, value in adapter_parameters(both, "lookahead").items():
            adapter_parameters(plain, "lookahead")[key.replace(".base_layer", "")].copy_(value)
    assert torch.equal(kept(both), kept(plain))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_size": 32}, "hidden_size is 32 and should be 64"),
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2"),
    ],
)
def test_an_adapter_for_another_base_is_refused(change, said):
    config = copy.deepcopy(lookahead_model().peft_config["default"])
    model = AutoModelForCausalLM.from_config(tiny_config(**change))
    with pytest.raises(ValueError, match=f"another base model.*{said}"):
        get_peft_model(model, config)


@pytest.mark.parametrize(
    "values",
    [
        {"r": 10**9}, {"r": 0}, {"r": -1}, {"r": 2.5}, {"r": True}, {"num_lookahead_tokens": 10**9},
        {"num_lookahead_tokens": 0}, {"lora_alpha": 0}, {"lora_alpha": float("nan")}, {"pooling_kernel_size": 2},
        {"pooling": "median"}, {"neighbor_weight": 0.2},
        {"row_power": 0.5}, {"row_power": float("nan")},
        {"last_layer_modules": "none"},
    ],
)  # fmt: skip
def test_configs_out_of_range_are_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        LookaheadKVConfig(**values)


def test_unknown_config_keys_are_refused():
    with pytest.raises(TypeError, match="number_of_tokens"):
        LookaheadKVConfig(number_of_tokens=5)


def test_modules_that_are_not_linear_are_refused():
    with pytest.raises((TypeError, ValueError), match="input_layernorm"):
        get_peft_model(tiny_model(), LookaheadKVConfig(target_modules=["input_layernorm"]))


def test_what_is_no_decoder_is_refused():
    with pytest.raises(TypeError, match="decoder"):
        get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LookaheadKVConfig())


GPT2_SIZES = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 160}


def test_gpt2s_linear_modules_hold_their_weights_transposed():
    base, model = base_and_adapted("gpt2", **GPT2_SIZES)
    shapes = {key.partition(".h.0.")[2]: value.shape for key, value in adapter_parameters(model, "default").items()}
    assert shapes["attn.c_attn.lookahead_kv_A.default"] == (4, 64)
    assert shapes["attn.c_attn.lookahead_kv_B.default"] == (192, 4)
    assert any("mlp.c_proj" in key for key in shapes)
    ids = prompt_ids(2, 40)
    expected = lookahead_attention(base, model, ids)
    cache = LookaheadCache(7, allocation="uniform")
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for layer, kept in kept_entries(cache).items():
        assert torch.equal(kept, top_entries(scores_of(expected[layer], 4), 7))


class _Opaque(torch.nn.Module):
    """A linear module that does not look like one."""

    def __init__(self, linear):
        super().__init__()
        self.linear = (linear,)

    def forward(self, x):
        return self.linear[0](x)


def test_a_model_without_linear_modules():
    model = tiny_model("gpt2", **GPT2_SIZES)
    for layer in model.transformer.h:
        for part in (layer.attn, layer.mlp):
            for name in ("c_attn", "c_fc", "c_proj"):
                if hasattr(part, name):
                    setattr(part, name, _Opaque(getattr(part, name)))
    with pytest.raises(TypeError, match=r"no linear modules.*target_modules=\[\]"):
        add_adapter(model, LookaheadKVConfig())
    add_lookahead(model, target_modules=[])
    model.generate(prompt_ids(1, 30), past_key_values=LookaheadCache(budget=6), max_new_tokens=2)


def test_the_prefix_of_parameters_is_in_no_module_path():
    model = lookahead_model()
    randomize_adapter(model)
    assert all(
        LookaheadKVModel.prefix not in name.rpartition(".lookahead_kv_")[0] for name, _ in model.named_parameters()
    )


@pytest.mark.parametrize("batch", [1, 3])
def test_a_linear_infers_in_the_dtype_of_its_base_and_follows_the_adapter(batch):
    torch.manual_seed(0)
    base = torch.nn.Linear(16, 24).bfloat16()
    linear = LookaheadKVLinear(copy.deepcopy(base), "default", LookaheadKVConfig(r=4, lora_alpha=8))
    down, up = linear.lookahead_kv_A["default"], linear.lookahead_kv_B["default"]
    down.data, up.data = down.float(), up.float()  # as PEFT does when it loads or trains an adapter
    x = torch.randn(batch, 9, 16).bfloat16()

    def expected():
        result = base(x).float()
        result[:, -5:] += 2 * (x[:, -5:].float() @ down.T @ up.T)
        return result

    with torch.no_grad():
        for _ in range(3):
            up.add_(torch.randn_like(up))  # as an optimizer changes it, after the first inference too
            for _ in range(2):
                with lookahead_positions(5, x.shape[:2]):
                    found = linear(x)
                assert found.dtype == torch.bfloat16
                torch.testing.assert_close(found.float(), expected(), rtol=0.03, atol=0.03)
        up.data = torch.randn_like(up)
        with lookahead_positions(5, x.shape[:2]):
            torch.testing.assert_close(linear(x).float(), expected(), rtol=0.03, atol=0.03)
        assert torch.equal(linear(x), base(x))
        linear = pickle.loads(pickle.dumps(linear))
        down, up = linear.lookahead_kv_A["default"], linear.lookahead_kv_B["default"]
        up.data.copy_(torch.randn_like(up))  # averages of weights are often written so, which the parameter cannot see
        linear.eval()
        with lookahead_positions(5, x.shape[:2]):
            torch.testing.assert_close(linear(x).float(), expected(), rtol=0.03, atol=0.03)
        # Another adapter, in the memory and with the version of the last one.
        up.data.copy_(torch.randn_like(up))
        up = linear.lookahead_kv_B["default"] = torch.nn.Parameter(up.data)
        with lookahead_positions(5, x.shape[:2]):
            torch.testing.assert_close(linear(x).float(), expected(), rtol=0.03, atol=0.03)
    linear.delete_adapter("default")
    assert not linear._converted


def test_lookahead_tokens_alone_are_changed_as_behind_a_prompt():
    torch.manual_seed(0)
    linear = LookaheadKVLinear(torch.nn.Linear(16, 24), "default", LookaheadKVConfig(r=4, lora_alpha=8))
    down, up = linear.lookahead_kv_A["default"], linear.lookahead_kv_B["default"]
    torch.nn.init.normal_(up)
    x, weight = torch.randn(2, 9, 16), torch.randn(2, 5, 24)
    with lookahead_positions(5, x.shape[:2]):
        behind, alone = linear(x)[:, -5:], linear(x[:, -5:])
    torch.testing.assert_close(alone, behind)
    gradients = (torch.autograd.grad((found * weight).sum(), (down, up)) for found in (behind, alone))
    torch.testing.assert_close(*gradients)
