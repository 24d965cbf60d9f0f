"""Configuration of the LOOKAHEAD_KV adapter type."""

import logging
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from lkq_hf.adapter.registration import LOOKAHEAD_KV
from lkq_hf.cache.profile import check_profile
from lkq_hf.files import check_safetensors
from lkq_hf.scoring.pooling import POOLINGS, check_pooling

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Of adapter_config.json: files that name it hold all of SCORING_FIELDS."""

SCORING_FIELDS = (
    "num_lookahead_tokens", "r", "lora_alpha", "target_modules", "last_layer_modules", "row_power",
    "pooling_kernel_size", "pooling", "neighbor_weight",
)  # fmt: skip
"""Fields that decide how an adapter scores: a default in the place of one would silently change the scores."""

MAX_LOOKAHEAD_TOKENS = 4096
MAX_RANK = 4096
MAX_LORA_ALPHA = 1e6
MAX_POOLING_KERNEL_SIZE = 1023


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
        pooling: "max", "avg" or "sum" of the neighborhood.
        neighbor_weight: what each neighbor counts in a sum, from 0 (excluded) to 1.
        base_model_shape: sizes of the model that the adapter was made for; filled in by the first model it is
            attached to, and checked by every later one.
        init_weights: whether the LoRA starts without effect, as for training. False draws all its weights, for tests.
        format_version: of the file that the config is written to.
        budget_profile: for a few budgets what each KV head of each evicted layer keeps, as a share of the mean:
            ``{"128": [[share, ...], ...]}``, one row for each layer. ``LookaheadCache(allocation="profile")`` needs
            it; ``lkq-hf train`` and ``lkq-hf profile`` measure it.

    Raises:
        ValueError: a value is out of range, or a file lacks a field that decides how the adapter scores.
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
    pooling: str = field(default="max", metadata={"help": f"How scores are pooled: {', '.join(POOLINGS)}."})
    neighbor_weight: float = field(default=1.0, metadata={"help": "What a neighbor counts, with pooling sum."})
    base_model_shape: dict[str, Any] | None = field(
        default=None, metadata={"help": "Sizes of the base model; filled in when the adapter is attached."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Whether the LoRA starts without effect."})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Of the file; do not change it."})

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # A file names its type, a user who makes a config does not. However PEFT reads a file, it comes by here.
        if "peft_type" in kwargs:
            _check_fields(kwargs)
        return super().__new__(cls)

    budget_profile: dict[str, list[list[float]]] | None = field(
        default=None, metadata={"help": "Shares of the mean that each KV head keeps, for a few budgets; measured."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LOOKAHEAD_KV
        if not isinstance(self.init_weights, bool):
            raise ValueError(f"init_weights must be True or False, got {self.init_weights!r}")
        _check_whole("num_lookahead_tokens", self.num_lookahead_tokens, MAX_LOOKAHEAD_TOKENS)
        _check_whole("r", self.r, MAX_RANK)
        _check_whole("pooling_kernel_size", self.pooling_kernel_size, MAX_POOLING_KERNEL_SIZE)
        if self.pooling_kernel_size % 2 == 0:
            raise ValueError(f"pooling_kernel_size must be odd, got {self.pooling_kernel_size}")
        if not _is_number(self.neighbor_weight):
            raise ValueError(f"neighbor_weight must be a number, got {self.neighbor_weight!r}")
        check_pooling(self.pooling_kernel_size, self.pooling, self.neighbor_weight)
        if not _is_number(self.lora_alpha) or not 0 < self.lora_alpha <= MAX_LORA_ALPHA:
            raise ValueError(f"lora_alpha must be positive and at most {MAX_LORA_ALPHA:,.0f}, got {self.lora_alpha!r}")
        if not _is_number(self.row_power) or not 1 <= self.row_power <= 8:
            raise ValueError(f"row_power must be from 1 to 8, got {self.row_power!r}")
        if not _are_names(self.target_modules) and not _is_pattern(self.target_modules):
            raise ValueError(
                f"target_modules must be a list of names, a regular expression or None, got {self.target_modules!r}"
            )
        if not _are_names(self.last_layer_modules) and self.last_layer_modules != "all":
            raise ValueError(
                f'last_layer_modules must be a list of names, "all" or None, got {self.last_layer_modules!r}'
            )
        if not isinstance(self.base_model_shape, dict | None):
            raise ValueError(f"base_model_shape must be a mapping or None, got {self.base_model_shape!r}")
        check_profile(self.budget_profile)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Self:
        """The config in a directory or repository.

        Raises:
            ValueError: the directory holds pickled or damaged weights, or a value is out of range.
        """
        directory = Path(pretrained_model_name_or_path, subfolder or "")
        if (directory / WEIGHTS_NAME).is_file() and not (directory / SAFETENSORS_WEIGHTS_NAME).is_file():
            raise ValueError(
                f"{directory} holds pickled weights ({WEIGHTS_NAME}), which are not read: a pickle can run code. Ask "
                f"its author for {SAFETENSORS_WEIGHTS_NAME}."
            )
        if (directory / SAFETENSORS_WEIGHTS_NAME).is_file():
            check_safetensors(directory / SAFETENSORS_WEIGHTS_NAME)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes adapter_config.json; PEFT does so after it has written the weights.

        Raises:
            ValueError: the directory holds pickled weights, as ``safe_serialization=False`` writes them.
        """
        pickled = Path(save_directory, WEIGHTS_NAME)
        if pickled.is_file():
            raise ValueError(
                f"{pickled} is a pickle, which LOOKAHEAD_KV adapters are not loaded from: a pickle can run code. "
                "Delete it, and save without safe_serialization=False"
            )
        super().save_pretrained(save_directory, **kwargs)


# A config comes from strangers: nothing in it may make us allocate without bound, or fail only when it is used.


def _check_fields(values: dict[str, Any]) -> None:
    """Checks that a file's values decide how the adapter scores; files of earlier versions may leave some out.

    Raises:
        ValueError: they do not, or a later version wrote them.
    """
    version = values.get("format_version")
    if version is not None and version != FORMAT_VERSION:
        raise ValueError(
            f"adapter_config.json has format_version {version!r}, and this lkq-hf reads {FORMAT_VERSION}: install the "
            "version that wrote it"
        )
    missing = [name for name in SCORING_FIELDS if name not in values]
    if not missing:
        return
    if version is not None:
        raise ValueError(
            f"adapter_config.json has no {', '.join(missing)}, which decide how the adapter scores: it was cut or "
            "edited; copy it again from where the adapter was saved"
        )
    logger.warning(
        "adapter_config.json has no %s; defaults are used in their place, which scores differently if the adapter was "
        "trained with other values. Save the adapter again to record them",
        ", ".join(missing),
    )


def _check_whole(name: str, value: Any, maximum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
        raise ValueError(f"{name} must be a whole number from 1 to {maximum}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_names(value: Any) -> bool:
    if value is None:
        return True
    return (
        isinstance(value, Collection) and not isinstance(value, str) and all(isinstance(name, str) for name in value)
    )


def _is_pattern(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        re.compile(value)
    except re.error:
        return False
    return True
