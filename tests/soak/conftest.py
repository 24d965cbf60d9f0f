import copy

import pytest
from models import ARCHITECTURES, add_lookahead, tiny_model

from lkq_hf import prepare_model_for_eviction


@pytest.fixture(scope="module")
def models():
    """For each architecture the untouched model with eager attention, and the same with an adapter."""
    pairs = {}
    for architecture in ARCHITECTURES:
        base = tiny_model(architecture)
        pairs[architecture] = base, add_lookahead(copy.deepcopy(base))
        prepare_model_for_eviction(pairs[architecture][1])
    return pairs
