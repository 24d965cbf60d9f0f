"""Under which names a model's original files hold its experts: one matrix for each, where in memory they are fused."""

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from lkq_hf.quantization.experts import packed_experts
from lkq_hf.quantization.packing import group_index
from lkq_hf.quantization.quantized_experts import QuantizedExperts

_EACH = "experts.*."


@dataclass(frozen=True)
class SplitExperts:
    """The matrices of one packed projection.

    Args:
        packed: the projection.
        prefix: name of the experts in the files, with a dot at its end.
        parts: names of the matrices that are concatenated in each expert, in their order, such as gate and up.
    """

    packed: QuantizedExperts
    prefix: str
    parts: tuple[str, ...]

    @property
    def modules(self) -> list[str]:
        """The names of all matrices."""
        return [f"{self.prefix}{expert}.{part}" for expert in range(self.packed.num_experts) for part in self.parts]

    def split(self, kind: str, tensor: Tensor) -> dict[str, Tensor]:
        """One packed tensor of all experts as those of every matrix, with the `g_idx` that is only implied here.

        Args:
            kind: `"qweight"`, `"qzeros"` or `"scales"`.
        """
        result: dict[str, Tensor] = {}
        for expert, whole in enumerate(tensor):
            # Output features are the last dimension of each kind.
            for part, piece in zip(self.parts, whole.chunk(len(self.parts), -1), strict=True):
                module = f"{self.prefix}{expert}.{part}"
                result[f"{module}.{kind}"] = piece.contiguous()
                if kind == "qweight":
                    result[f"{module}.g_idx"] = group_index(self.packed.in_features, self.packed.group_size)
        return result


def split_experts(model: PreTrainedModel, in_file: dict[str, str]) -> dict[str, SplitExperts]:
    """How the packed experts of a model are told apart, by the names of the packed projections in the files.

    Args:
        model: with packed experts.
        in_file: the names in memory of the packed projections, by their names in the files.

    Raises:
        ValueError: the model's original files do not hold one matrix for each expert.
    """
    found: dict[str, SplitExperts] = {}
    for name, module in model.named_modules():
        for projection, packed in packed_experts(module).items():
            child = next(key for key, each in module.named_children() if each is packed)
            key = next(key for key, in_memory in in_file.items() if in_memory == f"{name}.{child}")
            parts = _parts(model, projection)
            if parts is None or packed.transposed:
                raise ValueError(
                    f"{name}.{projection}: the original files of {type(model).__name__} do not hold one matrix for "
                    "each expert, and other engines have no common name for their packed weights. Load the checkpoint "
                    "with lkq_hf, or quantize with modules_to_not_convert for the experts to export the rest"
                )
            found[key] = SplitExperts(packed, key.removesuffix(child), parts)
    return found


def _parts(model: PreTrainedModel, projection: str) -> tuple[str, ...] | None:
    """What transformers merges into one projection: the names behind an expert's number."""
    for change in get_model_conversion_mapping(model, add_legacy=False):
        if not isinstance(change, WeightConverter) or len(change.target_patterns) != 1:
            continue
        sources = [source.replace("\\", "") for source in change.source_patterns]
        fits = change.target_patterns[0].replace("\\", "").endswith(f"experts.{projection}")
        if fits and all(_EACH in source and source.endswith(".weight") for source in sources):
            steps = [(type(step), getattr(step, "dim", None)) for step in change.operations]
            if steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
                return tuple(source.rpartition(_EACH)[2].removesuffix(".weight") for source in sources)
    return None
