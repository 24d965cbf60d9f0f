import copy
import itertools

import pytest
from models import ARCHITECTURES, add_lookahead, tiny_model

from lkq_hf import prepare_model_for_eviction


def pairs_of_models(device):
    """For each architecture the untouched model with eager attention, and the same with an adapter."""
    pairs = {}
    for architecture in ARCHITECTURES:
        base = tiny_model(architecture).to(device)
        pairs[architecture] = base, add_lookahead(copy.deepcopy(base))
        prepare_model_for_eviction(pairs[architecture][1])
    return pairs


@pytest.fixture(scope="module")
def models():
    return pairs_of_models("cpu")


@pytest.fixture(scope="module")
def models_on_gpu():
    pairs = pairs_of_models("cuda")
    for model in itertools.chain(*pairs.values()):
        model.generation_config.disable_compile = True  # every conversation has other shapes
    return pairs
