"""From a base checkpoint to a quantized one and back, through transformers and through Optimum's interface."""

import json
import os
import signal

import pytest
import torch
from children import Killed, run
from models import add_adapter
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from lkq_hf import LookaheadKVConfig
from lkq_hf.quantization import QuantizedLinear, TwoStageGPTQConfig, TwoStageQuantizer
from lkq_hf.quantization.finished_blocks import FinishedBlocks


@pytest.fixture
def base(tmp_path, tiny_llama, tokenizer):
    path = tmp_path / "base"
    tiny_llama.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def options(texts):
    return {
        "dataset": texts,
        "bits": 4,
        "group_size": 32,
        "sym": False,
        "num_samples": 6,
        "model_seqlen": 32,
        "advanced": {"batch_size": 4},
    }


@pytest.fixture
def ids():
    return torch.randint(2, 128, (2, 24), generator=torch.Generator().manual_seed(5))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_quantize_on_load_save_and_load_again(base, options, ids, tmp_path, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=TwoStageGPTQConfig(**options))
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(packed) == 2 * 7 and type(model.lm_head) is nn.Linear
    model.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(model, ids), logits(again, ids))
    difference = (logits(again, ids) - logits(tiny_llama, ids)).norm() / logits(tiny_llama, ids).norm()
    assert 0 < difference < 0.5
    assert model.is_quantized and again.hf_quantizer.is_serializable() and again.hf_quantizer.is_trainable

    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "two_stage_gptq" and stored["checkpoint_format"] == "gptq_v2"
    assert stored["meta"]["calibration"]["samples"] == 6
    assert not {"dataset", "tokenizer", "device", "resume_dir"} & set(stored)
    assert str(tmp_path) not in json.dumps(stored["meta"])
    assert {p.suffix for p in (tmp_path / "out").iterdir()} == {".json", ".safetensors"}


def test_quantizing_again_what_is_quantized_is_refused(base, options, tmp_path):
    TwoStageQuantizer.from_pretrained(base).quantize(tmp_path / "out", **options)
    config = TwoStageGPTQConfig(**{**options, "bits": 2})
    with pytest.raises(ValueError, match="quantized already, and quantization_config has calibration data"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", quantization_config=config)
    # Without data it asks for nothing, and transformers says that it is not used.
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", quantization_config=TwoStageGPTQConfig(bits=2, group_size=32)
        )
    assert model.config.quantization_config.bits == 4


def test_a_checkpoint_has_a_group_size(base, options, tmp_path):
    TwoStageQuantizer.from_pretrained(base).quantize(tmp_path / "out", **{**options, "group_size": None})
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    assert config["quantization_config"]["group_size"] == 64
    config["quantization_config"]["group_size"] = None
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="group_size must be the number that the checkpoint was written with"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # As an earlier version read it.
    assert TwoStageGPTQConfig.from_dict({"quant_method": "two_stage_gptq"}).group_size == 128


def test_models_that_initialize_layers_inside_of_others_load_again(tiny_gpt2, tokenizer, options, ids, tmp_path):
    tiny_gpt2.save_pretrained(tmp_path / "base")
    config = TwoStageGPTQConfig(**options, tokenizer=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    model.save_pretrained(tmp_path / "out")
    # Eager attention reads a mask that is in no checkpoint: GPT-2 makes it where it initializes the layers.
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    layer = again.transformer.h[0].attn.c_proj
    assert isinstance(layer, QuantizedLinear) and layer.weight is None


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("sym", [False, True])
def test_dequantize_gives_a_plain_model_with_the_same_logits(base, options, ids, bits, sym):
    config = TwoStageGPTQConfig(**{**options, "bits": bits, "sym": sym, "group_size": -1})
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    before = logits(model, ids)
    plain = model.dequantize()
    assert not any(isinstance(module, QuantizedLinear) for module in plain.modules())
    torch.testing.assert_close(logits(plain, ids), before, rtol=1e-4, atol=1e-4)
    assert not hasattr(plain.config, "quantization_config")


@pytest.mark.parametrize("loaded", [False, True])
def test_dequantize_puts_back_layers_of_the_kind_that_was_there(tiny_gpt2, tokenizer, options, ids, tmp_path, loaded):
    tiny_gpt2.save_pretrained(tmp_path / "base")
    config = TwoStageGPTQConfig(**options, tokenizer=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    if loaded:
        model.save_pretrained(tmp_path / "out")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = logits(model, ids)
    model.dequantize().save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(again, ids), before, rtol=1e-4, atol=1e-4)


def test_dequantize_takes_the_name_of_a_dtype_which_saving_leaves_in_the_config(base, options, tmp_path):
    TwoStageQuantizer.from_pretrained(base).quantize(tmp_path / "out", **options)
    for saved, dtype, expected in ((True, None, torch.float32), (False, "bfloat16", torch.bfloat16)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        if saved:
            model.save_pretrained(tmp_path / "again")
        assert model.dequantize(dtype).model.layers[0].mlp.up_proj.weight.dtype == expected
    with pytest.raises(ValueError, match="dtype must be a torch dtype or the name of one, found 'half-ish'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").dequantize("half-ish")


def test_dtype_and_device_map_at_load_keep_the_stored_format(base, options, ids, tmp_path):
    TwoStageQuantizer.from_pretrained(base).quantize(tmp_path / "out", **options)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, device_map="cpu")
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.scales.dtype == torch.float16 and layer.qweight.dtype == torch.int32
    assert layer.bias.dtype == torch.bfloat16 and model.lm_head.weight.dtype == torch.bfloat16
    assert logits(model, ids).dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", [{"": "disk"}, {"model.layers.1": "disk", "": "cpu"}])
def test_a_device_map_with_disk_is_refused_before_quantizing(base, options, device_map):
    config = TwoStageGPTQConfig(**options)
    with pytest.raises(ValueError, match="leaves a part of the model on disk"):
        AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map=device_map)


def test_what_auto_would_put_on_disk_stays_in_main_memory(base, options, monkeypatch):
    monkeypatch.setattr("lkq_hf.quantization.quantizer.infer_auto_device_map", lambda *_, **__: {"": "disk"})
    config = TwoStageGPTQConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map="auto")
    assert model.device.type == "cpu"


def test_the_decoder_loads_without_its_head(base, options, ids, tmp_path):
    whole = TwoStageQuantizer.from_pretrained(base).quantize(
        tmp_path / "out", **options, modules_to_not_convert=["lm_head"]
    )
    decoder = AutoModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = whole.model(input_ids=ids).last_hidden_state
        assert torch.equal(decoder(input_ids=ids).last_hidden_state, expected)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again, ids), logits(whole, ids))


@pytest.mark.one_version
def test_the_presets_differ_and_all_stages_off_is_gptq(base, options, ids):
    found = {}
    for name, changes in {
        "default": {},
        "paper": {"preset": "paper"},
        "gptq": {"preset": "paper", "stages": ()},
        "nearest": {"stages": (), "round_to_nearest": True, "alpha": 0.0},
    }.items():
        config = TwoStageGPTQConfig(**{**options, "bits": 2, **changes})
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
        steps = model.hf_quantizer.report.layers[0].losses
        found[name] = (list(steps), model.model.layers[1].mlp.down_proj.qweight)
    assert found["default"][0] == ["nearest", "gptq", "descent"]
    assert found["paper"][0] == ["nearest", "gptq", "stage2"]
    assert found["gptq"][0] == ["nearest", "gptq"]
    assert found["nearest"][0] == ["nearest"]
    weights = [weight for _, weight in found.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_optimum_interface_equals_quantize_on_load_and_block_by_block_equals_in_memory(base, options, tmp_path):
    TwoStageQuantizer.from_pretrained(base).quantize(tmp_path / "memory", **options)
    quantizer = TwoStageQuantizer.from_pretrained(base)
    quantizer.quantize(tmp_path / "blocks", block_by_block=True, **options)
    config = TwoStageGPTQConfig(**options)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(tmp_path / "load")
    expected = load_file(tmp_path / "memory" / "model.safetensors")
    for other in ("blocks", "load"):
        found = load_file(tmp_path / other / "model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(quantizer.report.layers) == 14 and quantizer.report.peak_memory > 0
    assert (tmp_path / "blocks" / "tokenizer.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "blocks", "load", "memory"]


def test_a_failing_run_leaves_no_checkpoint_and_a_full_directory_is_not_touched(base, options, tmp_path, monkeypatch):
    quantizer = TwoStageQuantizer.from_pretrained(base)
    weights = load_file(base / "model.safetensors")
    damaged = dict(weights)
    damaged["model.layers.1.mlp.up_proj.weight"] = torch.full_like(
        weights["model.layers.1.mlp.up_proj.weight"], torch.nan
    )
    save_file(damaged, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: the weight contains NaN"):
        quantizer.quantize(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()

    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="not an empty directory"):
        quantizer.quantize(tmp_path / "out", **options)
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def killed_after_a_block():
    write = FinishedBlocks.write

    def write_and_die(*arguments):
        write(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)  # No handler, no finally clause and no exit hook runs.

    FinishedBlocks.write = write_and_die


def quantize(base, out, options):
    TwoStageQuantizer.from_pretrained(base).quantize(out, device="cpu", **options)


@pytest.mark.one_version
@pytest.mark.parametrize("block_by_block", [False, True])
def test_a_killed_run_leaves_no_checkpoint_and_the_same_call_gives_that_of_an_undisturbed_one(
    base, options, tmp_path, block_by_block
):
    quantize(base, tmp_path / "undisturbed", options)
    out = tmp_path / "out"
    with pytest.raises(Killed, match="SIGKILL"):
        run(quantize, base, out, options | {"block_by_block": block_by_block}, fault=killed_after_a_block)
    assert not out.exists()
    assert sorted(path.name for path in (tmp_path / "out.partial").iterdir()) == [
        "block-00000.safetensors",
        "run.json",
    ]
    quantizer = TwoStageQuantizer.from_pretrained(base)
    quantizer.quantize(out, block_by_block=block_by_block, device="cpu", **options)
    assert quantizer.report.resumed_blocks == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "undisturbed"]
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_damaged_checkpoints_are_refused_before_they_answer_wrongly(base, options, tmp_path):
    out = tmp_path / "out"
    TwoStageQuantizer.from_pretrained(base).quantize(out, **options)
    good = load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())

    def write(tensors, changes=None):
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        stored = {**config, "quantization_config": {**config["quantization_config"], **(changes or {})}}
        (out / "config.json").write_text(json.dumps(stored))

    write({name: tensor for name, tensor in good.items() if name != "model.layers.0.mlp.up_proj.scales"})
    with pytest.raises(ValueError, match=r"no model\.layers\.0\.mlp\.up_proj\.scales"):
        AutoModelForCausalLM.from_pretrained(out)
    write(good, {"bits": 8})
    with pytest.raises(ValueError, match=r"config\.json \(bits=8"):
        AutoModelForCausalLM.from_pretrained(out)
    write(good, {"group_size": 64})
    with pytest.raises(ValueError, match="group_size=64"):
        AutoModelForCausalLM.from_pretrained(out)
    write({**good, "model.layers.0.mlp.up_proj.scales": -good["model.layers.0.mlp.up_proj.scales"]})
    with pytest.raises(ValueError, match="finite and positive"):
        AutoModelForCausalLM.from_pretrained(out)
    write(good)
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or truncated"):
        AutoModelForCausalLM.from_pretrained(out)


def test_lora_trains_on_top(base, options, ids):
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=TwoStageGPTQConfig(**options))
    before = logits(model, ids)
    packed = {name: buffer.clone() for name, buffer in model.named_buffers() if "qweight" in name}
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(logits(adapted, ids), before)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = adapted(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, buffer in adapted.get_base_model().named_buffers():
        original = name.replace("base_layer.", "")
        if original in packed:
            assert torch.equal(buffer, packed[original])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bits": 5}, ValueError, r"bits must be one of \[2, 3, 4, 8\].*, found 5"),
        ({"group_size": 0}, ValueError, "group_size must be"),
        ({"advanced": {"damp_percent": -1}}, ValueError, "damp_percent must be a number from 0 to 1"),
        ({"advanced": {"alpha": 2}}, ValueError, "alpha must be a number from 0 to 1"),
        ({"advanced": {"sweeps": 0}}, ValueError, "sweeps must be a positive"),
        ({"advanced": {"stages": ("stage3",)}}, ValueError, "stages must be"),
        ({"preset": "best"}, ValueError, "preset must be"),
        ({"advanced": {"scale_search": "max"}}, ValueError, "scale_search must be"),
        ({"advanced": {"offload": "tape"}}, ValueError, "offload must be"),
        ({"sym": "yes"}, TypeError, "sym must be True or False"),
        ({"desc_act": True}, ValueError, "desc_act must be False"),
        ({"bit": 4}, TypeError, "no field 'bit'"),
        ({"advanced": {"beta": 1}}, TypeError, "advanced has no option 'beta'"),
        ({"advanced": "alpha"}, TypeError, "advanced must be a dict"),
    ],
)
def test_configurations_that_cannot_be_are_refused(changes, error, message):
    with pytest.raises(error, match=message):
        TwoStageGPTQConfig(**changes)


def test_the_configuration_survives_its_own_json(options):
    config = TwoStageGPTQConfig(
        **options | {"preset": "paper", "advanced": {"alpha": 0.5}, "modules_to_not_convert": ["lm_head"]}
    )
    again = TwoStageGPTQConfig.from_dict(json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict() and again.stages == ("stage1", "stage2") and again.alpha == 0.5
    assert again.dataset is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": None}, "needs calibration data"),
        ({"dataset": []}, "contains no text"),
        ({"dataset": ["w1 w2"]}, "too short"),
        ({"model_seqlen": 512}, "more than the model's 256 positions"),
        (
            {"group_size": 48},
            r"model\.layers\.0\.self_attn\.q_proj: in_features=64 .* group sizes that fit: 32, 64, -1",
        ),
        ({"modules_to_not_convert": ["gate"]}, "matches no module"),
        ({"modules_in_block_to_quantize": ["mlp.up_proj", "mlp.out"]}, "'mlp.out', which matches no module"),
        ({"advanced": {"block_name_to_quantize": "model.blocks"}}, "no module list"),
    ],
)
def test_what_cannot_be_quantized_is_said_before_anything_is_written(base, options, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        TwoStageQuantizer.from_pretrained(base).quantize(tmp_path / "out", **{**options, **changes})
    assert not (tmp_path / "out").exists()


def test_layers_can_be_chosen(base, options, tmp_path, ids):
    for changes, expected in (
        ({"modules_to_not_convert": ["mlp", "layers.0.self_attn.q_proj"]}, 7),
        ({"modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.k_proj"], ["mlp.up_proj"]]}, 6),
    ):
        config = TwoStageGPTQConfig(**{**options, **changes})
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
        assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == expected
        model.save_pretrained(tmp_path / str(expected))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(expected))
        assert torch.equal(logits(model, ids), logits(again, ids))


@pytest.mark.parametrize("form", ["in memory", "directory", "block by block"])
def test_quantized_models_are_not_quantized_again(base, options, tmp_path, form):
    first = {**options, "modules_to_not_convert": ["mlp"]}
    model = TwoStageQuantizer.from_pretrained(base).quantize(tmp_path / "out", **first)
    quantizer = TwoStageQuantizer.from_pretrained(model if form == "in memory" else tmp_path / "out")
    with pytest.raises(ValueError, match="expected a model in full precision, found one that is quantized already"):
        quantizer.quantize(tmp_path / "again", **{**options, "bits": 3}, block_by_block=form == "block by block")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def lora_in_the_model(model):
    add_adapter(model, LoraConfig(r=32))
    return model


def lora_inside_a_peft_model(model):
    return get_peft_model(model, LoraConfig(r=4)).get_base_model()


def lookahead_without_lora(model):
    add_adapter(model, LookaheadKVConfig(num_lookahead_tokens=4, target_modules=[]))
    return model


@pytest.mark.parametrize("add", [lora_in_the_model, lora_inside_a_peft_model, lookahead_without_lora])
def test_models_with_adapters_are_refused(tiny_llama, tokenizer, options, tmp_path, add):
    quantizer = TwoStageQuantizer.from_pretrained(add(tiny_llama))
    with pytest.raises(ValueError, match="expected a model without adapters"):
        quantizer.quantize(tmp_path / "out", tokenizer=tokenizer, **options)
    assert not list(tmp_path.iterdir())


def test_a_peft_model_is_no_model_to_quantize(tiny_llama):
    with pytest.raises(TypeError, match=r"found PeftModel; .* what merge_and_unload"):
        TwoStageQuantizer.from_pretrained(get_peft_model(tiny_llama, LoraConfig(r=4)))
