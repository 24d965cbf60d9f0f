"""A refused attempt leaves nothing behind, names what was typed, and says what to do."""

import json
import shutil

import pytest
from small_checkpoint import save_small_checkpoint, save_texts

CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, its adapter, and texts."""
    directory = tmp_path_factory.mktemp("files")
    save_small_checkpoint(directory / "base", directory / "adapter")
    save_texts(directory)
    return directory


@pytest.fixture(scope="module")
def targets(files, tmp_path_factory):
    from datasets import Dataset

    directory = tmp_path_factory.mktemp("targets")
    rows = [{"input_ids": list(range(3, 40 + index)), "response_ids": [4, 5, 6]} for index in range(2)]
    for part in ("train", "validation"):
        (directory / part).mkdir()
        Dataset.from_list(rows).to_parquet(directory / part / "shard-00000000.parquet")
    return directory


def refused(run, out, message, *arguments):
    code, _, err = run(*arguments, "--out", out)
    assert code == 1 and message in err.splitlines()[-1], err
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()


def test_evaluate_leaves_nothing_of_a_refused_attempt(run, files, tmp_path):
    short = ["evaluate", "eviction", files / "base", "--no-plots", *CPU]
    short += ["--tasks", "needle", "--examples", "1", "--batch-size", "1"]
    eviction = [*short, "--text", files / "handbook.txt"]
    out = tmp_path / "out"
    refused(run, out, "8192 positions", *eviction, "--length", "9000")
    refused(run, out, "evicts nothing from prompts of 320 tokens", *eviction, "--length", "320", "--budgets", "320")
    refused(run, out, "the length leaves no room", *eviction, "--length", "33", "--budgets", "8")
    small = tmp_path / "small.txt"
    small.write_text("word")
    refused(run, out, "fewer than the 320 of a prompt", *short, "--text", small, "--length", "320")
    shutil.copytree(files / "adapter", tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_shape"]["hidden_size"] = 1
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with_adapter = [*eviction, "--length", "320", "--budgets", "8", "--adapter"]
    refused(run, out, "was made for another base model", *with_adapter, tmp_path / "adapter")
    # The next attempt, with other arguments, is a first one.
    code, _, err = run(*with_adapter, files / "adapter", "--out", out)
    assert code == 0 and (out / "results.json").is_file(), err


def test_generate_targets_leaves_nothing_of_a_refused_attempt(run, files, tmp_path):
    command = [
        "generate-targets",
        files / "base",
        *CPU,
        "--dtype",
        "float32",
        "--count",
        "1",
        "--validation-count",
        "1",
    ]
    sizes = ["--min-length", "512", "--max-length", "512", "--max-new-tokens", "2"]
    out, one = tmp_path / "out", tmp_path / "one.jsonl"
    lines = (files / "texts.jsonl").read_text().splitlines()
    one.write_text("\n".join(lines[:1] * 2))
    message = 'got 2 copies of one. Split a long one, for example by chapter: a .jsonl file with one {"text"'
    refused(run, out, message, *command, *sizes, "--documents", one)
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "One."}\n{"text": "Two."}')
    refused(run, out, "fewer than the 544 of a prompt", *command, *sizes, "--documents", short)
    refused(run, out, "--min-length", *command, "--min-length", "9", "--documents", files / "texts.jsonl")
    longer = ["--max-length", "8448", "--documents", files / "texts.jsonl"]
    refused(run, out, "longer than the model's 8192 positions", *command, *longer)
    refused(run, out, "there is no device", *command, *sizes, "--documents", files / "texts.jsonl", "--device", "gpu")
    prompt = tmp_path / "prompt.jsonl"
    prompt.write_text('{"text": "the same prompt"}\n{"text": "the same prompt"}')
    refused(run, out, "holds 1 prompts, copies not counted", *command, "--prompts", prompt)
    code, _, err = run(*command, *sizes, "--documents", files / "texts.jsonl", "--out", out)
    assert code == 0, err


def test_the_longest_prompt_is_by_default_one_that_the_model_has_positions_for(run, files, tmp_path):
    base = shutil.copytree(files / "base", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 600}))
    options = ["--documents", files / "texts.jsonl", "--count", "2", "--validation-count", "1", "--prompts-only"]
    code, _, err = run("generate-targets", base, *options, "--length-step", "1", "--out", tmp_path / "out")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["mix"]["max_length"] == 600


def test_train_leaves_nothing_of_a_refused_attempt(run, files, targets, tmp_path, monkeypatch):
    command = ["train", files / "base", "--targets", targets, "--dtype", "float32", *CPU, "--max-steps", "1"]
    command += ["--num-lookahead-tokens", "2", "--rank", "2", "--batch-size", "2"]
    out = tmp_path / "out"
    refused(run, out, "--pooling-kernel-size must be odd", *command, "--pooling-kernel-size", "2")
    refused(run, out, "raise --max-repetition", *command, "--max-repetition", "-1")
    refused(run, out, "--row-power must be from 1 to 8", *command, "--row-power", "9")
    damaged = shutil.copytree(targets, tmp_path / "damaged")
    shard = damaged / "train" / "shard-00000000.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(run, out, f"{shard} is damaged", *command, "--targets", damaged)

    # What fails in the first step leaves no note that the next attempt has to agree with.
    def out_of_memory(*arguments, **options):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("lkq_hf.training.trainer.LookaheadTrainer.training_step", out_of_memory)
        code, _, err = run(*command, "--out", out)
    assert code == 1 and "out of memory" in err and not (out / "checkpoints" / "run.json").exists()
    code, _, err = run(*command, "--learning-rate", "0.01", "--out", out)
    assert code == 0 and (out / "checkpoints" / "run.json").exists(), err


def test_quantize_says_which_settings_differ_and_leaves_nothing_of_a_refused_attempt(
    run, files, tmp_path, monkeypatch
):
    command = ["quantize", files / "base", "--dataset", files / "calibration.jsonl", *CPU]
    command += ["--num-samples", "2", "--model-seqlen", "32"]
    out = tmp_path / "out"
    refused(run, out, "Name the field with --text-column", *command, "--text-column", "txt")
    refused(run, out, "--model-seqlen 9000 is more than", *command, "--model-seqlen", "9000")
    refused(run, out, "or lower --num-samples or --model-seqlen", *command, "--num-samples", "10000")
    refused(run, out, "--group-size", *command, "--group-size", "48")
    refused(run, out, "--modules-to-not-convert names 'qproj'", *command, "--modules-to-not-convert", "qproj")

    from lkq_hf.quantization.finished_blocks import FinishedBlocks

    write = FinishedBlocks.write

    def stop_after_the_first(self, index, *rest):
        write(self, index, *rest)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FinishedBlocks, "write", stop_after_the_first)
        assert run(*command, "--out", out)[0] == 130
    code, _, err = run(*command, "--bits", "3", "--num-samples", "3", "--out", out)
    assert code == 1 and "(bits was 4, now 3; " in err and "--num-samples was 2, now 3" in err
    assert run(*command, "--out", out)[0] == 0


def test_the_group_size_fits_by_default(run, tmp_path, files):
    from models import tiny_model
    from small_checkpoint import small_tokenizer
    from transformers import AutoModelForCausalLM

    command = ["--dataset", files / "calibration.jsonl", "--num-samples", "2", "--model-seqlen", "32", *CPU]
    for width, size in ((128, 128), (192, 64), (96, 32)):
        base = tmp_path / f"base{width}"
        sizes = {"hidden_size": width, "num_attention_heads": 2, "head_dim": width // 2, "intermediate_size": width}
        tiny_model(vocab_size=len(small_tokenizer()), num_hidden_layers=1, **sizes).save_pretrained(base)
        small_tokenizer().save_pretrained(base)
        code, out, err = run("quantize", base, *command, "--out", tmp_path / f"q{width}", "--json")
        assert code == 0, err
        assert json.loads(out)["group_size"] == size
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"q{width}")
        assert model.config.quantization_config.group_size == size
        assert model.model.layers[0].mlp.up_proj.group_size == size
    code, out, _ = run("quantize", tmp_path / "base96", *command, "--out", tmp_path / "again")
    assert code == 0 and "4 bits, group size 32" in out


def test_a_truncated_adapter_is_named(run, files, targets, tmp_path):
    adapter = shutil.copytree(files / "adapter", tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    out = tmp_path / "out"
    inspect = ["inspect", files / "base", "--prompt", files / "prompt.txt", "--budget", "32", *CPU]
    refused(run, out, f"{weights} is damaged or truncated", *inspect, "--adapter", adapter)
    train = ["train", files / "base", "--targets", targets, *CPU]
    refused(run, out, f"{weights} is damaged or truncated", *train, "--adapter", adapter)


def test_an_adapter_in_the_place_of_a_model_names_its_base_model(run, files, tmp_path):
    evaluate = ["evaluate", "perplexity", files / "adapter", "--text", files / "handbook.txt", *CPU]
    message = "holds an adapter and no model; expected a model, such as the adapter's base model. Pass tiny-llama"
    refused(run, tmp_path / "out", message, *evaluate)


def test_a_mark_before_utf_8_is_no_part_of_a_text(run, files, tmp_path):
    from lkq_hf.evaluation.tasks import QuestionAnswering
    from lkq_hf.files import read_json
    from lkq_hf.quantization.calibration_data import calibration_tokens
    from lkq_hf.text.documents import read_documents, read_text

    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "One text.", "question": "?", "context": "c", "answers": "a"}', encoding="utf-8-sig")
    assert read_documents([path])[0]["text"] == "One text."
    assert not read_text(path).startswith("\ufeff")
    assert read_json(path)["question"] == "?"

    class Corpus:
        tokenizer = None

    assert QuestionAnswering.from_jsonl(Corpus(), path).questions[0]["answers"] == "a"
    from small_checkpoint import small_tokenizer

    marked, plain = tmp_path / "marked.txt", tmp_path / "plain.txt"
    text = (files / "handbook.txt").read_text()
    marked.write_text(text, encoding="utf-8-sig")
    plain.write_text(text)
    tokens = [calibration_tokens(str(each), small_tokenizer(), samples=2, length=64)[0] for each in (marked, plain)]
    assert tokens[0].tolist() == tokens[1].tolist()


def test_messages_are_in_words_of_the_options():
    import typer

    from lkq_hf.cli import app
    from lkq_hf.cli.messages import in_words_of_options

    command = typer.main.get_command(app)

    def told(text, *words):
        return in_words_of_options(text, command, words)

    assert told("lower num_samples or model_seqlen=9", "quantize") == "lower --num-samples or --model-seqlen 9"
    assert told("with block_by_block=True.", "quantize") == "with --block-by-block."
    assert told("at /a/num_samples/b, num_samples.txt", "quantize") == "at /a/num_samples/b, num_samples.txt"
    assert told("raise max_new_tokens", "inspect", "m") == "raise --max-new-tokens"
    assert told("raise num_samples", "inspect", "m") == "raise num_samples"
    assert told("the batch_size", "evaluate", "perplexity") == "the --batch-size"


def test_a_repository_that_is_not_there_is_asked_for_once(run, files, tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    from lkq_hf.sharing.errors import HTTPError

    asked = []

    def unreachable(self, repo_id, *arguments, **options):
        asked.append(repo_id)
        raise HTTPError("no route")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    evaluate = ["evaluate", "perplexity", "mistyped", "--text", files / "handbook.txt", *CPU]
    refused(run, tmp_path / "out", "there is no directory mistyped, and the Hub cannot be reached", *evaluate)
    inspect = ["inspect", files / "base", "--prompt", files / "prompt.txt", "--adapter", "mistyped-adapter", *CPU]
    refused(run, tmp_path / "out", "there is no directory mistyped-adapter, and the Hub", *inspect)
    assert asked == ["mistyped", "mistyped-adapter"]
