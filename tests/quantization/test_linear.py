"""The packed Linear as a module: arithmetic, state dict, dtypes, and what PEFT and the compiler do with it."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lkq_hf.quantization.linear import QuantizedLinear
from lkq_hf.quantization.weight import QuantizedWeight


def random_weight(bits: int = 3, sym: bool = False, out_features: int = 96, in_features: int = 128) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.int32, generator=generator)
    zeros = torch.randint(0, 2**bits, (out_features, in_features // 64), dtype=torch.int32, generator=generator)
    if sym:
        zeros.fill_(2 ** (bits - 1))
    scales = (torch.rand(out_features, in_features // 64, generator=generator) * 0.01 + 0.001).half()
    return QuantizedWeight(integers, scales, zeros, bits, 64, sym)


@pytest.fixture
def weight() -> QuantizedWeight:
    return random_weight()


@pytest.fixture
def linear(weight: QuantizedWeight) -> QuantizedLinear:
    return QuantizedLinear.from_quantized_weight(weight, torch.linspace(-1, 1, 96))


def empty_like(linear: QuantizedLinear, **changes: object) -> QuantizedLinear:
    arguments = {"bits": linear.bits, "group_size": linear.group_size, "sym": linear.sym, "bias": True, **changes}
    return QuantizedLinear(linear.in_features, linear.out_features, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_forward_and_backward_are_those_of_the_dequantized_weight(bits: int, sym: bool) -> None:
    weight = random_weight(bits, sym)
    linear = QuantizedLinear.from_quantized_weight(weight)
    assert torch.equal(linear.dequantize(), weight.dequantize())
    assert torch.equal(linear.quantized_weight().integers, weight.integers)
    x = torch.randn(2, 5, 128, requires_grad=True)
    dense_x = x.detach().clone().requires_grad_()
    y, dense_y = linear(x), nn.functional.linear(dense_x, weight.dequantize())
    torch.testing.assert_close(y, dense_y)
    grad = torch.randn_like(y)
    y.backward(grad)
    dense_y.backward(grad)
    torch.testing.assert_close(x.grad, dense_x.grad)


def test_dtypes(linear: QuantizedLinear) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        moved = copy.deepcopy(linear).to(dtype)
        assert moved.scales.dtype == torch.float16
        assert torch.equal(moved.scales, linear.scales)
        assert moved.bias.dtype == dtype
        assert moved(torch.ones(1, 128, dtype=dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.ones(1, 128)).dtype == torch.bfloat16


def test_state_dict_onto_meta(linear: QuantizedLinear) -> None:
    with torch.device("meta"):
        empty = empty_like(linear)
    assert {name: tensor.shape for name, tensor in empty.state_dict().items()} == {
        name: tensor.shape for name, tensor in linear.state_dict().items()
    }
    empty.load_state_dict(linear.state_dict(), assign=True)
    x = torch.randn(3, 128)
    assert torch.equal(empty(x), linear(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 4}, "size mismatch for qweight"),
        ({"group_size": 32}, "size mismatch for scales"),
        ({"sym": True}, "symmetric zero points should all be 4"),
    ],
)
def test_tensors_of_another_configuration_are_refused(
    linear: QuantizedLinear, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        empty_like(linear, **changes).load_state_dict(linear.state_dict())


def test_validate(linear: QuantizedLinear) -> None:
    linear.validate()

    def damaged(name: str, tensor: torch.Tensor) -> QuantizedLinear:
        module = copy.deepcopy(linear)
        setattr(module, name, tensor)
        return module

    with pytest.raises(ValueError, match="g_idx should be k // group_size"):
        damaged("g_idx", linear.g_idx.flip(0)).validate()
    with pytest.raises(ValueError, match="scales should be finite and positive"):
        damaged("scales", linear.scales * torch.nan).validate()
    with pytest.raises(ValueError, match="scales should be finite and positive"):
        damaged("scales", -linear.scales).validate()
    symmetric = QuantizedLinear.from_quantized_weight(random_weight(sym=True))
    symmetric.scales = -symmetric.scales
    symmetric.validate()
    symmetric.scales = symmetric.scales * 0
    with pytest.raises(ValueError, match="scales should be finite and not 0"):
        symmetric.validate()
    with pytest.raises(ValueError, match=r"qweight should be torch.int32 \[12, 96\], found torch.int32 \[11, 96\]"):
        damaged("qweight", linear.qweight[1:]).validate()
    with pytest.raises(ValueError, match=r"scales should be torch.float16 .* found torch.float32"):
        damaged("scales", linear.scales.float()).validate()
    with pytest.raises(ValueError, match=r"bias should be \[96\], found \[95\]"):
        damaged("bias", linear.bias[1:]).validate()


class Model(nn.Module):
    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(128)
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(x))


def test_lora_trains_on_top_and_does_not_merge(linear: QuantizedLinear) -> None:
    x = torch.randn(4, 128)
    expected = Model(linear)(x)
    model = get_peft_model(Model(linear), LoraConfig(target_modules=["linear"], r=4))
    torch.testing.assert_close(model(x), expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(x).square().mean() < expected.square().mean()
    before = linear.qweight.clone()
    with pytest.raises(AttributeError):
        model.merge_and_unload()
    assert torch.equal(linear.qweight, before)


def test_compiles_without_a_graph_break(linear: QuantizedLinear) -> None:
    x = torch.randn(4, 128)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (1, 4):
        torch.testing.assert_close(compiled(x[:rows]), linear(x[:rows]))
