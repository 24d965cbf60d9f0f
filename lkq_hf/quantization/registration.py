"""The quantization method in transformers' lists, without the seconds that its classes take to import.

transformers imports its lists in the middle of its own modules, before ours could be imported. So the lists first hold
two stand-ins, which import the classes when a checkpoint or a configuration of ours is used.
"""

from typing import TYPE_CHECKING, Any

from transformers.quantizers import auto

from lkq_hf.formats import QUANT_METHOD

if TYPE_CHECKING:
    from lkq_hf.quantization.config import TwoStageGPTQConfig
    from lkq_hf.quantization.quantizer import TwoStageGPTQHfQuantizer

_lists: Any = auto


class _ConfigOnFirstUse:
    @staticmethod
    def from_dict(values: dict[str, Any], **options: Any) -> "TwoStageGPTQConfig":
        register_classes()
        return _lists.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD].from_dict(values, **options)


def _quantizer_on_first_use(config: "TwoStageGPTQConfig", **options: Any) -> "TwoStageGPTQHfQuantizer":
    register_classes()
    return _lists.AUTO_QUANTIZER_MAPPING[QUANT_METHOD](config, **options)


def register_classes() -> None:
    """Puts the classes themselves into transformers' lists."""
    from lkq_hf.quantization.config import TwoStageGPTQConfig
    from lkq_hf.quantization.quantizer import TwoStageGPTQHfQuantizer

    if TwoStageGPTQConfig not in _lists.LOADING_ATTRIBUTES_CONFIG_TYPES:
        # Whose configurations are asked what of them applies to a checkpoint that is quantized already.
        _lists.LOADING_ATTRIBUTES_CONFIG_TYPES += (TwoStageGPTQConfig,)
    _lists.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = TwoStageGPTQConfig
    _lists.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = TwoStageGPTQHfQuantizer


_lists.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, _ConfigOnFirstUse)
_lists.AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, _quantizer_on_first_use)
