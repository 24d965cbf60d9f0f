"""Products of packed Linears that share their input: what they are, and when each computes for itself."""

import copy
import pickle

import pytest
import torch
from models import Graphs, compiled_by, prompt_ids, tiny_model
from torch import nn

from lkq_hf import LookaheadCache, prepare_model_for_eviction
from lkq_hf.kernels.quantized_matmul import fixed_weights
from lkq_hf.kernels.shared_product import SharedInput, weights_fixed
from lkq_hf.quantization.linear import QuantizedLinear
from lkq_hf.quantization.shared_input import share_inputs
from lkq_hf.quantization.weight import QuantizedWeight


def packed(linear: nn.Linear, bits: int = 4, seed: int = 0) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed + linear.out_features)
    shape = linear.out_features, linear.in_features
    integers = torch.randint(0, 2**bits, shape, dtype=torch.int32, generator=generator)
    zeros = torch.randint(0, 2**bits, (shape[0], shape[1] // 32), dtype=torch.int32, generator=generator)
    scales = (torch.rand(shape[0], shape[1] // 32, generator=generator) * 0.02 + 0.01).half()
    return QuantizedLinear.from_quantized_weight(QuantizedWeight(integers, scales, zeros, bits, 32, False))


def packed_model() -> nn.Module:
    """A tiny Llama whose Linears are packed, and share their inputs."""
    model = tiny_model("llama", "sdpa", hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, attribute = name.rpartition(".")
            setattr(model.model.get_submodule(parent), attribute, packed(module))
    share_inputs(model)
    return model.requires_grad_(False)


def alone(model: nn.Module) -> nn.Module:
    """A copy of which every Linear computes for itself."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.shared_input = None
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each product of several has served."""
    found: list[int] = []
    original = SharedInput.compute

    def counted(shared: SharedInput, x: torch.Tensor) -> torch.Tensor | None:
        y = original(shared, x)
        if y is not None:
            found.append(len(shared.layers))
        return y

    monkeypatch.setattr(SharedInput, "compute", counted)
    return found


def test_one_product_for_each_input(calls: list[int]) -> None:
    model = packed_model()
    ids = prompt_ids(2, 5)
    torch.testing.assert_close(model(ids).logits, alone(model)(ids).logits)
    assert calls == [3, 1, 2, 1] * model.config.num_hidden_layers


def test_who_computes_alone(calls: list[int]) -> None:
    layer = packed_model().model.layers[0]
    attention = layer.self_attn
    query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
    x, other = torch.randn(2, 3, 64)
    expected = alone(attention)
    # Another tensor, though equal, may be another thread's.
    query(x)
    torch.testing.assert_close(key(other), expected.k_proj(other))
    torch.testing.assert_close(key(x.clone()), expected.k_proj(x))
    torch.testing.assert_close(value(x), expected.v_proj(x))
    assert calls == [3]
    # Without the first, the others have nothing to take.
    torch.testing.assert_close(key(x), expected.k_proj(x))
    # Products of others, as of another thread, may come in between: also those of the very same tensor.
    query(x)
    layer.mlp.gate_proj(x)
    torch.testing.assert_close(key(x), expected.k_proj(x))
    assert calls == [3, 3, 2]
    # Many rows; gradients; a weight that is elsewhere.
    query(torch.randn(17, 64))
    query(x.clone().requires_grad_()).sum().backward()
    offloaded = copy.deepcopy(attention)
    offloaded.v_proj.to("meta")
    torch.testing.assert_close(offloaded.q_proj(x), expected.q_proj(x))
    assert calls == [3, 3, 2]


def test_autocast_and_bias(calls: list[int]) -> None:
    attention = packed_model().model.layers[0].self_attn
    attention.k_proj.bias = torch.ones(attention.k_proj.out_features)
    expected = alone(attention)
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        for name in ("q_proj", "k_proj", "v_proj"):
            found = getattr(attention, name)(x)
            assert found.dtype == torch.bfloat16
            torch.testing.assert_close(found, getattr(expected, name)(x))
    assert calls == [3]


def test_other_formats_do_not_share() -> None:
    mlp = packed_model().model.layers[0].mlp
    mlp.up_proj = packed(nn.Linear(64, 96), bits=3)
    mlp.gate_proj.shared_input = None
    share_inputs(mlp)
    assert mlp.gate_proj.shared_input is not mlp.up_proj.shared_input


@pytest.mark.one_version
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_weights_of_their_own(duplicate) -> None:  # type: ignore[no-untyped-def]
    model = packed_model()
    with weights_fixed(model):
        other = duplicate(model)
    other.model.layers[0].self_attn.k_proj.scales.zero_()
    ids = prompt_ids(1, 5)
    with weights_fixed(model), weights_fixed(other):
        for each in (model, other):
            compiled = torch.compile(each, backend="eager")
            torch.testing.assert_close(compiled(ids).logits, alone(each)(ids).logits)
    assert not torch.equal(model(ids).logits, other(ids).logits)


@pytest.mark.usefixtures("reset_compiler")
def test_compiled_decoding_takes_no_packed_weights_and_notices_new_ones() -> None:
    model = packed_model()
    prepare_model_for_eviction(model)
    graphs = Graphs()

    def logits(model: nn.Module, max_new_tokens: int | None, **options: object) -> torch.Tensor:
        cache = LookaheadCache(8, "snapkv", max_new_tokens=max_new_tokens)
        ids = prompt_ids(2, 30)
        found = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        return torch.stack(found.logits)

    def check(compilations: int) -> None:
        other = alone(model)
        torch.testing.assert_close(logits(model, 6, **compiled_by(graphs)), logits(other, None), atol=1e-4, rtol=1e-4)
        assert graphs.count == compilations
        assert fixed_weights == {}

    check(1)
    check(1)
    inputs = [node.meta["example_value"] for node in graphs.graphs[0].graph.nodes if node.op == "placeholder"]
    weights = {module.qweight.shape for module in model.modules() if hasattr(module, "qweight")}
    assert not any(isinstance(value, torch.Tensor) and value.shape in weights for value in inputs)
    model.model.layers[1].mlp.down_proj.scales = model.model.layers[1].mlp.down_proj.scales * 2
    check(2)
    model.model.layers[0].self_attn.o_proj = packed(nn.Linear(64, 64), seed=7)
    share_inputs(model)
    check(3)
