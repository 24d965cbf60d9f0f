"""Time of one token on a CPU: bfloat16, float32, and 4-bit weights with and without torch's int4 kernel.

    OMP_NUM_THREADS=1 python benchmarks/cpu_decode.py --out benchmarks/results/cpu_decode.json
    OMP_NUM_THREADS=1 python benchmarks/cpu_decode.py --hidden 2048 --layers 2 --tokens 6 --out other    # another size

Weights are rounded to the nearest integers: how well a model is quantized does not change its time. All variants take
turns, a token each, so that other work on the machine slows all of them; the median over tokens is reported.
"""

import copy
import os
import statistics
import time
from typing import Any

import torch
from common import MODELS, describe, parser, save
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from lkq_hf.kernels import int4_cpu
from lkq_hf.kernels.dispatch import ENVIRONMENT_VARIABLE
from lkq_hf.quantization.calibrate import find_layers
from lkq_hf.quantization.config import TwoStageGPTQConfig
from lkq_hf.quantization.shared_input import share_inputs
from lkq_hf.quantization.walk import quantize_blocks


def packed(model: PreTrainedModel, group_size: int) -> PreTrainedModel:
    """A copy with 4-bit weights, rounded to nearest."""
    model = copy.deepcopy(model)
    config = TwoStageGPTQConfig(
        bits=4, group_size=group_size, preset="paper", advanced={"stages": (), "alpha": 0.0, "round_to_nearest": True}
    )
    name, layers = find_layers(model, config)
    quantize_blocks(model, name, layers, torch.ones(1, 8, dtype=torch.int64), config.solver_settings())
    share_inputs(model)
    return model


class Decoding:
    """One variant: a model with a cache of its own; ``reference`` unpacks weights at every product."""

    def __init__(self, model: PreTrainedModel, prompt: int, reference: bool = False) -> None:
        self.model, self.reference = model, reference
        self.cache = DynamicCache(config=model.config)
        self.milliseconds: list[float] = []
        self.token = torch.ones(1, 1, dtype=torch.int64)
        with torch.no_grad():
            self.model(torch.ones(1, prompt, dtype=torch.int64), past_key_values=self.cache)

    @torch.no_grad()
    def step(self) -> None:
        os.environ[ENVIRONMENT_VARIABLE] = "torch" if self.reference else ""
        start = time.perf_counter()
        logits = self.model(self.token, past_key_values=self.cache).logits
        self.milliseconds.append(1000 * (time.perf_counter() - start))
        self.token = logits[:, -1:].argmax(-1)

    def row(self, name: str, repacked: int) -> dict[str, Any]:
        median = statistics.median(self.milliseconds[1:])
        sizes = {tensor.data_ptr(): tensor.nbytes for tensor in self.model.state_dict().values()}
        speed = {"milliseconds": round(median, 2), "tokens_per_second": round(1000 / median, 2)}
        return {"variant": name, **speed, "weight_bytes": sum(sizes.values()), "repacked_bytes": repacked}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--hidden", type=int, help="of a random Llama instead of SmolLM2-135M-Instruct")
    options.add_argument("--layers", type=int, default=4, help="of a random Llama")
    options.add_argument("--group-size", type=int, default=64)
    options.add_argument("--prompt", type=int, default=64, help="tokens in the cache at the start")
    options.add_argument("--tokens", type=int, default=12, help="measured, after one that is not")
    given = options.parse_args()
    if given.hidden:
        config = LlamaConfig(
            hidden_size=given.hidden,
            intermediate_size=given.hidden * 11 // 4,
            num_hidden_layers=given.layers,
            num_attention_heads=given.hidden // 128,
            num_key_value_heads=max(1, given.hidden // 512),
            vocab_size=32000,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(MODELS["smollm2"](), dtype=torch.float32)
    models = {"bfloat16": copy.deepcopy(model.eval()).bfloat16(), "float32": model}
    variants = {dtype: Decoding(each, given.prompt) for dtype, each in models.items()}
    for dtype, each in models.items():
        small = packed(each, given.group_size)
        variants[f"4 bits, {dtype}, unpacked at every product"] = Decoding(small, given.prompt, reference=True)
        variants[f"4 bits, {dtype}"] = Decoding(small, given.prompt)
    for _ in range(given.tokens + 1):
        for variant in variants.values():
            variant.step()
    kept = dict.fromkeys((torch.float32, torch.bfloat16), 0)
    for repacked in int4_cpu._repacked.values():
        kept[repacked.scales_and_zeros.dtype] += repacked.weight.nbytes + repacked.scales_and_zeros.nbytes
    rows = [
        each.row(name, kept[each.model.dtype] if name.startswith("4 bits") and not each.reference else 0)
        for name, each in variants.items()
    ]
    settings = {"model": f"{model.config.model_type}, {model.num_parameters():,} parameters"}
    settings |= {name: getattr(given, name) for name in ("group_size", "prompt", "tokens")}
    settings["threads"] = torch.get_num_threads()
    save(given.out, {"settings": settings, "environment": describe(), "rows": rows})
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
