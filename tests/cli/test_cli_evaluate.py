import json
import os
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.real_model  # for SmolLM2's tokenizer; the models are tiny and random

SETTING = ("--length", "320", "--budgets", "16,8", "--examples", "3", "--batch-size", "2")
TASKS = "needle,variable_tracking,summarise"


def eviction(checkpoint, text, out, *more):
    arguments = ["evaluate", "eviction", checkpoint / "base", "--adapter", checkpoint / "adapter", "--text", text]
    return [*arguments, *SETTING, "--device", "cpu", "--no-plots", "--out", out, *more]


def results(directory):
    return json.loads((directory / "results.json").read_text())


def test_a_table_json_and_plots(checkpoint, text, tmp_path, run):
    pytest.importorskip("matplotlib")
    arguments = eviction(checkpoint, text, tmp_path, "--tasks", TASKS)
    arguments.remove("--no-plots")
    code, output, error = run(*arguments)
    assert code == 0, error
    found = results(tmp_path)
    assert found["arguments"]["budgets"] == [8, 16] and found["environment"]["versions"]["torch"]
    assert set(found["environment"]["hardware"]) >= {"device", "name", "processes"}
    rows = {(row["task"], row["scorer"], row["budget"]): row for row in found["rows"]}
    assert len(rows) == 3 * (1 + 2 * 4)
    for (task, scorer, budget), row in rows.items():
        assert row["examples"] == 3 and row["length"] == 320
        assert ("answer_match" in row) == (task != "summarise")
        if scorer == "full cache":
            assert budget is None and row["nll_gap"] == 0 and row["word_f1"] == row["token_agreement"] == 1
            assert row["kv_bytes"] == 320 * 3 * 2 * 2 * 16 * 4  # layers, keys and values, KV heads, head_dim, float32
            continue
        assert row["kv_bytes"] == budget * 3 * 2 * (2 * 16 + 1) * 4  # and a position for each entry
        assert [len(layer) for layer in row["entries_by_head"]] == [2, 2, 2]
        assert sum(map(sum, row["entries_by_head"])) == pytest.approx(6 * budget)
        assert row["entries_least"] == min(map(min, row["entries_by_head"])) <= budget <= row["entries_most"]
        assert 0 <= row["topk_recall"] <= 1 and 0 < row["retained_attention_mass"] < 1
        if scorer == "oracle":
            assert row["topk_recall"] == 1
            others = [rows[task, other, budget] for other in ("lookahead", "snapkv", "streaming")]
            assert row["retained_attention_mass"] > max(other["retained_attention_mass"] for other in others)
    assert output.strip() == (tmp_path / "results.md").read_text().strip()
    assert "| lookahead " in output and "summarise, 320 tokens, 3 prompts" in output
    assert "most of a head" in output
    for name in ("quality_by_budget", "nll_by_budget", "pareto", "entries_by_head"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_run_goes_on_and_other_arguments_are_refused(checkpoint, text, tmp_path, run, monkeypatch):
    from lkq_hf.evaluation.eviction import EvictionEvaluator

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    tasks = ("--tasks", "needle,summarise", "--scorers", "lookahead,oracle")
    assert run(*eviction(checkpoint, text, whole, *tasks))[0] == 0
    measured = []
    measure = EvictionEvaluator.measure

    def stopping(self, examples, max_new_tokens):
        if len(measured) == 3:
            raise OSError("no space left")
        measured.append(examples)
        return measure(self, examples, max_new_tokens)

    with monkeypatch.context() as patch:
        patch.setattr(EvictionEvaluator, "measure", stopping)
        code, _, error = run(*eviction(checkpoint, text, stopped, *tasks))
        assert code == 1 and "no space left" in error
        assert not (stopped / "results.json").exists()
        measured[:] = measured[:2]  # one more batch is left to do
        assert run(*eviction(checkpoint, text, stopped, *tasks))[0] == 0
    assert len(measured) == 3
    assert results(stopped)["rows"] == results(whole)["rows"]
    code, _, error = run(*eviction(checkpoint, text, stopped, *tasks, "--seed", "7"))
    assert code == 1
    assert "seed was 0, now 7" in error.splitlines()[-1]
    text_now = tmp_path / "text.txt"
    text_now.write_text(text.read_text() + " More.")
    code, _, error = run(*eviction(checkpoint, text_now, stopped, *tasks))
    assert code == 1 and "sha256 was" in error


@pytest.mark.slow  # tests/distributed compares them without torchrun
@pytest.mark.parametrize("command", ["eviction", "perplexity"])
def test_results_do_not_depend_on_the_number_of_processes(checkpoint, text, tmp_path, run, command):
    def arguments(out):
        if command == "eviction":
            return eviction(checkpoint, text, out, "--tasks", "needle,summarise")
        base = ["evaluate", "perplexity", checkpoint / "base", "--text", text, "--window", "128"]
        return [*base, "--batch-size", "3", "--max-windows", "11", "--device", "cpu", "--out", out]

    assert run(*arguments(tmp_path / "one"))[0] == 0
    # What `accelerate launch` runs on GPUs; for CPUs alone it would need MPI.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m"]
    process = subprocess.run(
        [*launch, "lkq_hf.cli", *map(str, arguments(tmp_path / "two"))],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert two["environment"]["hardware"]["processes"] == 2
    for key in ("arguments", "rows", *(["records"] if command == "eviction" else [])):
        assert one[key] == two[key]
    # Only one process prints.
    assert process.stdout.strip() == (tmp_path / "two" / "results.md").read_text().strip()


def test_questions_of_the_user(checkpoint, text, tmp_path, run):
    questions = tmp_path / "questions.jsonl"
    question = {"question": "Who wrote it?", "context": "Ada Byron wrote it.", "answers": ["Ada", "Byron", "Lovelace"]}
    questions.write_text(json.dumps(question) + "\n")
    arguments = eviction(checkpoint, text, tmp_path / "out", "--tasks", "question_answering")
    code, _, error = run(*arguments)
    assert code == 1 and "--questions" in error
    assert run(*arguments, "--questions", questions)[0] == 0
    records = results(tmp_path / "out")["records"]
    assert [record["reference"] for record in records] == [question["answers"]] * 3


def test_quantized_checkpoints(checkpoint, text, tmp_path, run):
    out = ["--bits", "4", "--group-size", "32", "--num-samples", "2", "--model-seqlen", "64", "--device", "cpu"]
    assert run("quantize", checkpoint / "base", "--dataset", text, "--out", tmp_path / "quantized", *out)[0] == 0
    model = tmp_path / "quantized"
    small = ["--text", text, "--device", "cpu", "--out"]
    assert run("evaluate", "perplexity", model, "--window", "64", "--max-windows", "2", *small, tmp_path / "p")[0] == 0
    base = ["evaluate", "perplexity", checkpoint / "base", "--window", "64", "--max-windows", "2", *small]
    assert run(*base, tmp_path / "b")[0] == 0
    assert results(tmp_path / "p")["rows"] != results(tmp_path / "b")["rows"]
    arguments = ["evaluate", "eviction", model, "--adapter", checkpoint / "adapter", *SETTING, "--no-plots", *small]
    code, _, error = run(*arguments, tmp_path / "e", "--tasks", "needle")
    assert code == 0, error
    assert {row["scorer"] for row in results(tmp_path / "e")["rows"]} >= {"lookahead", "oracle"}


def test_json_on_the_terminal(checkpoint, text, tmp_path, run):
    code, output, _ = run(*eviction(checkpoint, text, tmp_path, "--tasks", "needle", "--json"))
    assert code == 0
    assert json.loads(output)["rows"] == results(tmp_path)["rows"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--scorers", "lookahead,h2o"], "--scorers must be one of lookahead, snapkv, streaming, random, oracle; got"),
        (["--tasks", "riddles"], "got 'riddles'"),
        (["--budgets", "64,many"], "--budgets expects positive whole numbers of entries, or fractions"),
        (["--budgets", "0"], "positive"),
        (["--budgets", "320"], "evicts nothing"),
        (["--dtype", "int3"], "--dtype must be one of"),
    ],
)
def test_errors_are_one_line(checkpoint, text, tmp_path, run, more, message):
    code, output, error = run(*eviction(checkpoint, text, tmp_path / "out", *more))
    assert code == 1 and not output
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error


def test_the_lookahead_scorer_needs_an_adapter(checkpoint, text, tmp_path, run):
    arguments = [
        "evaluate",
        "eviction",
        checkpoint / "base",
        "--text",
        text,
        *SETTING,
        "--no-plots",
        "--device",
        "cpu",
    ]
    code, _, error = run(*arguments, "--out", tmp_path / "a", "--scorers", "lookahead")
    assert code == 1 and "needs an adapter" in error
    assert run(*arguments, "--out", tmp_path / "b", "--tasks", "needle")[0] == 0
    assert {row["scorer"] for row in results(tmp_path / "b")["rows"]} == {
        "full cache", "snapkv", "streaming", "oracle",
    }  # fmt: skip


def test_plots_need_matplotlib(checkpoint, text, tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = eviction(checkpoint, text, tmp_path / "out")
    arguments.remove("--no-plots")
    code, _, error = run(*arguments)
    assert code == 1 and "pip install lkq-hf[plots]" in error
    # Before any work is done.
    assert not (tmp_path / "out").exists()


def test_perplexity_of_windows(checkpoint, text, tmp_path, run):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = ["evaluate", "perplexity", checkpoint / "base", "--text", text, "--window", 128, "--device", "cpu"]
    code, output, _ = run(*arguments, "--max-windows", 5, "--batch-size", 2, "--out", tmp_path / "out")
    assert code == 0 and "perplexity" in output
    (row,) = results(tmp_path / "out")["rows"]
    ids = AutoTokenizer.from_pretrained(checkpoint / "base")(text.read_text(), return_tensors="pt")["input_ids"]
    windows = ids[0, : 5 * 128].view(5, 128)
    with torch.no_grad():
        loss = AutoModelForCausalLM.from_pretrained(checkpoint / "base")(windows, labels=windows).loss
    assert (row["windows"], row["tokens"]) == (5, 5 * 127)
    assert row["nll"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)
    code, _, error = run(*arguments[:-4], "--window", 100_000, "--device", "cpu", "--out", tmp_path / "more")
    assert code == 1 and "smaller window" in error


def test_divergence_from_a_reference(checkpoint, text, tmp_path, run):
    import torch
    from transformers import AutoModelForCausalLM

    changed = shutil.copytree(checkpoint / "base", tmp_path / "changed")
    model = AutoModelForCausalLM.from_pretrained(changed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(changed)
    arguments = ["evaluate", "perplexity", changed, "--text", text, "--window", 64, "--max-windows", 2]
    arguments += ["--device", "cpu", "--out"]
    code, output, error = run(*arguments, tmp_path / "out", "--reference", checkpoint / "base")
    assert code == 0, error
    (row,) = results(tmp_path / "out")["rows"]
    assert 0 < row["kl"] < row["kl_p99"] and 0 < row["same_top"] < 1
    assert f" {row['kl']:.3f} |" in output and "KL, 99th percentile" in output
    assert results(tmp_path / "out")["arguments"]["reference"]["model"] == str(checkpoint / "base")
    code, _, error = run(*arguments, tmp_path / "out")
    assert code == 1 and "reference" in error  # the same run has one
    code, _, error = run(*arguments, tmp_path / "other", "--reference", "./none")
    assert code == 1 and "no directory" in error


def test_numbers_per_head_on_prompts_from_texts(checkpoint, text, tmp_path, run):
    adapter = shutil.copytree(checkpoint / "adapter", tmp_path / "adapter")
    arguments = ["--adapter", adapter, "--text", text, "--budgets", "16,64", "--count", "3", "--dtype", "float32"]
    lengths = ["--min-length", "256", "--max-length", "300", "--device", "cpu"]
    code, output, error = run("profile", checkpoint / "base", *arguments, *lengths)
    assert code == 0, error
    assert "budget 16: heads keep from" in output and "budget 64: heads keep from" in output
    profile = json.loads((adapter / "adapter_config.json").read_text())["budget_profile"]
    assert [list(map(len, layers)) for layers in profile.values()] == [[2, 2, 2]] * 2


def test_allocations(checkpoint, text, tmp_path, run):
    adapter = shutil.copytree(checkpoint / "adapter", tmp_path / "adapter")
    arguments = ["evaluate", "eviction", checkpoint / "base", "--adapter", adapter, "--text", text, *SETTING]
    arguments += ["--tasks", "needle", "--device", "cpu", "--no-plots"]
    config = json.loads((adapter / "adapter_config.json").read_text())
    code, _, error = run(*arguments, "--allocation", "profile", "--out", tmp_path / "refused")
    assert code == 1 and "has no budget_profile" in error
    rows = [[0.5, 1.5], [1.75, 0.25], [1.0, 1.0]]
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"budget_profile": {"8": rows}}))
    for allocation in ("uniform", "profile"):
        code, _, error = run(*arguments, "--allocation", allocation, "--out", tmp_path / allocation)
        assert code == 0, error
        found = results(tmp_path / allocation)
        assert found["arguments"]["allocation"] == allocation
        for row in found["rows"]:
            if (budget := row["budget"]) is not None:  # oracle and baselines too
                shares = rows if allocation == "profile" else [[1.0, 1.0]] * 3
                assert row["entries_by_head"] == [[budget * share for share in layer] for layer in shares]
    code, _, error = run(*arguments, "--allocation", "global", "--out", tmp_path / "uniform")
    assert code == 1 and "allocation was 'uniform', now 'global'" in error
    code, _, error = run(*arguments, "--allocation", "all", "--out", tmp_path / "all")
    assert code == 1 and "--allocation must be one of" in error
