"""The two kinds of tuner layers: learned tokens on the decoder, and a LoRA that knows its positions."""

import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lkq_hf.adapter.config import LookaheadKVConfig
from lkq_hf.attention import thread_state
from lkq_hf.cache.profile import BudgetProfile
from lkq_hf.kernels.add_low_rank import add_low_rank
from lkq_hf.scoring.base import PerLayerEmbedding


class LookaheadKVLayer(BaseTunerLayer):
    """What both kinds share."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError(
            "a LOOKAHEAD_KV adapter cannot be merged: it acts on the lookahead tokens only, and merged weights act on "
            "every token. Keep it as an adapter, or drop it with unload()."
        )

    def unmerge(self) -> None:
        raise NotImplementedError("a LOOKAHEAD_KV adapter is never merged, so there is nothing to unmerge")

    def _sole_active_adapter(self, available: nn.ParameterDict) -> str | None:
        """The active adapter of this layer; ordinary adapters may be active beside it.

        Raises:
            ValueError: more than one is active.
        """
        if self.disable_adapters:
            return None
        active = [name for name in self.active_adapters if name in available]
        if len(active) > 1:
            raise ValueError(
                f"only one LOOKAHEAD_KV adapter can be active at a time, found {', '.join(active)}; "
                "choose one with model.set_adapter(...), or peft.functional.set_adapter(model, ...)"
            )
        return active[0] if active else None


def _available(parameters: nn.ParameterDict, adapter_name: str) -> torch.Tensor:
    """An adapter's parameter, fetched if accelerate has offloaded it."""
    # As parameters[adapter_name], without the detour over attributes: every layer of a prefill comes by here.
    parameter: torch.Tensor = parameters._parameters[adapter_name]  # type: ignore[assignment]
    if parameter.is_meta:
        # Its hook would act when the module is called, as a dictionary never is.
        with align_module_device(parameters):
            return parameters[adapter_name]
    return parameter


def adapter_parameters(model: nn.Module, adapter_name: str) -> dict[str, nn.Parameter]:
    """The parameters of one LOOKAHEAD_KV adapter by their name in the model."""
    return {
        f"{module_name}.{attribute}.{adapter_name}": getattr(module, attribute)[adapter_name]
        for module_name, module in model.named_modules()
        if isinstance(module, LookaheadKVLayer)
        for attribute in module.adapter_layer_names
        if adapter_name in getattr(module, attribute)
    }


class LookaheadTokens(nn.Module, LookaheadKVLayer):
    """The learned tokens, ``[num_lookahead_tokens, hidden]`` for each adapter; attached to the decoder.

    For models that embed every token once per layer as well (Gemma 3n), also these embeddings,
    ``[num_lookahead_tokens, layers, hidden_per_layer]``.
    """

    adapter_layer_names = ("lookahead_kv_tokens", "lookahead_kv_rows")
    other_param_names = ("poolings", "row_powers", "budget_profiles")

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.lookahead_kv_tokens = nn.ParameterDict()
        self.lookahead_kv_rows = nn.ParameterDict()
        self.poolings: dict[str, dict[str, Any]] = {}
        self.row_powers: dict[str, float] = {}
        self.budget_profiles: dict[str, BudgetProfile | None] = {}
        self._complete: set[str] = set()
        # In a tuple, so that it is not registered as a submodule and saved twice.
        self._embedding = (embedding,)

    def update_layer(
        self,
        adapter_name: str,
        config: LookaheadKVConfig,
        hidden_size: int,
        per_layer: PerLayerEmbedding | None = None,
    ) -> None:
        """Adds an adapter's tokens, drawn to look like the model's own embeddings.

        Args:
            adapter_name: of the adapter.
            config: its.
            hidden_size: of the model's embeddings.
            per_layer: what the model embeds tokens to once per layer; None if it does not.
        """
        weight = getattr(self._embedding[0], "weight", None)
        tokens = _initial_tokens(self._embedding[0], weight, config.num_lookahead_tokens, (hidden_size,))
        self.lookahead_kv_tokens[adapter_name] = _parameter(tokens, config)
        if per_layer is not None:
            rows = _initial_tokens(per_layer.embed, weight, config.num_lookahead_tokens, per_layer.shape)
            self.lookahead_kv_rows[adapter_name] = _parameter(rows, config)
        self.poolings[adapter_name] = {
            "kernel_size": config.pooling_kernel_size,
            "pooling": config.pooling,
            "neighbor_weight": config.neighbor_weight,
        }
        self.row_powers[adapter_name] = config.row_power
        self.set_budget_profile(adapter_name, config)
        self._complete.discard(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_budget_profile(self, adapter_name: str, config: LookaheadKVConfig) -> None:
        """Takes an adapter's numbers per head from its config."""
        profile = config.budget_profile
        self.budget_profiles[adapter_name] = None if profile is None else BudgetProfile.from_config(profile)

    def active_name(self) -> str:
        """Name of the active adapter.

        Raises:
            ValueError: no adapter, or more than one, is active.
        """
        name = self._sole_active_adapter(self.lookahead_kv_tokens)
        if name is None:
            raise ValueError(
                "LookaheadCache with the lookahead scorer needs an active LOOKAHEAD_KV adapter, and this model's are "
                "switched off. Call model.enable_adapters() or model.set_adapter(...), or choose a scorer that needs "
                'no adapter, such as LookaheadCache(budget=..., scorer="snapkv").'
            )
        return name

    def check_complete(self, decoder: nn.Module) -> None:
        """Refuses an active adapter whose weights were not all loaded; looks at each adapter once.

        ``model.load_adapter`` of transformers only warns about missing tensors and does not look at values.

        Raises:
            ValueError: a weight is not finite, as all are that loading should have replaced.
        """
        name = self.active_name()
        if name in self._complete:
            return
        broken = [
            f"{module_name}.{attribute}.{name}"
            for module_name, module in decoder.named_modules()
            if isinstance(module, LookaheadKVLayer)
            for attribute in module.adapter_layer_names
            if name in getattr(module, attribute)
            and not torch.isfinite(_available(getattr(module, attribute), name)).all()
        ]
        if broken:
            raise ValueError(
                f"{len(broken)} tensors of the LOOKAHEAD_KV adapter {name!r} ({', '.join(broken[:3])}, ...) were "
                "missing from its file or hold values that are not finite. The file is damaged, or it belongs to "
                f"another model or config: call lkq_hf.adapter.remove_adapter(model, {name!r}) and load an intact one."
            )
        self._complete.add(name)

    def active_tokens(self) -> torch.Tensor:
        """The active adapter's tokens, ``[1, num_lookahead_tokens, hidden]``.

        Raises:
            ValueError: no adapter, or more than one, is active.
        """
        return _available(self.lookahead_kv_tokens, self.active_name())[None]

    def active_rows(self) -> torch.Tensor | None:
        """The active adapter's embeddings for each layer, ``[1, num_lookahead_tokens, layers, hidden_per_layer]``.

        None for models without them.

        Raises:
            ValueError: no adapter, or more than one, is active.
        """
        name = self.active_name()
        return _available(self.lookahead_kv_rows, name)[None] if name in self.lookahead_kv_rows else None

    def pooling(self) -> dict[str, Any]:
        """Arguments of `pool_scores` that the active adapter's config recommends.

        Raises:
            ValueError: no adapter, or more than one, is active.
        """
        return self.poolings[self.active_name()]

    def row_power(self) -> float:
        """Exponent of the active adapter's mean over its tokens.

        Raises:
            ValueError: no adapter, or more than one, is active.
        """
        return self.row_powers[self.active_name()]

    def budget_profile(self) -> BudgetProfile:
        """What each head keeps by the active adapter's config.

        Raises:
            ValueError: no adapter, or more than one, is active, or its config holds no profile.
        """
        name = self.active_name()
        profile = self.budget_profiles[name]
        if profile is None:
            raise ValueError(
                f'allocation="profile" needs numbers per head, and the config of the adapter {name!r} has no '
                'budget_profile. Measure one with `lkq-hf profile`, or choose allocation="global".'
            )
        return profile

    def get_base_layer(self) -> nn.Module:
        return self._embedding[0]


class _Converted(NamedTuple):
    """An adapter's two matrices in another dtype: of which parameters, and in which state of theirs."""

    of: tuple[weakref.ref[torch.Tensor], weakref.ref[torch.Tensor]]
    state: tuple[Any, ...]
    down: torch.Tensor
    up: torch.Tensor


class LookaheadKVLinear(nn.Module, LookaheadKVLayer):
    """A linear module with a LoRA on the last positions of a prefill.

    Outside such a forward, and on every other position, the output is the base layer's, bit for bit.
    """

    adapter_layer_names = ("lookahead_kv_A", "lookahead_kv_B")
    other_param_names = ("scaling", "_converted")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LookaheadKVConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = _sizes(self.get_base_layer())
        self.lookahead_kv_A = nn.ParameterDict()
        self.lookahead_kv_B = nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self._converted: dict[str, _Converted] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: LookaheadKVConfig) -> None:
        """Adds an adapter's matrices ``A [r, in_features]`` and ``B [out_features, r]``.

        Their product starts at 0, unless ``config.init_weights`` is False.
        """
        down = torch.empty(config.r, self.in_features)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        up = torch.zeros(self.out_features, config.r)
        if not config.init_weights:
            nn.init.kaiming_uniform_(up, a=math.sqrt(5))
        self.lookahead_kv_A[adapter_name] = _parameter(down, config)
        self.lookahead_kv_B[adapter_name] = _parameter(up, config)
        self.scaling[adapter_name] = config.lora_alpha / config.r
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        length = thread_state.lookahead_length
        if length == 0:
            return result
        name = self._sole_active_adapter(self.lookahead_kv_A)
        if name is None:
            return result
        if x.ndim == 2:
            rows, result_rows = self._by_row(x), self._by_row(result)
            return self._adapted(name, rows, result_rows, length).flatten(0, 1)
        return self._adapted(name, x, result, length)

    def _by_row(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, length, features]`` from the tokens of a batch in one list, as some models feed their MLPs.

        Raises:
            NotImplementedError: it is not the list of all tokens, as where each expert has its own.
        """
        batch, length = thread_state.token_shape
        if x.shape[0] != batch * length:
            raise NotImplementedError(
                "a LOOKAHEAD_KV adapter acts on the last positions of a prompt, and a linear module was given "
                f"{x.shape[0]} of {batch * length} tokens without their positions. Leave such modules, as experts "
                "are, out of the adapter: LookaheadKVConfig(target_modules=[...])."
            )
        return x.unflatten(0, (batch, length))

    def _adapted(self, name: str, x: torch.Tensor, result: torch.Tensor, length: int) -> torch.Tensor:
        """``result``, with the adapter's part on the last ``length`` positions: itself, where no gradients flow."""
        if torch.is_grad_enabled():
            return self._adapted_with_gradients(name, x, result, length)
        down, up = _available(self.lookahead_kv_A, name), _available(self.lookahead_kv_B, name)
        dtype = result.dtype
        if down.dtype != dtype:
            down, up = self._in_dtype(name, down, up, dtype)
        if x.ndim == 3 and x.shape[-1] == self.in_features and result.shape[-1] == self.out_features:
            add_low_rank(result, x if x.dtype == dtype else x.to(dtype), down, up, self.scaling[name], length)
        else:
            start = x.shape[-2] - length
            lookahead, tail = x.narrow(-2, start, length).to(dtype), result.narrow(-2, start, length)
            tail.add_(self._update(lookahead, down, up, tail.shape[-1]), alpha=self.scaling[name])
        return result

    def _adapted_with_gradients(self, name: str, x: torch.Tensor, result: torch.Tensor, length: int) -> torch.Tensor:
        down, up = _available(self.lookahead_kv_A, name), _available(self.lookahead_kv_B, name)
        start = x.shape[-2] - length
        # A forward of the lookahead tokens alone, as in training, needs no cutting and joining, each with a backward.
        lookahead, tail = (x.narrow(-2, start, length), result.narrow(-2, start, length)) if start else (x, result)
        update = self._update(lookahead.to(down.dtype), down, up, result.shape[-1])
        changed = tail + (update * self.scaling[name]).to(result.dtype)
        return torch.cat([result.narrow(-2, 0, start), changed], dim=-2) if start else changed

    def _in_dtype(
        self, name: str, down: torch.Tensor, up: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """An adapter's matrices in the dtype of the base model, for inference; converted again once they change.

        PEFT holds adapters in float32, in which the two small products would take longer than the rest of the layer.
        """
        if torch.compiler.is_compiling() or down.is_inference() or up.is_inference():  # these have no version
            return down.to(dtype), up.to(dtype)
        state = (dtype, down.data_ptr(), down._version, up.data_ptr(), up._version)
        found = self._converted.get(name)
        # Another adapter of this name may have got the memory of the last one.
        if found is None or found.of[0]() is not down or found.of[1]() is not up or found.state != state:
            of = weakref.ref(down), weakref.ref(up)
            found = self._converted[name] = _Converted(of, state, down.detach().to(dtype), up.detach().to(dtype))
        return found.down, found.up

    def train(self, mode: bool = True) -> Self:
        # Writes to a parameter's `.data`, as averaging weights is often written, leave no trace in its version.
        self._converted.clear()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_converted": {}}

    def _update(self, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, features: int) -> torch.Tensor:
        """``x A^T B^T``, ``[..., features]``.

        Under tensor parallelism every process holds the whole adapter, but of its layer's input or output only a part:
        then it takes the matching columns of ``A``, summing over the processes, or rows of ``B``.
        """
        if x.shape[-1] == self.in_features and features == self.out_features:
            return F.linear(F.linear(x, down), up)
        if torch.is_grad_enabled() and down.requires_grad:
            raise NotImplementedError(
                "a LOOKAHEAD_KV adapter cannot be trained under tensor parallelism: its gradients would be those of "
                "one process's part. Train it with DDP or FSDP (examples/accelerate), or call model.eval() and read "
                "under torch.no_grad()."
            )
        if features != self.out_features:
            mesh = self._tensor_parallel_mesh(dim=0)
            return F.linear(F.linear(x, down), up.chunk(mesh.size(), dim=0)[mesh.get_local_rank()])
        mesh = self._tensor_parallel_mesh(dim=1)
        hidden = F.linear(x, down.chunk(mesh.size(), dim=1)[mesh.get_local_rank()])
        distributed.all_reduce(hidden, group=mesh.get_group())
        return F.linear(hidden, up)

    def _tensor_parallel_mesh(self, dim: int) -> Any:
        """The processes among which the base layer's weight is cut along ``dim``, each one's part in one piece.

        Raises:
            NotImplementedError: it is not, or its parts lie scattered (projections fused into one).
        """
        weight = getattr(self.get_base_layer(), "weight", None)
        if isinstance(weight, DTensor):
            mesh = weight.device_mesh["tp"] if weight.device_mesh.ndim > 1 else weight.device_mesh
            if any(type(placement) is Shard and placement.dim == dim for placement in weight.placements):
                return mesh
        raise NotImplementedError(
            "this model's tensor parallelism cuts a layer in a way that a LOOKAHEAD_KV adapter cannot follow. Load it "
            'with device_map="auto" in the place of tp_plan, or choose a scorer without adapter, such as "snapkv".'
        )

    def __repr__(self) -> str:
        return "lookahead_kv." + super().__repr__()


def _sizes(linear: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear module; GPT-2's, a `Conv1D`, has other names for them."""
    return (linear.nx, linear.nf) if isinstance(linear, Conv1D) else (linear.in_features, linear.out_features)


def _parameter(initial: torch.Tensor, config: LookaheadKVConfig) -> nn.Parameter:
    """A weight to train from ``initial``, or one to load, which is not a number until something was loaded into it."""
    return nn.Parameter(torch.full_like(initial, torch.nan) if config.inference_mode else initial)


def _initial_tokens(
    embed: Callable[[torch.Tensor], torch.Tensor], weight: torch.Tensor | None, count: int, shape: tuple[int, ...]
) -> torch.Tensor:
    """``[count, *shape]`` normal values with the spread of what a model embeds tokens to.

    Args:
        embed: the embedding; some models scale what they look up.
        weight: of the tokens' embedding; None if it cannot be looked at.
        count: values for so many tokens.
        shape: of one.
    """
    if weight is None or weight.device.type == "meta":
        return torch.randn(count, *shape) * 0.02
    with torch.no_grad():
        # A few hundred tokens are enough.
        ids = torch.linspace(0, weight.shape[0] - 1, min(512, weight.shape[0]), device=weight.device).long()
        sample = embed(ids[None])[0].float()
        drawn = torch.randn(count, *shape, device=weight.device)
        return (drawn * sample.std(0) + sample.mean(0)).to(torch.float32)
