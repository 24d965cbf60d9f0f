"""What this package needs of the libraries below it, by name, and what it says when they have moved on."""

import configparser
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from models import tiny_model
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from lkq_hf import LookaheadCache, compat
from lkq_hf.cache.prepare import prepare_model_for_eviction

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("part", compat.PRIVATE_PARTS, ids=lambda part: part.partition("(")[0])
def test_a_private_part_is_where_it_was(part):
    assert compat.has_part(part)


@pytest.mark.parametrize(
    "part", ["transformers.nothing_here:Cache", "transformers:Nothing", "transformers:Cache.update(nothing)"]
)
def test_a_part_that_moved_is_noticed(part):
    assert not compat.has_part(part)


def test_the_tested_versions_are_those_of_setup_cfg_and_the_newest_constraints():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required = [Requirement(line) for line in config["options"]["install_requires"].split("\n") if line]
    oldest = {each.name: next(s.version for s in each.specifier if s.operator == ">=") for each in required}
    # In a comment: what was tested by hand.
    newest = dict(
        re.findall(r"^(?:# )?([\w-]+)==(\S+?);?(?: |$)", (ROOT / "constraints-newest.txt").read_text(), re.M)
    )
    for name, (first, last) in compat.TESTED_VERSIONS.items():
        assert (first, last) == (oldest[name], newest[name.replace("-", "_")])


@pytest.mark.parametrize("name", compat.CACHE_NAMES)
def test_a_cache_is_found_under_either_name(name):
    cache = LookaheadCache(8)
    assert compat.find_cache({"use_cache": True, name: cache}, LookaheadCache) is cache
    assert compat.find_cache({name: None}, LookaheadCache) is None
    assert compat.rename_cache({"use_cache": True, name: cache}, cache) == {
        "use_cache": True,
        compat.cache_name(): cache,
    }


def test_a_cache_is_found_in_outputs():
    cache = LookaheadCache(8)
    assert compat.find_cache(BaseModelOutputWithPast(**compat.pass_cache(cache)), LookaheadCache) is cache


def test_generate_takes_a_cache_under_either_name():
    """Also the name that this transformers does not have: its own `generate` would refuse it, or warn."""
    model = tiny_model()
    prepare_model_for_eviction(model)
    prompt = torch.randint(3, 160, (1, 40))
    answers = []
    for name in compat.CACHE_NAMES:
        cache = LookaheadCache(8, scorer="snapkv")
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            answers.append(model.generate(prompt, **{name: cache}, max_new_tokens=8, do_sample=False))
        assert cache.summary()["entries_stored"] == 8 + 7
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", compat.CACHE_NAMES)
def test_a_forward_takes_a_cache_under_the_names_that_transformers_knows(name):
    if name == "cache" != compat.cache_name():
        pytest.skip(f"this transformers has {compat.cache_name()} only")
    model = tiny_model()
    prepare_model_for_eviction(model)
    cache = LookaheadCache(8, scorer="snapkv")
    with torch.no_grad():
        model(torch.randint(3, 160, (1, 40)), **{name: cache})
    assert cache.summary()["entries_stored"] == 8


def test_an_unknown_name_for_caches_is_an_error_about_versions(monkeypatch):
    monkeypatch.setattr(compat, "CACHE_NAMES", ("kv_store",))
    compat.cache_name.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"under none of the names kv_store.*transformers 5\.17 to.*pip install"):
            prepare_model_for_eviction(tiny_model())
    finally:
        compat.cache_name.cache_clear()


def test_a_transformers_without_its_mark_of_an_attention_interface_is_an_error_about_versions(monkeypatch):
    model = tiny_model()
    monkeypatch.delattr(PreTrainedModel, "_supports_attention_backend")
    with pytest.raises(ImportError, match=r"PreTrainedModel has no _supports_attention_backend\. Found"):
        prepare_model_for_eviction(model)


def test_a_registry_without_its_mapping_is_an_error_about_versions():
    with pytest.raises(ImportError, match=r"builtins\.dict has no _local_mapping.*Found torch"):
        compat.require_parts({}, "_local_mapping")


def test_newer_libraries_are_warned_about_with_both_versions(monkeypatch):
    tested = {name: newest for name, (_, newest) in compat.TESTED_VERSIONS.items()}
    monkeypatch.setattr(compat, "version", lambda name: "99.1" if name == "peft" else tested[name])
    newest = re.escape(compat.TESTED_VERSIONS["peft"][1])
    with pytest.warns(UserWarning, match=rf"peft 99\.1 \(newest tested: {newest}\).*pip install 'peft>=0\.21,<="):
        compat.warn_of_newer_versions()


def test_a_build_of_a_tested_version_is_not_newer(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: f"{compat.TESTED_VERSIONS[name][1]}+cpu")
    assert compat.newer_versions() == {}


def test_importing_the_package_warns_of_nothing_where_all_is_tested():
    if compat.newer_versions():
        pytest.skip(f"newer than tested: {compat.newer_versions()}")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:lkq_hf", "-c", "import lkq_hf"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_failed_import_names_the_missing_part_and_the_versions(monkeypatch):
    monkeypatch.setattr(compat, "PRIVATE_PARTS", ("transformers.cache_utils:Gone",))
    with (
        pytest.raises(ImportError, match=r"missing are transformers\.cache_utils:Gone.*Found torch"),
        compat.explained_imports(),
    ):
        raise AttributeError("Gone")


def test_other_failures_of_an_import_stay_as_they_are():
    with pytest.raises(AttributeError, match=r"^a mistake of our own$"), compat.explained_imports():
        raise AttributeError("a mistake of our own")


def test_tested_versions_are_versions():
    assert all(Version(first) <= Version(last) for first, last in compat.TESTED_VERSIONS.values())
