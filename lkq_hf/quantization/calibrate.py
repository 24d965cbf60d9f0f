"""From a model in memory and a configuration to the quantized model: what every front end calls."""

import copy
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkq_hf import __version__
from lkq_hf.quantization.base_weights import forget_quantized_origin
from lkq_hf.quantization.blocks import check_names, find_layers, weights_of
from lkq_hf.quantization.calibration_data import (
    CalibrationRecipe,
    calibration_tokens,
    check_vocabulary,
    digest,
    find_tokenizer,
    tokenizer_name,
)
from lkq_hf.quantization.config import PRESETS, TwoStageGPTQConfig
from lkq_hf.quantization.dry_run import check_that_it_loads
from lkq_hf.quantization.mixed_bits import describe_widths, set_widths
from lkq_hf.quantization.own_text import OwnTextError, interleave, own_windows, write_windows
from lkq_hf.quantization.packing import MULTIPLE
from lkq_hf.quantization.walk import WalkReport, peak_memory, quantize_blocks

logger = logging.getLogger(__name__)

SMALL_SHARE = 0.9
"""A smaller share of the linear weights is warned of before the work."""

GROUP_SIZES = (128, 64, MULTIPLE)
"""What is tried, in this order, where no group size is given."""


def default_group_size(model: PreTrainedModel, config: TwoStageGPTQConfig) -> int:
    """The largest of 128, 64 and 32 that divides the inputs of all layers that `config` selects; 32 divides any."""
    rows = copy.copy(config)
    rows.group_size = -1  # fits any layer
    _, layers = find_layers(model, rows)
    widths = {weight.shape[-1] for name, layer in layers.items() for weight in weights_of(name, layer).values()}
    return next(size for size in GROUP_SIZES if all(width % size == 0 for width in widths))


def calibrate(model: PreTrainedModel, config: TwoStageGPTQConfig, load_block: Any = None) -> WalkReport:
    """Quantizes `model` in place and writes the recipe into `config.meta`.

    Args:
        model: on the CPU or one device; blocks may be on the meta device if `load_block` fills them.
        config: with `dataset`. Where it has no `tokenizer`, that becomes the base model's, if it has one.

    Raises:
        ValueError: no data, or a model or layer that cannot be quantized; nothing has been changed if it is found
            before the first block, and a message names the layer if it is found later.
    """
    check_data(config)
    places = set(getattr(model, "hf_device_map", {}).values())
    if len(places) > 1:
        raise ValueError(
            f"the model is spread over {', '.join(sorted(map(str, places)))}, but quantizing takes its blocks to the "
            "compute device one by one: load it without device_map, or with block_by_block=True (TwoStageQuantizer), "
            "which reads one block at a time from disk"
        )
    _refuse_adapters(model)
    forget_quantized_origin(model)
    check_names(model, config.modules_in_block_to_quantize, config.modules_to_not_convert)
    if config.chooses_widths and load_block is not None:
        raise ValueError(
            "bits that differ by layer are chosen with the whole model in memory, and block_by_block reads one block "
            "at a time. Choose them on a machine with more memory, or give one width for all layers with bits"
        )
    if config.group_size is None:
        config.group_size = default_group_size(model, config)
    list_name, layers = find_layers(model, config)
    covered = check_that_it_loads(model, config)
    logger.log(logging.INFO if covered.share > SMALL_SHARE else logging.WARNING, "%s", covered)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # Models without a limit have None or -1.
    if longest is not None and 0 < longest < config.model_seqlen:
        raise ValueError(f"model_seqlen={config.model_seqlen} is more than the model's {longest} positions")
    config.tokenizer = tokenizer = find_tokenizer(config.tokenizer, model.name_or_path)
    training = model.training
    model.eval()
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    start = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    tokens, recipe, unwritten = _calibration_windows(model, config, tokenizer, device)
    if config.chooses_widths:
        set_widths(model, config, list_name, layers, tokens, device)
    peak_before = peak_memory(device)
    widths = describe_widths(config, list_name, layers) if config.layer_bits else {}
    settings = config.solver_settings()
    report = quantize_blocks(
        model,
        list_name,
        layers,
        tokens,
        settings,
        device=device,
        batch_size=config.batch_size,
        true_sequential=config.true_sequential,
        offload=config.offload,
        resume_dir=config.resume_dir,
        load_block=load_block,
    )
    report.coverage = covered
    report.seconds, report.peak_memory = time.perf_counter() - start, max(peak_before, report.peak_memory)
    model.train(training)
    config.block_name_to_quantize = list_name
    config.meta = {
        **_base_model(model),
        **copy.deepcopy(config.meta),
        "quantizer": [f"lkq-hf:{__version__}"],
        "calibration": recipe.to_dict(),
        **widths,
    }
    if unwritten is not None:
        config.meta["no_own_text"] = unwritten
    if settings.refinement is not None:
        config.meta["refinement"] = {**asdict(settings.refinement), "unrefined_blocks": report.unrefined}
    if settings.end_to_end is not None:
        tuned = report.untuned if report.end_to_end is None else asdict(report.end_to_end)
        config.meta["end_to_end"] = {**asdict(settings.end_to_end), "divergence": tuned}
    return report


def check_data(config: TwoStageGPTQConfig) -> None:
    """Checks that there is something to calibrate on.

    Raises:
        ValueError: no data, or data that would not be used.
    """
    if config.dataset is None and config.own_text < 1:
        raise ValueError(
            "quantizing needs calibration data: pass dataset= to TwoStageGPTQConfig (a list of texts, a dataset, a "
            "text or .jsonl file, or a Hub dataset id), or own_text=1 (of advanced=), and the model writes all of it"
        )
    if config.dataset is not None and config.own_text == 1:
        raise ValueError("found a dataset and own_text=1, with which it would not be used: leave one of them out")


def _calibration_windows(
    model: PreTrainedModel,
    config: TwoStageGPTQConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device | str,
) -> tuple[Tensor, CalibrationRecipe, str | None]:
    """The windows of the dataset, and among them those that the model writes itself.

    Returns:
        Token ids, int64 `[samples, length]`; their recipe; why the model wrote none although the preset asks for it.

    Raises:
        ValueError: a dataset that cannot be used, or a model that cannot write an `own_text` other than the preset's.
    """
    samples, share = config.num_samples, config.own_text
    count = own_windows(share, samples)
    given, recipe = _dataset_windows(config, tokenizer, samples - count)
    check_vocabulary(given, model)
    if not count:
        return given, recipe, None
    try:
        own = write_windows(
            model, tokenizer, count, config.model_seqlen, config.seed, device=device, resume_dir=config.resume_dir
        )
    except OwnTextError as error:
        if share != PRESETS[config.preset].get("own_text"):
            raise
        logger.warning("calibrating on the dataset alone: %s", error)
        return *_dataset_windows(config, tokenizer, samples), str(error)
    tokens = interleave(given, own)
    return tokens, replace(recipe, samples=samples, written_by_model=count, tokens_sha256=digest(tokens)), None


def _dataset_windows(
    config: TwoStageGPTQConfig, tokenizer: PreTrainedTokenizerBase | None, count: int
) -> tuple[Tensor, CalibrationRecipe]:
    length, seed = config.model_seqlen, config.seed
    if config.dataset is not None and count:
        return calibration_tokens(config.dataset, tokenizer, count, length, seed, config.text_column)
    recipe = CalibrationRecipe(None, tokenizer_name(tokenizer), 0, length, seed, "")
    return torch.empty(0, length, dtype=torch.int64), recipe


def _refuse_adapters(model: PreTrainedModel) -> None:
    # Their weights would be quantized with the model's, and `save_pretrained` would write nothing but them.
    if getattr(model, "_hf_peft_config_loaded", False) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ValueError(
            "expected a model without adapters, found one that holds an adapter. Quantize the base model alone: a "
            "lookahead adapter for it can then be loaded onto the quantized model. A LoRA that should become a part "
            "of the weights has to be merged before (merge_and_unload of PEFT)"
        )


def _base_model(model: PreTrainedModel) -> dict[str, str]:
    """The name under which the Hub knows the model; nothing for a directory, whose path concerns nobody else."""
    name = model.name_or_path
    return {"base_model": name} if name and not Path(name).exists() and name.count("/") <= 1 else {}
