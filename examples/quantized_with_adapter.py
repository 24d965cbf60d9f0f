"""A quantized model and a lookahead adapter together: small weights and a small cache.

    python examples/quantized_with_adapter.py
    python examples/quantize_and_push.py --out smollm2-w4
    python examples/quantized_with_adapter.py --checkpoint smollm2-w4

Numbers are planted in a text and asked for. The same prompts go to the original and to the quantized model, each with
the full cache and with a LookaheadCache of `--budget` entries. You see how many numbers each of the four finds, and
the memory of weights and cache.

The adapter was trained for the original model. It is loaded into the quantized one as it is: it stays in full
precision beside the packed layers. Without --checkpoint the model is quantized to 4 bits while it is loaded, quickly
and roughly, which takes some minutes on two CPU cores.
"""

import argparse
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from real_models import smollm2_directory
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from lkq_hf import LookaheadCache, TwoStageGPTQConfig
from lkq_hf.compat import pass_cache
from lkq_hf.evaluation.tasks import Corpus, build_task

ADAPTER = Path(__file__).parents[1] / "model_cards" / "smollm2-135m-instruct-lookahead"


def weight_bytes(model) -> int:
    """Bytes of the model's tensors without the adapter's; a tensor with two names counts once."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "lookahead_kv" not in name}
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors.values()}.values())


def cache_bytes(cache) -> int:
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=128, help="entries kept per layer and KV head")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--group-size", type=int, default=64, help="of the quantization, without --checkpoint")
    parser.add_argument("--checkpoint", help="quantized checkpoint of the model; default: quantize it now")
    parser.add_argument("--model", help="directory or Hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--adapter", default=str(ADAPTER), help="lookahead adapter of the model")
    arguments = parser.parse_args()

    name = arguments.model or smollm2_directory()
    tokenizer = AutoTokenizer.from_pretrained(name)
    documents = [{"document": topic, "text": text} for topic, text in topics.items()]
    original = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    started = time.perf_counter()
    if arguments.checkpoint:
        quantized = AutoModelForCausalLM.from_pretrained(arguments.checkpoint)
        print(f"Loaded {arguments.checkpoint}")
    else:
        recipe = TwoStageGPTQConfig(
            bits=4,
            group_size=arguments.group_size,
            sym=False,
            dataset=list(topics.values()),
            tokenizer=tokenizer,
            num_samples=8,
            model_seqlen=256,
            advanced={"sweeps": 1},
        )
        quantized = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, quantization_config=recipe)
        print(f"Quantized in {time.perf_counter() - started:.0f} s")
    models = {"original": original.eval(), "quantized": quantized.eval()}
    for model in models.values():
        model.load_adapter(arguments.adapter)

    task = build_task("needle", Corpus(documents, tokenizer))
    prompts = list(task.examples(arguments.prompts, arguments.length))
    caches = {
        "full cache": lambda: DynamicCache(config=original.config),
        "LookaheadCache": lambda: LookaheadCache(budget=arguments.budget),
    }
    rows = []
    with tqdm(total=len(models) * len(caches) * len(prompts), desc="answering", unit="answer") as progress:
        for model_name, model in models.items():
            for cache_name, new_cache in caches.items():
                right = 0
                for prompt in prompts:
                    ids, cache = torch.tensor([prompt["input_ids"]]), new_cache()
                    output = model.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        **pass_cache(cache),
                        max_new_tokens=task.max_new_tokens,
                        do_sample=False,
                    )
                    answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
                    right += prompt["reference"][0] in answer
                    progress.update()
                rows.append((model_name, cache_name, right, weight_bytes(model), cache_bytes(cache)))

    print(f"\n{'model':10s} {'cache':15s} {'found':>8s} {'weights':>12s} {'KV cache':>12s}")
    for model_name, cache_name, right, weights, held in rows:
        found = f"{right} of {len(prompts)}"
        print(f"{model_name:10s} {cache_name:15s} {found:>8s} {weights / 2**20:8.1f} MiB {held / 2**20:8.1f} MiB")


if __name__ == "__main__":
    main()
