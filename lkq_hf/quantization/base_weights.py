"""A base model whose blocks stay on disk until their turn, so that it may be larger than memory."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils.quantization_config import Mxfp4Config, QuantizationMethod

from lkq_hf.quantization.blocks import find_blocks
from lkq_hf.quantization.conversions import Conversions

# Arguments of `from_pretrained` that also say which configuration it takes.
CONFIG_ARGUMENTS = {"revision", "token", "cache_dir", "trust_remote_code", "local_files_only", "subfolder"}


class BaseWeights:
    """The tensors of a safetensors checkpoint, read one module at a time.

    Args:
        path: a directory, or a Hub id, which is downloaded.
        dtype: of the tensors handed out; `None` for the stored one.

    Raises:
        FileNotFoundError: there is no safetensors file.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype | None = None, revision: str | None = None) -> None:
        directory = Path(path)
        if not directory.is_dir():
            directory = Path(
                snapshot_download(str(path), revision=revision, allow_patterns=["*.safetensors", "*.json"])
            )
        self.directory = directory
        self.dtype = dtype
        self._file_of: dict[str, Path] = {}
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                self._file_of.update(dict.fromkeys(tensors.keys(), file))
        if not self._file_of:
            raise FileNotFoundError(
                f"{directory} has no .safetensors file; blocks can only be loaded from safetensors"
            )

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """Tensors by their names, floating ones in `dtype`.

        Raises:
            KeyError: the checkpoint has no such tensor.
        """
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            by_file[self._file_of[name]].append(name)
        tensors = {}
        for file, inside in by_file.items():
            with safe_open(file, framework="pt") as opened:
                for name in inside:
                    tensor = opened.get_tensor(name)
                    tensors[name] = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        return tensors

    def follow(self, model: PreTrainedModel) -> None:
        """From now on, names are those of `model`: tensors are renamed and put together as transformers does."""
        self._conversions = Conversions(model, self._file_of)

    def load(self, prefix: str, module: nn.Module) -> None:
        """Fills `module`, which the model knows as `prefix`, from disk.

        Raises:
            ValueError: the checkpoint does not have all of its tensors.
        """
        names = [f"{prefix}.{name}" for name in module.state_dict()]
        module.load_state_dict(
            {name.removeprefix(f"{prefix}."): t for name, t in self.named(names).items()}, assign=True
        )

    def named(self, names: list[str]) -> dict[str, Tensor]:
        """The tensors of the model that is followed, by their names in it.

        Raises:
            ValueError: the checkpoint does not have all of them.
        """
        if missing := self._conversions.missing(names):
            raise ValueError(
                f"the checkpoint has no tensor {missing[0]} ({len(missing)} such names): it is incomplete, or belongs "
                "to another model"
            )
        return self._conversions.tensors(names, self.read)


def load_base(path: str | Path, dtype: str | torch.dtype = "auto", **loading: Any) -> PreTrainedModel:
    """A base model in memory. One that comes in MXFP4, as gpt-oss does, is dequantized while it is loaded.

    Args:
        dtype: of the model; `"auto"` for the checkpoint's own.
        loading: further arguments of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: the checkpoint is quantized in another way.
    """
    config = AutoConfig.from_pretrained(path, **{key: loading[key] for key in CONFIG_ARGUMENTS & set(loading)})
    method = _quant_method(config)
    if method == QuantizationMethod.MXFP4:
        loading = {**loading, "quantization_config": Mxfp4Config(dequantize=True)}
    elif method is not None:
        raise ValueError(
            "expected a model in full precision, found one that is quantized already; quantize its base model"
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **loading)
    return model


def _quant_method(config: Any) -> str | None:
    settings = getattr(config, "quantization_config", None)
    return settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)


def forget_quantized_origin(model: PreTrainedModel) -> None:
    """Lets a model that was dequantized while it was loaded save itself as one in full precision.

    transformers keeps what it did with the files, to undo it when it saves, and cannot undo a dequantization.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if any(getattr(step, "hf_quantizer", None) for each in conversions or () for step in _steps(each)):
        del model._weight_conversions


def _steps(conversion: Any) -> list[Any]:
    return getattr(conversion, "operations", [])


def open_base(
    path: str | Path, dtype: torch.dtype | None = None, block_name: str | None = None, **config_kwargs: Any
) -> tuple[PreTrainedModel, BaseWeights]:
    """A model with everything but its blocks loaded, and the weights from which its blocks can be.

    Args:
        dtype: of the model; `None` for the one in its config.
        block_name: the list of blocks, where structure alone does not tell.

    Returns:
        The model, its blocks on the meta device, and the source for `quantize_blocks(load_block=source.load)`.
    """
    revision = config_kwargs.get("revision")
    config = AutoConfig.from_pretrained(path, **config_kwargs)
    if (method := _quant_method(config)) is not None:
        raise ValueError(
            f"expected a model in full precision, found one that is quantized already ({method}); quantize its base "
            "model, or one in MXFP4 without block_by_block"
        )
    dtype = dtype or config.dtype or torch.float32
    weights = BaseWeights(path, dtype, revision)
    # Buffers are made for real: those that no checkpoint holds (rotary frequencies) are only computed here.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.name_or_path = config.name_or_path = str(path)
    list_name, _ = find_blocks(model, block_name)
    tied = set(model.all_tied_weights_keys)
    weights.follow(model)
    outside = [name for name in model.state_dict() if not name.startswith(f"{list_name}.") and name not in tied]
    for name, tensor in weights.named(outside).items():
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()
    if (weights.directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(weights.directory)
    return model.eval(), weights
