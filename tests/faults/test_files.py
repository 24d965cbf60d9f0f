"""A file or a directory is the old one or the new one, and whole."""

import os
import stat
from functools import partial
from pathlib import Path

import pytest
import torch
from children import Killed, count_changes, full_disk, killed_at, killed_by_size, run
from safetensors.torch import load_file, save_file

from lkq_hf.files import (
    check_free,
    naming,
    new_directory,
    remove_partial,
    write_atomically,
    write_json,
)

OLD, NEW = "old\n", "new " * 1000


def replace(path):
    write_atomically(path, lambda partial: partial.write_text(NEW))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "directory" / "file.txt"
    path.parent.mkdir()
    path.write_text(OLD)
    return path


def test_a_file_takes_the_place_of_the_old_one(path):
    replace(path)
    assert path.read_text() == NEW
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_after_an_error_the_old_file_is_there_and_nothing_else(path, error):
    def fail(partial):
        partial.write_text("half")
        raise error

    with pytest.raises(error):
        write_atomically(path, fail)
    assert path.read_text() == OLD
    assert list(path.parent.iterdir()) == [path]


def test_killed_before_each_change(path):
    for change in range(count_changes(path.parent, replace, path)):
        path.write_text(OLD)
        with pytest.raises(Killed):
            run(replace, path, fault=partial(killed_at, path.parent, change))
        assert path.read_text() == OLD
        remove_partial(path.parent)
        assert list(path.parent.iterdir()) == [path]
    assert change > 2


def test_killed_in_the_middle_and_a_full_disk(path):
    with pytest.raises(Killed):
        run(replace, path, fault=partial(killed_by_size, 100))
    assert path.read_text() == OLD
    remove_partial(path.parent)
    with pytest.raises(RuntimeError, match="File too large"):
        run(replace, path, fault=partial(full_disk, 100))
    assert path.read_text() == OLD
    assert list(path.parent.iterdir()) == [path]


def save_too_much(path):
    write_atomically(path, lambda partial: save_file({"ones": torch.ones(1000)}, partial))


def new_directory_that_is_too_large(path):
    with new_directory(path) as temporary:
        save_file({"ones": torch.ones(1000)}, temporary / "model.safetensors")


def torch_save_too_much(path):
    with naming(path):
        torch.save(torch.ones(100_000), path)


@pytest.mark.parametrize("write", [replace, save_too_much, new_directory_that_is_too_large, torch_save_too_much])
def test_a_full_disk_is_told_with_the_path(write, tmp_path):
    with pytest.raises(RuntimeError) as error:
        run(write, tmp_path / "result", fault=partial(full_disk, 100))
    assert str(tmp_path / "result") in str(error.value).strip().splitlines()[-1]


def test_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="elsewhere"), naming(tmp_path):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(RuntimeError, match=r"^out of memory$"), naming(tmp_path):
        raise RuntimeError("out of memory")


def test_the_content_is_on_the_disk_before_the_name(path, monkeypatch):
    synchronized = []

    def fsync(descriptor):
        synchronized.append((os.fstat(descriptor).st_ino, path.read_text()))

    monkeypatch.setattr(os, "fsync", fsync)
    replace(path)
    assert synchronized == [(path.stat().st_ino, OLD)]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_permissions_are_those_of_any_new_file(path, mask):
    before = os.umask(mask)
    try:
        replace(path)
        write_atomically(path.with_name("tensors"), lambda partial: save_file({"ones": torch.ones(2)}, partial))
    finally:
        os.umask(before)
    assert load_file(path.with_name("tensors"))["ones"].tolist() == [1, 1]
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask, file.name


def test_two_write_the_same_file(path):
    def slower(partial):
        partial.write_text("slower")
        replace(path)
        assert path.read_text() == NEW

    write_atomically(path, slower)
    assert path.read_text() == "slower"
    assert list(path.parent.iterdir()) == [path]


def test_json(path):
    write_json(path, {"größe": [1, 2.5, None]})
    assert path.read_text(encoding="utf-8") == '{\n "größe": [\n  1,\n  2.5,\n  null\n ]\n}\n'


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "target"
    with pytest.raises(KeyboardInterrupt), new_directory(target) as temporary:
        (temporary / "half").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with new_directory(target) as temporary:
        (temporary / "whole").touch()
        assert not target.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "whole"]
    with pytest.raises(FileExistsError, match="not an empty directory"):
        check_free(target)
    with pytest.raises(FileExistsError, match="not an empty directory"), new_directory(target / "whole"):
        pass


def fill(target):
    with new_directory(target) as temporary:
        (temporary / "folder").mkdir()
        for name in ("config.json", "folder/file", "weights"):
            (temporary / name).touch()


def contents(target):
    return sorted(str(path.relative_to(target)) for path in target.rglob("*"))


@pytest.mark.parametrize("name", ["target", "link", "."])
def test_an_empty_directory_is_filled_and_stays(tmp_path, monkeypatch, name):
    """As a mount point has to, and where a shell stands."""
    target = tmp_path / "target"
    target.mkdir()
    (tmp_path / "link").symlink_to("target")
    monkeypatch.chdir(target if name == "." else tmp_path)
    before = target.stat()
    fill(Path(name))
    assert (target.stat().st_ino, target.stat().st_dev) == (before.st_ino, before.st_dev)
    assert contents(target) == ["config.json", "folder", "folder/file", "weights"]
    assert contents(tmp_path)[:2] == ["link", "target"] and (tmp_path / "link").is_symlink()


def test_a_directory_is_filled_or_empty_after_an_error(tmp_path, monkeypatch):
    rename, renamed = Path.rename, []

    def fail(path, target):
        if path.name == "config.json":
            raise KeyboardInterrupt
        renamed.append(path.name)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path)
    # Without a config.json nobody takes it for a checkpoint, if the process is killed in between.
    assert sorted(renamed) == ["folder", "weights"]
    assert contents(tmp_path) == []


def test_a_directory_begun_by_a_killed_process_begins_anew(tmp_path):
    (tmp_path / ".target.saving").mkdir()
    (tmp_path / ".target.saving" / "half").touch()
    with new_directory(tmp_path / "target") as temporary:
        assert list(temporary.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
