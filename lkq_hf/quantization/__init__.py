"""Two-stage group-wise quantisation: from a model to a checkpoint that `from_pretrained` loads.

Importing this package registers the quantisation method with transformers.
"""

from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import register_quantization_config, register_quantizer

from lkq_hf.quantization.config import QUANT_METHOD, TwoStageGPTQConfig
from lkq_hf.quantization.linear import QuantizedLinear
from lkq_hf.quantization.quantizer import TwoStageGPTQHfQuantizer
from lkq_hf.quantization.weight import QuantizedWeight

if TYPE_CHECKING:
    from lkq_hf.quantization.optimum_quantizer import TwoStageQuantizer

__all__ = ["QuantizedLinear", "QuantizedWeight", "TwoStageGPTQConfig", "TwoStageQuantizer"]

register_quantization_config(QUANT_METHOD)(TwoStageGPTQConfig)
register_quantizer(QUANT_METHOD)(TwoStageGPTQHfQuantizer)


def __getattr__(name: str) -> Any:
    # Loading a quantised model needs no Optimum.
    if name == "TwoStageQuantizer":
        from lkq_hf.quantization.optimum_quantizer import TwoStageQuantizer

        return TwoStageQuantizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
