"""The compiler's pass that leaves products of one row to a kernel of ours."""

from unittest.mock import patch

import pytest
import torch
from functorch.compile import make_boxed_func
from models import prompt_ids, tiny_model
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from transformers import CompileConfig

from lkq_hf.cache import row_products
from lkq_hf.cache.row_products import RowProducts

FOR_CPUS = RowProducts("cpu", (torch.float32,))


def apply_pass(module, inputs):
    """A backend that does to a graph what the pass does, and compiles nothing."""
    FOR_CPUS(module.graph)
    module.recompile()
    return make_boxed_func(module.forward)


def traced(module):
    torch._dynamo.reset()
    return torch.compile(module.__call__, backend=aot_autograd(fw_compiler=apply_pass))


@pytest.fixture
def launches(monkeypatch):
    """How many weights each operator of what is compiled takes."""
    taken, replace = [], row_products._replace

    def note(graph, products):
        taken.append(len(products))
        replace(graph, products)

    monkeypatch.setattr(row_products, "_replace", note)
    return taken


@torch.no_grad()
def test_a_models_products_that_share_an_input_become_one(launches):
    model = tiny_model("llama").eval()
    layers = model.config.num_hidden_layers
    token = prompt_ids(1, 1)
    expected = model(token, use_cache=False).logits
    torch.testing.assert_close(traced(model)(token, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)
    # Query, key and value; gate and up; output and down; the vocabulary.
    assert sorted(launches) == sorted([3, 2, 1, 1] * layers + [1])


@torch.no_grad()
def test_several_rows_are_left_alone(launches):
    model = tiny_model("llama").eval()
    ids = prompt_ids(2, 1)
    torch.testing.assert_close(
        traced(model)(ids, use_cache=False).logits, model(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5
    )
    assert launches == []


class Products(nn.Module):
    """Products that are not of one kind: four that share a row, one with a bias, one with a computed weight."""

    def __init__(self):
        super().__init__()
        self.shared = nn.ModuleList(nn.Linear(16, size, bias=False) for size in (8, 3, 5, 8))
        self.with_bias, self.computed = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, row):
        first, second, third, fourth = (linear(row) for linear in self.shared)
        weight = self.computed * second.sum()
        return self.with_bias(first * fourth) + nn.functional.linear(first, weight) + third.sum()


@torch.no_grad()
def test_only_products_with_weights_that_are_there_are_taken(launches):
    torch.manual_seed(0)
    module, row = Products(), torch.randn(1, 16)
    torch._dynamo.reset()
    compiled = torch.compile(module, options={"post_grad_custom_pre_pass": FOR_CPUS, "fx_graph_cache": False})
    torch.testing.assert_close(compiled(row), module(row), atol=1e-5, rtol=1e-5)
    assert launches == [3, 1]


def test_what_was_compiled_with_it_is_found_again():
    # transformers copies the options of a CompileConfig whenever it compiles.
    options = {"post_grad_custom_pre_pass": RowProducts()}
    first, second = (CompileConfig(mode=None, options=options).to_dict() for _ in range(2))
    assert first["options"] == second["options"] == options
    assert RowProducts() != FOR_CPUS


def test_the_cache_on_disk_can_name_it():
    assert FOR_CPUS.uuid() == RowProducts("cpu", (torch.float32,)).uuid()
    assert FOR_CPUS.uuid() != RowProducts().uuid()
    with patch.object(torch._inductor.config, "post_grad_custom_pre_pass", FOR_CPUS):
        assert torch._inductor.config.save_config_portable()  # the cache's key: it has to be picklable
