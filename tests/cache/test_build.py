"""Which layers a model gets."""

import pytest
import transformers
from models import prompt_ids, tiny_model
from transformers.cache_utils import DynamicCache, DynamicLayer

from lkq_hf import LookaheadCache, prepare_model_for_eviction
from lkq_hf.cache import build


def refuse(model, said):
    """The model refuses a prompt with these words before any attention has run."""
    calls = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    with prepare_model_for_eviction(model), pytest.raises(NotImplementedError, match=said):
        model(input_ids=prompt_ids(1, 30), past_key_values=LookaheadCache(7, "snapkv"))
    assert not calls


def with_layers(monkeypatch, name):
    """Lets transformers make caches whose second layer is of a class of this name."""
    kind = type(name, (DynamicLayer,), {})

    class Cache(DynamicCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.layers[1] = kind()

    monkeypatch.setattr(build, "DynamicCache", Cache)


def test_a_layer_of_a_later_transformers_is_named(monkeypatch):
    with_layers(monkeypatch, "HolographicLayer")
    version = transformers.__version__.replace(".", r"\.")
    refuse(tiny_model(), rf"layer 1 .*keeps its state in a HolographicLayer.*does not know \(transformers {version}\)")


@pytest.mark.parametrize("name", build._REASONS)
def test_layers_that_cannot_be_cut_say_why(name, monkeypatch):
    with_layers(monkeypatch, name)
    refuse(tiny_model(), f"layer 1 .*cannot be evicted: {build._REASONS[name]}")
