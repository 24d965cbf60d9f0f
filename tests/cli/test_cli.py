"""The command line as a shell and a program see it: help, exit codes, one-line errors, JSON."""

import json
import os
import random
import shutil
import sys

import pytest
import torch
from datasets import Dataset
from models import add_lookahead, tiny_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, T5Config

import lkq_hf
from lkq_hf.cli import app, main
from lkq_hf.training import LookaheadTrainer, load_targets

COMMANDS = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in this process; exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lkq-hf", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def base(tmp_path):
    core = Tokenizer(
        models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i + 3 for i in range(157)}, "<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "base")
    tiny_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [" ".join(f"w{(7 * row + 3 * word) % 157}" for word in range(80)) for row in range(8)]
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return path


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    assert len(COMMANDS) >= 5 and all(command in out for command in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0 and "Usage" in out


def test_the_version(run):
    assert run("--version") == (0, f"lkq-hf {lkq_hf.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments", [[], ["nonsense"], ["quantize"], ["push", "--nonsense"], ["train", "m", "--rank", "x"]]
)
def test_wrong_usage_exits_with_2_and_writes_to_stderr(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    if arguments:
        assert err.startswith("lkq-hf: ") and err.count("\n") == 1 and "--help" in err
    else:
        assert err.startswith("Usage")


def test_the_list_of_commands_is_whole(run):
    assert "..." not in run("--help")[1].partition("Commands:")[2]
    assert "..." not in run("evaluate", "--help")[1].partition("Commands:")[2]


def test_ctrl_c_is_one_line(run, tmp_path, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    (tmp_path / "config.json").touch()
    monkeypatch.setattr("lkq_hf.quantization.export.export_checkpoint", stopped)
    code, _, err = run("export", tmp_path, "--format", "gptq", "--out", tmp_path / "out")
    assert (code, err.strip()) == (130, "lkq-hf: stopped")


def damaged(base):
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def emptied(base):
    for path in base.iterdir():
        path.unlink()


def encoder(base):
    config = BertConfig(
        vocab_size=160, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertForMaskedLM(config).save_pretrained(base)


def encoder_and_decoder(base):
    T5Config().save_pretrained(base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged, "is damaged or truncated"),
        (emptied, "holds no model: expected a config.json and weights, found nothing"),
        (encoder, "expected a decoder-only language model of transformers, found BertLMHeadModel, an encoder"),
        (encoder_and_decoder, "holds a t5 model; expected a decoder-only language model"),
    ],
)
def test_what_is_not_the_right_model(run, base, texts, tmp_path, change, message):
    change(base)
    code, out, err = run("evaluate", "perplexity", base, "--text", texts, "--window", "64", "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert message in err and err.splitlines()[-1].startswith("lkq-hf: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["./nowhere", "/no/where", "a/b/c"])
def test_a_directory_that_is_not_there_is_not_looked_for_on_the_hub(run, texts, tmp_path, model):
    code, _, err = run("evaluate", "perplexity", model, "--text", texts, "--out", tmp_path / "out")
    assert (code, err) == (
        1,
        f"lkq-hf: there is no directory {model}; expected one with a model, or an id on the Hub\n",
    )


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there(run, base, texts, tmp_path, device):
    options = ["--text", texts, "--out", tmp_path / "out", "--device", device]
    code, _, err = run("evaluate", "perplexity", base, *options)
    assert code == 1
    assert err.splitlines()[-1].startswith(f"lkq-hf: there is no device '{device}' here: expected cpu")


def test_a_file_that_is_not_text(run, base, tmp_path):
    (tmp_path / "text").write_bytes(b"abc\x80")
    options = ["--text", tmp_path / "text", "--out", tmp_path / "out"]
    code, _, err = run("evaluate", "perplexity", base, *options)
    assert code == 1 and "is not text: expected UTF-8, found byte 0x80 at 3" in err


def test_an_error_is_one_line_and_exits_with_1(run, tmp_path):
    code, out, err = run("export", tmp_path, "--format", "gptq", "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert err.startswith("lkq-hf: ") and err.count("\n") == 1 and "config.json" in err


def test_an_error_that_nobody_foresaw_is_named(run, tmp_path, monkeypatch):
    def broken(*arguments):
        raise KeyError("inner")

    (tmp_path / "config.json").touch()
    monkeypatch.setattr("lkq_hf.quantization.export.export_checkpoint", broken)
    code, _, err = run("export", tmp_path, "--format", "gptq", "--out", tmp_path / "out")
    assert code == 1
    assert err == "lkq-hf: KeyError: 'inner' (lkq-hf --debug shows where)\n"


def test_debug_shows_the_traceback(monkeypatch, tmp_path):
    arguments = ["--debug", "export", str(tmp_path), "--format", "gptq", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["lkq-hf", *arguments])
    with pytest.raises(FileNotFoundError):
        main()


def test_quantize_and_export_as_json(run, base, texts, tmp_path):
    shape = ["--num-samples", "4", "--model-seqlen", "32", "--group-size", "32", "--device", "cpu"]
    options = [*shape, "--dataset", texts, "--out", tmp_path / "w4", "--base-model-name", "alice/base", "--json"]
    code, out, _ = run("quantize", base, *options)
    assert code == 0
    result = json.loads(out)
    assert result["checkpoint"] == str(tmp_path / "w4") and result["seconds"] > 0
    stored = json.loads((tmp_path / "w4" / "config.json").read_text())["quantization_config"]
    assert stored["meta"]["base_model"] == "alice/base"

    code, out, _ = run("export", tmp_path / "w4", "--format", "gptq", "--out", tmp_path / "gptq", "--json")
    exported = {
        "checkpoint": str(tmp_path / "gptq"),
        "format": "gptq",
        "tested_readers": ["GPTQModel", "transformers with GPTQModel", "vLLM"],
    }
    assert (code, json.loads(out)) == (0, exported)


def test_results_in_the_working_directory(run, base, texts, tmp_path, monkeypatch):
    shape = ["--num-samples", "4", "--model-seqlen", "32", "--group-size", "32", "--device", "cpu"]
    for name, command in (
        ("w4", ["quantize", base, *shape, "--dataset", texts]),
        ("gptq", ["export", tmp_path / "w4", "--format", "gptq"]),
    ):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        code, _, err = run(*command, "--out", ".")
        assert code == 0, err
        assert "config.json" in os.listdir() and not [each for each in os.listdir() if each.startswith(".")]


@pytest.mark.parametrize("relative", [False, True])
def test_a_checkpoint_records_no_path_of_this_computer(run, base, texts, tmp_path, monkeypatch, relative):
    monkeypatch.chdir(base.parent)
    shape = ["--num-samples", "4", "--model-seqlen", "32", "--group-size", "32", "--device", "cpu"]
    directory = base.name if relative else base
    code, out, _ = run("quantize", directory, *shape, "--dataset", texts, "--out", tmp_path / "w4")
    assert code == 0 and "peak memory" in out
    stored = (tmp_path / "w4" / "config.json").read_text()
    assert str(tmp_path) not in stored and "base_model" not in json.loads(stored)["quantization_config"]["meta"]


def test_training_as_json(run, base, texts, tmp_path):
    targets = ["--prompts", texts, "--max-new-tokens", "8", "--device", "cpu", "--dtype", "float32"]
    code, out, _ = run("generate-targets", base, *targets, "--out", tmp_path / "targets", "--json")
    assert code == 0
    made = json.loads(out)
    assert made["train"]["prompts"] == 7 and made["validation"]["prompts"] == 1

    options = ["--targets", tmp_path / "targets", "--out", tmp_path / "adapter", "--base-model-name", "alice/base"]
    shape = ["--max-steps", "1", "--num-lookahead-tokens", "4", "--device-batch-size", "2", "--batch-size", "2"]
    shape += ["--profile-budgets", "4,8,1024"]
    code, out, err = run("train", base, *options, *shape, "--device", "cpu", "--dtype", "float32", "--json")
    assert code == 0, err
    profile = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["budget_profile"]
    assert list(profile) == ["4", "8"]  # the validation prompt has 80 tokens
    assert all(sum(map(sum, layers)) == pytest.approx(6) for layers in profile.values())
    result = json.loads(out)
    assert result["adapter"] == str(tmp_path / "adapter") and result["metrics"]["eval_loss"] > 0
    record = json.loads((tmp_path / "adapter" / "training.json").read_text())
    assert record["options"]["steps"] == 1 and record["metrics"] == result["metrics"]
    assert str(tmp_path) not in json.dumps(record)

    # A second round goes on from the first one's adapter.
    cpu = ["--device", "cpu", "--dtype", "float32", "--device-batch-size", "2", "--batch-size", "2"]
    both = ["--targets", tmp_path / "targets", "--targets", tmp_path / "targets"]
    again = [*both, "--out", tmp_path / "second", "--adapter", tmp_path / "adapter"]
    code, out, err = run("train", base, *again, *cpu, "--max-steps", "1", "--learning-rate", "0", "--json")
    assert code == 0, err
    assert json.loads(out)["metrics"]["eval_loss"] == pytest.approx(result["metrics"]["eval_loss"])
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)

    assert "no validation prompt is 4 times as long as the smallest budget" in err

    code, _, err = run("train", base, *again, *cpu, "--max-repetition", "-1")
    assert code == 1 and "--max-repetition" in err
    code, _, err = run("train", base, *again, *cpu, "--profile-budgets", "64,x")
    assert code == 1 and "--profile-budgets expects positive whole numbers" in err


def test_numbers_per_head_of_an_adapter_that_has_none(run, base, texts, tmp_path):
    add_lookahead(tiny_model()).save_pretrained(tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    arguments = ["profile", base, "--adapter", tmp_path / "adapter", "--device", "cpu", "--dtype", "float32"]
    for more, said in (
        ([], "pass either --text, to make prompts from, or --prompts"),
        (["--prompts", texts, "--budgets", "64"], "no prompt is 4 times as long as the smallest budget, 64"),
        (["--prompts", texts, "--budgets", "0"], "--budgets expects positive whole numbers"),
        (["--prompts", texts, "--budgets", ","], "--budgets expects names or numbers"),
    ):
        code, _, err = run(*arguments, *more)
        assert code == 1 and said in err
        assert before == {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    code, out, err = run(*arguments, "--prompts", texts, "--budgets", "8,4,16", "--count", "3", "--json")
    assert code == 0, err
    profile = json.loads(out)["profile"]
    assert list(profile) == ["4", "8", "16"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config == json.loads(before["adapter_config.json"]) | {"budget_profile": profile}
    code, _, err = run("profile", base, "--adapter", base, "--prompts", texts, "--device", "cpu")
    assert code == 1 and "LOOKAHEAD_KV adapter" in err


def test_targets_of_another_model_are_refused(run, base, other, texts, tmp_path):
    def generate(model, *more):
        options = ["--prompts", texts, "--max-new-tokens", "4", "--device", "cpu", "--out", tmp_path / "targets"]
        return run("generate-targets", model, *options, *more)

    assert generate(base)[0] == 0
    assert generate(base)[0] == 0
    code, _, err = generate(other)
    assert code == 1 and f"validation holds a run with other arguments (model was '{base}', now '{other}'" in err
    code, _, err = generate(base, "--dtype", "float32")
    assert code == 1 and "dtype was 'bfloat16', now 'float32'" in err
    shutil.rmtree(base)
    other.rename(base)
    code, _, err = generate(base)
    assert code == 1 and "other arguments (sha256 was" in err and "model.safetensors" in err and "config" not in err


def test_windows_beyond_the_models_positions(run, base, texts, tmp_path):
    positions = AutoConfig.from_pretrained(base).max_position_embeddings
    options = ["--text", texts, "--device", "cpu", "--out", tmp_path / "out", "--window", positions + 1]
    code, _, err = run("evaluate", "perplexity", base, *options)
    message = f"windows of {positions + 1} tokens are longer than the model's {positions} positions"
    assert code == 1 and message in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_numbers_of_a_model_that_was_replaced(run, base, other, texts, tmp_path, monkeypatch):
    options = ["--text", texts, "--window", "32", "--max-windows", "2", "--device", "cpu", "--out", tmp_path / "out"]
    assert run("evaluate", "perplexity", base, *options)[0] == 0
    assert run("evaluate", "perplexity", base, *options)[0] == 0
    with monkeypatch.context() as otherwise_read:
        otherwise_read.setattr("lkq_hf.text.documents.read_documents", lambda paths: [{"text": "w1 " * 80}])
        code, _, err = run("evaluate", "perplexity", base, *options)
        assert code == 1 and "other arguments (tokens_sha256 was" in err
    shutil.copy(other / "model.safetensors", base)
    code, _, err = run("evaluate", "perplexity", base, *options)
    assert code == 1 and "other arguments (sha256 was" in err and "model.safetensors" in err


def save_targets(directory, seed):
    rng = random.Random(seed)
    for part in ("train", "validation"):
        rows = [{"input_ids": rng.choices(range(160), k=12), "response_ids": rng.choices(range(160), k=4)}] * 2
        (directory / part).mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(directory / part / "shard-00000000.parquet")


@pytest.fixture
def other(base, tmp_path):
    """A model like ``base`` with other weights."""
    directory = shutil.copytree(base, tmp_path / "other")
    tiny_model(seed=1).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("options", "fits", "expected"), [
    ([], 3, [4, 2]), ([], 4, [4]), (["--device-batch-size", "2"], 1, [2]), (["--device-batch-size", "3"], 1, [2]),
])  # fmt: skip
def test_a_forward_takes_as_many_prompts_as_fit(run, base, tmp_path, monkeypatch, options, fits, expected):
    made = []

    class Noted(LookaheadTrainer):
        def __init__(self, model, args, **kwargs):
            made.append((args.per_device_train_batch_size, args.gradient_accumulation_steps))
            super().__init__(model, args, **kwargs)

    monkeypatch.setattr("lkq_hf.training.LookaheadTrainer", Noted)
    monkeypatch.setattr("lkq_hf.training.memory.prompts_that_fit", lambda trainer, most: min(fits, most))
    save_targets(tmp_path / "targets", seed=0)
    small = ["--max-steps", "1", "--num-lookahead-tokens", "2", "--batch-size", "4", "--device", "cpu"]
    small += ["--targets", tmp_path / "targets", "--out", tmp_path / "adapter", "--dtype", "float32"]
    code, _, err = run("train", base, *small, *options)
    assert code == 0, err
    assert made == [(together, 4 // together) for together in expected]


def test_a_training_goes_on_with_the_same_arguments_only(run, base, other, tmp_path):
    save_targets(tmp_path / "targets", seed=0)
    save_targets(tmp_path / "more", seed=1)
    small = ["--max-steps", "1", "--num-lookahead-tokens", "2", "--batch-size", "2", "--device", "cpu"]

    def train(model, *more):
        options = ["--targets", tmp_path / "targets", "--out", tmp_path / "adapter", "--dtype", "float32"]
        return run("train", model, *options, *small, *more)

    assert train(base)[0] == 0
    trained = (tmp_path / "adapter" / "adapter_config.json").read_text()
    code, _, err = train(base, "--device-batch-size", "1", "--save-steps", "1")
    assert code == 0, err  # neither changes the result
    for model, more, message in (
        (other, [], f"model was '{base}', now '{other}'"),
        (base, ["--learning-rate", "0.1"], "--learning-rate was 0.003, now 0.1"),
        (base, ["--rank", "4"], "r was 8, now 4"),
        (base, ["--targets", tmp_path / "more"], "targets was"),
    ):
        code, _, err = train(model, *more)
        assert code == 1 and message in err.splitlines()[-1] and "name another directory" in err
    save_targets(tmp_path / "targets", seed=1)
    code, _, err = train(base)
    assert code == 1 and "sha256 was" in err and "validation/shard-00000000.parquet" in err
    assert (tmp_path / "adapter" / "adapter_config.json").read_text() == trained
    # As earlier versions left it.
    (tmp_path / "adapter" / "checkpoints" / "run.json").unlink()
    code, _, err = train(base)
    assert code == 1 and "holds results but no run.json that says how they were made" in err


def test_prompts_of_another_mix(run, base, tmp_path):
    paragraphs = "\n\n".join(
        f"The report of section {i} says that water level {i} was read twice." for i in range(400)
    )
    (tmp_path / "documents.jsonl").write_text(
        "\n".join(json.dumps({"document": str(part), "text": f"Part {part}. {paragraphs}"}) for part in range(2))
    )
    options = ["--documents", tmp_path / "documents.jsonl", "--count", "3", "--validation-count", "1"]
    sizes = ["--min-length", "512", "--max-length", "512", "--max-new-tokens", "2", "--validation-fraction", "0.5"]
    cpu = ["--device", "cpu", "--dtype", "float32"]
    mix = ["--mix", '{"weights": {"summarise": 1}, "answer_start_share": 0}']
    code, _, err = run("generate-targets", base, *options, *sizes, *cpu, *mix, "--out", tmp_path / "targets")
    assert code == 0, err
    assert set(load_targets(tmp_path / "targets" / "train")["kind"]) == {"summarise"}
    code, _, err = run("generate-targets", base, *options, *cpu, "--mix", '{"length": 0}', "--out", tmp_path / "new")
    assert code == 1 and "answer_start_share" in err
    # The prompts of another tokenizer.
    core = json.loads((base / "tokenizer.json").read_text())
    core["model"]["vocab"] |= {"w1": 5, "w2": 4}
    (base / "tokenizer.json").write_text(json.dumps(core))
    again = ["--prompts-only", "--out", tmp_path / "targets"]
    code, _, err = run("generate-targets", base, *options, *sizes, *mix, *again)
    assert code == 1 and "tokenizer was" in err


def test_sets_of_several_seeds_hold_the_same_documents_out(run, base, tmp_path):
    documents = [
        {"document": name, "text": "\n\n".join(f"The report of {name} has a section {i}." for i in range(400))}
        for name in ("w11", "w22", "w33", "w44")
    ]
    (tmp_path / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)))
    options = ["--documents", tmp_path / "documents.jsonl", "--count", "6", "--validation-count", "6"]
    sizes = ["--min-length", "512", "--max-length", "512", "--validation-fraction", "0.3", "--prompts-only"]
    sizes += ["--mix", '{"weights": {"raw": 1}}']
    tokenizer, found = AutoTokenizer.from_pretrained(base), []
    for seed in range(4):
        out = tmp_path / str(seed)
        code, _, err = run("generate-targets", base, *options, *sizes, "--seed", seed, "--out", out)
        assert code == 0, err
        for name in ("train", "validation"):
            rows = Dataset.from_parquet(str(out / name / "prompts.parquet"))
            texts = [tokenizer.decode(row["input_ids"]) for row in rows]
            read = {each["document"] for each in documents if any(each["document"] in text for text in texts)}
            found.append((name, read))
    held_out = set.union(*(read for name, read in found if name == "validation"))
    assert len(held_out) == 1
    assert not held_out & set.union(*(read for name, read in found if name == "train"))


def test_what_cannot_be_quantized(run, base, texts, tmp_path):
    options = [
        "--dataset",
        texts,
        "--num-samples",
        "4",
        "--model-seqlen",
        "32",
        "--group-size",
        "32",
        "--device",
        "cpu",
    ]
    assert run("quantize", base, *options, "--out", tmp_path / "w4")[0] == 0
    code, _, err = run("quantize", tmp_path / "w4", *options, "--out", tmp_path / "again")
    assert (code, err) == (1, f"lkq-hf: {tmp_path / 'w4'} is quantized already; expected a model in full precision\n")
    code, _, err = run("quantize", base, *options, "--dtype", "int3", "--out", tmp_path / "other")
    assert code == 1 and "--dtype must be one of float32, bfloat16, float16, auto; got 'int3'" in err
    (tmp_path / "binary").write_bytes(b"abc\x80")
    code, _, err = run("quantize", base, *options, "--dataset", tmp_path / "binary", "--out", tmp_path / "other")
    assert code == 1 and "binary is not text: expected UTF-8" in err
