"""What a model reads of a chat, always through the tokenizer's own template."""

from collections.abc import Mapping, Sequence

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase


def render_chat(messages: Sequence[Mapping[str, str]], answer_prefix: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the model reads: the tokenizer's own chat template, then the beginning of the answer.

    A tokenizer without a chat template (a base model's) gets the messages' contents as paragraphs. A template that
    refuses system messages gets them at the start of the user's.
    """
    chat = [dict(message) for message in messages]
    if not chat:
        return answer_prefix
    if not tokenizer.chat_template:
        body = "\n\n".join(message["content"] for message in chat)
        return f"{body}\n\n{answer_prefix}" if answer_prefix else f"{body}\n\n"
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        if chat[0]["role"] != "system" or len(chat) < 2:
            raise
        merged = {"role": chat[1]["role"], "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}
        text = tokenizer.apply_chat_template([merged, *chat[2:]], tokenize=False, add_generation_prompt=True)
    return f"{text}{answer_prefix}"


def encode_chat(
    messages: Sequence[Mapping[str, str]], answer_prefix: str, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Token ids of a chat and the beginning of its answer.

    Special tokens are added only where no chat template writes them.
    """
    bare = not messages or not tokenizer.chat_template
    return tokenizer(render_chat(messages, answer_prefix, tokenizer), add_special_tokens=bare, verbose=False)[
        "input_ids"
    ]
