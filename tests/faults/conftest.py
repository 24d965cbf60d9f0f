import json
from pydoc_data.topics import topics

import pytest
from small_checkpoint import save_small_checkpoint, save_texts


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A model (``base``) with its tokenizer, an ``adapter``, and texts for each command."""
    directory = tmp_path_factory.mktemp("files")
    save_small_checkpoint(directory / "base", directory / "adapter")
    save_texts(directory)
    lines = [json.dumps({"text": text[:200]}) for text in list(topics.values())[:10]]
    (directory / "prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return directory
