"""`lkq-hf push` as a user runs it."""

import json

import pytest
from huggingface_hub import ModelCard


@pytest.fixture
def push(hub, python):
    def push(*arguments, token=None):
        return python.run(f"""
import os, sys
from lkq_hf.cli import main

os.environ |= {{"HF_TOKEN": {token!r}}} if {token!r} else {{}}
sys.argv = {["lkq-hf", *map(str, arguments)]!r}
main()
""")

    return push


def test_it_uploads_and_prints_the_url(hub, adapter, push):
    done = push("push", adapter, "alice/adapter", "--private", "--token", "hf_alice")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{hub.url}/alice/adapter/commit/") and done.stdout.count("\n") == 1
    assert hub.repositories["alice/adapter"].private
    assert 'load_adapter("alice/adapter")' in ModelCard.load("alice/adapter").text
    assert "hf_alice" not in done.stdout + done.stderr


def test_a_pull_request_as_json(hub, adapter, tmp_path, push):
    hub.create("alice/adapter")
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"rows": [{"nll": 2.5}]}))
    done = push("push", adapter, "alice/adapter", "--create-pr", "--results", results, "--json", token="hf_bob")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["repo_id"] == "alice/adapter" and found["url"].endswith("/discussions/1")
    assert "| text | NLL | 2.5 |" in hub.text("alice/adapter", "README.md", "refs/pr/1")
    assert hub.files("alice/adapter") == set()


@pytest.mark.parametrize("debug", [False, True])
def test_a_refused_push_is_one_line_without_the_token(adapter, debug, push):
    done = push(*(["--debug"] if debug else []), "push", adapter, "alice/adapter", "--token", "hf_wrong_token")
    assert done.returncode == 1 and done.stdout == ""
    assert "lkq-hf: alice/adapter: the token is not valid" in done.stderr or debug
    assert ("Traceback" in done.stderr) == debug
    assert debug or done.stderr.count("\n") == 1
    assert "hf_wrong_token" not in done.stderr
