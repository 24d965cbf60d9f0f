"""Model cards: what the Hub reads in them, what people read in them, and their snippets, executed."""

import json
import re
import shutil

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel
from sharing import BASE, base_model, edit_json

from lkq_hf.hub import push_to_hub, read_contents, read_results, render_card, write_card, write_training_record
from lkq_hf.quantization.export import export_checkpoint
from lkq_hf.sharing.cards import BaseModel, is_unfilled


def run_snippet(hub, python, directory, repo_id):
    """Executes the card's code as a reader would: in a process and a directory of its own."""
    (snippet,) = re.findall(r"```python\n(.*?)```", hub.text(repo_id, "README.md"), re.DOTALL)
    return python.run(f"import os\nos.chdir({str(directory)!r})\nos.environ['HF_TOKEN'] = 'hf_alice'\n{snippet}")


@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("adapter", "checkpoint")),
        "both",
        "compressed-tensors",
    ],
)
def test_the_snippet_of_a_pushed_card_runs(hub, python, adapter, checkpoint, tmp_path, kind):
    directory = {"adapter": adapter, "checkpoint": checkpoint, "both": checkpoint}.get(kind)
    if kind == "both":
        for file in adapter.glob("adapter_*"):
            shutil.copy(file, checkpoint)
        edit_json(checkpoint / "adapter_config.json", base_model_name_or_path="alice/shared")
    if kind == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
        directory = export_checkpoint(checkpoint, tmp_path / "export", "compressed-tensors")
    push_to_hub(directory, "alice/shared")
    done = run_snippet(hub, python, tmp_path, "alice/shared")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert ("LookaheadCache" in done.stdout) == (kind == "adapter")


def test_metadata_of_an_adapters_card(hub, adapter):
    write_card(adapter, "alice/adapter")
    data = ModelCard.load(adapter / "README.md").data
    assert (data.base_model, data.base_model_relation) == (BASE, "adapter")
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert (data.license, data.language) == ("apache-2.0", "en")
    assert {"lkq-hf", "lookahead-kv"} <= set(data.tags)


def test_metadata_of_a_checkpoints_card(hub, checkpoint):
    write_card(checkpoint, "alice/w4")
    card = ModelCard.load(checkpoint / "README.md")
    assert (card.data.base_model, card.data.base_model_relation) == (BASE, "quantized")
    assert (card.data.library_name, card.data.license) == ("transformers", "apache-2.0")
    for said in ("4-bit", "| group size | 32 |", "| zero points | symmetric |", "| calibration: samples | 4 |"):
        assert said in card.text


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_the_card_of_an_export_knows_the_base_model_and_the_recipe(hub, checkpoint, tmp_path, format):
    if format == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    export = export_checkpoint(checkpoint, tmp_path / "export", format)
    write_card(export, "alice/export")
    card = ModelCard.load(export / "README.md")
    assert (card.data.base_model, card.data.license, card.data.language) == (BASE, "apache-2.0", "en")
    assert f"| base model | `{BASE}` |" in card.text and "| calibration: samples | 4 |" in card.text


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_example_unpacks_what_transformers_cannot_read_packed(checkpoint, tmp_path, symmetric):
    pytest.importorskip("compressed_tensors")
    export = export_checkpoint(checkpoint, tmp_path / "export", "compressed-tensors")
    config = json.loads((export / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = symmetric
    (export / "config.json").write_text(json.dumps(config))
    (snippet,) = re.findall(r"```python\n(.*?)```", render_card(read_contents(export), "alice/w4").text, re.DOTALL)
    compile(snippet, "card", "exec")
    assert ("CompressedTensorsConfig(dequantize=True)" in snippet) != symmetric


def test_a_license_of_its_own_name_is_inherited_whole(hub, base_directory, adapter, tmp_path):
    other = shutil.copytree(base_directory, tmp_path / "other")
    header = "---\nlicense: other\nlicense_name: our-license\nlicense_link: LICENSE.md\n---\n"
    (other / "README.md").write_text(header)
    hub.publish(BASE, other)
    write_card(adapter, "alice/adapter")
    data = ModelCard.load(adapter / "README.md").data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "our-license", "LICENSE.md")


def test_a_base_model_that_is_not_on_the_hub_is_left_out(hub, checkpoint):
    edit_json(
        checkpoint / "config.json",
        quantization_config=json.loads((checkpoint / "config.json").read_text())["quantization_config"]
        | {"meta": {"base_model": "nobody/nothing"}},
    )
    write_card(checkpoint, "alice/w4")
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.base_model is None and card.data.license is None
    assert "| base model | not recorded |" in card.text


def test_a_users_card_is_never_written_over(hub, adapter):
    mine = "---\nlicense: mit\n---\n"  # not a word of text, and still somebody's
    (adapter / "README.md").write_text(mine)
    assert not write_card(adapter, "alice/adapter")
    push_to_hub(adapter, "alice/adapter")
    assert (adapter / "README.md").read_text() == hub.text("alice/adapter", "README.md") == mine


@pytest.mark.parametrize("head", ["license: [mit", "- a list", 'title: "a\n\tb'])
def test_a_card_whose_metadata_cannot_be_read(hub, adapter, head):
    (adapter / "README.md").write_text(f"---\n{head}\n---\nMine.\n")
    with pytest.raises(ValueError, match=r"README\.md should begin with YAML between two lines of ---, found"):
        push_to_hub(adapter, "alice/adapter")


def test_the_forms_of_peft_and_transformers_are_replaced(hub, adapter):
    assert is_unfilled(ModelCard.load(adapter / "README.md")), "PEFT's form has changed"
    assert write_card(adapter, "alice/adapter")
    assert not write_card(adapter, "alice/other")
    description = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    form = ModelCard.from_template(ModelCardData(), model_description=description)
    assert is_unfilled(form)
    form.text = form.text.replace("# Model Card for Model ID", "# My model")
    assert not is_unfilled(form)


def test_results_of_an_evaluation_become_a_model_index(hub, adapter, tmp_path, caplog):
    rows = [
        {"task": "needle", "length": 512, "scorer": "full cache", "budget": None, "nll": 0.5},
        {"task": "needle", "length": 512, "scorer": "snapkv", "budget": 64, "topk_recall": 0.4},
        {"task": "needle", "length": 512, "scorer": "lookahead", "budget": 64, "topk_recall": 0.75, "examples": 8},
    ]
    (tmp_path / "results.json").write_text(json.dumps({"arguments": {}, "rows": rows, "records": []}))
    results = read_results(tmp_path / "results.json")
    push_to_hub(adapter, "alice/adapter", results=results)
    card = ModelCard.load("alice/adapter")
    push_to_hub(adapter, "alice/adapter", results=results)
    assert "the results were not added" in caplog.text
    (found,) = card.data.eval_results
    assert (found.metric_type, found.metric_value, found.dataset_name) == ("topk_recall", 0.75, "needle, 512 tokens")
    assert "| needle, 512 tokens | Recall of the oracle's top entries at budget 64 | 0.75 |" in card.text


def test_perplexity_and_training_metrics_are_read(adapter, tmp_path):
    measured = {"nll": 1.5, "perplexity": 4.4817, "kl": 0.0512, "kl_p99": 0.61, "same_top": 0.93}
    (tmp_path / "perplexity.json").write_text(json.dumps({"rows": [{"windows": 3, **measured}]}))
    results = read_results(tmp_path / "perplexity.json")
    assert {result.metric_type: result.metric_value for result in results} == measured
    text = render_card(read_contents(adapter), "alice/adapter", results=results).text
    assert "| text | KL divergence from the original model, mean (nats) | 0.0512 |" in text
    write_training_record(adapter, {"learning_rate": 0.002}, {"eval_loss": 0.1, "eval_recall@64": 0.77})
    text = render_card(read_contents(adapter), "alice/adapter", BaseModel(BASE, {})).text
    assert "| learning rate | 0.002 |" in text
    assert "| validation prompts | Recall of the oracle's top entries at budget 64 | 0.77 |" in text


def test_a_training_without_recall_still_gives_a_card(hub, adapter):
    write_training_record(adapter, {"steps": 3}, {"eval_loss": 0.1})
    push_to_hub(adapter, "alice/adapter")
    assert "| steps | 3 |" in hub.text("alice/adapter", "README.md")


@pytest.mark.parametrize("content", ["[]", "{}", '{"rows": []}', "not json"])
def test_a_file_without_results_is_refused(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json (holds no results|is not JSON|should hold a JSON object)"):
        read_results(tmp_path / "results.json")


def test_cards_have_no_gaps(hub, adapter, checkpoint, tmp_path):
    result = EvalResult("text-generation", "custom", "text", "perplexity", 9.5, metric_name="Perplexity")
    gptq = export_checkpoint(checkpoint, tmp_path / "gptq", "gptq")
    for directory in (adapter, checkpoint, gptq):
        for results in ([], [result]):
            text = render_card(read_contents(directory), "alice/shared", BaseModel(BASE, {}), results).text
            assert "None" not in text and "Undefined" not in text and "\n\n\n" not in text
            assert ("## Measured" in text) == bool(results)
            for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
                assert len({row.count("|") for row in table.splitlines()}) == 1


def test_peft_models_still_load_what_has_our_card(hub, adapter, base_directory):
    write_card(adapter, "alice/adapter")
    push_to_hub(adapter, "alice/adapter")
    PeftModel.from_pretrained(base_model(base_directory), "alice/adapter").save_pretrained(adapter)
    assert "A lookahead adapter for" in (adapter / "README.md").read_text()
