"""`TwoStageQuantizer`: the Optimum way to a quantized checkpoint."""

import copy
import shutil
from pathlib import Path
from typing import Any, Self

import torch
from optimum.quantization_base import OptimumQuantizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lkq_hf.files import check_free, new_directory
from lkq_hf.quantization.base_weights import load_base, open_base
from lkq_hf.quantization.calibrate import calibrate
from lkq_hf.quantization.config import TwoStageGPTQConfig
from lkq_hf.quantization.processes import Processes
from lkq_hf.quantization.quantizer import TwoStageGPTQHfQuantizer, torch_dtype
from lkq_hf.quantization.shared_input import share_inputs
from lkq_hf.quantization.walk import WalkReport
from lkq_hf.runs import pieces_directory


class TwoStageQuantizer(OptimumQuantizer):
    """Quantizes a causal language model and writes a checkpoint, in one call.

    ```python
    quantizer = TwoStageQuantizer.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    quantizer.quantize("out", bits=3, group_size=64, sym=False, dataset="calibration.jsonl")
    ```

    Args:
        model: a model in memory, or the directory or Hub id of one.
        dtype: in which a model is loaded; `"auto"` for the checkpoint's own.
        loading: further arguments of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        TypeError: something else than a model or the name of one.
    """

    def __init__(self, model: PreTrainedModel | str | Path, dtype: str | torch.dtype = "auto", **loading: Any) -> None:
        if not isinstance(model, PreTrainedModel | str | Path):
            raise TypeError(
                f"model must be a transformers model, a directory or a Hub id, found {type(model).__name__}; of a "
                "PeftModel, pass the base model, or what merge_and_unload() returns"
            )
        self.model = model
        self.dtype = dtype
        self.loading = loading
        self.report = WalkReport()

    @classmethod
    def from_pretrained(
        cls, model_or_path: PreTrainedModel | str | Path, file_name: str | None = None, **loading: Any
    ) -> Self:
        """Names the model to quantize; its weights are loaded by `quantize`.

        Args:
            model_or_path: a model in memory, or the directory or Hub id of one.
            file_name: not used: a model is a directory of safetensors files.
        """
        if file_name is not None:
            raise ValueError(
                f"a model is a directory of safetensors files, not one file; found file_name={file_name!r}"
            )
        return cls(model_or_path, **loading)

    def quantize(
        self,
        save_dir: str | Path,
        file_prefix: str | None = None,
        *,
        config: TwoStageGPTQConfig | None = None,
        block_by_block: bool = False,
        **config_kwargs: Any,
    ) -> PreTrainedModel:
        """Quantizes the model and saves it with its tokenizer: completely, or not at all.

        A killed run leaves its finished blocks in `<save_dir>.partial`, or in `<save_dir>/.partial` if the directory
        was there, and the same call goes on from there. The processes of a group share the work if all of them make
        the same call; the first one saves.

        Args:
            save_dir: a directory that does not exist yet, or is empty.
            file_prefix: not used.
            config: the configuration; or give its fields as further arguments.
            block_by_block: read one block at a time from the safetensors files, for models larger than memory.

        Returns:
            The quantized model, on the CPU unless a model on another device was given; with `block_by_block`, only
            in the first of several processes.

        Raises:
            FileExistsError: `save_dir` is not empty.
            ValueError: a configuration, dataset or model that cannot be used.
        """
        if file_prefix is not None:
            raise ValueError(f"a checkpoint's file names are fixed; found file_prefix={file_prefix!r}")
        if config is not None and config_kwargs:
            raise ValueError(f"give either config or its fields, found both (fields {sorted(config_kwargs)})")
        config = config or TwoStageGPTQConfig(**config_kwargs)
        target = Path(save_dir).resolve()
        check_free(target)
        partial = Path(config.resume_dir or pieces_directory(target))
        run = copy.copy(config)
        run.resume_dir = partial
        load_block = None
        if isinstance(self.model, PreTrainedModel):
            if block_by_block:
                raise ValueError("block_by_block reads a checkpoint; this model is already in memory")
            model = self.model
        elif block_by_block:
            dtype = None if self.dtype == "auto" else torch_dtype(self.dtype)
            model, weights = open_base(self.model, dtype, run.block_name_to_quantize, **self.loading)
            load_block = weights.load
        else:
            model = load_base(self.model, self.dtype, **self.loading)
        if getattr(model.config, "quantization_config", None) is not None:
            raise ValueError(
                "expected a model in full precision, found one that is quantized already; quantize its base model"
            )
        self.report = calibrate(model, run, load_block)
        share_inputs(model)
        mark_quantized(model, run)
        processes = Processes.current()
        # All have read what they need of the finished blocks, and found the directory free.
        processes.wait()
        if processes.is_main:
            with new_directory(target) as temporary:
                model.save_pretrained(temporary)
                if isinstance(run.tokenizer, PreTrainedTokenizerBase):
                    run.tokenizer.save_pretrained(temporary)
            shutil.rmtree(partial)
        processes.wait()
        return model


def mark_quantized(model: PreTrainedModel, config: TwoStageGPTQConfig) -> None:
    """Tells a model whose layers have been replaced that it is quantized, so that it saves itself as such."""
    model.hf_quantizer = TwoStageGPTQHfQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = config.quant_method  # type: ignore[assignment]
    model.config.quantization_config = config
    model.config._is_quantized = True
