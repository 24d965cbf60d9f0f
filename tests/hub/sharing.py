"""What the tests of sharing have in common."""

import json

from transformers import AutoModelForCausalLM

BASE = "alice/base"


def base_model(directory):
    """The base model from a directory, under its name on the Hub."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.name_or_path = model.config._name_or_path = BASE
    return model


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
