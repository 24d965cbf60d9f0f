"""Killed at any moment while a cache is saved, or with the disk full: the old cache is there or the new one, whole."""

from contextlib import suppress
from functools import partial

import pytest
import torch
from children import Killed, count_changes, full_disk, killed_at, killed_by_size, run
from models import lookahead_model, prompt_ids

from lkq_hf import LookaheadCache


def read(length):
    model, cache = lookahead_model(), LookaheadCache(budget=8)
    with torch.no_grad():
        model(prompt_ids(1, length), past_key_values=cache)
    return model, cache


def save(directory, length=50):
    read(length)[1].save_pretrained(directory)


def length_of(directory):
    return LookaheadCache.from_pretrained(directory, lookahead_model()).get_seq_length()


@pytest.fixture
def directory(tmp_path):
    save(tmp_path / "cache", length=40)
    return tmp_path / "cache"


def assert_whole(directory, lengths=(40, 50)):
    assert length_of(directory) in lengths
    save(directory, length=60)
    assert length_of(directory) == 60
    assert sorted(path.suffix for path in directory.iterdir()) == [".json", ".safetensors"], "nothing else is left"


def test_killed_before_each_change(directory):
    found = []
    changes = count_changes(directory, save, directory)
    assert changes > 5
    for change in range(changes):
        save(directory, length=40)
        with pytest.raises(Killed, match="SIGKILL"):
            run(save, directory, fault=partial(killed_at, directory, change))
        found.append(length_of(directory))
        assert_whole(directory)
    assert set(found) == {40, 50} and sorted(found) == found  # the old one, up to the moment when the new one is there


@pytest.mark.parametrize("size", [0, 500, 4000])
def test_killed_in_the_middle_of_a_file(directory, size):
    with pytest.raises(Killed):
        run(save, directory, fault=partial(killed_by_size, size))
    assert_whole(directory, [40])


@pytest.mark.parametrize("size", [0, 500, 4000])
def test_the_disk_is_full(directory, size):
    with pytest.raises(RuntimeError, match=r"File too large|No space|SafetensorError|I/O"):
        run(save, directory, fault=partial(full_disk, size))
    assert_whole(directory, [40])


def test_killed_while_the_first_one_is_saved(tmp_path):
    changes = count_changes(tmp_path, save, tmp_path / "first")
    for change in range(changes):
        directory = tmp_path / f"killed-{change}"
        with pytest.raises(Killed):
            run(save, directory, fault=partial(killed_at, directory, change))
        with suppress(FileNotFoundError):  # nothing is there yet
            assert length_of(directory) == 50
        save(directory, length=60)
        assert length_of(directory) == 60
