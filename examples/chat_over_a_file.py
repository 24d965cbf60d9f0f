"""Ask several questions about one long file that is read once.

    python examples/chat_over_a_file.py
    python examples/chat_over_a_file.py notes.txt --question "Who wrote this?" --question "What is it about?"

The file is read into a LookaheadCache of `--budget` entries, with everything parked in main memory. Each question
gets a copy of that cache, so it costs the time of its own few tokens, not of the file. While a question is read it
attends to the whole file, and the best entries for it answer. You see the time and the memory of the one prefill, and
then each question with its answer and its time. The default model is very small, and answers some questions badly
with the whole file in its cache too: `--budget 4096` keeps all of it.

Without `park="cpu"` only the entries that were chosen before any question was known would be left.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from real_models import smollm2_directory
from transformers import AutoModelForCausalLM, AutoTokenizer

from lkq_hf import LookaheadCache, prepare_model_for_eviction
from lkq_hf.compat import pass_cache

ROOT = Path(__file__).parents[1]
ADAPTER = ROOT / "model_cards" / "smollm2-135m-instruct-lookahead"
QUESTIONS = (
    "What is the name of this license?",
    "What does the word 'Contributor' mean in this license?",
    "What must You include when You redistribute the Work?",
)
MARK = "<<question>>"


def split_prompt(tokenizer, text: str) -> tuple[str, str]:
    """What the model reads before the question, and after it; the chat template's own words are part of both."""
    content = f"{text}\n\n{MARK}"
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": content}]
        content = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, after = content.split(MARK)
    return before, after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=ROOT / "LICENSE", help="text to read; default: LICENSE")
    parser.add_argument("--question", action="append", help="may be repeated")
    parser.add_argument("--budget", type=int, default=256, help="entries kept per layer and KV head")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longest answer, in tokens")
    parser.add_argument("--model", help="directory or Hub id; default: SmolLM2-135M-Instruct and its adapter")
    parser.add_argument("--adapter", help="lookahead adapter for --model; without one, SnapKV chooses")
    arguments = parser.parse_args()

    name = arguments.model or smollm2_directory()
    adapter = arguments.adapter or (None if arguments.model else str(ADAPTER))
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    if adapter:
        model.load_adapter(adapter)
    else:
        prepare_model_for_eviction(model)

    # Only the start may hold special tokens: a chat template writes its own.
    before, after = split_prompt(tokenizer, arguments.file.read_text(encoding="utf-8").strip())
    file_ids = tokenizer(
        before, add_special_tokens=not tokenizer.chat_template, return_tensors="pt", verbose=False
    ).input_ids
    cache = LookaheadCache(budget=arguments.budget, scorer="lookahead" if adapter else "snapkv", park="cpu")
    started = time.perf_counter()
    with torch.inference_mode():
        model(file_ids, **pass_cache(cache), logits_to_keep=1)
    held = cache.summary()
    seconds = time.perf_counter() - started
    print(
        f"Read {arguments.file.name}, {held['tokens_seen']:,} tokens, in {seconds:.1f} s. The cache keeps "
        f"{held['entries_stored']:,.0f} entries per head, {held['bytes'] / 2**20:.1f} MiB, and parks "
        f"{held['entries_parked']:,} in main memory, {held['bytes_parked'] / 2**20:.1f} MiB."
    )

    for question in arguments.question or QUESTIONS:
        question_ids = tokenizer(question + after, add_special_tokens=False, return_tensors="pt").input_ids
        # The ids of the whole text: generate sees how many of them the cache has read.
        ids = torch.cat([file_ids, question_ids], dim=1)
        started = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=copy.deepcopy(cache),
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
        )
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
        print(f"\n{question}\n  {' '.join(answer.split())}   ({time.perf_counter() - started:.1f} s)")


if __name__ == "__main__":
    main()
