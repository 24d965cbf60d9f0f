"""Configuration of the LOOKAHEAD_KV adapter type."""

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from lkq_hf.adapter.registration import LOOKAHEAD_KV

MAX_LOOKAHEAD_TOKENS = 4096
MAX_RANK = 4096


@dataclass
class LookaheadKVConfig(PeftConfig):
    """Learned lookahead tokens and a LoRA that is active on them only (LookaheadKV, arXiv 2603.10899).

    Args:
        num_lookahead_tokens: learned tokens appended after the prompt during the prefill (n in the paper).
        r: rank of the LoRA.
        lora_alpha: the LoRA's update is scaled by ``lora_alpha / r``.
        target_modules: names (or a regular expression) of the linear modules that get a LoRA, as in PEFT; None for
            every linear module of the decoder's layers. An empty list trains the tokens alone.
        last_layer_modules: names of the modules that keep their LoRA in the last layer, where only queries and keys
            can change the scores. None for the attention's query and key projections, ``"all"`` for no exception.
        row_power: exponent of the power mean over tokens that makes attention an importance, of the lookahead tokens
            and, in training, of the response: 1 for the paper's mean, 2 for the root mean square.
        pooling_kernel_size: odd width of the pooling along the prompt that suits this adapter, 1 for none.
        base_model_shape: sizes of the model that the adapter was made for; filled in by the first model it is
            attached to, and checked by every later one.

    Raises:
        ValueError: a value is out of range.
    """

    num_lookahead_tokens: int = field(default=32, metadata={"help": "Learned tokens appended after the prompt."})
    r: int = field(default=8, metadata={"help": "Rank of the LoRA on the lookahead positions."})
    lora_alpha: float = field(default=32, metadata={"help": "The LoRA's update is scaled by lora_alpha / r."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Linear modules with a LoRA; None for all of the decoder's layers."}
    )
    last_layer_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules with a LoRA in the last layer; None for queries and keys."}
    )
    row_power: float = field(default=1.0, metadata={"help": "Exponent of the mean over lookahead tokens; 1: paper."})
    pooling_kernel_size: int = field(default=1, metadata={"help": "Odd width of the pooling of scores, 1 for none."})
    base_model_shape: dict[str, Any] | None = field(
        default=None, metadata={"help": "Sizes of the base model; filled in when the adapter is attached."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LOOKAHEAD_KV
        _check_range("num_lookahead_tokens", self.num_lookahead_tokens, MAX_LOOKAHEAD_TOKENS)
        _check_range("r", self.r, MAX_RANK)
        if not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha must be positive, got {self.lora_alpha}")
        if not 1 <= self.row_power <= 8:
            raise ValueError(f"row_power must be from 1 to 8, got {self.row_power}")
        if self.pooling_kernel_size < 1 or self.pooling_kernel_size % 2 == 0:
            raise ValueError(f"pooling_kernel_size must be a positive odd number, got {self.pooling_kernel_size}")
        if isinstance(self.last_layer_modules, str) and self.last_layer_modules != "all":
            raise ValueError(
                f'last_layer_modules must be a list of names, "all" or None, got {self.last_layer_modules!r}'
            )


def _check_range(name: str, value: int, maximum: int) -> None:
    # A config comes from strangers: a size must not make us allocate without bound.
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
        raise ValueError(f"{name} must be a whole number from 1 to {maximum}, got {value!r}")
