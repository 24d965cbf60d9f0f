"""Adapters that come with the package."""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

BESIDE = Path(__file__).parents[1]
CONFIG = "adapter_config.json"


def shipped_adapter(name: str = "smollm2-135m-instruct-lookahead") -> str:
    """The directory of an adapter that comes with the package, in a clone or installed.

    Args:
        name: by default the one for HuggingFaceTB/SmolLM2-135M-Instruct. Also
            "smollm2-135m-instruct-lookahead-later", for texts that are read before anything is asked, and
            "gemma-3-270m-lookahead".

    Raises:
        FileNotFoundError: there is none of that name, or the installation has left its files out.
    """
    for directory in _places(name):
        if (directory / CONFIG).is_file():
            return str(directory)
    raise FileNotFoundError(f"no adapter {name} comes with this installation of lkq-hf; install it again with pip")


def _places(name: str) -> Iterator[Path]:
    yield BESIDE / "model_cards" / name  # a clone
    yield BESIDE / "share" / "lkq-hf" / name  # pip install --target
    try:
        files = metadata.files("lkq-hf") or []
    except metadata.PackageNotFoundError:
        return
    for file in files:
        if file.parts[-2:] == (name, CONFIG):
            yield Path(str(file.locate())).resolve().parent
