"""Checkpoints of ours for other engines: plain GPTQ, and compressed-tensors `pack-quantized`.

Ours already is in the GPTQ tensor layout, so the first export only writes the configuration that other readers of GPTQ
know. The second is a transpose of every tensor. Experts, whose packed weights we keep in one tensor, become one matrix
each, under the names of the model's original files. Nothing is rounded. Whole files are converted one at a time.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import CHAT_TEMPLATE_DIR, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lkq_hf import __version__
from lkq_hf.files import check_free, new_directory, read_json
from lkq_hf.formats import QUANT_METHOD, RECIPE
from lkq_hf.quantization.checkpoint import Headers, names_in_model, packed_model, tensor_headers
from lkq_hf.quantization.config import TwoStageGPTQConfig
from lkq_hf.quantization.expert_names import split_experts
from lkq_hf.quantization.linear import QuantizedLinear
from lkq_hf.quantization.packed_module import PackedModule
from lkq_hf.quantization.packing import checkpoint_format

FORMATS = ("gptq", "compressed-tensors")

# A model card of ours would tell the reader of an export to import lkq_hf, which it does not need.
_NOT_COPIED = {"config.json", "quantize_config.json", "README.md", SAFE_WEIGHTS_INDEX_NAME}


def export_checkpoint(source: str | Path, out: str | Path, format: str) -> Path:
    """Writes a checkpoint of this package in another format.

    Args:
        source: directory of a checkpoint that `save_pretrained` wrote.
        out: directory to write; it appears whole or not at all.
        format: `"gptq"`: GPTQ version 1 if symmetric, 2 if asymmetric, for GPTQModel, transformers' and vLLM's `gptq`.
            `"compressed-tensors"`: `pack-quantized`, for the compressed-tensors library, transformers and vLLM.

    Returns:
        `out`.

    Raises:
        FileExistsError: `out` is not empty.
        FileNotFoundError: `source` has no config.json or no safetensors file.
        ImportError: compressed-tensors is needed and not installed.
        ValueError: an unknown format, a checkpoint that is not ours, tensors that disagree with its configuration,
            layers that the format does not know, or packed experts of a model whose original files do not hold one
            matrix for each expert.
    """
    source, out = Path(source), Path(out)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; found {format!r}")
    check_free(out)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no checkpoint: expected a config.json and safetensors files")
    config = read_json(source / "config.json")
    settings = config.get("quantization_config") or {}
    if settings.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f"{source} is not a checkpoint of ours: its config.json should have quant_method {QUANT_METHOD!r}, found "
            f"{settings.get('quant_method')!r}"
        )
    ours = TwoStageGPTQConfig.from_dict(dict(settings))
    # An adapter may lie beside the checkpoint; it is copied.
    files = sorted(path for path in source.glob("*.safetensors") if path.name != ADAPTER_WEIGHTS)
    if not files:
        raise FileNotFoundError(f"{source} has no .safetensors file; only safetensors checkpoints can be exported")
    headers = tensor_headers(files)
    model = packed_model(source, ours, headers)
    packed = {key.removesuffix(".qweight") for key in headers if key.endswith(".qweight")}
    in_memory = names_in_model(model, headers)
    experts = split_experts(model, {key: in_memory[f"{key}.qweight"].removesuffix(".qweight") for key in packed})
    bits = {name: module.bits for name, module in model.named_modules() if isinstance(module, PackedModule)}
    widths = {name: _look_up(bits, in_memory[f"{name}.qweight"], model.base_model_prefix) for name in packed}
    for projection, each in experts.items():
        widths |= dict.fromkeys(each.modules, widths.pop(projection))
    single, several = _dense_names(model, headers)

    convert: Callable[[str, Tensor], dict[str, Tensor]]
    if format == "gptq":
        config["quantization_config"] = _gptq_config(ours, widths, single, several)

        def convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
            return {name: tensor}
    else:
        _refuse_conv1d(model)
        config["quantization_config"] = _compressed_tensors_config(ours, widths, single, several)
        # compressed-tensors does without fields of others in its configuration, and may come to refuse them.
        config[RECIPE] = ours.meta

        def convert(name: str, tensor: Tensor) -> dict[str, Tensor]:
            module, _, kind = name.rpartition(".")
            return _transpose(module, kind, tensor, widths[module], ours.sym) if module in widths else {name: tensor}

    def convert_all(name: str, tensor: Tensor) -> dict[str, Tensor]:
        module, _, kind = name.rpartition(".")
        if module not in experts:
            return convert(name, tensor)
        each = experts[module].split(kind, tensor)
        return {key: value for part, piece in each.items() for key, value in convert(part, piece).items()}

    with new_directory(out) as staging:
        _write(source, files, staging, convert_all)
        (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if format == "gptq":
            text = json.dumps(config["quantization_config"], indent=2, sort_keys=True)
            (staging / "quantize_config.json").write_text(text + "\n")
    return out


def _look_up(bits: dict[str, int], tensor: str, base: str) -> int:
    """The bits of the module of a tensor; model or checkpoint may have the base model's prefix, and the other not."""
    name = tensor.rpartition(".")[0]
    return next(bits[each] for each in (name, f"{base}.{name}", name.removeprefix(f"{base}.")) if each in bits)


def known_readers(out: str | Path) -> list[str]:
    """Which readers were tested to load an export, by what is in it; docs/serving.md says how.

    Args:
        out: directory of an export (`export_checkpoint`).
    """
    config = read_json(Path(out) / "config.json")
    settings = config["quantization_config"]
    names = {key for path in Path(out).glob("*.safetensors") for key in tensor_headers([path])}
    experts = any(re.search(r"\.experts\.\d+\..*\.(qweight|weight_packed)$", name) for name in names)
    if settings["quant_method"] == "gptq":
        mixed = any("bits" in rule for rule in settings.get("dynamic", {}).values())
        if experts or mixed:
            return []
        # vLLM, tested on a CPU, takes 4 bits only, and of gptq symmetric ones.
        by_vllm = settings["bits"] == 4 and settings["sym"]
        by_transformers = settings["bits"] == 4 or (settings["bits"] == 3 and not settings["sym"])
        return [
            "GPTQModel",
            *(["transformers with GPTQModel"] if by_transformers else []),
            *(["vLLM"] if by_vllm else []),
        ]
    groups = settings["config_groups"].values()
    # transformers fuses experts in memory and finds none in full precision to fuse. It unpacks asymmetric weights only
    # while it loads them, and takes all for those of one group then.
    by_transformers = not experts and (len(groups) == 1 or all(group["weights"]["symmetric"] for group in groups))
    by_vllm = not experts and {group["weights"]["num_bits"] for group in groups} == {4}
    return [
        "compressed-tensors",
        *(["transformers with compressed-tensors"] if by_transformers else []),
        *(["vLLM"] if by_vllm else []),
    ]


def _refuse_conv1d(model: PreTrainedModel) -> None:
    transposed = [
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear) and issubclass(module.replaces, Conv1D)
    ]
    if transposed:
        raise ValueError(
            f"compressed-tensors reads packed weights of nn.Linear only, found Conv1D ({transposed[0]}, as in GPT-2); "
            "export to gptq"
        )


def _dense_names(model: PreTrainedModel, headers: Headers) -> tuple[list[str], list[str]]:
    """Names of what is not packed and may be a Linear to another engine: single ones, and modules that hold several.

    Experts are fused in the model and single in the files, or both, or neither; engines go by either one's names.
    """
    modules = dict(model.named_modules())
    packed = {name for name, module in modules.items() if isinstance(module, QuantizedLinear)}
    single = {name for name, module in modules.items() if isinstance(module, nn.Linear) and name not in packed}
    several = set()
    for key, name in names_in_model(model, headers).items():
        shape, _ = headers[key]
        in_file, _, _ = key.rpartition(".")
        owner, _, _ = name.rpartition(".")
        while owner not in modules:
            owner, _, _ = owner.rpartition(".")
        no_linear = isinstance(modules[owner], nn.Embedding | nn.modules.conv._ConvNd)
        if len(shape) < 2 or f"{in_file}.qweight" in headers or no_linear:
            continue
        below = name.removeprefix(owner)
        names = {owner, key.removesuffix(below) if key.endswith(below) else in_file}
        if not owner or any(layer.startswith(f"{owner}.") for layer in packed):
            single.add(in_file)
        elif len(shape) == 2 and below.count(".") == 1:
            single |= names
        else:
            several |= names
    return sorted(single), sorted(several)


def _gptq_config(
    config: TwoStageGPTQConfig, widths: dict[str, int], single: list[str], several: list[str]
) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": False,
        "sym": config.sym,
        "lm_head": False,
        "checkpoint_format": checkpoint_format(config.sym),
        "pack_dtype": "int32",
        "meta": {**config.meta, "quantizer": [f"lkq-hf:{__version__}"]},
    }
    # The language model head is known not to be quantized; other exceptions are told by name, as in GPTQModel.
    exceptions = [f"^{re.escape(name)}$" for name in single if name != "lm_head"] + _patterns(several)
    dynamic: dict[str, Any] = {f"-:{pattern}": {} for pattern in exceptions}
    # GPTQModel takes the first rule that a module's name matches.
    dynamic |= {
        f"+:^{re.escape(name)}$": {"bits": bits} for name, bits in sorted(widths.items()) if bits != config.bits
    }
    if dynamic:
        settings["dynamic"] = dynamic
    return settings


def _patterns(several: list[str]) -> list[str]:
    """Regular expressions for modules and all that is in them."""
    return [rf"^{re.escape(name)}(\..*)?$" for name in several]


def _compressed_tensors_config(
    config: TwoStageGPTQConfig, widths: dict[str, int], single: list[str], several: list[str]
) -> dict[str, Any]:
    try:
        from compressed_tensors import CompressionFormat
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            QuantizationStatus,
            QuantizationStrategy,
        )
    except ImportError as error:
        raise ImportError(
            "the compressed-tensors export needs compressed-tensors; install it with: pip install lkq-hf[export]"
        ) from error
    whole_row = config.group_size == -1
    targets: dict[int, list[str]] = {}
    for name, bits in sorted(widths.items()):
        targets.setdefault(bits, []).append(name)
    if len(targets) == 1:
        targets = {bits: ["Linear"] for bits in targets}
    settings = QuantizationConfig(
        config_groups={
            f"group_{index}": QuantizationScheme(
                targets=names,
                weights=QuantizationArgs(
                    num_bits=bits,
                    symmetric=config.sym,
                    strategy=QuantizationStrategy.CHANNEL if whole_row else QuantizationStrategy.GROUP,
                    group_size=None if whole_row else config.group_size,
                ),
                format=CompressionFormat.pack_quantized.value,
            )
            for index, (bits, names) in enumerate(targets.items())
        },
        format=CompressionFormat.pack_quantized.value,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=single + [f"re:{pattern}" for pattern in _patterns(several)],
    )
    return json.loads(settings.model_dump_json())


def _transpose(module: str, kind: str, tensor: Tensor, bits: int, sym: bool) -> dict[str, Tensor]:
    """A tensor of a packed Linear in compressed-tensors' names and orientation; nothing for those it does without."""
    if kind == "qweight":
        shape = torch.tensor([tensor.shape[1], tensor.shape[0] * 32 // bits])
        return {f"{module}.weight_packed": tensor.t().contiguous(), f"{module}.weight_shape": shape}
    if kind == "scales":
        return {f"{module}.weight_scale": tensor.t().contiguous()}
    if kind == "qzeros":
        return {} if sym else {f"{module}.weight_zero_point": tensor.t().contiguous()}
    if kind == "g_idx":
        return {}
    return {f"{module}.{kind}": tensor}


def _write(source: Path, files: list[Path], target: Path, convert: Callable[[str, Tensor], dict[str, Tensor]]) -> None:
    """Convert the weight files one by one, write their index if there are several, and copy what else is needed."""
    weight_map: dict[str, str] = {}
    total_size = 0
    for path in files:
        converted: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                converted.update(convert(name, file.get_tensor(name)))
        save_file(converted, target / path.name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(converted, path.name))
        total_size += sum(tensor.numel() * tensor.element_size() for tensor in converted.values())
    if [path.name for path in files] != [SAFE_WEIGHTS_NAME]:
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (target / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for path in source.iterdir():
        if path.is_file() and path not in files and path.name not in _NOT_COPIED:
            shutil.copy2(path, target / path.name)
        elif path.name == CHAT_TEMPLATE_DIR:
            shutil.copytree(path, target / path.name)
