"""Train a lookahead adapter on texts of your own, from the first prompt to the first answer.

    python examples/train_on_your_texts.py
    python examples/train_on_your_texts.py --text book.txt --text more.jsonl --out adapter --steps 200 --prompts 3000

Three things happen: prompts are made from the texts, the model answers them itself, and the adapter learns which
entries of a prompt these answers look at. Before and after the training you see the recall on held-out texts: the
share of the most important entries that the adapter finds. At the end the adapter is loaded as anybody would load it,
and answers a held-out prompt from a small cache.

The default is tiny, so that it ends in minutes on two CPU cores: it shows the steps, it does not make a good adapter.
For that, use a GPU and the commands in docs/training-an-adapter.md.
"""

import argparse
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import get_peft_model
from real_models import smollm2_directory
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from lkq_hf import LookaheadCache, LookaheadKVConfig, LookaheadTrainer, LookaheadTrainingArguments
from lkq_hf.text.documents import read_documents
from lkq_hf.training import PromptMix, build_prompts, generate_targets, split_documents

BUDGETS = [32, 64]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", type=Path, help="text or jsonl file; default: Python's reference")
    parser.add_argument("--out", type=Path, help="directory for the adapter; default: a temporary one")
    parser.add_argument("--prompts", type=int, default=32, help="training prompts")
    parser.add_argument("--validation-prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=320, help="tokens of the longest prompt; at least 256")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="longest answer of the model")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=4, help="prompts in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--model", help="directory or Hub id; default: SmolLM2-135M-Instruct")
    arguments = parser.parse_args()
    set_seed(0)

    name = arguments.model or smollm2_directory()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    if arguments.text:
        documents = read_documents(arguments.text)
    else:
        documents = [{"document": topic, "text": text} for topic, text in topics.items()]

    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch) / "adapter"

        started = time.perf_counter()
        training, validation = split_documents(documents, validation_fraction=0.2)
        mix = PromptMix(min_length=256, max_length=arguments.length)
        sets = {}
        for part, pool, count in (
            ("train", training, arguments.prompts),
            ("validation", validation, arguments.validation_prompts),
        ):
            prompts = [{"input_ids": prompt["input_ids"]} for prompt in build_prompts(pool, tokenizer, count, mix)]
            sets[part] = generate_targets(model, prompts, out / "targets" / part, arguments.max_new_tokens)
        made = sum(map(len, sets.values()))
        print(f"{made} prompts, answered by the model itself in {time.perf_counter() - started:.0f} s")

        peft_model = get_peft_model(model, LookaheadKVConfig())
        trainer = LookaheadTrainer(
            peft_model,
            LookaheadTrainingArguments(
                output_dir=str(out / "checkpoints"),
                max_steps=arguments.steps,
                per_device_train_batch_size=arguments.batch_size,
                per_device_eval_batch_size=arguments.batch_size,
                learning_rate=arguments.learning_rate,
                recall_budgets=BUDGETS,
                eviction_weight=0.0,  # for short steps on a CPU
                save_strategy="no",
                report_to=[],
            ),
            train_dataset=sets["train"],
            eval_dataset=sets["validation"],
        )
        before = trainer.evaluate()
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        after = trainer.evaluate()
        peft_model.save_pretrained(str(out))
        size = (out / "adapter_model.safetensors").stat().st_size
        print(f"{arguments.steps} steps in {seconds:.0f} s; the adapter takes {size / 2**20:.1f} MiB\n")

        print(f"{'budget':>8s} {'recall before':>15s} {'recall after':>14s}")
        for budget in BUDGETS:
            key = f"eval_recall@{budget}"
            print(f"{budget:8d} {before[key]:15.3f} {after[key]:14.3f}")

        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
        model.load_adapter(str(out))
        ids = torch.tensor([sets["validation"][0]["input_ids"]]).to(model.device)
        cache = LookaheadCache(budget=BUDGETS[-1])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
        )
        answer = " ".join(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).split())
        print(f"\nA held-out prompt of {ids.shape[1]} tokens, answered from {BUDGETS[-1]} of them:\n  {answer}")
        if arguments.out:
            print(f"\nThe adapter is in {out}: model.load_adapter({str(out)!r})")


if __name__ == "__main__":
    main()
