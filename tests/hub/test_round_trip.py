"""Pushing and loading by id, through the real client of the Hub and the protocol it speaks."""

import copy
import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from models import needs_adapter_methods, prompt_ids
from peft import PeftModel
from real_models import load_smollm2
from safetensors.torch import load_file
from sharing import BASE, base_model, edit_json
from transformers import AutoModelForCausalLM, AutoTokenizer

from lkq_hf import LookaheadCache
from lkq_hf.adapter.model import adapter_parameters
from lkq_hf.compat import adapter_methods_work
from lkq_hf.hub import load_adapter, push_to_hub
from lkq_hf.quantization import QuantizedLinear

IDS = prompt_ids(1, 60)


def tokens_of(model):
    return next(value for name, value in adapter_parameters(model, "default").items() if "tokens" in name)


def saved_tokens(directory):
    return next(
        value for name, value in load_file(directory / "adapter_model.safetensors").items() if "tokens" in name
    )


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_an_adapter_is_pushed_and_loaded_by_its_id(hub, transfer, adapter):
    commit = push_to_hub(adapter, "alice/adapter")
    assert commit.commit_url.startswith(f"{hub.url}/alice/adapter/commit/")
    assert hub.files("alice/adapter") == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    expected = saved_tokens(adapter)

    native = AutoModelForCausalLM.from_pretrained(BASE)
    native.load_adapter("alice/adapter")
    ours = AutoModelForCausalLM.from_pretrained(BASE)
    load_adapter(ours, "alice/adapter")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "alice/adapter")
    whole = AutoModelForCausalLM.from_pretrained("alice/adapter")  # with the base model it names
    for model in (native, ours, peft, whole):
        torch.testing.assert_close(tokens_of(model), expected)
    output = native.generate(IDS, past_key_values=LookaheadCache(budget=16), max_new_tokens=4, do_sample=False)
    assert output.shape[1] == IDS.shape[1] + 4
    uploads = [line for line in hub.log if "/xorbs/" in line]
    assert bool(uploads) == (transfer == "xet")


def test_a_checkpoint_is_pushed_and_loaded_by_its_id(hub, transfer, checkpoint):
    push_to_hub(checkpoint, "alice/w4")
    model = AutoModelForCausalLM.from_pretrained("alice/w4")
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    torch.testing.assert_close(logits(model), logits(AutoModelForCausalLM.from_pretrained(checkpoint)))
    assert AutoTokenizer.from_pretrained("alice/w4")("w1 w2")["input_ids"] == [4, 5]


@pytest.mark.parametrize("kind", [pytest.param("native", marks=needs_adapter_methods), "peft"])
def test_push_to_hub_of_a_model_with_an_adapter_writes_our_card(hub, adapter, base_directory, kind):
    model = base_model(base_directory)
    if kind == "peft":
        model = PeftModel.from_pretrained(model, adapter)
    else:
        model.load_adapter(str(adapter))
    model.push_to_hub("alice/pushed")
    card = ModelCard.load("alice/pushed")
    assert card.data.base_model == BASE and card.data.license == "apache-2.0"
    assert 'model.load_adapter("alice/pushed")' in card.text
    again = AutoModelForCausalLM.from_pretrained(BASE)
    again.load_adapter("alice/pushed")
    torch.testing.assert_close(tokens_of(again), saved_tokens(adapter))


@pytest.mark.parametrize("route", ["push_to_hub", "save_pretrained"])
def test_push_to_hub_of_a_quantized_model_writes_our_card(hub, checkpoint, tmp_path, route):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    if route == "push_to_hub":
        model.push_to_hub("alice/pushed", private=True)
    else:
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="alice/pushed", private=True)
    AutoTokenizer.from_pretrained(checkpoint).push_to_hub("alice/pushed")
    card = ModelCard.load("alice/pushed")
    assert card.data.base_model_relation == "quantized"
    assert 'AutoModelForCausalLM.from_pretrained("alice/pushed")' in card.text
    assert hub.repositories["alice/pushed"].private
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained("alice/pushed")), logits(model))


def test_a_card_on_the_hub_survives_every_kind_of_push(hub, adapter, base_directory):
    mine = "---\nlicense: mit\n---\n\n# Mine\n"
    push_to_hub(adapter, "alice/adapter")
    HfApi().upload_file(path_or_fileobj=mine.encode(), path_in_repo="README.md", repo_id="alice/adapter")
    form = (adapter / "README.md").read_text()
    push_to_hub(adapter, "alice/adapter")
    assert hub.text("alice/adapter", "README.md") == mine
    assert (adapter / "README.md").read_text() == form, "a push leaves the directory as it is"
    (adapter / "README.md").unlink()
    push_to_hub(adapter, "alice/adapter")
    assert hub.text("alice/adapter", "README.md") == mine
    if adapter_methods_work():
        model = base_model(base_directory)
        model.load_adapter(str(adapter))
    else:
        model = PeftModel.from_pretrained(base_model(base_directory), adapter)
    model.push_to_hub("alice/adapter")
    assert "# Mine" in hub.text("alice/adapter", "README.md")


def test_a_private_repository_opens_to_its_token_alone(hub, transfer, adapter, monkeypatch, base_directory):
    monkeypatch.delenv("HF_TOKEN")
    push_to_hub(adapter, "alice/secret", private=True, token="hf_alice")
    assert hub.repositories["alice/secret"].private
    model = base_model(base_directory)
    with pytest.raises(FileNotFoundError, match=r"no repository alice/secret.*hf auth login"):
        load_adapter(model, "alice/secret")
    with pytest.raises(FileNotFoundError, match=r"needs a token with access"):
        load_adapter(model, "alice/secret", token="hf_bob")
    with pytest.raises(PermissionError, match="the token is not valid"):
        load_adapter(model, "alice/secret", token="hf_expired")
    load_adapter(model, "alice/secret", token="hf_alice")
    torch.testing.assert_close(tokens_of(model), saved_tokens(adapter))


def test_a_branch_leaves_main_alone(hub, adapter, base_directory):
    hub.create("alice/adapter")
    push_to_hub(adapter, "alice/adapter", revision="feat/x")
    assert hub.files("alice/adapter") == set()
    assert "adapter_model.safetensors" in hub.files("alice/adapter", "feat/x")
    model = base_model(base_directory)
    with pytest.raises(ValueError, match="should hold a LOOKAHEAD_KV adapter; found neither"):
        load_adapter(model, "alice/adapter")
    load_adapter(model, "alice/adapter", revision="feat/x")
    PeftModel.from_pretrained(base_model(base_directory), "alice/adapter", revision="feat/x")


def test_a_tag_and_a_commit_name_a_version(hub, adapter, base_directory):
    first = push_to_hub(adapter, "alice/adapter")
    HfApi().create_tag("alice/adapter", tag="v1")
    hub.repositories["alice/adapter"].add("refs/heads/main", "emptied", {})
    for revision in ("v1", first.oid):
        load_adapter(base_model(base_directory), "alice/adapter", revision=revision)


def test_a_pull_request_to_a_repository_of_another_user(hub, transfer, adapter, base_directory):
    hub.create("alice/adapter")
    commit = push_to_hub(adapter, "alice/adapter", create_pr=True, token="hf_bob")
    assert commit.pr_url == f"{hub.url}/alice/adapter/discussions/1"
    assert hub.files("alice/adapter") == set()
    model = base_model(base_directory)
    load_adapter(model, "alice/adapter", revision="refs/pr/1")
    torch.testing.assert_close(tokens_of(model), saved_tokens(adapter))


def test_an_interrupted_upload_goes_on(hub, transfer, saved_checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved_checkpoint)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    AutoTokenizer.from_pretrained(saved_checkpoint).save_pretrained(tmp_path / "sharded")
    shards = {sha256(path) for path in (tmp_path / "sharded").glob("*.safetensors")}
    first = sha256(tmp_path / "sharded" / "model-00001-of-00002.safetensors")
    where = "/cas/v1/shards" if transfer == "xet" else f"{first}?part=2"
    hub.failure = lambda method, path: where in path
    with pytest.raises(ConnectionError, match=r"the upload to alice/w4 was interrupted.*push again"):
        push_to_hub(tmp_path / "sharded", "alice/w4")
    assert hub.files("alice/w4") == set()
    stored = set(hub.objects)
    assert stored == (shards - {first} if transfer == "lfs" else set())
    hub.failure = None
    hub.log.clear()
    push_to_hub(tmp_path / "sharded", "alice/w4")
    assert not [line for line in hub.log if line.startswith("PUT") and any(oid in line for oid in stored)]
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained("alice/w4")), logits(model))


def test_pushing_again_sends_and_commits_nothing(hub, transfer, adapter):
    push_to_hub(adapter, "alice/adapter")
    head = hub.repositories["alice/adapter"].resolve("main").oid
    hub.log.clear()
    push_to_hub(adapter, "alice/adapter")
    assert hub.repositories["alice/adapter"].resolve("main").oid == head
    assert not [line for line in hub.log if line.startswith("PUT") or "/xorbs/" in line or "/commit/" in line]


def test_weights_in_one_file_replace_those_in_several(hub, saved_checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved_checkpoint)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    AutoTokenizer.from_pretrained(saved_checkpoint).save_pretrained(tmp_path / "sharded")
    for directory, several in ((saved_checkpoint, False), (tmp_path / "sharded", True), (saved_checkpoint, False)):
        push_to_hub(shutil.copytree(directory, tmp_path / f"copy-{len(hub.log)}"), "alice/w4")
        weights = {name for name in hub.files("alice/w4") if name.endswith(".safetensors")}
        assert (
            ("model.safetensors" not in weights and len(weights) > 1) if several else weights == {"model.safetensors"}
        )
        assert ("model.safetensors.index.json" in hub.files("alice/w4")) == several


def test_what_was_loaded_once_loads_offline(hub, transfer, adapter, checkpoint, monkeypatch):
    push_to_hub(adapter, "alice/adapter")
    push_to_hub(checkpoint, "alice/w4")

    def load():
        model = AutoModelForCausalLM.from_pretrained("alice/w4")
        load_adapter(model, "alice/adapter")
        return tokens_of(model), logits(model), AutoTokenizer.from_pretrained("alice/w4")("w3")["input_ids"]

    online = load()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    torch.testing.assert_close(load(), online)
    assert hub.log == []
    with pytest.raises(ConnectionError, match="the cache does not hold it"):
        load_adapter(AutoModelForCausalLM.from_pretrained("alice/w4"), "alice/other")


def test_one_repository_with_an_adapter_and_its_quantized_base(hub, transfer, adapter, checkpoint):
    for file in adapter.glob("adapter_*"):
        shutil.copy(file, checkpoint)
    with pytest.raises(ValueError, match=r'set "base_model_name_or_path" to "alice/both"'):
        push_to_hub(checkpoint, "alice/both")
    edit_json(checkpoint / "adapter_config.json", base_model_name_or_path="alice/both")
    push_to_hub(checkpoint, "alice/both")
    model = AutoModelForCausalLM.from_pretrained("alice/both")
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    torch.testing.assert_close(tokens_of(model), saved_tokens(adapter))
    model.generate(IDS, past_key_values=LookaheadCache(budget=16), max_new_tokens=2)


def test_an_adapter_in_a_folder_beside_its_quantized_base(hub, adapter, checkpoint):
    shutil.copytree(adapter, checkpoint / "lookahead")
    push_to_hub(checkpoint, "alice/both")
    model = AutoModelForCausalLM.from_pretrained("alice/both")
    load_adapter(model, "alice/both", subfolder="lookahead")
    torch.testing.assert_close(tokens_of(model), saved_tokens(adapter))


def test_a_trainers_state_stays_at_home(hub, adapter):
    state = adapter / "checkpoints" / "checkpoint-1"
    state.mkdir(parents=True)
    (state / "optimizer.pt").write_bytes(b"pickle")
    (adapter / ".secret").write_text("mine")
    push_to_hub(adapter, "alice/adapter")
    assert hub.files("alice/adapter") == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_the_adapters_config_holds_no_path_of_this_computer(hub, adapter):
    push_to_hub(adapter, "alice/adapter")
    assert json.loads(hub.text("alice/adapter", "adapter_config.json"))["base_model_name_or_path"] == BASE


def test_a_model_that_was_saved_is_copied_and_pickled_as_before(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.save_pretrained(tmp_path / "saved")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin._upload_modified_files.__self__ is twin
        torch.testing.assert_close(logits(twin), logits(model))


@pytest.mark.real_model
def test_the_adapter_of_smollm2(hub, transfer, tmp_path):
    model, tokenizer = load_smollm2()
    published = Path(__file__).parents[2] / "model_cards" / "smollm2-135m-instruct-lookahead"
    adapter = shutil.copytree(published, tmp_path / "adapter")
    (adapter / "README.md").unlink()
    hub.create("HuggingFaceTB/SmolLM2-135M-Instruct")
    push_to_hub(adapter, "alice/smollm2-lookahead")
    assert ModelCard.load("alice/smollm2-lookahead").data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    load_adapter(model, "alice/smollm2-lookahead")
    torch.testing.assert_close(tokens_of(model), saved_tokens(adapter).float())
    inputs = tokenizer("The fox keeps its key under the third stone. " * 40, return_tensors="pt")
    cache = LookaheadCache(budget=64)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False)
