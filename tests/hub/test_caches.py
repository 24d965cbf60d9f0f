"""A compressed cache travels over the Hub."""

import re

import pytest
import torch
from models import prompt_ids
from sharing import BASE, base_model
from transformers import AutoModelForCausalLM

from lkq_hf import LookaheadCache, prepare_model_for_eviction
from lkq_hf.hub import push_cache

IDS = prompt_ids(1, 60)


def read(model, length=60, **options):
    cache = LookaheadCache(**{"budget": 8, "scorer": "snapkv"} | options)
    prepare_model_for_eviction(model)
    with torch.no_grad():
        model(IDS[:, :length], past_key_values=cache)
    return cache


def answer(model, cache):
    ids = torch.cat([IDS[:, : cache.get_seq_length()], prompt_ids(1, 5, seed=1)], dim=1)
    return model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)


@pytest.fixture
def model(hub, base_directory):
    return base_model(base_directory)


def test_a_cache_is_pushed_and_loaded_by_its_id(hub, transfer, model):
    cache = read(model)
    commit = cache.push_to_hub("alice/handbook")
    assert commit.commit_url.startswith(f"{hub.url}/alice/handbook/commit/")
    files = hub.files("alice/handbook")
    assert len(files) == 3 and {"README.md", "lookahead_cache.json"} < files
    other = AutoModelForCausalLM.from_pretrained(BASE)
    loaded = LookaheadCache.from_pretrained("alice/handbook", other)
    assert torch.equal(answer(other, loaded), answer(model, cache))


def test_a_second_push_replaces_the_first_and_leaves_the_card(hub, model):
    read(model).push_to_hub("alice/handbook", input_ids=IDS)
    before = hub.files("alice/handbook")
    card = hub.repositories["alice/handbook"].resolve("main").files["README.md"]
    first = hub.repositories["alice/handbook"].refs["refs/heads/main"]
    push_cache(read(model, 50), "alice/handbook", commit_message="Shorter")
    after = hub.files("alice/handbook")
    assert len(before) == len(after) == 3 and before != after
    assert hub.repositories["alice/handbook"].resolve("main").files["README.md"] == card
    assert LookaheadCache.from_pretrained("alice/handbook", model).get_seq_length() == 50
    assert LookaheadCache.from_pretrained("alice/handbook", model, revision=first).get_seq_length() == 60


def test_branches_pull_requests_and_private_repositories(hub, model):
    read(model).push_to_hub("alice/handbook", private=True)
    with pytest.raises(FileNotFoundError, match="needs a token with access"):
        LookaheadCache.from_pretrained("alice/handbook", model, token="hf_bob")
    read(model, 50).push_to_hub("alice/handbook", revision="short")
    assert LookaheadCache.from_pretrained("alice/handbook", model, revision="short").get_seq_length() == 50
    assert LookaheadCache.from_pretrained("alice/handbook", model).get_seq_length() == 60
    assert hub.repositories["alice/handbook"].private
    pull_request = read(model, 40).push_to_hub("alice/handbook", create_pr=True)
    assert pull_request.pr_revision == "refs/pr/1"
    assert LookaheadCache.from_pretrained("alice/handbook", model, revision="refs/pr/1").get_seq_length() == 40
    with pytest.raises(PermissionError, match="token is not valid"):
        read(model).push_to_hub("alice/handbook", token="hf_nobody")


def test_what_was_loaded_once_loads_offline(hub, model, monkeypatch):
    read(model).push_to_hub("alice/handbook")
    LookaheadCache.from_pretrained("alice/handbook", model)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert LookaheadCache.from_pretrained("alice/handbook", model).get_seq_length() == 60
    with pytest.raises(ConnectionError, match="cannot be reached"):
        LookaheadCache.from_pretrained("alice/other", model)


def test_what_holds_no_cache(hub, model, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no repository alice/nothing"):
        LookaheadCache.from_pretrained("alice/nothing", model)
    with pytest.raises(FileNotFoundError, match=f"{BASE} holds no saved cache"):
        LookaheadCache.from_pretrained(BASE, model)
    with pytest.raises(FileNotFoundError, match=r"there is no directory .*nothing"):
        LookaheadCache.from_pretrained(tmp_path / "nothing", model)
    with pytest.raises(ValueError, match="not the id of a repository"):
        LookaheadCache.from_pretrained("what is this?", model)
    read(model).push_to_hub("alice/handbook")
    with pytest.raises(FileNotFoundError, match="no branch, tag or commit 'v2'"):
        LookaheadCache.from_pretrained("alice/handbook", model, revision="v2")


@pytest.mark.parametrize("options", [{}, {"park": "cpu", "budget": 0.2}])
def test_the_snippet_of_the_card_runs(hub, model, options, capsys):
    read(model, **options).push_to_hub("alice/handbook")
    repository = hub.repositories["alice/handbook"].resolve("main")
    card = hub.blobs[repository.files["README.md"].oid].decode()
    assert "60 tokens in 0." in card and "snapkv" in card and "lookahead-cache" in card
    assert ("saved: later turns" in card) == ("park" in options)
    assert not re.search(r"\n\n\n|\{\{|\{%|None|[ \t]\n", card)
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(block, "card", "exec"), {})
    assert capsys.readouterr().out.strip()
