"""Chat in the terminal, with a cache that holds the same number of entries however long the conversation gets.

    python examples/chat.py
    python examples/chat.py --file notes.txt --budget 512
    python examples/chat.py --model name/model --adapter name/adapter

Type a message and see the answer as it is written. The line under it says how many entries the cache holds for each KV
head on the device, how many wait in main memory, and how long the turn took. An empty line ends the chat.

With parking, the default, each message attends to the whole conversation while it is read, and the best entries for it
answer. `--no-park` drops what is evicted. The default model is very small: do not expect much of what it says.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from real_models import smollm2_directory
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from lkq_hf import LookaheadCache, prepare_model_for_eviction

ADAPTER = Path(__file__).parents[1] / "model_cards" / "smollm2-135m-instruct-lookahead"
MARK = "<<answer>>"


def render(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


class Chat:
    """A conversation: its ids, which are never tokenized again, and the cache that has read them."""

    def __init__(self, model: Any, tokenizer: Any, cache: LookaheadCache, max_new_tokens: int) -> None:
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self.max_new_tokens = max_new_tokens
        self.ids: torch.Tensor | None = None
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])

    def ask(self, message: str, streamer: TextStreamer | None = None) -> str:
        """The answer to a message."""
        asked = {"role": "user", "content": message}
        if self.ids is None:
            text, before = render(self.tokenizer, [asked]), torch.empty(1, 0, dtype=torch.long)
        else:
            # What the template writes between an answer and the next one.
            past = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": MARK}]
            text, before = render(self.tokenizer, [*past, asked]).split(MARK)[1], self.ids
        new = self.tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids
        ids = torch.cat([before.to(self.model.device), new.to(self.model.device)], dim=1)
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and ids.shape[1] + self.max_new_tokens > positions:
            raise SystemExit(f"The conversation has {ids.shape[1]:,} tokens, and the model {positions:,} positions.")
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self.cache,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            streamer=streamer,
        )
        # The template writes the end of the answer again.
        self.ids = output[:, :-1] if int(output[0, -1]) in self.ends else output
        return self.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="text that goes before your first message")
    parser.add_argument("--budget", type=int, default=256, help="entries kept per KV head on average")
    parser.add_argument("--park", action=argparse.BooleanOptionalAction, default=True, help="keep all in main memory")
    parser.add_argument("--refresh-every", type=int, help="also evict while an answer is written, every N tokens")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest answer, in tokens")
    parser.add_argument("--model", help="directory or Hub id; default: SmolLM2-135M-Instruct and its adapter")
    parser.add_argument("--adapter", help="lookahead adapter for --model; without one, SnapKV chooses")
    arguments = parser.parse_args()

    name = arguments.model or smollm2_directory()
    adapter = arguments.adapter or (None if arguments.model else str(ADAPTER))
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto" if torch.cuda.is_available() else torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    if adapter:
        model.load_adapter(adapter)
    else:
        prepare_model_for_eviction(model)
    cache = LookaheadCache(
        budget=arguments.budget,
        scorer="lookahead" if adapter else "snapkv",
        park="cpu" if arguments.park else None,
        refresh_every=arguments.refresh_every,
    )
    chat = Chat(model, tokenizer, cache, arguments.max_new_tokens)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    text = arguments.file.read_text(encoding="utf-8").strip() + "\n\n" if arguments.file else ""
    while True:
        print("\n> ", end="", flush=True)
        message = sys.stdin.readline().strip()
        if not message:
            return
        started = time.perf_counter()
        chat.ask(text + message, streamer)
        text = ""
        held = cache.summary()
        print(
            f"[{held['entries_stored']:,.0f} entries a head on the device, {held['entries_parked']:,} parked, "
            f"{held['tokens_seen']:,} tokens read, {time.perf_counter() - started:.1f} s]",
            flush=True,
        )


if __name__ == "__main__":
    main()
