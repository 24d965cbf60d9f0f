"""Processes among which a model's heads are divided (transformers' ``tp_plan``)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from lkq_hf.cache.fingerprint import model_sizes


@dataclass(frozen=True)
class DividedHeads:
    """KV heads of which each process holds as many, in the order of the processes.

    Attributes:
        mesh: the processes.
        heads: KV heads of a layer over all of them.
    """

    mesh: Any
    heads: int

    def own(self, tensor: torch.Tensor, heads: int, dim: int) -> torch.Tensor:
        """This process's part of a tensor with all heads along ``dim``, if its ``heads`` are not all."""
        return tensor if heads == self.heads else tensor.narrow(dim, self.mesh.get_local_rank() * heads, heads)

    def gather(self, scores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The scores of all processes.

        Args:
            scores: of each layer float32 ``[batch, own heads, candidates]``; processes may have other numbers of
                candidates.

        Returns:
            For each layer ``[batch, heads, most candidates]``, minus infinity where a process has none. What this
            process holds whole is left as it is.
        """
        own = [layer for layer in scores if layer.shape[1] < self.heads]
        if not own:
            return list(scores)
        group, size = self.mesh.get_group(), self.mesh.size()
        widths = torch.tensor([layer.shape[2] for layer in own], device=own[0].device)
        distributed.all_reduce(widths, distributed.ReduceOp.MAX, group=group)
        padded = [
            F.pad(layer.to(own[0].device), (0, width - layer.shape[2]), value=-torch.inf)
            for layer, width in zip(own, widths.tolist(), strict=True)
        ]
        sent = torch.cat([layer.flatten() for layer in padded])
        received = sent.new_empty(size * sent.numel())
        distributed.all_gather_into_tensor(received, sent, group=group)
        parts = received.view(size, -1).split([layer.numel() for layer in padded], dim=1)
        whole = iter(
            [
                part.reshape(size, *layer.shape).transpose(0, 1).flatten(1, 2)
                for part, layer in zip(parts, padded, strict=True)
            ]
        )
        return [next(whole).to(layer.device) if layer.shape[1] < self.heads else layer for layer in scores]


def is_divided(model: nn.Module) -> bool:
    """Whether a forward of this model waits for other processes, which hold parts of its weights."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return False
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        isinstance(parameter, DTensor) or hasattr(parameter, "ds_id")  # DeepSpeed's, of ZeRO-3
        for parameter in model.parameters()
    )


def divided_heads(decoder: nn.Module) -> DividedHeads | None:
    """How the KV heads of a decoder are divided among processes; None if they are not."""
    mesh = find_mesh(decoder)
    heads = model_sizes(decoder.config).get("num_key_value_heads")
    return None if mesh is None or heads is None else DividedHeads(mesh, heads)


def find_mesh(decoder: nn.Module) -> Any:
    """The processes that hold the parts of a decoder's attention layers; None if this one holds all of them.

    A mesh without names is that of transformers. FSDP, which shards weights and not heads, has such meshes too.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return None
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
