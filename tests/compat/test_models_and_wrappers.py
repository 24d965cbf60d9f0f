"""The same generation through everything that can be put around a model: attention implementations, compilation,
devices and precisions, PEFT, quantized weights, pipelines."""

import copy
import importlib.metadata
import importlib.util

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.utils import compile_regions
from models import (
    ARCHITECTURES,
    add_adapter,
    add_lookahead,
    base_and_adapted,
    compiled_by,
    full_layers,
    kept_entries,
    lookahead_model,
    prompt_ids,
    randomize_adapter,
    save_adapter,
    set_adapter,
    switch_adapters,
    tiny_model,
)
from peft import LoraConfig, PeftModel, get_peft_model
from reference import assert_as_masked, expected_logits, generate
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, pipeline

from lkq_hf import LookaheadCache, LookaheadKVConfig, prepare_model_for_eviction

item = pytest.mark.item
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@item("attention: eager, sdpa")
@every_architecture
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations(architecture, attention):
    base, model = base_and_adapted(architecture)
    model.set_attn_implementation(attention)
    ids, cache = prompt_ids(2, 40), LookaheadCache(budget=7)
    assert_as_masked(base, ids, *generate(model, ids, cache), cache)


@item("attention: flex_attention")
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_flex_attention(architecture, reset_compiler):
    base, model = base_and_adapted(architecture)
    model.set_attn_implementation("flex_attention")
    ids, cache = prompt_ids(2, 40), LookaheadCache(budget=7)
    # The same function without the C++ compiler that it needs on a CPU.
    with torch.compiler.set_stance("force_eager"):
        assert_as_masked(base, ids, *generate(model, ids, cache), cache)


@item("torch.compile of the model, or of its layers (accelerate's compile_regions)")
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("compiled_parts", [torch.compile, compile_regions])
def test_a_compiled_model(architecture, compiled_parts, reset_compiler):
    base, model = base_and_adapted(architecture)
    ids, cache, uncompiled = prompt_ids(2, 40), LookaheadCache(budget=7), LookaheadCache(budget=7)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=uncompiled)
        compiled = compiled_parts(model, backend="eager")
        compiled(input_ids=ids, past_key_values=cache)
    stages, expected = [kept_entries(cache)], kept_entries(uncompiled)
    assert expected.keys() == set(full_layers(base))
    for layer, kept in expected.items():
        assert torch.equal(stages[0][layer], kept)
    follow_up = torch.cat([ids, prompt_ids(2, 4, seed=3)], dim=1)
    tokens, logits = generate(compiled, follow_up, cache)
    stages.append(kept_entries(cache))
    assert_as_masked(base, follow_up, tokens, logits, stages)


@item("static decode: LookaheadCache(max_new_tokens=...), compiled by generate")
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_static_decode(architecture, reset_compiler):
    base, model = base_and_adapted(architecture)
    model.set_attn_implementation("sdpa")
    ids, cache = prompt_ids(2, 40), LookaheadCache(budget=7, max_new_tokens=8)
    assert_as_masked(base, ids, *generate(model, ids, cache, **compiled_by("eager")), cache)


@item("static decode: LookaheadCache(max_new_tokens=...), compiled by generate")
@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"num_beams": 3}], ids=lambda o: next(iter(o)))
def test_static_storage_in_other_modes(options):
    model, ids = lookahead_model(attention="sdpa"), prompt_ids(1, 20).repeat(1, 2)
    found, expected = (
        model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, **options)
        for cache in (LookaheadCache(7, max_new_tokens=8), LookaheadCache(7))
    )
    assert torch.equal(found, expected)


@item("train mode, gradients through the prompt")
@every_architecture
def test_train_mode(architecture):
    base, model = base_and_adapted(architecture)
    ids, cache = prompt_ids(1, 40), LookaheadCache(budget=7)
    model.train()
    model.get_input_embeddings().weight.requires_grad_(True)
    model(ids, past_key_values=cache).logits.square().mean().backward()
    expected = base.get_input_embeddings().weight.requires_grad_(True)
    base(ids).logits.square().mean().backward()
    torch.testing.assert_close(model.get_input_embeddings().weight.grad, expected.grad, atol=1e-4, rtol=1e-3)


@item("gradient checkpointing in train mode", refused="model.eval() or model.gradient_checkpointing_disable()")
@every_architecture
def test_gradient_checkpointing(architecture):
    base, model = base_and_adapted(architecture)
    model.gradient_checkpointing_enable()
    calls = []
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.train()
    with pytest.raises(ValueError, match=r"model\.eval\(\) or model\.gradient_checkpointing_disable\(\)"):
        generate(model, prompt_ids(1, 40), LookaheadCache(budget=7))
    handle.remove()
    assert not calls
    model.eval()
    ids, cache = prompt_ids(1, 40), LookaheadCache(budget=7)
    assert_as_masked(base, ids, *generate(model, ids, cache), cache)


@item("CPU and disk offload of the weights (accelerate, device_map)")
@pytest.mark.parametrize("adapter_first", [True, False])
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_offloaded_weights(kind, adapter_first, tmp_path):
    base = tiny_model()
    model = copy.deepcopy(base)

    def offload():
        if kind == "cpu":
            cpu_offload(model, execution_device="cpu")
        else:
            disk_offload(model, str(tmp_path), execution_device="cpu")

    if adapter_first:
        add_lookahead(model)
        offload()
    else:
        # What was prepared later wraps accelerate's own forward.
        offload()
        prepare_model_for_eviction(model)
    ids, cache = prompt_ids(1, 40), LookaheadCache(7, scorer="lookahead" if adapter_first else "snapkv")
    assert next(model.model.layers[0].parameters()).device.type == "meta"
    assert_as_masked(base, ids, *generate(model, ids, cache), cache)


@item("CPU and disk offload of the weights (accelerate, device_map)")
def test_an_adapter_after_offloading(tmp_path):
    base, model = base_and_adapted()
    base.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{index}": "disk" if index == 1 else "cpu" for index in range(3)}
    spread = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=device_map, offload_folder=str(tmp_path / "offload")
    )
    with pytest.raises(NotImplementedError, match="is offloaded to main memory or disk"):
        spread.load_adapter(str(tmp_path / "adapter"))


@item("device_map over several GPUs")
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_two_gpus(tmp_path):
    base, model = base_and_adapted()
    base.save_pretrained(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    device_map = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    device_map |= {f"model.layers.{index}": index // 2 for index in range(3)}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=device_map)
    spread.load_adapter(str(tmp_path / "adapter"))
    ids, cache = prompt_ids(2, 40).cuda(), LookaheadCache(budget=7)
    tokens, logits = generate(spread, ids, cache)
    assert {layer.keys.device.index for layer in cache.layers} == {0, 1}
    kept = {layer: entries.cpu() for layer, entries in kept_entries(cache).items()}
    expected = expected_logits(base, ids.cpu(), tokens.cpu(), [kept])
    torch.testing.assert_close(logits.cpu(), expected, atol=1e-3, rtol=1e-3)


@item("half precisions: bfloat16, float16, autocast")
@every_architecture
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precisions(architecture, dtype):
    base, model = base_and_adapted(architecture)
    base, model = base.to(dtype), model.to(dtype)
    ids, cache = prompt_ids(2, 40), LookaheadCache(budget=7)
    tokens, logits = generate(model, ids, cache)
    assert cache.layers[-1].keys.dtype == cache.layers[-1].prefix.pool.keys.dtype == dtype
    assert cache.summary()["entries_stored"] == 7 + 7
    expected = expected_logits(base, ids, tokens, cache)
    error = (logits.float() - expected.float()).norm() / expected.float().norm()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


@item("half precisions: bfloat16, float16, autocast")
def test_autocast():
    base, model = base_and_adapted()
    ids, cache = prompt_ids(2, 40), LookaheadCache(budget=7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens, logits = generate(model, ids, cache)
        expected = expected_logits(base, ids, tokens, cache)
    assert (logits.float() - expected.float()).norm() / expected.float().norm() < 0.05


@item("PeftModel")
@every_architecture
def test_peft_model(architecture):
    base = tiny_model(architecture)
    model = get_peft_model(copy.deepcopy(base), LookaheadKVConfig(num_lookahead_tokens=5, r=4)).eval()
    randomize_adapter(model)
    ids, cache = prompt_ids(2, 40), LookaheadCache(budget=7)
    assert_as_masked(base, ids, *generate(model, ids, cache), cache)
    cache = LookaheadCache(budget=7, park="cpu")
    tokens, logits = generate(model, ids, cache, prefill_chunk_size=8)
    assert_as_masked(base, ids, tokens, logits, cache)


def lora(seed):
    torch.manual_seed(seed)
    return LoraConfig(r=3, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)


def merged(base, *seeds):
    """The base with ordinary LoRAs in its weights."""
    model = copy.deepcopy(base)
    for seed in seeds:
        model = get_peft_model(model, lora(seed)).merge_and_unload()
    return model


@item("ordinary LoRA adapters beside the lookahead adapter: one, several, swapped while in use")
def test_loras_beside_and_swapped():
    base = tiny_model()
    model = copy.deepcopy(base)
    for name, seed in (("one", 11), ("two", 12)):
        add_adapter(model, lora(seed), name)
    add_lookahead(model, "lookahead")
    model.eval()
    ids = prompt_ids(2, 40)
    for active, seeds in ((["one"], (11,)), (["two"], (12,)), (["one", "two"], (11, 12)), ([], ())):
        set_adapter(model, [*active, "lookahead"])
        cache = LookaheadCache(budget=7)
        tokens, logits = generate(model, ids, cache)
        assert_as_masked(merged(base, *seeds), ids, tokens, logits, cache, tolerance=1e-3)


@item("ordinary LoRA adapters beside the lookahead adapter: one, several, swapped while in use")
def test_a_lora_of_a_question_over_a_document_read_without_it():
    base, ids = tiny_model(), prompt_ids(1, 40)
    model = copy.deepcopy(base)
    add_adapter(model, lora(11), "style")
    add_lookahead(model, "lookahead")
    set_adapter(model, "lookahead")
    cache = LookaheadCache(budget=7)
    with torch.no_grad():
        model.eval()(ids, past_key_values=cache)
    stages, whole = [kept_entries(cache)], DynamicCache(config=base.config)
    with torch.no_grad():
        base(ids, past_key_values=whole)
    set_adapter(model, ["style", "lookahead"])
    tokens, _ = generate(model, torch.cat([ids, prompt_ids(1, 5, seed=4)], dim=1), cache)
    assert tokens.shape == (1, 8)
    stages.append(kept_entries(cache))
    for index, layer in enumerate(cache.layers):
        keys, _, positions, stored = layer.prefix.padded()
        of_the_document = stored & (positions < 40)
        kept = stages[1][index][..., :40]
        assert of_the_document.any() and not (kept & ~stages[0][index]).any()
        found = keys[of_the_document]
        torch.testing.assert_close(found, whole.layers[index].keys[kept], atol=1e-4, rtol=1e-4)


@item("ordinary LoRA adapters beside the lookahead adapter: one, several, swapped while in use")
def test_a_question_without_the_lookahead_adapter_is_kept_whole():
    base, ids = tiny_model(), prompt_ids(1, 40)
    model = copy.deepcopy(base)
    add_adapter(model, lora(11), "style")
    add_lookahead(model, "lookahead")
    question = torch.cat([ids, prompt_ids(1, 5, seed=4)], dim=1)
    for evict_later_turns in (True, False):
        set_adapter(model, "lookahead")
        cache = LookaheadCache(budget=7, evict_later_turns=evict_later_turns)
        with torch.no_grad():
            model.eval()(ids, past_key_values=cache)
        set_adapter(model, ["style"])
        if evict_later_turns:
            with pytest.warns(UserWarning, match=r"kept whole.*needs an active LOOKAHEAD_KV adapter.*set_adapter"):
                answer = generate(model, question, cache)[0]
        else:
            answer = generate(model, question, cache)[0]
        assert answer.shape == (1, 8)
        assert cache.summary()["entries_stored"] == 7 + 5 + 7


@item("hot-swapping of lookahead adapters")
def test_lookahead_adapters_are_swapped(tmp_path):
    base = tiny_model()
    ids, kept = prompt_ids(1, 40), {}
    for seed in (1, 2):
        model = add_lookahead(copy.deepcopy(base), seed=seed)
        randomize_adapter(model, seed=seed)
        save_adapter(model, tmp_path / str(seed))
        cache = LookaheadCache(budget=7)
        assert_as_masked(base, ids, *generate(model, ids, cache), cache)
        kept[seed] = torch.stack(list(kept_entries(cache).values()))
    assert not torch.equal(kept[1], kept[2])
    model = copy.deepcopy(base)
    for seed in (1, 2):
        model.load_adapter(str(tmp_path / str(seed)), adapter_name=f"adapter{seed}")
    for seed in (2, 1, 2):
        set_adapter(model, f"adapter{seed}")
        cache = LookaheadCache(budget=7)
        generate(model, ids, cache)
        assert torch.equal(torch.stack(list(kept_entries(cache).values())), kept[seed])
    peft_model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "1")
    peft_model.load_adapter(tmp_path / "2", adapter_name="second")
    peft_model.set_adapter("second")
    cache = LookaheadCache(budget=7)
    generate(peft_model, ids, cache)
    assert torch.equal(torch.stack(list(kept_entries(cache).values())), kept[2])


@item("disable_adapters", refused="enable_adapters(), or a scorer that needs no adapter")
def test_disabled_adapters():
    base, model = base_and_adapted()
    ids = prompt_ids(1, 40)
    switch_adapters(model, False)
    with pytest.raises(ValueError, match=r"enable_adapters\(\).*snapkv"):
        generate(model, ids, LookaheadCache(budget=7))
    cache = LookaheadCache(budget=7, scorer="snapkv")
    assert_as_masked(base, ids, *generate(model, ids, cache), cache)
    switch_adapters(model, True)
    cache = LookaheadCache(budget=7)
    assert_as_masked(base, ids, *generate(model, ids, cache), cache)


def assert_runs_on(load, tolerance=1e-3):
    """``load()`` gives the same quantized model each time."""
    base, model = load().eval(), load().eval()
    for one in (base, model):
        one.generation_config.eos_token_id = None
    add_lookahead(model)
    ids, cache = prompt_ids(2, 40, vocabulary=128), LookaheadCache(budget=7)
    assert_as_masked(base, ids, *generate(model, ids, cache), cache, tolerance=tolerance)
    return model


def word_tokenizer():
    words = {f"w{index}": index for index in range(3, 160)}
    core = Tokenizer(tokenizer_models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **words}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left",
        chat_template="{% for m in messages %}{{ '<s> ' + m['content'] + ' ' }}{% endfor %}",
    )  # fmt: skip


@item("bases quantized by lkq-hf (two_stage_gptq)")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_our_own_quantized_bases(bits, tmp_path):
    from lkq_hf import TwoStageGPTQConfig

    tiny_model().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    texts = [" ".join(f"w{n}" for n in torch.randint(3, 160, (50,), generator=generator).tolist()) for _ in range(8)]
    config = TwoStageGPTQConfig(bits=bits, group_size=32, dataset=texts, num_samples=4, model_seqlen=32)
    AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config).save_pretrained(
        tmp_path / "quantized"
    )

    def load():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", attn_implementation="eager")

    model = assert_runs_on(load)
    assert model.model.layers[0].mlp.up_proj.base_layer.__class__.__name__ == "QuantizedLinear"


def require(package, record_property):
    """Skips the test without the package, and says in the table with which version of it, and where, it ran."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    record_property("with", f"{package} {importlib.metadata.version(package)}, on the CPU")


@item("bases quantized by torchao")
def test_torchao_bases(record_property):
    require("torchao", record_property)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def load():
        model = tiny_model()
        quantize_(model, Int8WeightOnlyConfig())
        return model

    assert_runs_on(load, tolerance=1e-2)


@item("bases quantized by bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_bases(bits, tmp_path, record_property):
    require("bitsandbytes", record_property)
    from transformers import BitsAndBytesConfig

    tiny_model(intermediate_size=128).save_pretrained(tmp_path)  # of whole blocks of 64 weights
    # Without outliers, which are chosen over all tokens of a forward: each token is then quantized by itself.
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, llm_int8_threshold=0.0)

    def load():
        return AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, attn_implementation="eager", dtype=torch.float32
        )

    assert_runs_on(load, tolerance=5e-2)


@item("bases quantized by GPTQModel")
def test_gptqmodel_bases(tmp_path):
    pytest.importorskip("gptqmodel", reason="GPTQModel is not installed")
    from transformers import GPTQConfig

    tiny_model().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    config = GPTQConfig(bits=4, group_size=32, dataset=["w3 w4 w5 w6 " * 20], tokenizer=str(tmp_path))
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).save_pretrained(tmp_path / "gptq")
    assert_runs_on(
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "gptq", attn_implementation="eager"), tolerance=1e-2
    )


@item('pipeline("text-generation")')
@every_architecture
def test_a_pipeline(architecture):
    _, model = base_and_adapted(architecture)
    tokenizer = word_tokenizer()
    text = tokenizer.decode(prompt_ids(1, 40)[0])
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    cache = LookaheadCache(budget=7)
    output = pipe(text, past_key_values=cache, max_new_tokens=6, do_sample=False, return_full_text=False)
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**inputs, past_key_values=LookaheadCache(budget=7), max_new_tokens=6, do_sample=False)
    assert kept_entries(cache)
    assert output[0]["generated_text"].split() == tokenizer.decode(expected[0, -6:], skip_special_tokens=True).split()


@item("chat templates")
def test_a_chat():
    base, model = base_and_adapted()
    tokenizer = word_tokenizer()
    messages = [{"role": "user", "content": tokenizer.decode(prompt_ids(1, 40)[0])}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    cache = LookaheadCache(budget=7)
    tokens, logits = generate(model, inputs["input_ids"], cache)
    assert inputs["input_ids"][0, 0] == tokenizer.bos_token_id
    assert_as_masked(base, inputs["input_ids"], tokens, logits, cache)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    output = pipe(messages, past_key_values=LookaheadCache(budget=7), max_new_tokens=8, do_sample=False)
    assert (
        output[0]["generated_text"][-1]["content"].split()
        == tokenizer.decode(tokens[0], skip_special_tokens=True).split()
    )
