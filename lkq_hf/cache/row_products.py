"""A pass of torch's compiler: products of a decode step's one row are left to `lkq_hf.kernels.dense_rows`.

Products that share their input (query, key and value; gate and up) become one launch, whatever the model's modules
are called.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from lkq_hf.kernels.dense_rows import MOST_WEIGHTS


@dataclass(frozen=True)  # copies are equal, so that what was compiled with one is found with another
class RowProducts(CustomGraphPass):
    """For the option ``post_grad_custom_pre_pass`` of ``torch.compile``.

    Args:
        device_type: of the products that are taken.
        dtypes: likewise.
    """

    device_type: str = "cuda"
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)

    def __call__(self, graph: fx.Graph) -> None:
        sharing: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            if self._applies(node):
                sharing.setdefault(_source(_argument(node, 0)), []).append(node)
        for products in sharing.values():
            for first in range(0, len(products), MOST_WEIGHTS):
                _replace(graph, products[first : first + MOST_WEIGHTS])
        graph.lint()

    def _applies(self, product: fx.Node) -> bool:
        row, weight = _argument(product, 0).meta["val"], _weight(product)
        # Only weights that are there before the step: the operator stands where the first of its products stood.
        if weight is None or weight.op not in ("placeholder", "get_attr") or row.shape[0] != 1:
            return False
        known = row.device.type == self.device_type and row.dtype in self.dtypes
        return known and row.is_contiguous() and weight.meta["val"].is_contiguous()

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,), f"{self.device_type}{self.dtypes}")


def _weight(product: fx.Node) -> fx.Node | None:
    """What is transposed on the right of a product, ``[out_features, in_features]``."""
    right: Any = product.args[1]
    if right.target is torch.ops.aten.t.default:
        return _argument(right, 0)
    transposes = right.target is torch.ops.aten.permute.default and list(right.args[1]) == [1, 0]
    return _argument(right, 0) if transposes else None


def _argument(node: fx.Node, place: int) -> fx.Node:
    return node.args[place]  # type: ignore[return-value]


def _source(row: fx.Node) -> fx.Node:
    """What a row is a view of: every product has a view of its own."""
    while row.target in (torch.ops.aten.view.default, torch.ops.aten.reshape.default):
        row = _argument(row, 0)
    return row


def _replace(graph: fx.Graph, products: list[fx.Node]) -> None:
    """Puts one operator in the place of products with the same row, in the order of the graph."""

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        values = [_values(arg) for arg in args]
        node.meta["val"] = target(*values)
        return node

    with graph.inserting_before(products[0]):
        weights = [_weight(product) for product in products]
        outputs, start = call(torch.ops.lkq_hf.dense_rows.default, products[0].args[0], weights), 0
        for product in products:
            stop = start + product.meta["val"].shape[1]
            part = call(torch.ops.aten.slice.Tensor, outputs, 1, start, stop)
            product.replace_all_uses_with(part)
            start = stop
    for product in products:
        graph.erase_node(product)


def _values(arg: Any) -> Any:
    """The tensors without contents behind the nodes of an argument."""
    if isinstance(arg, list):
        return [_values(each) for each in arg]
    value: Tensor | Any = arg.meta["val"] if isinstance(arg, fx.Node) else arg
    return value
