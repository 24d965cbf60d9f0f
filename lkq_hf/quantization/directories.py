"""Directories that appear whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_free(directory: Path) -> None:
    """Refuses a directory that has contents.

    Raises:
        FileExistsError: it is a file or not empty.
    """
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not an empty directory; choose another one or remove it")


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory beside `target` that takes its place when the block ends without an error.

    A process that was killed leaves it there, under a name that the next one finds and begins anew.
    """
    check_free(target)
    temporary = target.with_name(f".{target.name}.saving")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
