"""A Hub on loopback, a tiny base model on it, and an adapter and a quantized checkpoint to share."""

import os
import shutil
from urllib.parse import urlsplit

import pytest
import torch
from huggingface_hub import constants
from loopback_hub import LoopbackHub
from models import randomize_adapter, tiny_model
from peft import get_peft_model
from sharing import BASE, base_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from warm_python import WarmPython

from lkq_hf import LookaheadKVConfig, TwoStageQuantizer


@pytest.fixture(scope="session")
def server():
    server = LoopbackHub(urlsplit(os.environ["HF_ENDPOINT"]).port)
    yield server
    server.close()


@pytest.fixture(scope="session")
def python(server, tmp_path_factory):
    """Of a reader: with a home of its own, and nothing to do with this process but the Hub."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    environment |= {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path_factory.mktemp("home"))}
    with WarmPython("import peft, transformers, lkq_hf.cli, lkq_hf.hub", env=environment) as python:
        yield python


@pytest.fixture
def hub(server, base_directory, tmp_path, monkeypatch):
    """The Hub with nothing but the base model, seen by alice on a computer that has downloaded nothing."""
    server.reset()
    server.publish(BASE, base_directory)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_XET_CACHE", str(tmp_path / "xet"))
    yield server
    assert not server.leaks, "a token was sent to the host of large files"


@pytest.fixture(params=["xet", "lfs"])
def transfer(request, monkeypatch):
    """Both ways in which large files travel."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


@pytest.fixture(scope="session")
def tokenizer():
    words = {f"w{i}": i + 3 for i in range(157)}
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, **words}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="<unk>")


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory, tokenizer):
    directory = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n\n# The base\n")
    return directory


@pytest.fixture(scope="session")
def saved_adapter(tmp_path_factory, base_directory):
    directory = tmp_path_factory.mktemp("saved") / "adapter"
    config = LookaheadKVConfig(num_lookahead_tokens=5, r=4, task_type="CAUSAL_LM")
    model = get_peft_model(base_model(base_directory), config)
    randomize_adapter(model)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def saved_checkpoint(tmp_path_factory, base_directory):
    directory = tmp_path_factory.mktemp("saved") / "checkpoint"
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(f"w{n}" for n in torch.randint(0, 157, (60,), generator=generator).tolist()) for _ in range(8)]
    quantizer = TwoStageQuantizer.from_pretrained(base_directory)
    quantizer.quantize(
        directory,
        bits=4,
        group_size=32,
        dataset=texts,
        num_samples=4,
        model_seqlen=32,
        device="cpu",
        meta={"base_model": BASE},
    )
    return directory


@pytest.fixture
def adapter(saved_adapter, tmp_path):
    """A copy to push, damage or edit."""
    return shutil.copytree(saved_adapter, tmp_path / "adapter")


@pytest.fixture
def checkpoint(saved_checkpoint, tmp_path):
    """A copy to push, damage or edit."""
    return shutil.copytree(saved_checkpoint, tmp_path / "checkpoint")
