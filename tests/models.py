"""Tiny random models, plain computations to compare the package's results with, and a backend that shows graphs."""

import copy
import functools
from contextlib import contextmanager

import pytest
import torch
from peft.functional import set_adapter as peft_set_adapter
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompileConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from lkq_hf import LookaheadKVConfig
from lkq_hf.adapter.injection import inject_adapter, remove_adapter
from lkq_hf.adapter.model import adapter_parameters
from lkq_hf.cache.prepare import get_decoder
from lkq_hf.compat import adapter_methods_work

ARCHITECTURES = ("llama", "qwen3", "mistral", "phi3", "gemma3")

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    # Ten times the usual spread, so that attention is far from uniform.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PARTICULAR = {
    "mistral": {"sliding_window": None},
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "query_pre_attn_scalar": 16,
    },
}


def tiny_config(architecture="llama", **changes):
    values = SIZES | PARTICULAR.get(architecture, {}) | changes
    config = AutoConfig.for_model(values.pop("model_type", architecture), **values)
    config._name_or_path = f"tiny-{architecture}"
    return config


def tiny_model(architecture="llama", attention="eager", seed=0, **changes):
    """A random model in eval mode whose generation never ends early."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), attn_implementation=attention)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def tiny_gemma3_with_pictures(attention="eager"):
    """A language model inside of a multimodal one; token 3 stands for a part of a picture."""
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=tiny_config("gemma3").to_dict(),
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=3,
        initializer_range=0.2,
    )
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def add_lookahead(model, name="default", seed=1, **config):
    """Adds a LOOKAHEAD_KV adapter whose LoRA changes something, as after training."""
    torch.manual_seed(seed)
    inject_adapter(model, LookaheadKVConfig(**{"num_lookahead_tokens": 5, "r": 4} | config), name)
    randomize_adapter(model, name)
    return model


needs_adapter_methods = pytest.mark.skipif(
    not adapter_methods_work(), reason="transformers refuses a model's own adapter methods with this PEFT"
)

# A model's own methods where transformers lets them run with the installed PEFT, and what does the same elsewhere.


def add_adapter(model, config, name="default"):
    if adapter_methods_work():
        model.add_adapter(config, name)
    else:
        inject_adapter(model, config, name)
        peft_set_adapter(model, name)


def set_adapter(model, names):
    if adapter_methods_work():
        model.set_adapter(names)
    else:
        peft_set_adapter(model, names)


def delete_adapter(model, name):
    if adapter_methods_work():
        model.delete_adapter(name)
    else:
        remove_adapter(model, name)


def switch_adapters(model, enabled):
    if adapter_methods_work():
        (model.enable_adapters if enabled else model.disable_adapters)()
    else:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(enabled)


def save_adapter(model, directory, name="default"):
    """What `save_pretrained` does for a model with an adapter."""
    if adapter_methods_work():
        model.save_pretrained(directory)
        return
    weights = get_peft_model_state_dict(model, adapter_name=name)
    model.peft_config[name].save_pretrained(directory)
    save_file(
        {f"base_model.model.{key}": value.contiguous() for key, value in weights.items()},
        directory / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


def randomize_adapter(model, name="default", seed=2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in adapter_parameters(model, name).items():
            if "lookahead_kv_B" in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def lookahead_model(architecture="llama", attention="eager", **changes):
    return add_lookahead(tiny_model(architecture, attention, **changes))


def prompt_ids(batch, length, seed=0, vocabulary=SIZES["vocab_size"]):
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows):
    """Token ids and mask of rows of different lengths."""
    length = max(len(row) for row in rows)
    ids = torch.stack([F.pad(row, (length - len(row), 0)) for row in rows])
    mask = torch.stack([F.pad(torch.ones_like(row), (length - len(row), 0)) for row in rows])
    return ids, mask


def padded_prompts(long=40, short=25, seed=0):
    """Token ids and mask of two prompts."""
    return left_padded([prompt_ids(1, long, seed=seed)[0], prompt_ids(1, short, seed=seed + 1)[0]])


def full_layers(model):
    config = get_decoder(model).config
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [index for index, kind in enumerate(types) if kind == "full_attention"]


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


@contextmanager
def _hooks(handles):
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def lookahead_attention(base, adapted, ids, mask=None, name="default"):
    """Attention of an adapter's tokens to the prompt, ``{layer: [batch, heads, n, length]}``, by definition.

    One eager forward of the untouched base over prompt and tokens; the LoRA is added by hooks that know nothing of
    the package's layers.
    """
    parameters = {key: value.detach() for key, value in adapter_parameters(adapted, name).items()}
    tokens = next(value for key, value in parameters.items() if "lookahead_kv_tokens" in key)
    config = adapted.peft_config[name]
    count, length = tokens.shape[0], ids.shape[1]
    handles = []
    for key, down in parameters.items():
        if "lookahead_kv_A" in key:
            up = parameters[key.replace("lookahead_kv_A", "lookahead_kv_B")]
            module = base.get_submodule(key.partition(".lookahead_kv_A")[0])

            def add(module, args, output, down=down, up=up):
                # Some models feed their MLPs the tokens of all rows in one list.
                x, changed = (tensor.reshape(ids.shape[0], length + count, -1) for tensor in (args[0], output.clone()))
                changed[:, -count:] += config.lora_alpha / config.r * (x[:, -count:] @ down.T @ up.T)
                return changed.view(output.shape)

            handles.append(module.register_forward_hook(add))
    mask = torch.ones_like(ids) if mask is None else mask
    mask = F.pad(mask, (0, count), value=1)
    embeds = base.get_input_embeddings()(ids)
    embeds = torch.cat([embeds, tokens.expand(ids.shape[0], -1, -1)], dim=1)
    with torch.no_grad(), _hooks(handles):
        output = base(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions(mask),
            output_attentions=True,
            use_cache=False,
        )
    return {index: output.attentions[index][:, :, length:, :length] for index in full_layers(base)}


def scores_of(attention, kv_heads=SIZES["num_key_value_heads"], row_power=1.0):
    """``[batch, kv_heads, length]`` from ``[batch, heads, n, length]``."""
    return attention.pow(row_power).mean(2).unflatten(1, (kv_heads, -1)).mean(2).pow(1 / row_power)


def top_entries(scores, budget, mask=None):
    """Which entries have the highest scores of each head, bool ``[batch, kv_heads, length]``; padding never."""
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    for row in range(scores.shape[0]):
        real = torch.ones(scores.shape[-1], dtype=torch.bool) if mask is None else mask[row].bool()
        for head in range(scores.shape[1]):
            best = scores[row, head].masked_fill(~real, -torch.inf).argsort(descending=True, stable=True)
            kept[row, head, best[: min(budget, int(real.sum()))]] = True
    return kept


def kept_entries(cache):
    """``{layer: bool [batch, kv_heads, length]}`` of the layers that were cut."""
    found = {index: layer.kept() for index, layer in enumerate(cache.layers) if hasattr(layer, "kept")}
    return {index: kept for index, kept in found.items() if kept is not None}


def evicted_logits(base, ids, mask, kept, prompt_length=None):
    """Logits of an eager model that keeps its whole cache and masks, head by head, what was evicted.

    Args:
        kept: for each layer what was kept of the first ``prompt_length`` tokens, ``[batch, kv_heads, prompt_length]``,
            which later tokens see with all that follow it. A list of several such dictionaries for several evictions,
            each for the tokens up to the next; with a number, for the tokens from that position on.
    """
    stages = [
        stage if isinstance(stage, tuple) else (stage, None) for stage in (kept if isinstance(kept, list) else [kept])
    ]

    def hide(layer):
        def change(module, args, kwargs):
            attention_mask = kwargs["attention_mask"]
            heads = module.config.num_attention_heads
            hidden = attention_mask.expand(-1, heads, -1, -1).clone()
            for stage, begin in stages:
                one = stage[layer]
                length = one.shape[-1] if prompt_length is None else prompt_length
                begin = length if begin is None else begin
                gone = ~one.repeat_interleave(heads // one.shape[1], dim=1)[:, :, None, :length]
                # What a later eviction has brought back (from main memory) is seen again.
                hidden[:, :, begin:] = attention_mask[:, :, begin:].expand(-1, heads, -1, -1)
                hidden[:, :, begin:, :length].masked_fill_(gone, torch.finfo(hidden.dtype).min)
            return args, kwargs | {"attention_mask": hidden}

        return change

    decoder = get_decoder(base)
    handles = [
        decoder.layers[layer].self_attn.register_forward_pre_hook(hide(layer), with_kwargs=True)
        for layer in stages[0][0]
    ]
    mask = torch.ones_like(ids) if mask is None else F.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    with torch.no_grad(), _hooks(handles):
        return base(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits


def base_and_adapted(architecture="llama", **changes):
    """The same random model twice: untouched, and with an adapter."""
    base = tiny_model(architecture, **changes)
    return base, add_lookahead(copy.deepcopy(base))


class Graphs:
    """A backend of torch.compile that runs graphs as they are and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)
        return graph.forward

    @property
    def count(self):
        return len(self.graphs)

    def __deepcopy__(self, memo):
        return self  # CompileConfig copies what it hands to torch.compile


@functools.cache
def _waits(function):
    return any(name in str(function) for name in ("local_scalar_dense", "nonzero", "equal.default", "unique"))


class Waits(TorchDispatchMode):
    """Refuses what asks the device for a value."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not _waits(function), f"{function} waits"
        return function(*args, **(kwargs or {}))


def compiled_by(backend):
    """Options of ``generate`` that compile on every device, in one graph or not at all."""
    config = CompileConfig(backend=backend, fullgraph=True, mode=None)
    config._compile_all_devices = True
    return {"compile_config": config}
