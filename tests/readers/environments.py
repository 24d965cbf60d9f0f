"""Environments of other engines, which want other versions of the libraries than this package does."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def build(directory: Path, packages: Sequence[str], unwanted: Sequence[str] = (), then: Sequence[str] = ()) -> Path:
    """The interpreter of an environment with these packages; made by pip unless it is there already.

    Args:
        directory: of the environment.
        packages: requirements, as pip takes them.
        unwanted: packages to remove afterwards.
        then: what pip installs after `packages`, with its options.
    """
    python = directory / "bin" / "python"
    if not (directory / "ready").is_file():
        pip = [str(python), "-m", "pip"]
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        subprocess.run([*pip, "install", "--quiet", *packages], check=True)
        if then:
            subprocess.run([*pip, "install", "--quiet", *then], check=True)
        if unwanted:
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", *unwanted], check=True)
        (directory / "ready").touch()
    return python


def run(python: Path, script: str, *arguments: object, **variables: str) -> str:
    """What a script of an engine prints, run with an interpreter of its own and without this package.

    Raises:
        AssertionError: it failed; the message is the end of what it printed.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_ENDPOINT")}
    environment |= {"HF_HUB_OFFLINE": "1", **variables}
    found = subprocess.run(
        [str(python), "-c", script, *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return found.stdout
