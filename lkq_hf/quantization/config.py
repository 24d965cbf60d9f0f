"""`TwoStageGPTQConfig`: what a user says, and what a checkpoint's config.json says."""

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

from lkq_hf.files import bytes_of
from lkq_hf.formats import QUANT_METHOD
from lkq_hf.quantization.activations import OFFLOADS
from lkq_hf.quantization.calibration_data import CalibrationSource
from lkq_hf.quantization.packing import checkpoint_format as format_for
from lkq_hf.quantization.refinement import BlockRefinement, EndToEnd
from lkq_hf.quantization.solve import SolverSettings, SolverSwitches

BITS = (2, 3, 4, 8)
STAGES = ("stage1", "stage2", "descent")
SCALE_SEARCHES = ("minmax", "mse")
COLUMN_ORDERS = ("stored", "group_aware", "costliest_first")

# What each preset changes of the switches' defaults, which are the strongest method measured
# (benchmarks/quantization.py). "paper" is the published two stages around plain GPTQ, "refined" the default and what
# REFINEMENTS adds.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "stages": ("stage1", "stage2"),
        "damp_percent": 0.01,
        "column_order": "stored",
        "corrected_target": False,
        "corrected_residual": False,
        "sweeps": 1,
    },
    "refined": {"own_text": 0.5},
}
REFINEMENTS: dict[str, dict[str, Any]] = {"refined": {"refinement": BlockRefinement(), "end_to_end": EndToEnd()}}
"""What presets do by gradient where there is plenty of calibration text, as fields of `SolverSettings`."""


@dataclass(frozen=True, kw_only=True)
class AdvancedOptions(SolverSwitches):
    """What few users change: the switches of the solver, and how the calibration walks through the model.

    Args:
        true_sequential: quantize a block's layers in the order in which they run.
        block_name_to_quantize: the list of blocks, where structure alone does not tell.
        batch_size: windows that run through a block at once.
        seed: draws the windows.
        offload: where activations wait: `"auto"`, `"cpu"` or `"disk"`.
        own_text: share of the windows, from 0 to 1, that the model writes itself before it is quantized
            (`write_windows`), for which the whole model has to fit on the device.
    """

    true_sequential: bool = True
    block_name_to_quantize: str | None = None
    batch_size: int = 8
    seed: int = 0
    offload: str = "auto"
    own_text: float = 0.0


ADVANCED = tuple(field.name for field in fields(AdvancedOptions))


class TwoStageGPTQConfig(QuantizationConfigMixin):
    """Two-stage group-wise GPTQ: quantizes a model while `from_pretrained` loads it.

    ```python
    config = TwoStageGPTQConfig(bits=3, group_size=64, sym=False, dataset="calibration.jsonl", tokenizer=tokenizer)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config)
    model.save_pretrained("out")
    ```

    The names are those of `transformers.GPTQConfig` and `optimum.gptq.GPTQQuantizer` where the meaning is the same.
    `dataset`, `tokenizer` and all that only steers a calibration are not part of a checkpoint; `meta` has its recipe.

    Args:
        bits (`int` or `float`, defaults to 4): 2, 3, 4 or 8. A fraction between, such as 3.2, is a mean over all
            weights: the calibration then chooses a width for each layer by how much the model's output loses.
        dataset: calibration data: a list of texts, a `datasets` dataset, a text or `.jsonl` file, or a Hub dataset id
            (see `calibration_tokens`). Needed to quantize, unless `advanced` has an `own_text` of 1; not to load.
        tokenizer (`PreTrainedTokenizerBase` or `str`, *optional*): by default the base model's own.
        group_size (`int`, *optional*): input features that share a scale, usually 32, 64 or 128; -1 for a whole row.
            By default the largest of 128, 64 and 32 that divides the inputs of all layers; the calibration sets it.
        sym (`bool`, defaults to `True`): zero points fixed at the middle of the range.
        preset (`str`, defaults to `"default"`): `"default"`, the strongest combination measured, `"paper"`, the
            method as published (arXiv 2602.02126), or `"refined"`, the default, then each block's scales
            and integers by gradient (`BlockRefinement`), and at the end the whole model's scales (`EndToEnd`); half
            of its windows are text of the model's own.
        target_size (`int` or `str`, *optional*): instead of `bits`, the largest size of the checkpoint's weights, all
            of them, in bytes or with a unit, as in `"4.5GiB"`: widths of layers are chosen as for a mean.
        num_samples (`int`, defaults to 128): calibration windows.
        model_seqlen (`int`, defaults to 2048): tokens in a window.
        text_column (`str`, defaults to `"text"`): column or field of the texts.
        modules_to_not_convert (`list[str]`, *optional*): names or parts of names that stay in full precision. The
            language model head and embeddings always do.
        modules_in_block_to_quantize (`list`, *optional*): only these layers of each block; a list, or Optimum's list
            of lists. Their order is always the one in which they run.
        device (`str`, *optional*): where a calibration computes, block by block; by default a GPU if there is one.
        resume_dir (`str`, *optional*): keeps finished blocks, so that a killed calibration goes on where it stopped.
        advanced (`dict`, *optional*): fields of [`AdvancedOptions`], such as `{"alpha": 0.5}`; each replaces the
            preset's. They are attributes of the configuration.
        stored: what a checkpoint's config.json holds besides: `meta`, where it comes from; `layer_bits`, the layers
            that have other bits than `bits`, by their names inside the list of blocks, such as `0.mlp.down_proj`; and
            fields for other readers. Until the next release also the advanced options, with a `FutureWarning`.

    Raises:
        TypeError: a field of the wrong type, or an unknown one.
        ValueError: a value that is not offered.
    """

    # Not part of a checkpoint: they steer one calibration.
    CALIBRATION_FIELDS = (
        "dataset",
        "tokenizer",
        "num_samples",
        "model_seqlen",
        "own_text",
        "batch_size",
        "seed",
        "text_column",
        "device",
        "offload",
        "resume_dir",
        "target_size",
        "mean_bits",
    )

    # The advanced options.
    stages: tuple[str, ...]
    damp_percent: float
    column_order: str
    corrected_target: bool
    corrected_residual: bool
    alpha: float
    sweeps: int
    scale_search: str
    round_to_nearest: bool
    true_sequential: bool
    block_name_to_quantize: str | None
    batch_size: int
    seed: int
    offload: str
    own_text: float

    def __init__(
        self,
        bits: float = 4,
        dataset: CalibrationSource | None = None,
        tokenizer: PreTrainedTokenizerBase | str | None = None,
        group_size: int | None = None,
        *,
        sym: bool = True,
        preset: str = "default",
        target_size: int | str | None = None,
        num_samples: int = 128,
        model_seqlen: int = 2048,
        text_column: str = "text",
        modules_to_not_convert: Sequence[str] | None = None,
        modules_in_block_to_quantize: Sequence[str] | Sequence[Sequence[str]] | None = None,
        device: str | None = None,
        resume_dir: str | Path | None = None,
        advanced: Mapping[str, Any] | None = None,
        **stored: Any,
    ) -> None:
        if not isinstance(preset, str) or preset not in PRESETS:
            _refuse("preset", preset, f"one of {list(PRESETS)}")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers' enumeration is closed to us
        self.mean_bits = _mean_bits(bits) if target_size is None else None
        # Where widths are yet to be chosen, the one below the mean.
        self.bits = int(bits) if self.mean_bits is None else max(width for width in BITS if width < self.mean_bits)
        self.target_size = None if target_size is None else bytes_of(target_size)
        self.layer_bits = dict(stored.pop("layer_bits", None) or {})
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.group_size: Any = group_size  # an int, once a calibration has chosen it
        self.sym = sym
        self.preset = preset
        options = PRESETS[preset] | _advanced(advanced) | _moved(stored)
        for name, value in asdict(AdvancedOptions(**options)).items():
            setattr(self, name, value)
        self.stages = _names("stages", self.stages)
        self.modules_in_block_to_quantize = _flat(modules_in_block_to_quantize)
        self.modules_to_not_convert = None
        if modules_to_not_convert is not None:
            self.modules_to_not_convert = list(_names("modules_to_not_convert", modules_to_not_convert))
        meta = stored.pop("meta", None)
        if not isinstance(meta, dict | None):
            raise TypeError(f"meta must be a dict, found {type(meta).__name__}")
        self.meta = dict(meta or {})
        self.num_samples = num_samples
        self.model_seqlen = model_seqlen
        self.text_column = text_column
        self.device = device
        self.resume_dir = resume_dir
        self.post_init()
        self._check_stored(stored)

    def post_init(self) -> None:
        """Checks every field."""
        for name in ("sym", "corrected_target", "corrected_residual", "round_to_nearest", "true_sequential"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, found {getattr(self, name)!r}")
        if self.bits not in BITS:
            _refuse("bits", self.bits, f"one of {list(BITS)}, or a fraction between for a mean, as in 3.2")
        for name, bits in self.layer_bits.items():
            if type(bits) is not int or bits not in BITS:
                _refuse(f"layer_bits[{name!r}]", bits, f"one of {list(BITS)}")
        if self.chooses_widths and self.layer_bits:
            raise ValueError("found layer_bits and a mean or a size, by which they would be chosen: give one of them")
        if self.group_size is not None and (
            type(self.group_size) is not int or (self.group_size != -1 and self.group_size < 1)
        ):
            _refuse("group_size", self.group_size, "a positive number (32, 64, 128) or -1 for a whole row")
        for name in ("damp_percent", "alpha", "own_text"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value <= 1:
                _refuse(name, value, "a number from 0 to 1")
        for name in ("sweeps", "num_samples", "model_seqlen", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                _refuse(name, value, "a positive whole number")
        if len(set(self.stages)) != len(self.stages) or not set(self.stages) <= set(STAGES):
            _refuse("stages", self.stages, f"a selection of {list(STAGES)}, each once")
        if self.column_order not in COLUMN_ORDERS:
            _refuse("column_order", self.column_order, f"one of {list(COLUMN_ORDERS)}")
        if self.scale_search not in SCALE_SEARCHES:
            _refuse("scale_search", self.scale_search, f"one of {list(SCALE_SEARCHES)}")
        if self.offload not in OFFLOADS:
            _refuse("offload", self.offload, f"one of {list(OFFLOADS)}")
        if not isinstance(self.block_name_to_quantize, str | None):
            raise TypeError(f"block_name_to_quantize must be a name, found {self.block_name_to_quantize!r}")

    def _check_stored(self, stored: dict[str, Any]) -> None:
        """Fields that a checkpoint carries for other readers, and that follow from ours."""
        stored.pop("quant_method", None)
        for name, expected in self._derived().items():
            found = stored.pop(name, expected)
            if found != expected:
                _refuse(name, found, f"{expected!r} with bits={self.bits}, sym={self.sym}")
        if stored:
            raise TypeError(f"TwoStageGPTQConfig has no field {', '.join(map(repr, sorted(stored)))}")

    def _derived(self) -> dict[str, Any]:
        return {
            "checkpoint_format": format_for(self.sym),
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
        }

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> "TwoStageGPTQConfig":
        """The configuration in a checkpoint. One that names no group size was written with groups of 128."""
        values = {"group_size": 128, **config_dict}
        if values["group_size"] is None:
            _refuse("group_size", None, "the number that the checkpoint was written with")
        # A file has them beside the other fields.
        values["advanced"] = {name: values.pop(name) for name in ADVANCED if name in values}
        return super().from_dict(values, return_unused_kwargs, **kwargs)

    def get_loading_attributes(self) -> dict[str, Any]:
        """Which fields of a configuration given to `from_pretrained` apply to a quantized checkpoint: none.

        Raises:
            ValueError: the configuration asks for quantizing, which would not be done.
        """
        if self.dataset is not None or self.own_text == 1:
            raise ValueError(
                "the checkpoint is quantized already, and quantization_config has calibration data, as if it were to "
                "be quantized. Load the base model to quantize it anew, or leave quantization_config out to load the "
                "checkpoint as it is"
            )
        return {}

    @property
    def chooses_widths(self) -> bool:
        """Whether a calibration is to choose the bits of each layer, by a mean or a size."""
        return self.mean_bits is not None or self.target_size is not None

    def bits_of(self, layer: str) -> int:
        """The bits per weight of a layer, by its name inside the list of blocks, such as `0.mlp.down_proj`."""
        return self.layer_bits.get(layer, self.bits)

    def solver_settings(self) -> SolverSettings:
        """The part of the configuration that decides how one layer is solved; its group size must be known."""
        tokens = self.num_samples * self.model_seqlen
        steps: dict[str, Any] = REFINEMENTS.get(self.preset, {})
        return SolverSettings(
            bits=self.bits,
            group_size=self.group_size,
            sym=self.sym,
            **{field.name: getattr(self, field.name) for field in fields(SolverSwitches)},
            **{name: each.with_tokens(tokens) for name, each in steps.items()},
            layer_bits=self.layer_bits,
        )

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: no calibration data, tokenizer or local path."""
        values = {name: value for name, value in self.__dict__.items() if name not in self.CALIBRATION_FIELDS}
        values["stages"] = list(self.stages)
        if not self.layer_bits:
            del values["layer_bits"]
        return copy.deepcopy({**values, **self._derived()})

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: dict[int, Any]) -> "TwoStageGPTQConfig":
        # from_pretrained copies a model's config; the calibration data in it must not be copied along.
        new = copy.copy(self)
        new.meta = copy.deepcopy(self.meta, memo)
        return new


def _advanced(options: Any) -> dict[str, Any]:
    if not isinstance(options, Mapping | None):
        raise TypeError(f"advanced must be a dict, found {type(options).__name__}")
    if unknown := sorted(set(options or {}) - set(ADVANCED)):
        raise TypeError(f"advanced has no option {', '.join(map(repr, unknown))}; expected some of {list(ADVANCED)}")
    return dict(options or {})


def _moved(stored: dict[str, Any]) -> dict[str, Any]:
    """Takes the advanced options out of further arguments, where they were until this release."""
    moved = {name: stored.pop(name) for name in ADVANCED if name in stored}
    if moved:
        shown = ", ".join(f'"{name}": {value!r}' for name, value in moved.items())
        warnings.warn(
            f"TwoStageGPTQConfig takes advanced options together: pass advanced={{{shown}}}. The next release refuses "
            f"{', '.join(f'{name}=' for name in moved)}",
            FutureWarning,
            stacklevel=3,
        )
    # None stood for the preset's.
    return {name: value for name, value in moved.items() if value is not None}


def _mean_bits(bits: Any) -> float | None:
    """The mean that is asked for; `None` for one width for all layers."""
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not BITS[0] <= bits <= BITS[-1]:
        _refuse("bits", bits, f"one of {list(BITS)}, or a fraction between for a mean, as in 3.2")
    return None if float(bits).is_integer() else float(bits)


def _names(field: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Collection) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"{field} must be a list of names, found {value!r}")
    return tuple(value)


def _flat(names: Any) -> list[str] | None:
    if names is None:
        return None
    field = "modules_in_block_to_quantize"
    if isinstance(names, str) or not isinstance(names, Collection):
        raise TypeError(f"{field} must be a list of names, or of lists of them, found {names!r}")
    return [name for entry in names for name in ([entry] if isinstance(entry, str) else _names(field, entry))]


def _refuse(name: str, found: Any, expected: str) -> NoReturn:
    raise ValueError(f"{name} must be {expected}, found {found!r}")
