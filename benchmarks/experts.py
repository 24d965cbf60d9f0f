"""A mixture of experts of real shape with random weights: bytes, seconds to quantize, tokens per second against bf16.

    python benchmarks/experts.py --out benchmarks/results/experts.json     # on one CUDA GPU
    python benchmarks/experts.py --small                                   # a smoke run on any machine

The shape is that of Qwen3-30B-A3B's layers (128 experts of 2048 x 768, 8 for each token), four of them or
``--layers``. The same model is measured in bfloat16 and packed:

    experts    one layer's experts alone, as a CUDA graph, for several numbers of tokens: microseconds
    prefill    one forward pass over a prompt: tokens per second
    decode     one token after another, eager, for several batch sizes: tokens per second. With four layers it is
               bound by the host; the first table tells what the GPU takes

bfloat16 is measured with each of transformers' implementations, `grouped_mm` and `batched_mm`, and the faster one
counts. The packed model is also compared with the one that has its dequantized weights.
"""

import argparse
import copy
import gc
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import DEVICE, describe, parser, save, seconds_of, settings, synchronize
from tables import table
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, Qwen3MoeConfig

from lkq_hf.quantization import TwoStageGPTQConfig
from lkq_hf.quantization.blocks import find_layers
from lkq_hf.quantization.experts import PACKED_EXPERTS
from lkq_hf.quantization.install import restore_linear
from lkq_hf.quantization.shared_input import share_inputs
from lkq_hf.quantization.walk import quantize_blocks

IMPLEMENTATIONS = ("grouped_mm", "batched_mm")
SHAPE = {
    "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "vocab_size": 32768, "max_position_embeddings": 32768,
}  # fmt: skip
SMALL = SHAPE | {
    "hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
}  # fmt: skip


def build(shape: dict[str, int]) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**shape, norm_topk_prob=True)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def bytes_of(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in {*module.parameters(), *module.buffers()})


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Of the median run, after two that compile and choose kernels."""
    return statistics.median(seconds_of(run, repeats, warm_up=2)[0])


def graph_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Of one run without the host's part: replays of a CUDA graph. Without a GPU, of a plain run."""
    if DEVICE != "cuda":
        return seconds(run, repeats)
    run()
    synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> None:
        for _ in range(10):
            graph.replay()

    return seconds(replay, repeats) / 10


@torch.no_grad()
def time_experts(model: PreTrainedModel, tokens: list[int], repeats: int) -> dict[int, float]:
    """Microseconds of one layer's experts, with the routes of its own router, by the number of tokens."""
    mixture = model.model.layers[1].mlp
    microseconds = {}
    for count in tokens:
        hidden = torch.randn(1, count, model.config.hidden_size, device=DEVICE, dtype=model.dtype)
        received: list[tuple[Any, ...]] = []
        handle = mixture.experts.register_forward_pre_hook(lambda _, args: received.append(args))  # noqa: B023
        mixture(hidden)
        handle.remove()
        microseconds[count] = 1e6 * graph_seconds(lambda: mixture.experts(*received[0]), repeats)  # noqa: B023
    return microseconds


@torch.no_grad()
def time_model(model: PreTrainedModel, prompt: int, batches: list[int], steps: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of a prefill and of decoding."""
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (1, prompt), device=DEVICE)
    prefill = prompt / seconds(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1), repeats)
    decode = {}
    for batch in batches:
        cache = DynamicCache(config=model.config)
        model(input_ids=torch.randint(vocabulary, (batch, 16), device=DEVICE), past_key_values=cache)

        def run(batch: int = batch, cache: DynamicCache = cache) -> None:
            for _ in range(steps):
                model(input_ids=torch.randint(vocabulary, (batch, 1), device=DEVICE), past_key_values=cache)

        decode[batch] = batch * steps / seconds(run, repeats)
    return {"prefill": prefill, "decode": decode}


def measure(model: PreTrainedModel, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "experts_microseconds": time_experts(model, arguments.tokens, arguments.repeats),
        **time_model(model, arguments.prompt, arguments.batches, arguments.steps, arguments.repeats),
    }


def report(result: dict[str, Any]) -> str:
    packed, dense = result["packed"], result["bfloat16"]
    lines = [
        f"Blocks: {result['bytes']['bfloat16'] / 2**30:.2f} GiB in bfloat16, "
        f"{result['bytes']['packed'] / 2**30:.2f} GiB packed. Quantized in {result['quantize_seconds']:.0f} s, peak "
        f"memory {result['peak_memory_bytes'] / 2**30:.1f} GiB. Of {result['experts']['experts']} experts a layer, "
        f"{result['experts']['rare']} were rare and {result['experts']['unseen']} unseen at most.",
        f"Against dequantized weights the logits differ by {result['difference_to_dequantized']:.1e}.",
        "",
    ]
    rows = []

    def row(name: str, before: float, after: float, faster: float) -> None:
        rows.append([name, f"{before:.4g}", f"{after:.4g}", f"{faster:.2f}"])

    for count, after in packed["experts_microseconds"].items():
        before = min(each["experts_microseconds"][count] for each in dense.values())
        row(f"experts of a layer, {count} tokens, µs", before, after, before / after)
    before = max(each["prefill"] for each in dense.values())
    row("prefill, tokens/s", before, packed["prefill"], packed["prefill"] / before)
    for batch, after in packed["decode"].items():
        before = max(each["decode"][batch] for each in dense.values())
        row(f"decode, batch {batch}, tokens/s", before, after, after / before)
    return "\n".join([*lines, table(["", "bfloat16", "packed", "factor"], rows)])


def main() -> None:
    options = parser(__doc__, required=False)
    options.add_argument("--bits", type=int, default=4)
    options.add_argument("--group-size", type=int, default=128)
    options.add_argument("--samples", type=int, default=128, help="calibration windows")
    options.add_argument("--length", type=int, default=2048, help="tokens in a window")
    options.add_argument("--prompt", type=int, default=4096)
    options.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024, 4096])
    options.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    options.add_argument("--steps", type=int, default=32, help="tokens that are decoded in one run")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="at least 2")
    options.add_argument("--small", action="store_true", help="tiny sizes, for a check of this script")
    arguments = options.parse_args()
    shape = SHAPE | {"num_hidden_layers": arguments.layers}
    if arguments.small:
        shape = SMALL
        arguments.group_size, arguments.samples, arguments.length = 64, 4, 64
        arguments.prompt, arguments.tokens, arguments.batches = 64, [1, 8], [1, 2]
        arguments.steps, arguments.repeats = 2, 1

    model = build(shape)
    result: dict[str, Any] = {
        "settings": settings(arguments),
        "shape": shape,
        "hardware": describe(),
        "bytes": {"bfloat16": bytes_of(model.model.layers)},
        "bfloat16": {},
    }
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        # It repeats the weights of every token's experts, so that many tokens do not fit.
        few = [count for count in arguments.tokens if implementation == "grouped_mm" or count <= 16]
        limited = argparse.Namespace(**vars(arguments) | {"tokens": few})
        if implementation == "batched_mm":
            limited.prompt = min(limited.prompt, 16)
        result["bfloat16"][implementation] = measure(model, limited)
        for count in set(arguments.tokens) - set(few):
            result["bfloat16"][implementation]["experts_microseconds"][count] = float("inf")

    config = TwoStageGPTQConfig(bits=arguments.bits, group_size=arguments.group_size, sym=True)
    list_name, layers = find_layers(model, config)
    tokens = torch.randint(shape["vocab_size"], (arguments.samples, arguments.length))
    model.set_experts_implementation("grouped_mm")
    walk = quantize_blocks(model, list_name, layers, tokens, config.solver_settings(), device=DEVICE, batch_size=8)
    share_inputs(model)
    gc.collect()
    if model.config._experts_implementation != PACKED_EXPERTS:
        raise RuntimeError(f"expected packed experts, found {model.config._experts_implementation}")
    result["quantize_seconds"] = walk.seconds
    result["peak_memory_bytes"] = walk.peak_memory
    counts = list(walk.experts.values())
    result["experts"] = {
        "experts": counts[0].experts,
        "rare": max(count.rare for count in counts),
        "unseen": max(count.unseen for count in counts),
        "fewest_tokens": min(count.fewest_tokens for count in counts),
    }
    result["bytes"]["packed"] = bytes_of(model.model.layers)
    with torch.no_grad():
        ids = tokens[:1, :64].to(DEVICE)
        found = model(input_ids=ids).logits.float()
        dense = restore_linear(copy.deepcopy(model), torch.bfloat16)
        expected = dense(input_ids=ids).logits.float()
        # The median over tokens: rounding may send one to other experts.
        difference = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
        result["difference_to_dequantized"] = float(difference.median())
        del dense
    result["packed"] = measure(model, arguments)
    print(report(result))
    save(arguments.out, json.loads(json.dumps(result).replace("Infinity", "null")))


if __name__ == "__main__":
    main()
