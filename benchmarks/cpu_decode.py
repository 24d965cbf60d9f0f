"""Time of one token on a CPU: bfloat16, float32, and 4-bit weights with and without torch's int4 kernel.

    OMP_NUM_THREADS=1 python benchmarks/cpu_decode.py --out benchmarks/results/cpu_decode.json
    OMP_NUM_THREADS=1 python benchmarks/cpu_decode.py --hidden 2048 --layers 2 --tokens 6 \\
        --out benchmarks/results/cpu_decode_2048.json

Weights are rounded to the nearest integers: how well a model is quantized does not change its time. All variants take
turns, a token each, so that other work on the machine slows all of them; the median over tokens is reported.
"""

import argparse
import copy
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from hardware import describe
from real_models import smollm2_directory
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from lkq_hf.files import write_json
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
    """One variant: a model with a cache of its own.

    Args:
        model: on the CPU.
        reference: whether packed weights are unpacked at every product, as without torch's kernel.
    """

    def __init__(self, model: PreTrainedModel, prompt: int, reference: bool = False) -> None:
        self.model = model
        self.reference = reference
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


def weight_bytes(model: PreTrainedModel) -> int:
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, help="of a random Llama instead of SmolLM2-135M-Instruct")
    parser.add_argument("--layers", type=int, default=4, help="of a random Llama")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="tokens in the cache at the start")
    parser.add_argument("--tokens", type=int, default=12, help="measured, after one that is not")
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()

    if arguments.hidden:
        config = LlamaConfig(
            hidden_size=arguments.hidden,
            intermediate_size=arguments.hidden * 11 // 4,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.hidden // 128,
            num_key_value_heads=max(1, arguments.hidden // 512),
            vocab_size=32000,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(smollm2_directory(), dtype=torch.float32)
    model.eval()
    half = copy.deepcopy(model).bfloat16()
    w4 = {"float32": packed(model, arguments.group_size), "bfloat16": packed(half, arguments.group_size)}
    variants = {"bfloat16": Decoding(half, arguments.prompt), "float32": Decoding(model, arguments.prompt)}
    for dtype, each in w4.items():
        variants[f"4 bits, {dtype}, unpacked at every product"] = Decoding(each, arguments.prompt, reference=True)
        variants[f"4 bits, {dtype}"] = Decoding(each, arguments.prompt)
    for _ in range(arguments.tokens + 1):
        for variant in variants.values():
            variant.step()
    kept: dict[torch.dtype, int] = {}
    for repacked in int4_cpu._repacked.values():
        size = repacked.weight.nbytes + repacked.scales_and_zeros.nbytes
        kept[repacked.scales_and_zeros.dtype] = kept.get(repacked.scales_and_zeros.dtype, 0) + size
    rows: list[dict[str, Any]] = []
    for name, variant in variants.items():
        own = name.startswith("4 bits") and not variant.reference
        rows.append(
            {
                "variant": name,
                "milliseconds": round(statistics.median(variant.milliseconds[1:]), 2),
                "tokens_per_second": round(1000 / statistics.median(variant.milliseconds[1:]), 2),
                "weight_bytes": weight_bytes(variant.model),
                "repacked_bytes": kept.get(variant.model.dtype, 0) if own else 0,
            }
        )
        print(rows[-1], flush=True)
    settings = {
        "model": f"{model.config.model_type}, {model.num_parameters():,} parameters",
        "group_size": arguments.group_size,
        "prompt": arguments.prompt,
        "tokens": arguments.tokens,
        "threads": torch.get_num_threads(),
    }
    write_json(arguments.out, {"settings": settings, "environment": describe(), "rows": rows})


if __name__ == "__main__":
    main()
