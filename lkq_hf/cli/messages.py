"""Errors of the library in the words of the command line."""

import re
from collections.abc import Sequence
from typing import Any


def in_words_of_options(text: str, command: Any, arguments: Sequence[str]) -> str:
    """A message in which the names of Python's arguments are those of a command's options.

    `text_column` becomes `--text-column`, `num_samples=5` becomes `--num-samples 5`, and `block_by_block=True` becomes
    `--block-by-block`. Names of one word are left as they are: they are words of any sentence.

    Args:
        text: the message.
        command: the command line, as click knows it.
        arguments: what the user typed, which tells the subcommand.
    """
    for word in arguments:
        command = getattr(command, "commands", {}).get(word, command)
    options = {each.name: each.opts[-1] for each in command.params if "_" in each.name and each.opts[-1][:2] == "--"}
    for name, option in options.items():
        text = re.sub(rf"\b{name}=(True|None)\b", option, text)
        text = re.sub(rf"\b{name}=(?=[\w\[{{'\"])", f"{option} ", text)
        text = re.sub(rf"(?<![\w./-]){name}\b=?(?!/|\.\w)", option, text)
    return text
