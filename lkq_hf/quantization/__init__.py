"""Two-stage group-wise quantisation: from a model to a checkpoint that `from_pretrained` loads.

Importing this package registers the quantisation method with transformers.
"""

from transformers.quantizers.auto import register_quantization_config, register_quantizer

from lkq_hf.quantization.config import QUANT_METHOD, TwoStageGPTQConfig
from lkq_hf.quantization.linear import QuantizedLinear
from lkq_hf.quantization.optimum_quantizer import TwoStageQuantizer
from lkq_hf.quantization.quantizer import TwoStageGPTQHfQuantizer
from lkq_hf.quantization.weight import QuantizedWeight

__all__ = ["QuantizedLinear", "QuantizedWeight", "TwoStageGPTQConfig", "TwoStageQuantizer"]

register_quantization_config(QUANT_METHOD)(TwoStageGPTQConfig)
register_quantizer(QUANT_METHOD)(TwoStageGPTQHfQuantizer)
