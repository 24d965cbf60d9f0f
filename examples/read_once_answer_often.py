"""Read a long file once, save its compressed cache, and answer questions from the saved file in another process.

    python examples/read_once_answer_often.py
    python examples/read_once_answer_often.py notes.txt --out notes-cache --question "Who wrote this?"
    python examples/read_once_answer_often.py --load notes-cache --question "What is it about?"

The first process reads the file into a LookaheadCache of `--budget` entries per KV head and saves that: a few MB,
whatever the file's length. The second one, which never sees the file, loads the cache and answers. You see how long
reading, loading and answering took. `cache.push_to_hub("name/notes-cache")` in the place of `save_pretrained` would
share it, and `--load name/notes-cache` load it.

The entries are chosen before any question is known, and the default model is very small: it answers some questions
badly with the whole file in its cache too.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from real_models import smollm2_directory
from transformers import AutoModelForCausalLM, AutoTokenizer

from lkq_hf import LookaheadCache

ROOT = Path(__file__).parents[1]
ADAPTER = ROOT / "model_cards" / "smollm2-135m-instruct-lookahead"
QUESTIONS = ("What is the name of this license?", "What must You include when You redistribute the Work?")
MARK = "<<question>>"


def load_model(name: str | None, adapter: str) -> tuple[Any, Any]:
    """The model with its lookahead adapter, and its tokenizer."""
    source = name or smollm2_directory()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    model.load_adapter(adapter)
    return model, AutoTokenizer.from_pretrained(source)


def split_chat(tokenizer: Any, text: str) -> tuple[str, str]:
    """What stands before a question and after it; the chat template's own words are part of both."""
    messages = [{"role": "user", "content": f"{text}\n\n{MARK}"}]
    before, after = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True).split(MARK)
    return before, after


def read(model: Any, tokenizer: Any, text: str, budget: int, directory: str | Path) -> LookaheadCache:
    """Reads a text and saves what is kept of it."""
    before, _ = split_chat(tokenizer, text)
    ids = tokenizer(before, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids
    cache = LookaheadCache(budget=budget)
    with torch.inference_mode():
        model(ids, past_key_values=cache, logits_to_keep=1)
    cache.save_pretrained(directory, input_ids=ids)
    return cache


def answer(model: Any, tokenizer: Any, source: str | Path, question: str, max_new_tokens: int = 48) -> str:
    """Answers a question about a text that another process has read."""
    cache = LookaheadCache.from_pretrained(source, model)
    _, after = split_chat(tokenizer, "")
    ids = tokenizer(question + after, add_special_tokens=False, return_tensors="pt").input_ids
    # The mask also covers the tokens that the cache has read.
    mask = torch.ones(1, cache.get_seq_length() + ids.shape[1], dtype=torch.long)
    output = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False
    )
    return " ".join(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=ROOT / "LICENSE", help="text to read; default: LICENSE")
    parser.add_argument("--out", type=Path, help="directory for the cache; default: one that is removed at the end")
    parser.add_argument("--load", help="directory or Hub id of a saved cache, to answer from; reads no file")
    parser.add_argument("--question", action="append", help="may be repeated")
    parser.add_argument("--budget", type=int, default=256, help="entries kept per KV head on average")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longest answer, in tokens")
    parser.add_argument("--model", help="directory or Hub id; default: SmolLM2-135M-Instruct")
    parser.add_argument("--adapter", default=str(ADAPTER), help="lookahead adapter for the model")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model, arguments.adapter)
    if arguments.load is not None:
        for question in arguments.question or QUESTIONS:
            started = time.perf_counter()
            found = answer(model, tokenizer, arguments.load, question, arguments.max_new_tokens)
            print(f"\n{question}\n  {found}   ({time.perf_counter() - started:.1f} s, loading included)")
        return

    with TemporaryDirectory() as folder:
        directory = arguments.out or Path(folder) / "cache"
        started = time.perf_counter()
        text = arguments.file.read_text(encoding="utf-8").strip()
        held = read(model, tokenizer, text, arguments.budget, directory).summary()
        size = sum(path.stat().st_size for path in directory.iterdir())
        print(
            f"Read {arguments.file.name}, {held['tokens_seen']:,} tokens, in {time.perf_counter() - started:.1f} s. "
            f"The saved cache has {size / 2**20:.1f} MiB; all keys and values have "
            f"{held['bytes_without_eviction'] / 2**20:.1f} MiB.",
            flush=True,
        )
        command = [sys.executable, __file__, "--load", str(directory), "--adapter", arguments.adapter]
        command += ["--max-new-tokens", str(arguments.max_new_tokens)]
        command += ["--model", arguments.model] if arguments.model else []
        command += [word for question in arguments.question or () for word in ("--question", question)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
