"""Exports, judged by the readers of their formats."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_gemma3_with_pictures, tiny_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    PreTrainedModel,
)

from lkq_hf.quantization import TwoStageGPTQConfig, TwoStageQuantizer
from lkq_hf.quantization.export import export_checkpoint
from lkq_hf.quantization.linear import QuantizedLinear
from lkq_hf.quantization.packing import unpack_weight

KEPT_DENSE = "model.layers.1.mlp.up_proj"
SETTINGS = [(bits, sym) for bits in (2, 3, 4, 8) for sym in (True, False)]


@pytest.fixture
def checkpoint(tiny_llama, tokenizer, texts, tmp_path):
    """Quantizes the tiny model: bits, sym and group_size to a directory and the model."""

    def make(
        bits: int, sym: bool, group_size: int = 32, shard: str = "5GB", stages: tuple[str, ...] = ()
    ) -> tuple[Path, PreTrainedModel]:
        tiny_llama.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        config = TwoStageGPTQConfig(
            bits=bits,
            group_size=group_size,
            sym=sym,
            dataset=texts,
            tokenizer=tokenizer,
            num_samples=4,
            model_seqlen=32,
            advanced={"stages": stages},
            modules_to_not_convert=[KEPT_DENSE],
        )
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config).eval()
        model.save_pretrained(tmp_path / "ours", max_shard_size=shard)
        tokenizer.save_pretrained(tmp_path / "ours")
        return tmp_path / "ours", model

    return make


@pytest.fixture
def quick(tokenizer, texts):
    """Settings for tests that do not look at how well a model is quantized."""
    rounding = {"bits": 4, "group_size": 32, "preset": "paper", "stages": ()}
    return {**rounding, "dataset": texts, "tokenizer": tokenizer, "num_samples": 2, "model_seqlen": 16}


def packed_layers(model: PreTrainedModel) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.mark.parametrize(("bits", "sym"), SETTINGS)
def test_compressed_tensors_decompresses_bit_for_bit(checkpoint, bits: int, sym: bool, tmp_path: Path) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import PackedQuantizationCompressor

    ours, model = checkpoint(bits, sym)
    out = export_checkpoint(ours, tmp_path / "export", "compressed-tensors")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    scheme = quantization.QuantizationConfig.model_validate(config).config_groups["group_0"]
    tensors = load_file(out / "model.safetensors")
    assert sorted(config["ignore"]) == ["lm_head", KEPT_DENSE]
    for name, layer in packed_layers(model).items():
        mine = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == name}
        weight = PackedQuantizationCompressor.decompress(mine, scheme)["weight"]
        assert torch.equal(weight, layer.dequantize(weight.dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_readers_take_negative_scales(checkpoint, bits: int, tmp_path: Path) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import PackedQuantizationCompressor

    ours, model = checkpoint(bits, True, stages=("stage1", "descent"))
    gptq = load_file(export_checkpoint(ours, tmp_path / "gptq", "gptq") / "model.safetensors")
    out = export_checkpoint(ours, tmp_path / "compressed", "compressed-tensors")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    scheme = quantization.QuantizationConfig.model_validate(config).config_groups["group_0"]
    tensors = load_file(out / "model.safetensors")
    layers = packed_layers(model)
    assert any((layer.scales < 0).any() for layer in layers.values())
    again = AutoModelForCausalLM.from_pretrained(ours)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    for name, layer in layers.items():
        mine = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == name}
        weight = PackedQuantizationCompressor.decompress(mine, scheme)["weight"]
        assert torch.equal(weight, layer.dequantize(weight.dtype))
        assert torch.equal(gptq_weight({key: gptq[f"{name}.{key}"] for key in GPTQ_TENSORS}, bits), layer.dequantize())
        if layer.in_features == 64:
            expected = x @ layer.dequantize().T + (0 if layer.bias is None else layer.bias)
            torch.testing.assert_close(again.get_submodule(name)(x), expected)


GPTQ_TENSORS = ("qweight", "qzeros", "scales", "g_idx")


def gptq_weight(tensors: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """`[out, in]` by the formula of AutoGPTQ's format: `scale * (q - (z + 1))`, the scale that of `g_idx`."""

    def numbers(words: torch.Tensor) -> torch.Tensor:
        # A stream of bits along the last dimension, the lowest first.
        stream = ((words.unsqueeze(-1) >> torch.arange(32)) & 1).flatten(-2)
        return (stream.unflatten(-1, (-1, bits)) << torch.arange(bits)).sum(-1)

    groups = tensors["g_idx"].long()
    zeros = numbers(tensors["qzeros"])[groups].T + 1
    return tensors["scales"].float()[groups].T * (numbers(tensors["qweight"].T.contiguous()) - zeros)


@pytest.mark.parametrize(("bits", "sym"), SETTINGS)
def test_transformers_loads_compressed_tensors(checkpoint, bits: int, sym: bool, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    ours, model = checkpoint(bits, sym)
    out = export_checkpoint(ours, tmp_path / "export", "compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    for name, layer in packed_layers(model).items():
        # Some versions multiply in the dtype of the scales (float16), others in the model's.
        found = theirs.get_submodule(name).weight
        products = [layer.dequantize(dtype).float() for dtype in (torch.float16, torch.float32)]
        assert any(torch.equal(found, product) for product in products)
        parent, _, leaf = name.rpartition(".")
        linear = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        linear.weight.data = found.clone()
        if layer.bias is not None:
            linear.bias.data = layer.bias.float()
        setattr(model.get_submodule(parent), leaf, linear)
    ids = torch.arange(24).view(1, -1)
    assert torch.equal(theirs(ids).logits, model(ids).logits)


def test_transformers_runs_compressed_tensors_packed(checkpoint, tmp_path: Path) -> None:
    # Asymmetric ones need dequantize=True: compressed-tensors 0.20 leaves zero points unpacked on the meta device.
    pytest.importorskip("compressed_tensors")
    ours, model = checkpoint(4, True)
    out = export_checkpoint(ours, tmp_path / "export", "compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    layer = theirs.model.layers[0].mlp.up_proj
    assert "weight_packed" in dict(layer.named_parameters())
    ids = torch.arange(24).view(1, -1)
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=0, atol=0.1)
    # docs/serving.md says so: the first forward unpacks them all.
    assert "weight_packed" not in dict(layer.named_parameters()) and layer.weight.dtype == torch.float32


@pytest.mark.parametrize(("bits", "sym"), SETTINGS)
def test_gptq_keeps_the_tensors(checkpoint, bits: int, sym: bool, tmp_path: Path) -> None:
    ours, _ = checkpoint(bits, sym)
    out = export_checkpoint(ours, tmp_path / "export", "gptq")
    before, after = load_file(ours / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config == json.loads((out / "quantize_config.json").read_text())
    assert config["quant_method"] == "gptq"
    assert config["checkpoint_format"] == ("gptq" if sym else "gptq_v2")
    assert (out / "tokenizer.json").read_text() == (ours / "tokenizer.json").read_text()


def test_whole_row_groups_and_shards(checkpoint, tmp_path: Path) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import PackedQuantizationCompressor

    ours, model = checkpoint(3, False, group_size=-1, shard="20KB")
    assert (ours / "model.safetensors.index.json").is_file()
    out = export_checkpoint(ours, tmp_path / "export", "compressed-tensors")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    scheme = quantization.QuantizationConfig.model_validate(config).config_groups["group_0"]
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for name, layer in packed_layers(model).items():
        kinds = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
        mine = {kind: load_file(out / index[f"{name}.{kind}"])[f"{name}.{kind}"] for kind in kinds}
        weight = PackedQuantizationCompressor.decompress(mine, scheme)["weight"]
        assert torch.equal(weight, layer.dequantize(weight.dtype))


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_names_in_the_files_may_differ_from_the_models(quick, tmp_path: Path, format: str) -> None:
    """Gemma 3's language model is `model.language_model` in memory, and `language_model.model` in its files."""
    tiny_gemma3_with_pictures().save_pretrained(tmp_path / "base")
    settings = TwoStageGPTQConfig(**quick)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings)
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    ids = torch.arange(24).view(1, -1)
    assert torch.equal(again(ids).logits, model(ids).logits)
    out = export_checkpoint(tmp_path / "ours", tmp_path / "export", format)
    kinds = {name.rpartition(".")[2] for name in load_file(out / "model.safetensors") if "self_attn.q_proj" in name}
    packed = {"weight_packed", "weight_scale", "weight_shape"}
    assert kinds >= (packed if format == "compressed-tensors" else {"qweight", "qzeros", "scales", "g_idx"})


def test_a_decoder_without_its_head_is_exported(tiny_llama, quick, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    tiny_llama.model.config.tie_word_embeddings = True
    tiny_llama.model.save_pretrained(tmp_path / "base")
    settings = TwoStageGPTQConfig(**quick)
    AutoModel.from_pretrained(tmp_path / "base", quantization_config=settings).save_pretrained(tmp_path / "ours")
    out = export_checkpoint(tmp_path / "ours", tmp_path / "export", "compressed-tensors")
    assert "layers.0.mlp.up_proj.weight_packed" in load_file(out / "model.safetensors")
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert "lm_head" in ignored and not any("proj" in name for name in ignored)


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_experts_and_routers_are_said_to_be_dense(quick, tmp_path: Path, format: str) -> None:
    """Mixtral holds experts one by one in its files, under `block_sparse_moe`, and fused in memory, under `mlp`."""
    model = tiny_model("mixtral", num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2)
    model.save_pretrained(tmp_path / "base")
    TwoStageQuantizer.from_pretrained(tmp_path / "base").quantize(
        tmp_path / "ours", **quick, modules_to_not_convert=["mlp.experts"]
    )
    if format == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    out = export_checkpoint(tmp_path / "ours", tmp_path / "export", format)
    found = json.loads((out / "config.json").read_text())["quantization_config"]
    patterns = found["dynamic"] if format == "gptq" else found["ignore"]

    def is_dense(name: str) -> bool:
        regular = [pattern.partition(":")[2] for pattern in patterns if ":" in pattern]
        return name in patterns or any(re.match(pattern, name) for pattern in regular)

    experts = [f"experts.{index}.{matrix}" for index in range(4) for matrix in ("w1", "w2", "w3")]
    tensors = load_file(out / "model.safetensors")
    for name in [*experts, "gate"]:
        assert f"model.layers.0.block_sparse_moe.{name}.weight" in tensors
        assert is_dense(f"model.layers.0.block_sparse_moe.{name}")
    assert is_dense("model.layers.0.block_sparse_moe.experts")
    assert is_dense("model.layers.0.mlp.experts") and is_dense("model.layers.0.mlp.gate")
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp", "block_sparse_moe"):
        assert not is_dense(f"model.layers.0.{name}")
    assert not is_dense("model.embed_tokens")


EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    ("name", "matrix"), [("mixtral", "block_sparse_moe.experts.3.w2"), ("qwen3_moe", "mlp.experts.0.up_proj")]
)
@pytest.mark.parametrize(("bits", "sym"), [(4, True), (3, False)])
def test_packed_experts_are_exported_as_one_matrix_each(
    quick, tmp_path: Path, name: str, matrix: str, bits: int, sym: bool
) -> None:
    """Under the names of the original files, which are those of the dequantized model."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import PackedQuantizationCompressor

    tiny_model(name, num_hidden_layers=2, **EXPERTS).save_pretrained(tmp_path / "base")
    quantizer = TwoStageQuantizer.from_pretrained(tmp_path / "base")
    model = quantizer.quantize(tmp_path / "ours", **quick | {"bits": bits, "sym": sym})
    model.save_pretrained(tmp_path / "ours-in-parts", max_shard_size="50KB")
    model.dequantize().save_pretrained(tmp_path / "plain")
    dense = load_file(tmp_path / "plain" / "model.safetensors")

    out = export_checkpoint(tmp_path / "ours-in-parts", tmp_path / "gptq", "gptq")
    tensors = {key: value for path in out.glob("*.safetensors") for key, value in load_file(path).items()}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    packed = {key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")}
    assert f"model.layers.1.{matrix}" in packed
    assert {key for key in dense if key.removesuffix(".weight") not in packed} == {
        key for key in tensors if key.rpartition(".")[0] not in packed
    }
    for module in packed:
        qweight, qzeros, scales, g_idx = (
            tensors[f"{module}.{kind}"] for kind in ("qweight", "qzeros", "scales", "g_idx")
        )
        assert torch.equal(g_idx, torch.arange(len(g_idx), dtype=torch.int32) // 32)
        weight = unpack_weight(qweight, qzeros, scales, bits=bits, group_size=32, sym=sym).dequantize()
        assert torch.equal(weight, dense[f"{module}.weight"])

    out = export_checkpoint(tmp_path / "ours", tmp_path / "compressed-tensors", "compressed-tensors")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    scheme = quantization.QuantizationConfig.model_validate(config).config_groups["group_0"]
    tensors = load_file(out / "model.safetensors")
    assert {key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")} == packed
    kinds = ("weight_packed", "weight_scale", "weight_shape") + (() if sym else ("weight_zero_point",))
    for module in packed:
        state = {kind: tensors[f"{module}.{kind}"] for kind in kinds}
        found = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
        torch.testing.assert_close(found.float(), dense[f"{module}.weight"], rtol=1e-3, atol=1e-5)
    assert not any("experts" in name for name in config["ignore"])


def test_experts_without_names_of_their_own_are_not_exported(quick, tmp_path: Path) -> None:
    model = tiny_model("gpt_oss", num_hidden_layers=2, layer_types=["full_attention"] * 2, **EXPERTS)
    TwoStageQuantizer.from_pretrained(model).quantize(tmp_path / "ours", **quick)
    for format in ("gptq", "compressed-tensors"):
        with pytest.raises(ValueError, match=r"original files of GptOssForCausalLM do not hold one matrix for each"):
            export_checkpoint(tmp_path / "ours", tmp_path / format, format)
        assert not (tmp_path / format).exists()


def test_compressed_tensors_of_conv1d_are_refused(tiny_gpt2, quick, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    TwoStageQuantizer.from_pretrained(tiny_gpt2).quantize(ours, **quick)
    with pytest.raises(ValueError, match=r"found Conv1D \(transformer\.h\.0\.attn\.c_attn.*export to gptq"):
        export_checkpoint(ours, tmp_path / "export", "compressed-tensors")
    assert (export_checkpoint(ours, tmp_path / "export", "gptq") / "model.safetensors").is_file()


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_what_lies_beside_the_weights_is_copied(checkpoint, tmp_path: Path, format: str) -> None:
    if format == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    ours, _ = checkpoint(4, True)
    (ours / "additional_chat_templates").mkdir()
    (ours / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    (ours / "adapter_config.json").write_text("{}")
    save_file({"lookahead_kv_tokens": torch.ones(2, 3)}, ours / "adapter_model.safetensors")
    out = export_checkpoint(ours, tmp_path / "export", format)
    for name in ("additional_chat_templates/rag.jinja", "adapter_config.json", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (ours / name).read_bytes()
    assert not (out / "model.safetensors.index.json").exists()


def test_bad_sources_write_nothing(checkpoint, tmp_path: Path) -> None:
    ours, _ = checkpoint(4, True)
    out = tmp_path / "export"
    with pytest.raises(ValueError, match="format must be one of gptq, compressed-tensors"):
        export_checkpoint(ours, out, "awq")
    with pytest.raises(ValueError, match="not a checkpoint of ours"):
        export_checkpoint(tmp_path / "base", out, "gptq")
    with pytest.raises(FileExistsError, match="exists"):
        export_checkpoint(ours, tmp_path / "base", "gptq")
    (tmp_path / "base" / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"base.config\.json is not JSON"):
        export_checkpoint(tmp_path / "base", out, "gptq")
    tensors = load_file(ours / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.scales"]
    save_file(tensors, ours / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"no model\.layers\.0\.mlp\.down_proj\.scales"):
        export_checkpoint(ours, out, "gptq")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "ours"]


GPTQMODEL_READER = """
import sys
import torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file, save_file

model = GPTQModel.load(sys.argv[1], backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
weights = {}
for name, module in model.model.named_modules():
    if hasattr(module, "qweight"):
        module.post_init() if not hasattr(module, "wf_unsqueeze_zero") else None
        weights[name] = module.dequantize_weight().t().contiguous().cpu()
assert weights, "GPTQModel loaded no packed layer"
save_file(weights, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "sym"), SETTINGS)
def test_gptqmodel_reads_the_same_weights(checkpoint, bits: int, sym: bool, tmp_path: Path) -> None:
    python = os.environ.get("GPTQMODEL_PYTHON")
    if python is None and importlib.util.find_spec("gptqmodel") is None:
        pytest.skip("GPTQModel is not installed here, and GPTQMODEL_PYTHON names no interpreter that has it")
    ours, model = checkpoint(bits, sym)
    out = export_checkpoint(ours, tmp_path / "export", "gptq")
    command = [python or sys.executable, "-c", GPTQMODEL_READER, str(out), str(tmp_path / "read.safetensors")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    read = load_file(tmp_path / "read.safetensors")
    layers = packed_layers(model)
    assert read.keys() == layers.keys()
    for name, weight in read.items():
        assert torch.equal(weight, layers[name].dequantize(weight.dtype)), name
