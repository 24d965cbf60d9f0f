"""Read a GPTQ checkpoint of any tool into a plain full-precision model, to measure it like our own.

from gptq_checkpoint import load_gptq
model = load_gptq("out/w3-strongest-seed0", dtype=torch.float32)
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lkq_hf.quantization.packing import group_index, unpack_weight


def load_gptq(directory: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A causal language model whose packed weights are dequantized in float32 and rounded once to ``dtype``.

    Raises:
        ValueError: groups that are not consecutive columns, or an asymmetric version 1 checkpoint.
    """
    directory = Path(directory)
    config = AutoConfig.from_pretrained(directory)
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    del config.quantization_config
    version_1 = settings.get("checkpoint_format", "gptq") == "gptq"
    if version_1 and not settings["sym"]:
        raise ValueError("asymmetric zero points of version 1 cannot be told apart; write checkpoint_format gptq_v2")
    tensors = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    state = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "qweight":
            scales = tensors[f"{module}.scales"]
            in_features = tensor.shape[0] * 32 // settings["bits"]
            group_size = in_features // scales.shape[0]
            if not torch.equal(tensors[f"{module}.g_idx"].int(), group_index(in_features, group_size)):
                raise ValueError(f"{module}: groups are not consecutive columns")
            weight = unpack_weight(
                tensor,
                tensors[f"{module}.qzeros"],
                scales,
                bits=settings["bits"],
                group_size=group_size,
                sym=version_1,
            )
            state[f"{module}.weight"] = weight.dequantize(dtype)
        elif kind not in ("qzeros", "scales", "g_idx"):
            state[name] = tensor.to(dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state)
    return model.eval()
