"""A tiny model with a tiny tokenizer, made on the spot, and texts in its words."""

import json
import random

import pytest
from models import add_lookahead, save_adapter, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = 150


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A directory with a model (``base``), an adapter, prompts and texts."""
    directory = tmp_path_factory.mktemp("files")
    words = {f"w{i}": i + 3 for i in range(WORDS)}
    core = Tokenizer(models.WordLevel({"<unk>": 0, "<bos>": 1, "<eos>": 2, **words}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")
    model = tiny_model(num_hidden_layers=2)
    model.save_pretrained(directory / "base")
    tokenizer.save_pretrained(directory / "base")
    save_adapter(add_lookahead(model), directory / "adapter")
    draw = random.Random(0)

    def text(length):
        return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(length))

    with (directory / "prompts.jsonl").open("w") as file:
        for length in range(12, 34):
            file.write(json.dumps({"text": text(length)}) + "\n")
    (directory / "texts.jsonl").write_text("\n".join(json.dumps({"text": text(60)}) for _ in range(40)))
    return directory
