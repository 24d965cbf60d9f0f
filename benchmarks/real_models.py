"""The real models of examples/real_models.py, for benchmarks."""

import importlib.util
import sys
from pathlib import Path

# By its path: beside it in examples/ are folders with the names of libraries.
_path = Path(__file__).parents[1] / "examples" / "real_models.py"
_spec = importlib.util.spec_from_file_location(__name__, _path)
sys.modules[__name__] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[__name__])
