"""What a user is told when a repository, a token or a directory is not what it should be."""

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sharing import BASE, base_model, edit_json

from lkq_hf import LookaheadCache
from lkq_hf.hub import adapter_config, load_adapter, push_to_hub, read_contents


@pytest.fixture
def lora(base_directory, tmp_path):
    model = base_model(base_directory)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


class TestLoading:
    def test_a_missing_repository(self, hub, base_directory):
        with pytest.raises(
            FileNotFoundError, match=r"no repository alice/nothing on the Hub, or it is private: check"
        ):
            load_adapter(base_model(base_directory), "alice/nothing")

    def test_a_missing_revision(self, hub, adapter, base_directory):
        push_to_hub(adapter, "alice/adapter")
        with pytest.raises(FileNotFoundError, match="alice/adapter has no branch, tag or commit 'v9'"):
            load_adapter(base_model(base_directory), "alice/adapter", revision="v9")

    @pytest.mark.parametrize("token", ["hf_bob", False])
    def test_a_gated_repository(self, hub, adapter, token):
        hub.publish("alice/gated", adapter, gated=True)
        with pytest.raises(PermissionError, match="alice/gated is gated: ask for access on its page"):
            adapter_config("alice/gated", token=token)
        assert adapter_config("alice/gated", token="hf_alice")["num_lookahead_tokens"] == 5

    def test_a_plain_model(self, hub):
        with pytest.raises(ValueError, match=r"alice/base should hold a LOOKAHEAD_KV adapter; found a model without"):
            adapter_config(BASE)

    def test_an_empty_repository(self, hub):
        hub.create("alice/empty")
        with pytest.raises(ValueError, match=r"found neither an adapter_config\.json nor a config\.json"):
            adapter_config("alice/empty")

    def test_an_adapter_of_another_type(self, hub, lora, base_directory):
        hub.publish("alice/lora", lora)
        model = base_model(base_directory)
        with pytest.raises(ValueError, match=r"alice/lora should hold a LOOKAHEAD_KV adapter; found one of type LORA"):
            load_adapter(model, "alice/lora")
        # transformers' own way loads it, and the cache refuses to work with it
        model.load_adapter("alice/lora")
        with pytest.raises(ValueError, match=r"LOOKAHEAD_KV|lookahead"):
            model.generate(torch.arange(3, 40)[None], past_key_values=LookaheadCache(budget=8), max_new_tokens=2)

    def test_what_is_not_an_id(self, hub):
        with pytest.raises(ValueError, match="is not the id of a repository"):
            adapter_config("a/b/c")

    def test_directories_are_told_apart_too(self, adapter, lora, base_directory):
        assert adapter_config(adapter)["peft_type"] == "LOOKAHEAD_KV"
        with pytest.raises(ValueError, match="found one of type LORA"):
            adapter_config(lora)
        with pytest.raises(ValueError, match="found a model without an adapter"):
            adapter_config(base_directory)


class TestPushing:
    def test_without_a_token(self, hub, adapter, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(PermissionError, match=r"alice/adapter: a token is needed .*hf auth login"):
            push_to_hub(adapter, "alice/adapter")

    def test_with_a_token_that_is_not_valid(self, hub, adapter):
        with pytest.raises(PermissionError, match="alice/adapter: the token is not valid") as refused:
            push_to_hub(adapter, "alice/adapter", token="hf_wrong")
        assert "hf_wrong" not in str(refused.value)

    @pytest.mark.parametrize("token", ["hf_reader", "hf_bob"])
    def test_with_a_token_that_may_not_write(self, hub, adapter, token):
        with pytest.raises(PermissionError, match="alice/adapter: no right to do that"):
            push_to_hub(adapter, "alice/adapter", token=token)
        assert "alice/adapter" not in hub.repositories

    @pytest.mark.parametrize("token", ["hf_reader", "hf_bob"])
    def test_to_an_existing_repository_without_the_right(self, hub, adapter, token):
        hub.create("alice/adapter")
        with pytest.raises(PermissionError, match="alice/adapter: no right to do that"):
            push_to_hub(adapter, "alice/adapter", token=token)
        assert hub.files("alice/adapter") == set()

    @pytest.mark.parametrize("name", ["/home/somebody/model", "nobody/nothing", "model"])
    def test_an_adapter_whose_base_nobody_finds(self, hub, adapter, name):
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=name)
        with pytest.raises(FileNotFoundError, match=rf"names '{name}' as the base model, and the Hub shows no model"):
            push_to_hub(adapter, "alice/adapter")
        assert "alice/adapter" not in hub.repositories

    def test_when_nobody_answers(self, hub, adapter, monkeypatch):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(ConnectionError, match="the Hub cannot be reached for alice/adapter"):
            push_to_hub(adapter, "alice/adapter")


class TestDirectories:
    """Refused before anything is sent."""

    def refuses(self, hub, directory, error, match):
        hub.log.clear()
        with pytest.raises(error, match=match):
            push_to_hub(directory, "alice/refused")
        assert hub.log == []

    def test_no_directory(self, hub, tmp_path):
        self.refuses(hub, tmp_path / "none", NotADirectoryError, "is not a directory")

    def test_something_else(self, hub, tmp_path, base_directory, lora):
        self.refuses(hub, tmp_path, ValueError, r"should hold a LOOKAHEAD_KV adapter .*; found neither")
        self.refuses(hub, base_directory, ValueError, "found a model with quant_method None")
        self.refuses(hub, lora, ValueError, "an adapter of type LORA, expected LOOKAHEAD_KV")

    def test_missing_weights(self, hub, adapter, checkpoint):
        (adapter / "adapter_model.safetensors").unlink()
        self.refuses(hub, adapter, FileNotFoundError, r"not complete: it should hold adapter_model\.safetensors")
        (checkpoint / "model.safetensors").unlink()
        self.refuses(hub, checkpoint, FileNotFoundError, r"not complete: it should hold model\.safetensors")

    def test_a_missing_shard(self, hub, checkpoint):
        (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
        index = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
        (checkpoint / "model.safetensors.index.json").write_text(index)
        self.refuses(hub, checkpoint, FileNotFoundError, r"should hold model-00002-of-00002\.safetensors")

    def test_no_tokenizer(self, hub, checkpoint):
        for file in checkpoint.glob("tokenizer*"):
            file.unlink()
        self.refuses(hub, checkpoint, FileNotFoundError, "has no tokenizer")

    def test_truncated_weights(self, hub, adapter, checkpoint):
        for directory, name in ((adapter, "adapter_model.safetensors"), (checkpoint, "model.safetensors")):
            content = (directory / name).read_bytes()
            (directory / name).write_bytes(content[: len(content) // 2])
            self.refuses(hub, directory, ValueError, "damaged or truncated")

    def test_weights_of_another_config(self, hub, adapter, checkpoint):
        edit_json(adapter / "adapter_config.json", num_lookahead_tokens=6)
        self.refuses(hub, adapter, ValueError, "should hold 6 lookahead tokens")
        tensors = load_file(checkpoint / "model.safetensors")
        del tensors[next(name for name in tensors if name.endswith("qweight"))]
        save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
        self.refuses(hub, checkpoint, ValueError, "the checkpoint has no .*qweight")

    def test_pickles(self, hub, adapter):
        (adapter / "training_args.bin").write_bytes(b"pickle")
        self.refuses(hub, adapter, ValueError, r"holds training_args\.bin: a pickle can run code")

    def test_a_config_that_is_not_json(self, hub, adapter):
        (adapter / "adapter_config.json").write_text("{")
        self.refuses(hub, adapter, ValueError, r"adapter_config\.json is not JSON")


def test_contents_say_what_is_there(adapter, checkpoint):
    assert read_contents(adapter).checkpoint is None and read_contents(adapter).base_model == BASE
    assert read_contents(checkpoint).adapter is None and read_contents(checkpoint).base_model == BASE
