"""Compare LookaheadCache with SnapKV and with sinks + recent entries, on numbers planted in a text.

    python examples/evaluate_against_baselines.py
    python examples/evaluate_against_baselines.py --text book.txt --length 2048 --prompts 20 --budgets 64 128 256

One number is planted among the paragraphs of each prompt, and asked for at its end. You see a table: for the full
cache, and for each scorer at each budget, the share of numbers found ("right"), how the full cache's own answer is
predicted ("tokens matched", "NLL gap"), what was kept of what that answer attends to, and the bytes of the cache.

The default has few prompts, so that it ends in minutes on two CPU cores: one answer more or less is then a large
difference. `lkq-hf evaluate eviction` runs more kinds of tasks, can be stopped and started again, and draws plots.
"""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
from real_models import smollm2_directory
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import lkq_hf  # noqa: F401  # registers the adapter type
from lkq_hf.evaluation.eviction import EvictionEvaluator, summarise
from lkq_hf.evaluation.tables import eviction_table
from lkq_hf.evaluation.tasks import Corpus, build_task
from lkq_hf.text.documents import read_documents

ADAPTER = Path(__file__).parents[1] / "model_cards" / "smollm2-135m-instruct-lookahead"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", type=Path, help="text or jsonl file; default: Python's reference")
    parser.add_argument("--budgets", type=int, nargs="+", default=[32, 64], help="entries kept per layer and KV head")
    parser.add_argument("--length", type=int, default=768, help="tokens of a prompt")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="directory or Hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--adapter", default=str(ADAPTER), help="lookahead adapter of the model")
    arguments = parser.parse_args()

    name = arguments.model or smollm2_directory()
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model.load_adapter(arguments.adapter)
    if arguments.text:
        documents = read_documents(arguments.text)
    else:
        documents = [{"document": topic, "text": text} for topic, text in topics.items()]

    task = build_task("needle", Corpus(documents, tokenizer), seed=arguments.seed)
    evaluator = EvictionEvaluator(model, tokenizer, ["lookahead", "snapkv", "streaming"], arguments.budgets)
    records = []
    for index in tqdm(range(arguments.prompts), desc="measuring", unit="prompt"):
        records += evaluator.measure([task.example(index, arguments.length)], task.max_new_tokens)
    print(f"\n{eviction_table(summarise(records))}")


if __name__ == "__main__":
    main()
