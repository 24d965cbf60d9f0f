"""Real models from PyPI packages, for benchmarks."""

from lkq_hf.evaluation.models import SMOLLM2_NAME, gemma3_directory, load_smollm2, smollm2_directory

__all__ = ["SMOLLM2_NAME", "gemma3_directory", "load_smollm2", "smollm2_directory"]
