"""What a training step of an 8B model holds for its backward pass, computed on tensors without contents.

    python benchmarks/training_memory.py --out benchmarks/results/training_memory.json

Counts the bytes of every tensor that autograd keeps, once each, for one prompt: with all of them held, and with layers
that are read again in the backward pass (``--recompute``, the default of `lkq-hf train`). To the second comes what one
layer holds while it is read again. Weights, the prompt's cache, and what a kernel allocates for itself are told apart.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lkq_hf import LookaheadKVConfig
from lkq_hf.cache.prepare import get_decoder
from lkq_hf.training.eviction import eviction_gates, response_divergence, response_logits
from lkq_hf.training.importance import PromptCache, lookahead_importance

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


def held(layers: int, length: int, response: int, recompute: bool) -> dict[str, int]:
    """Bytes by kind, of one prompt."""
    config = AutoConfig.for_model("llama", num_hidden_layers=layers, **LLAMA_8B)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = get_peft_model(base, LookaheadKVConfig())
        decoder = get_decoder(model)
        prompt = PromptCache(decoder, torch.zeros(1, length, dtype=torch.long))
        answer = torch.zeros(1, response, dtype=torch.long)
    cache = [tensor for layer in prompt.layers for tensor in (layer.keys, layer.values)]
    known = {_storage(tensor) for tensor in (*model.parameters(), *cache)}
    kept: dict[int, torch.Tensor] = {}

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        if _storage(tensor) not in known:
            kept[_storage(tensor)] = tensor
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        full = response_logits(base, decoder, prompt, answer).detach()
        tokens = decoder.lookahead.active_tokens()
        scores = lookahead_importance(base, decoder, prompt, tokens, 2.0, recompute=recompute)
        gates = eviction_gates(scores, {layer: prompt.kv_heads(layer) for layer in scores}, 128, 0.1, 2.0)
        evicted = response_logits(base, decoder, prompt, answer, gates=gates, recompute=recompute)
        loss = response_divergence(full, evicted)
    assert loss.requires_grad
    return {
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "prompt's cache": sum(tensor.nbytes for tensor in cache),
        "held": sum(tensor.untyped_storage().nbytes() for tensor in kept.values()),
    }


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--response", type=int, default=128)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for length in arguments.lengths:
        direct = held(arguments.layers, length, arguments.response, recompute=False)
        again = held(arguments.layers, length, arguments.response, recompute=True)
        # The difference between models of two and of one layers, without what both hold of the prompt as a whole.
        two, one = (held(layers, length, arguments.response, recompute=False)["held"] for layers in (2, 1))
        gib = {name: value / 2**30 for name, value in direct.items()}
        rows.append(
            {
                "length": length,
                "response": arguments.response,
                "weights": gib["weights"],
                "prompt's cache": gib["prompt's cache"],
                "all held": gib["held"],
                "recomputed": again["held"] / 2**30,
                "one layer": (two - one) / 2**30,
            }
        )
        print(json.dumps({name: round(value, 2) for name, value in rows[-1].items()}), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"unit": "GiB", "prompts": 1, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
