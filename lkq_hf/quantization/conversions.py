"""From the tensors of a checkpoint's files to those of a model, for a few of them at a time.

transformers renames tensors while it loads them, and puts some together from several: experts from one matrix each.
Its own rules are applied here.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)


class Conversions:
    """Which tensors of the files each tensor of a model is made from.

    Args:
        model: may be on the meta device.
        keys: names of the tensors in the files.
    """

    def __init__(self, model: PreTrainedModel, keys: Iterable[str]) -> None:
        self._model = model
        changes = get_model_conversion_mapping(model)
        renamings = [change for change in changes if isinstance(change, WeightRenaming)]
        converters = [change for change in changes if isinstance(change, WeightConverter)]
        self._converters = {pattern: each for each in converters for pattern in each.source_patterns}
        names = model.state_dict()
        # By the name of the first of the tensors that are made together.
        self._sources: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
        self._first: dict[str, str] = {}
        for key in sorted(keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
            if name not in names and key in names:
                name, pattern = key, None
            self._sources[name].append((key, pattern))
            self._first[name] = name
            if pattern is not None:
                first, *others = self._converters[pattern].target_patterns
                self._first |= {name.replace(first, other): name for other in others}

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of the model's tensors that the files say nothing of."""
        return [name for name in names if name not in self._first]

    def tensors(self, names: Iterable[str], read: Callable[[list[str]], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Some of the model's tensors.

        Args:
            read: the files' tensors by their names there.
        """
        wanted = list(names)
        found: dict[str, Tensor] = {}
        for first in dict.fromkeys(self._first[name] for name in wanted):
            found |= self._made(first, read([key for key, _ in self._sources[first]]))
        return {name: found[name] for name in wanted}

    def _made(self, first: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        (key, pattern), *_ = self._sources[first]
        if pattern is None:
            return {first: tensors[key]}
        converter: Any = deepcopy(self._converters[pattern])
        for key, pattern in self._sources[first]:
            converter.add_tensor(first, key, pattern, tensors.pop(key))
        made = converter.convert(first, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
