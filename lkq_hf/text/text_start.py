"""What stands before every text that a model reads."""

from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase


def text_start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids, such as the begin-of-text token, without which many models predict nothing useful.

    They are those that the tokenizer itself puts before a text. Where it puts none, it is the begin-of-text token if a
    chat begins with it, and has it nowhere else: Gemma 4's tokenizer leaves it to the chat template. In some chats
    every message begins with it; there it begins no text.
    """
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    if plain and plain[0] in ids and (start := ids[: ids.index(plain[0])]):
        return start
    return [tokenizer.bos_token_id] if _begins_chats(tokenizer.bos_token, tokenizer) else []


def _begins_chats(token: str | None, tokenizer: PreTrainedTokenizerBase) -> bool:
    if token is None or not tokenizer.chat_template:
        return False
    roles = ("user", "assistant", "user")
    try:
        text: Any = tokenizer.apply_chat_template([{"role": role, "content": "a"} for role in roles], tokenize=False)
    except (TemplateError, TypeError, ValueError):  # a chat of another form is expected
        return False
    return text.startswith(token) and text.count(token) == 1
