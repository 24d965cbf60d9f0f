"""What tells one model from another, cheaply."""

import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import PurePath
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

SHAPE_FIELDS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim",
)  # fmt: skip

SAMPLED_TENSORS, SAMPLED_VALUES = 24, 16


class ModelReference:
    """Remembers a module without keeping it alive. Copies share it; a pickle forgets the module."""

    def __init__(self, module: nn.Module | None = None) -> None:
        self._find: Callable[[], Any] = (lambda: None) if module is None else weakref.ref(module)

    def __call__(self) -> Any:
        """The module, or None."""
        return self._find()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModelReference":
        return self

    def __reduce__(self) -> Any:
        return ModelReference, ()


def model_sizes(config: Any) -> dict[str, Any]:
    """Those of `SHAPE_FIELDS` that a model has; where layers differ in one, transformers names none."""
    sizes = {}
    for name in SHAPE_FIELDS:
        with suppress(AttributeError, RuntimeError):
            sizes[name] = getattr(config, name)
    return sizes


def fingerprint(decoder: Any) -> dict[str, Any]:
    """Name, sizes, dtype and a sample of the weights of a decoder, as JSON.

    The sample holds a few values of a few tensors, spread evenly over all of them in the order of their names. Of a
    quantized model these are packed integers and scales. Lookahead adapters take no part, since they do not change
    keys and values; other adapters do, active or not.
    """
    tensors = _tensors(decoder)
    names = sorted(tensors)
    chosen = {names[index] for index in _spread(len(names), SAMPLED_TENSORS)}
    return {
        "name": _public_name(str(getattr(decoder.config, "_name_or_path", ""))),
        "sizes": model_sizes(decoder.config),
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "weights": {name: _sample(tensors[name]) for name in sorted(chosen)},
    }


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """In what two fingerprints differ, in words.

    Names are not compared, since one model may lie in several places. Weights of models in the same dtype have to be
    equal, those in others equal up to rounding.
    """
    if found["sizes"] != expected["sizes"]:
        return [
            f"{name} is {expected['sizes'].get(name)} and should be {found['sizes'].get(name)}"
            for name in {**found["sizes"], **expected["sizes"]}
            if found["sizes"].get(name) != expected["sizes"].get(name)
        ]
    ours, theirs = found["weights"], expected["weights"]
    if ours.keys() != theirs.keys():
        return ["its tensors have other names, as those of a quantized model or of one with another adapter have"]
    rounding = 0.0
    if found["dtype"] != expected["dtype"]:
        dtypes = [getattr(torch, each["dtype"]) for each in (found, expected)]
        rounding = max(torch.finfo(dtype).eps for dtype in dtypes)
    known = [name for name in ours if ours[name] is not None and theirs[name] is not None]
    return [f"the weights in {name} are others" for name in known if not _equal(ours[name], theirs[name], rounding)]


def is_fingerprint(value: Any) -> bool:
    """Whether something read from a file has the form of a fingerprint."""
    if not isinstance(value, dict) or not all(isinstance(value.get(name), dict) for name in ("sizes", "weights")):
        return False
    dtype = getattr(torch, value["dtype"], None) if isinstance(value.get("dtype"), str) else None
    return (
        isinstance(dtype, torch.dtype)
        and dtype.is_floating_point
        and isinstance(value.get("name"), str)
        and all(
            sample is None or (isinstance(sample, list) and all(isinstance(number, int | float) for number in sample))
            for sample in value["weights"].values()
        )
    )


def _tensors(decoder: nn.Module) -> dict[str, torch.Tensor]:
    """What the decoder would save, but for lookahead adapters, by names that do not show what is wrapped around."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in decoder.state_dict().items()
        if isinstance(tensor, torch.Tensor) and "lookahead_kv_" not in name
    }


def _sample(tensor: torch.Tensor) -> list[float] | None:
    """A few values; None of a tensor that is not whole here: accelerate has offloaded it, or FSDP sharded it."""
    if tensor.is_meta or isinstance(tensor, DTensor):
        return None
    flat = tensor.detach().reshape(-1)
    index = torch.tensor(_spread(flat.numel(), SAMPLED_VALUES), device=flat.device, dtype=torch.long)
    return flat[index].double().tolist()


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` indices, evenly spread, with the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(step * (count - 1) / (most - 1)) for step in range(most)]


def _equal(one: list[float], other: list[float], rounding: float) -> bool:
    if len(one) != len(other):
        return False
    tiny = torch.finfo(torch.float16).tiny if rounding else 0.0
    return all(abs(a - b) <= rounding * max(abs(a), abs(b)) + tiny for a, b in zip(one, other, strict=True))


def _public_name(name: str) -> str:
    """An id on the Hub as it is; of a directory on this machine only its own name."""
    return PurePath(name).name if os.path.isabs(name) or name.startswith((".", "~")) or os.path.isdir(name) else name
