"""The note and the pieces of a run that is started again."""

import json
from functools import partial

import pytest
from children import Killed, count_changes, killed_at, killed_by_size
from children import run as in_child

from lkq_hf.files import check_free, read_json
from lkq_hf.runs import NOTE, Run, pieces_directory, read_piece

ARGUMENTS = {"seed": 0, "sizes": (1, 2), "files": {"a": "1", "b": "2"}}


def a_run(directory, **changes):
    return Run(directory, ARGUMENTS | changes, "*/piece-*.txt")


def work(directory, pieces=3):
    """Makes the pieces that are not there yet."""
    run = a_run(directory)
    made = []
    for index in range(pieces):
        if (name := f"folder/piece-{index}.txt") not in run:
            run.write(name, lambda path, index=index: path.write_text(f"{index} " * 500))
            made.append(index)
    return made


def contents(directory):
    run = a_run(directory)
    run.remove_partial()
    return [run.read(f"folder/piece-{index}.txt", lambda path: path.read_text()) for index in range(3)]


def test_pieces_are_kept_beside_a_new_directory_and_inside_one_that_is_there(tmp_path):
    target = tmp_path / "target"
    assert pieces_directory(target) == tmp_path / "target.partial"
    target.mkdir()
    assert pieces_directory(target) == target / ".partial"
    (target / ".partial").mkdir()
    check_free(target)
    (tmp_path / "target.partial").mkdir()  # of a run that began before the directory was there
    assert pieces_directory(target) == tmp_path / "target.partial"


def test_the_note_comes_with_the_first_piece_and_is_compared(tmp_path):
    directory = tmp_path / "run"
    assert a_run(directory, seed=1).arguments == {"seed": 1, "sizes": [1, 2], "files": {"a": "1", "b": "2"}}
    assert not directory.exists()
    assert work(directory, 1) == [0]
    assert read_json(directory / NOTE) == ARGUMENTS | {"sizes": [1, 2]}
    with pytest.raises(ValueError, match=r"files was \{'b': '2'\}, now \{'b': '3', 'c': '4'\}; model was 'not noted'"):
        a_run(directory, files={"a": "1", "b": "3", "c": "4"}, model="m")
    assert work(directory) == [1, 2] and work(directory) == []
    (directory / NOTE).unlink()
    with pytest.raises(ValueError, match=r"run holds results but no run\.json"):
        a_run(directory)


def test_a_process_with_other_arguments_that_began_meanwhile(tmp_path):
    here, there = a_run(tmp_path), a_run(tmp_path, seed=1)
    there.begin()
    with pytest.raises(ValueError, match="seed was 1, now 0"):
        here.write("folder/piece-0.txt", lambda path: path.write_text("0"))
    assert [path.name for path in tmp_path.iterdir()] == [NOTE]


def test_killed_before_each_change(tmp_path):
    assert work(tmp_path / "expected") == [0, 1, 2]
    changes = count_changes(tmp_path, work, tmp_path / "counted")
    assert changes > 6
    for change in range(changes):
        directory = tmp_path / str(change)
        with pytest.raises(Killed):
            in_child(work, directory, fault=partial(killed_at, directory, change))
        work(directory)
        assert contents(directory) == contents(tmp_path / "expected")


def test_killed_in_the_middle_of_a_piece(tmp_path):
    with pytest.raises(Killed):
        in_child(work, tmp_path, fault=partial(killed_by_size, 600))
    assert read_json(tmp_path / NOTE) == ARGUMENTS | {"sizes": [1, 2]} and work(tmp_path) == [0, 1, 2]


def test_a_damaged_piece(tmp_path):
    path = tmp_path / "piece.json"
    path.write_text('{"half": ')
    with pytest.raises(ValueError, match=r"piece\.json is damaged .*; delete it, and the run makes it again"):
        read_piece(path, lambda path: json.loads(path.read_text()))
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_piece(path, lambda path: path.read_text())


def test_one_that_only_reads_and_one_that_keeps_nothing(tmp_path):
    reader = Run(tmp_path, ARGUMENTS, "piece-*", writes=False)
    nowhere = Run(None, ARGUMENTS, "piece-*")
    for run in (reader, nowhere):
        run.write("piece-0", lambda path: path.write_text("0"))
        run.begin()
        assert "piece-0" not in run
        with pytest.raises(FileNotFoundError):
            run.read("piece-0", lambda path: path.read_text())
    assert list(tmp_path.iterdir()) == []
