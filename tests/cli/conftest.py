import random
import sys

import pytest
from models import add_lookahead, save_adapter, tiny_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Directory of a tiny random model with SmolLM2's tokenizer, and of an adapter for it."""
    from real_models import smollm2_directory
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_directory())
    directory = tmp_path_factory.mktemp("model")
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=4096)
    model.save_pretrained(directory / "base")
    tokenizer.save_pretrained(directory / "base")
    save_adapter(add_lookahead(model), directory / "adapter")
    return directory


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    rng = random.Random(0)
    vocabulary = [f"{a}{b}{c}" for a in ("gra", "pel", "tor", "min") for b in "eiou" for c in ("nt", "ster", "lo")]

    def sentence():
        return " ".join(rng.choices(vocabulary, k=rng.randint(9, 20))).capitalize() + "."

    paragraphs = [" ".join(sentence() for _ in range(4)) for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(paragraphs))
    return path


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in this process and returns its exit code, stdout and stderr."""

    def run(*arguments):
        from lkq_hf.cli import main

        monkeypatch.setattr(sys, "argv", ["lkq-hf", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
