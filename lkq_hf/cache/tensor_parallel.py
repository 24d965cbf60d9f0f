"""Processes among which a model's heads are divided (transformers' ``tp_plan``)."""

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def find_mesh(decoder: nn.Module) -> Any:
    """The processes that hold the parts of a decoder's attention layers; None if this one holds all of them.

    A mesh without names is that of transformers. FSDP, which shards weights and not heads, has such meshes too.
    """
    if any(isinstance(module, FSDPModule) for module in decoder.modules()):
        return None
    for module in decoder.modules():
        if not hasattr(module, "layer_idx"):
            continue
        for parameter in module.parameters():
            if isinstance(parameter, DTensor):
                mesh = parameter.device_mesh
                if mesh.mesh_dim_names is None:
                    return mesh
                return mesh["tp"] if "tp" in mesh.mesh_dim_names else None
    return None
