"""What a training step of an 8B model holds for its backward pass, computed on tensors without contents.

    python benchmarks/training_memory.py --out benchmarks/results/training_memory.json

Counts the bytes of every tensor that autograd keeps, once each, for one prompt: with all of them held, and with layers
that are read again in the backward pass (``--recompute``, the default of `lkq-hf train`). To the second comes what one
layer holds while it is read again. Weights, the prompt's cache, and what a kernel allocates for itself are told apart.
"""

import torch
from common import LLAMA_8B, parser, save
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lkq_hf import LookaheadKVConfig
from lkq_hf.cache.prepare import get_decoder
from lkq_hf.training.eviction import eviction_gates, response_divergence, response_logits
from lkq_hf.training.importance import PromptCache, lookahead_importance


def held(layers: int, length: int, response: int, recompute: bool = False) -> dict[str, float]:
    """GiB by kind, of one prompt.

    Raises:
        RuntimeError: the step would train nothing.
    """
    config = AutoConfig.for_model(**LLAMA_8B | {"num_hidden_layers": layers})
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
    if not loss.requires_grad:
        raise RuntimeError("the loss has no gradient: nothing of the adapter would be trained")
    sizes = {"weights": model.parameters(), "prompt's cache": cache, "held": kept.values()}
    return {name: sum(each.untyped_storage().nbytes() for each in found) / 2**30 for name, found in sizes.items()}


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=32)
    options.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    options.add_argument("--response", type=int, default=128)
    given = options.parse_args()
    rows = []
    for length in given.lengths:
        sizes = length, given.response
        direct = held(given.layers, *sizes)
        # The difference between models of two and of one layers, without what both hold of the prompt as a whole.
        layer = held(2, *sizes)["held"] - held(1, *sizes)["held"]
        row = {"length": length, "response": given.response, "weights": direct["weights"]}
        row |= {"prompt's cache": direct["prompt's cache"], "all held": direct["held"]}
        rows.append(row | {"recomputed": held(given.layers, *sizes, recompute=True)["held"], "one layer": layer})
        print(rows[-1], flush=True)
    save(given.out, {"unit": "GiB", "prompts": 1, "rows": rows})


if __name__ == "__main__":
    main()
