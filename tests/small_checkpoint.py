"""A tiny random model on disk, with a tokenizer and an adapter of its own, and texts: what the docs assume."""

import gzip
import json
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

from models import add_lookahead, save_adapter, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def small_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template, trained on Python's language reference."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(topics.values(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def save_small_checkpoint(base: Path, adapter: Path) -> None:
    """A model whose layers have room for groups of 128, and an adapter for it."""
    tokenizer = small_tokenizer()
    model = tiny_model(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        head_dim=32,
        num_hidden_layers=2,
        max_position_embeddings=8192,
    )
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    save_adapter(add_lookahead(model), adapter)


def save_texts(directory: Path) -> None:
    """The text files that the pages name."""
    whole = "\n\n".join(topics.values())
    lines = "".join(json.dumps({"text": text}) + "\n" for text in topics.values())
    for name in ("handbook.txt", "book.txt", "long_document.txt"):
        (directory / name).write_text(whole[:60_000], encoding="utf-8")
    (directory / "prompt.txt").write_text(whole[:1_500], encoding="utf-8")
    for name in ("texts.jsonl", "calibration.jsonl"):
        (directory / name).write_text(lines, encoding="utf-8")
    (directory / "more.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    chats = [{"messages": [{"role": "user", "content": text[:1_500]}]} for text in list(topics.values())[:8]]
    (directory / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
