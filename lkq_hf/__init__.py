"""Cheap long-context inference for Hugging Face models.

Importing this package registers the ``LOOKAHEAD_KV`` adapter type with PEFT and the ``two_stage_gptq`` quantization
method with transformers, and does nothing else: no model class, attention function or cache of transformers is
changed. It imports neither library: each is registered with when it is imported, by whomever. Public names are
imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lkq_hf.compat import explained_imports, warn_of_newer_versions
from lkq_hf.registration import register

__version__ = "0.1.0"

_PUBLIC = {
    "LookaheadCache": "lkq_hf.cache",
    "LookaheadKVConfig": "lkq_hf.adapter",
    "LookaheadKVModel": "lkq_hf.adapter",
    "LookaheadTrainer": "lkq_hf.training",
    "LookaheadTrainingArguments": "lkq_hf.training",
    "TwoStageGPTQConfig": "lkq_hf.quantization",
    "TwoStageQuantizer": "lkq_hf.quantization",
    "prepare_model_for_eviction": "lkq_hf.cache",
    "shipped_adapter": "lkq_hf.shipped",
}

__all__ = [
    "LookaheadCache",
    "LookaheadKVConfig",
    "LookaheadKVModel",
    "LookaheadTrainer",
    "LookaheadTrainingArguments",
    "TwoStageGPTQConfig",
    "TwoStageQuantizer",
    "__version__",
    "prepare_model_for_eviction",
    "shipped_adapter",
]

if TYPE_CHECKING:
    from lkq_hf.adapter import LookaheadKVConfig, LookaheadKVModel
    from lkq_hf.cache import LookaheadCache, prepare_model_for_eviction
    from lkq_hf.quantization import TwoStageGPTQConfig, TwoStageQuantizer
    from lkq_hf.shipped import shipped_adapter
    from lkq_hf.training import LookaheadTrainer, LookaheadTrainingArguments


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        with explained_imports():
            return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


register()
warn_of_newer_versions()
