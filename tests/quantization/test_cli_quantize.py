"""`lkq-hf quantize` from a shell's point of view."""

import json

import pytest
import typer
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lkq_hf.cli.export import export
from lkq_hf.cli.quantize import quantize
from lkq_hf.quantization import QuantizedLinear


@pytest.fixture
def files(tmp_path, tiny_llama, tokenizer, texts):
    tiny_llama.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return tmp_path


def run(files, *options):
    app = typer.Typer()
    app.command()(quantize)
    arguments = [str(files / "base"), "--dataset", str(files / "texts.jsonl"), "--out", str(files / "out")]
    shape = ["--num-samples", "4", "--model-seqlen", "32", "--device", "cpu"]
    return CliRunner().invoke(app, [*arguments, *shape, *options])


@pytest.mark.parametrize("extra", [[], ["--block-by-block"]])
def test_a_checkpoint_comes_out(files, extra):
    result = run(files, "--bits", "3", "--group-size", "64", "--no-sym", "--preset", "paper", *extra)
    assert result.exit_code == 0, result.output
    assert "peak memory" in result.output and "100.0 % of the linear weights are quantized" in result.output
    model = AutoModelForCausalLM.from_pretrained(files / "out")
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    stored = json.loads((files / "out" / "config.json").read_text())["quantization_config"]
    assert (stored["bits"], stored["group_size"], stored["sym"], stored["preset"]) == (3, 64, False, "paper")
    assert stored["meta"]["calibration"]["dataset"] == "file texts.jsonl"


def test_the_refined_preset(files):
    result = run(files, "--preset", "refined", "--group-size", "64")
    assert result.exit_code == 0, result.output
    stored = json.loads((files / "out" / "config.json").read_text())["quantization_config"]
    assert stored["preset"] == "refined" and stored["meta"]["refinement"]["steps"] > 0
    assert stored["meta"]["end_to_end"]["divergence"].keys() == {"before", "after"}
    assert "scales tuned, KL on held-out windows" in result.output
    assert "2 of 4 windows are text of the model's own" in result.output


def test_text_of_the_models_own_needs_no_dataset(files):
    app = typer.Typer()
    app.command()(quantize)
    shape = ["--num-samples", "4", "--model-seqlen", "32", "--device", "cpu", "--out", str(files / "out")]
    result = CliRunner().invoke(app, [str(files / "base"), "--own-text", "1", *shape, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["written_by_model"] == 4
    stored = json.loads((files / "out" / "config.json").read_text())["quantization_config"]
    assert stored["meta"]["calibration"]["dataset"] is None
    for options, found in (([], "neither"), (["--own-text", "1", "--dataset", str(files / "texts.jsonl")], "both")):
        result = CliRunner().invoke(app, [str(files / "base"), *options, *shape])
        assert isinstance(result.exception, ValueError) and f"got {found}" in str(result.exception)


def test_an_export_says_which_readers_were_tested(files):
    assert run(files, "--bits", "3.3", "--preset", "paper").exit_code == 0
    app = typer.Typer()
    app.command()(export)
    arguments = [str(files / "out"), "--out", str(files / "gptq"), "--format", "gptq"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "no reader was tested that loads this export" in result.output and "docs/serving.md" in result.output


@pytest.mark.parametrize(
    ("options", "format", "readers"),
    [
        (["--sym"], "gptq", ["GPTQModel", "transformers with GPTQModel", "vLLM"]),
        (["--no-sym"], "gptq", ["GPTQModel", "transformers with GPTQModel"]),
        (["--bits", "8"], "gptq", ["GPTQModel"]),
        (["--bits", "3", "--no-sym"], "gptq", ["GPTQModel", "transformers with GPTQModel"]),
        (["--no-sym"], "compressed-tensors", ["compressed-tensors", "transformers with compressed-tensors", "vLLM"]),
        (["--bits", "8"], "compressed-tensors", ["compressed-tensors", "transformers with compressed-tensors"]),
    ],
)
def test_an_export_names_its_readers(files, options, format, readers):
    pytest.importorskip("compressed_tensors")
    assert run(files, "--preset", "paper", *options).exit_code == 0
    app = typer.Typer()
    app.command()(export)
    arguments = [str(files / "out"), "--out", str(files / "export"), "--format", format, "--json"]
    result = CliRunner().invoke(app, arguments)
    assert json.loads(result.stdout)["tested_readers"] == readers


def test_bits_by_layer(files):
    result = run(files, "--bits", "3.3", "--preset", "paper")
    assert result.exit_code == 0, result.output
    assert "bits on average (" in result.output and " layers), group size 64" in result.output
    assert json.loads((files / "out" / "config.json").read_text())["quantization_config"]["layer_bits"]


def test_a_target_size(files):
    result = run(files, "--target-size", "4 bits")
    assert isinstance(result.exception, ValueError) and "--target-size: expected a size" in str(result.exception)
    result = run(files, "--target-size", "110kB", "--group-size", "64", "--preset", "paper")
    assert result.exit_code == 0, result.output
    assert 80_000 < (files / "out" / "model.safetensors").stat().st_size <= 110_000


def test_errors_reach_the_user(files):
    result = run(files, "--bits", "5")
    assert isinstance(result.exception, ValueError) and "bits must be one of" in str(result.exception)
    assert not (files / "out").exists()


def test_a_directory_with_an_adapter_is_refused_before_anything_is_read(files):
    (files / "base" / "adapter_config.json").write_text("{}")
    result = run(files)
    assert isinstance(result.exception, ValueError) and "holds an adapter" in str(result.exception)
    assert not (files / "out").exists()
