"""Quantize a model, save it, load it again, compare it with the original; with --repo-id, push it to the Hub.

    python examples/quantize_and_push.py
    python examples/quantize_and_push.py --bits 3 --out smollm2-w3 --repo-id your-name/smollm2-w3 --private

You see the size of both checkpoints, the loss of both models (nats per token, lower is better) on a text that took no
part in the calibration, that the reloaded checkpoint gives the same loss, and the beginning of an answer of each.

The default calibrates with 8 short windows and refines once (`--sweeps 1`), so that it ends in minutes on two CPU
cores. For a checkpoint to keep, use the package's defaults: 128 windows of 2,048 tokens of your own kind of text, and
8 sweeps.
"""

import argparse
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from real_models import SMOLLM2_NAME, smollm2_directory
from transformers import AutoModelForCausalLM, AutoTokenizer

from lkq_hf import TwoStageQuantizer
from lkq_hf.evaluation.perplexity import text_windows, token_nlls
from lkq_hf.hub import push_to_hub

ROOT = Path(__file__).parents[1]
PROMPT = "The capital of France is"


def loss(model, windows: torch.Tensor) -> float:
    return torch.tensor(token_nlls(model, windows)).mean().item()


def continuation(model, tokenizer) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return " ".join(tokenizer.decode(output[0], skip_special_tokens=True).split())


def weight_bytes(model) -> int:
    """Bytes of everything a checkpoint holds; a tensor with two names counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8, help="calibration windows")
    parser.add_argument("--sample-length", type=int, default=256, help="tokens in a calibration window")
    parser.add_argument("--sweeps", type=int, default=1, help="refinements after GPTQ")
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens for the comparison")
    parser.add_argument("--out", type=Path, help="directory for the checkpoint; default: a temporary one")
    parser.add_argument("--repo-id", help="push to this repository, such as your-name/model-w4")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--model", help="directory or Hub id; default: SmolLM2-135M-Instruct")
    arguments = parser.parse_args()

    name = arguments.model or smollm2_directory()
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    license_text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    windows = text_windows([{"text": license_text}], tokenizer, 512, arguments.windows)
    rows = [("original", weight_bytes(base), loss(base, windows), continuation(base, tokenizer))]

    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch) / "checkpoint"
        started = time.perf_counter()
        # `base` itself is quantized in place: there is never a second copy of the weights.
        quantized = TwoStageQuantizer.from_pretrained(base).quantize(
            out,
            bits=arguments.bits,
            group_size=arguments.group_size,
            sym=False,
            dataset=list(topics.values()),
            tokenizer=tokenizer,
            num_samples=arguments.samples,
            model_seqlen=arguments.sample_length,
            advanced={"sweeps": arguments.sweeps},
            # The card names the base model by its id on the Hub, not by a directory of this computer.
            meta=None if arguments.model else {"base_model": SMOLLM2_NAME},
        )
        print(f"Quantized to {arguments.bits} bits in {time.perf_counter() - started:.0f} s")
        rows.append(
            ("quantized", weight_bytes(quantized), loss(quantized, windows), continuation(quantized, tokenizer))
        )

        reloaded = AutoModelForCausalLM.from_pretrained(out).eval()
        rows.append(("reloaded", weight_bytes(reloaded), loss(reloaded, windows), continuation(reloaded, tokenizer)))

        print(f"\n{'':10s} {'weights':>12s} {'loss':>8s}")
        for title, size, nats, text in rows:
            print(f"{title:10s} {size / 2**20:>8.1f} MiB {nats:8.3f}   {text}")

        if arguments.out:
            print(f"\nThe checkpoint is in {out}: import lkq_hf, then AutoModelForCausalLM.from_pretrained")
        if arguments.repo_id:
            commit = push_to_hub(out, arguments.repo_id, private=arguments.private or None)
            print(f"\nPushed: {commit.commit_url}")


if __name__ == "__main__":
    main()
