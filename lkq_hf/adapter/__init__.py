"""The LOOKAHEAD_KV adapter type: learned lookahead tokens and a LoRA on their positions, in PEFT's convention."""

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from lkq_hf.adapter.config import LookaheadKVConfig
from lkq_hf.adapter.injection import inject_adapter, inject_trained_adapter, remove_adapter
from lkq_hf.adapter.layer import LookaheadKVLinear, LookaheadTokens
from lkq_hf.adapter.model import LookaheadKVModel
from lkq_hf.adapter.registration import LOOKAHEAD_KV
from lkq_hf.formats import PEFT_TYPE

__all__ = [
    "LOOKAHEAD_KV",
    "LookaheadKVConfig",
    "LookaheadKVLinear",
    "LookaheadKVModel",
    "LookaheadTokens",
    "inject_adapter",
    "inject_trained_adapter",
    "remove_adapter",
]

if LOOKAHEAD_KV not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(
        name=PEFT_TYPE.lower(),
        config_cls=LookaheadKVConfig,
        model_cls=LookaheadKVModel,
        prefix=LookaheadKVModel.prefix,
    )
