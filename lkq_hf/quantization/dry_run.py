"""Whether a model can be quantized, refined, saved and loaded again, found out in seconds and before hours of work."""

import copy
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import logging

from lkq_hf.files import naming
from lkq_hf.kernels.dispatch import without_triton
from lkq_hf.quantization.blocks import find_blocks, weights_of
from lkq_hf.quantization.capture import PROBE_TOKENS, BlockCall, probe_block_calls
from lkq_hf.quantization.checkpoint import SAFETENSORS_DTYPES, Headers, check_checkpoint
from lkq_hf.quantization.config import TwoStageGPTQConfig
from lkq_hf.quantization.coverage import Coverage, coverage
from lkq_hf.quantization.experts import use_packed_experts
from lkq_hf.quantization.grid import SCALE_DTYPE, minmax_grid, nearest
from lkq_hf.quantization.install import install_packed, replace_by_packed
from lkq_hf.quantization.solve import SolverSettings, resolve_group_size
from lkq_hf.quantization.weight import QuantizedWeight

# Of a token's hidden states: far above what rounding to half precision leaves, far below another computation.
TOLERANCE = 0.1


def check_that_it_loads(model: PreTrainedModel, config: TwoStageGPTQConfig) -> Coverage:
    """Goes through saving and loading without weights: on the meta device, with transformers' own functions.

    Args:
        model: in full precision. It must be what its class makes of its configuration, since that is what is loaded.
        config: what it is to be quantized with.

    Returns:
        How much of the model would be quantized.

    Raises:
        ValueError: what would be saved could not be loaded.
    """
    own, made = (_shapes(each) for each in (model, _empty_twin(model)))
    if own != made:
        raise ValueError(
            f"a quantized {type(model).__name__} could be saved, but not loaded again, so it is not quantized: of its "
            f"tensors, {_some(sorted(dict(own - made)))} are not what its config makes, which would be "
            f"{_some(sorted(dict(made - own)))}"
        )
    # Packed blocks have no weights to be found by.
    list_name, _ = find_blocks(model, config.block_name_to_quantize)
    # Of a model of its own, since a first forward may change weights.
    runs_dense = _forward_error(_empty_twin(model), list_name) is None
    twin = _empty_twin(model)
    try:
        headers, missing, unexpected = _reload(model, config)
        if not missing and not unexpected:
            check_checkpoint(twin, replace_by_packed(twin, config), headers)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        raise ValueError(
            f"a quantized {type(model).__name__} could be saved, but not loaded again, so it is not quantized "
            f"({type(error).__name__}: {error})"
        ) from error
    if missing or unexpected:
        raise ValueError(
            f"a quantized {type(model).__name__} could be saved, but not loaded again, so it is not quantized: "
            f"transformers would miss {_some(missing)} in the file, and not know {_some(unexpected)}"
        )
    # Not every model runs without numbers.
    if runs_dense and (problem := _forward_error(twin, list_name)) is not None:
        raise ValueError(
            f"{type(model).__name__} does not run with packed layers ({type(problem).__name__}: {problem}): its code "
            "uses the weights of some other than by calling the layer. Leave these out with modules_to_not_convert"
        )
    return coverage(twin)


def _forward_error(twin: PreTrainedModel, list_name: str) -> Exception | None:
    """What goes wrong where a model without weights is run up to its last block."""
    _, blocks = find_blocks(twin, list_name)
    tokens = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64, device="meta")
    try:
        probe_block_calls(twin.eval(), list(blocks), tokens)
    except Exception as error:
        return error
    return None


def _shapes(model: PreTrainedModel) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])} and {len(names) - 3} more" if len(names) > 3 else ", ".join(names) or "nothing"


def _empty_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same structure without weights."""
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        twin: PreTrainedModel = type(model)(config)
    if (conversions := getattr(model, "_weight_conversions", None)) is not None:
        twin._weight_conversions = conversions
    return twin


def _reload(model: PreTrainedModel, config: TwoStageGPTQConfig) -> tuple[Headers, list[str], list[str]]:
    """What a file would hold, and the names that transformers misses in it or does not know."""
    twin = _empty_twin(model)
    replace_by_packed(twin, config)
    twin.config.quantization_config = config
    state = remove_tied_weights_from_state_dict(twin.state_dict(), twin)
    state = revert_weight_conversion(twin, state)
    headers = {name: (tuple(tensor.shape), SAFETENSORS_DTYPES.get(tensor.dtype, "")) for name, tensor in state.items()}
    with tempfile.TemporaryDirectory(prefix="lkq-hf-") as directory, naming(Path(directory)), _quiet():
        twin.config.save_pretrained(directory)
        stored = AutoConfig.from_pretrained(directory)
        load: Any = type(model).from_pretrained
        _, found = load(None, config=stored, state_dict=state, device_map={"": "meta"}, output_loading_info=True)
    return headers, sorted(found["missing_keys"]), sorted(found["unexpected_keys"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and warnings."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@torch.no_grad()
def check_that_blocks_run_packed(
    model: PreTrainedModel,
    list_name: str,
    blocks: Sequence[nn.Module],
    layers: dict[str, nn.Module],
    tokens: Tensor,
    settings: SolverSettings,
    device: torch.device,
) -> None:
    """Runs one block of each kind with packed layers, rounded to the nearest integers, on a few tokens.

    Some models read a weight themselves, or its dtype, and not only through the layer's forward: they cannot run with
    packed integers in its place.

    Args:
        blocks: those that `first_of_each_kind` lists have their weights.
        tokens: int64 `[samples, length]`, of which a few are taken.
        device: where a copy of a block is put.

    Raises:
        ValueError: layers in whose place the model does not run; all of them are named.
    """
    hidden, calls = probe_block_calls(model, blocks, tokens)
    for index in first_of_each_kind(list_name, blocks, layers):
        names = _names_inside(list_name, index, layers)
        trial = _Trial(blocks[index], calls[index], hidden.to(device), names, index, settings)
        if (problem := trial.problem(names)) is not None:
            culprits = [name for name in names if trial.problem([name]) is not None] or names
            raise ValueError(
                f"{type(blocks[index]).__name__} does not run with packed layers ({problem}): it uses the weights of "
                f"{', '.join(culprits)} other than by calling the layer. To leave them in full precision and quantize "
                f"the rest, add to modules_to_not_convert: {culprits}"
            )


class _Trial:
    """A copy of a block whose weights are on the grid, to be compared with copies that hold them packed."""

    def __init__(
        self,
        block: nn.Module,
        call: BlockCall,
        hidden: Tensor,
        names: Sequence[str],
        index: int,
        settings: SolverSettings,
    ) -> None:
        self.block = copy.deepcopy(block).to(hidden.device)
        self.call = call
        self.hidden = hidden
        self.weights: dict[str, QuantizedWeight] = {}
        for name in names:
            for key, weight in weights_of(name, self.block.get_submodule(name)).items():
                self.weights[key] = _rounded(weight, settings.of(f"{index}.{name}"))
                weight.copy_(self.weights[key].dequantize())
        self.expected = call.run(self.block, hidden.clone(), 0).float()

    def problem(self, names: Sequence[str]) -> str | None:
        """What goes wrong with these layers packed."""
        packed = copy.deepcopy(self.block)
        for name in names:
            install_packed(packed, name, self.weights)
        use_packed_experts(packed)
        try:
            with without_triton():
                found = self.call.run(packed, self.hidden.clone(), 0)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            return f"{type(error).__name__}: {error}"
        difference = (found.float() - self.expected).norm(dim=-1) / self.expected.norm(dim=-1)
        # Of most tokens: rounding may send one to another expert.
        return None if float(difference.nanmedian()) < TOLERANCE else "it computes something else"


def reason_against_gradients(model: PreTrainedModel, blocks: Sequence[nn.Module], tokens: Tensor) -> str | None:
    """Why nothing can be changed by gradient, if so; learnt from a few tokens in the first block."""
    hidden, calls = probe_block_calls(model, blocks, tokens)
    if hidden.shape[:2] != tokens[:1, :PROBE_TOKENS].shape:
        return f"{type(model).__name__} hands other hidden states to its blocks than one for each token"
    with torch.enable_grad():
        # Of a copy that is no leaf: blocks may write into their input.
        output = calls[0].run(blocks[0], hidden.clone().requires_grad_() * 1, 0)
    return None if output.requires_grad else f"blocks of {type(model).__name__} pass no gradients"


def first_of_each_kind(list_name: str, blocks: Sequence[nn.Module], layers: dict[str, nn.Module]) -> list[int]:
    """The first of the blocks that have the same modules and the same layers to quantize, of each such kind."""
    firsts: dict[object, int] = {}
    for index, block in enumerate(blocks):
        modules = tuple((name, type(module)) for name, module in block.named_modules())
        firsts.setdefault((modules, tuple(_names_inside(list_name, index, layers))), index)
    return list(firsts.values())


def _names_inside(list_name: str, index: int, layers: dict[str, nn.Module]) -> list[str]:
    prefix = f"{list_name}.{index}."
    return [name.removeprefix(prefix) for name in layers if name.startswith(prefix)]


def _rounded(weight: Tensor, settings: SolverSettings) -> QuantizedWeight:
    """The weight rounded to the nearest integers between each group's minimum and maximum."""
    weight = weight.float()
    group_size = resolve_group_size(weight.shape[1], settings.group_size)
    scales, zeros = minmax_grid(weight, settings.bits, group_size, settings.sym)
    integers = nearest(weight, scales, zeros, settings.bits, group_size)
    return QuantizedWeight(
        integers.to(torch.int32),
        scales.to(SCALE_DTYPE),
        zeros.to(torch.int32),
        settings.bits,
        group_size,
        settings.sym,
    )
