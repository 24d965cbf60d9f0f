"""Two-stage group-wise quantization: from a model to a checkpoint that `from_pretrained` loads.

Public names are imported on first use. What a part of the package needs of a module here, it imports from that module.
"""

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "QuantizedLinear": "lkq_hf.quantization.linear",
    "QuantizedWeight": "lkq_hf.quantization.weight",
    "TwoStageGPTQConfig": "lkq_hf.quantization.config",
    "TwoStageQuantizer": "lkq_hf.quantization.optimum_quantizer",
}

__all__ = ["QuantizedLinear", "QuantizedWeight", "TwoStageGPTQConfig", "TwoStageQuantizer"]

if TYPE_CHECKING:
    from lkq_hf.quantization.config import TwoStageGPTQConfig
    from lkq_hf.quantization.linear import QuantizedLinear
    from lkq_hf.quantization.optimum_quantizer import TwoStageQuantizer
    from lkq_hf.quantization.weight import QuantizedWeight


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
