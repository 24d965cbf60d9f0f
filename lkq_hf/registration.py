"""Registers this package with PEFT and transformers when those are imported.

Both take seconds to import, so `import lkq_hf` imports neither. A library that is imported already is dealt with at
once. For any other, a finder at the head of `sys.meta_path` waits for its import and registers right after it, before
the code that asked for the import goes on.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from lkq_hf.compat import explained_imports

REGISTERING = {
    "peft": "lkq_hf.adapter",
    "transformers.quantizers.auto": "lkq_hf.quantization.registration",
}
"""Modules of other libraries, and for each the module of ours that registers something there when it is imported."""


class _Finder(MetaPathFinder):
    """Finds what the other finders find, and lets our module be imported after the library's."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in REGISTERING:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find and find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    _register_after(spec.loader, fullname)
                return spec
        return None


def _register_after(loader: Loader, name: str) -> None:
    """Makes the loader of the library's module import ours when it has executed that module."""
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        if module.__name__ == name:  # a zip archive has one loader for several modules
            _import_ours(name)

    # On this one object: the loader keeps its type, by which others read sources and resources.
    vars(loader)["exec_module"] = exec_module


def _import_ours(library: str) -> None:
    with explained_imports():
        importlib.import_module(REGISTERING[library])


def register() -> None:
    """Registers with what is imported already, and sees to the rest."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for library in REGISTERING:
        if sys.modules.get(library) is not None:
            _import_ours(library)
