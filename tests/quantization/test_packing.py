"""The GPTQ tensor layout: round trips, and bit for bit against its description."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lkq_hf.kernels.bit_stream import pack, unpack
from lkq_hf.quantization.packing import (
    checkpoint_format,
    pack_weight,
    pack_zeros,
    packed_shapes,
    unpack_weight,
)
from lkq_hf.quantization.weight import QuantizedWeight

pytestmark = pytest.mark.one_version

BITS = (2, 3, 4, 8)


def random_weight(
    out_features: int, in_features: int, bits: int, group_size: int, sym: bool, seed: int = 0
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = in_features // group_size
    integers = torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.int32, generator=generator)
    zeros = torch.randint(0, 2**bits, (out_features, groups), dtype=torch.int32, generator=generator)
    if sym:
        zeros.fill_(2 ** (bits - 1))
    scales = (torch.rand(out_features, groups, generator=generator) + 0.01).half()
    return QuantizedWeight(integers, scales, zeros, bits, group_size, sym)


@settings(max_examples=60, deadline=None)
@given(
    out_blocks=st.integers(1, 4),
    groups=st.integers(1, 4),
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from((32, 64, 128)),
    sym=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_round_trip(out_blocks: int, groups: int, bits: int, group_size: int, sym: bool, seed: int) -> None:
    weight = random_weight(32 * out_blocks, group_size * groups, bits, group_size, sym, seed)
    tensors = pack_weight(weight)
    for name, (shape, dtype) in packed_shapes(group_size * groups, 32 * out_blocks, bits, group_size).items():
        assert tensors[name].shape == shape
        assert tensors[name].dtype == dtype
        assert tensors[name].is_contiguous()
    del tensors["g_idx"]
    again = unpack_weight(**tensors, bits=bits, group_size=group_size, sym=sym)
    assert torch.equal(again.integers, weight.integers)
    assert torch.equal(again.zeros, weight.zeros)
    assert torch.equal(again.scales, weight.scales)


@settings(max_examples=40, deadline=None)
@given(bits=st.sampled_from(BITS), values=st.lists(st.integers(0, 255), min_size=32, max_size=32))
def test_little_endian_bit_stream(bits: int, values: list[int]) -> None:
    values = [value % 2**bits for value in values]
    stream = sum(value << (bits * i) for i, value in enumerate(values))
    expected = [
        int.from_bytes((stream >> (32 * i)).to_bytes(64, "little")[:4], "little", signed=True) for i in range(bits)
    ]
    words = pack(torch.tensor(values, dtype=torch.int32), bits)
    assert words.tolist() == expected
    assert unpack(words, bits).tolist() == values


def test_layout_of_one_weight() -> None:
    weight = random_weight(64, 128, 4, 64, sym=False)
    tensors = pack_weight(weight)
    for k, n in ((0, 0), (7, 3), (8, 63), (127, 31)):
        assert (int(tensors["qweight"][k // 8, n]) >> (4 * (k % 8))) & 15 == int(weight.integers[n, k])
        assert (int(tensors["qzeros"][k // 64, n // 8]) >> (4 * (n % 8))) & 15 == int(weight.zeros[n, k // 64])
        assert tensors["scales"][k // 64, n] == weight.scales[n, k // 64]
        assert tensors["g_idx"][k] == k // 64


@pytest.mark.parametrize("bits", BITS)
def test_version_1_stores_symmetric_zero_points_less_one(bits: int) -> None:
    zeros = torch.full((64, 2), 2 ** (bits - 1), dtype=torch.int32)
    assert torch.equal(unpack(pack_zeros(zeros, bits, sym=True), bits), zeros.t() - 1)
    assert torch.equal(unpack(pack_zeros(zeros, bits, sym=False), bits), zeros.t())
    assert (checkpoint_format(True), checkpoint_format(False)) == ("gptq", "gptq_v2")


@pytest.mark.parametrize(("bits", "same"), [(2, True), (3, False), (4, True), (8, True)])
def test_version_1_and_subtraction_of_whole_words(bits: int, same: bool) -> None:
    # Other tools subtract packed ones from words; at 3 bits a borrow out of a word is lost where a field straddles.
    zeros = torch.full((32, 1), 2 ** (bits - 1), dtype=torch.int32)
    by_words = pack_zeros(zeros, bits, sym=False) - pack(torch.ones(1, 32, dtype=torch.int32), bits)
    assert torch.equal(by_words, pack_zeros(zeros, bits, sym=True)) == same
    if not same:
        assert [i for i, value in enumerate(unpack(by_words, bits)[0].tolist()) if value != 3] == [10, 21]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((100, 64, 4, 50), "in_features=100"),
        ((64, 40, 4, 64), "out_features=40"),
        ((64, 64, 4, 48), "divide in_features=64"),
        ((64, 64, 5, 64), "bits must be one of"),
    ],
)
def test_sizes_that_do_not_pack(sizes: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed_shapes(*sizes)


def test_incomplete_words() -> None:
    with pytest.raises(ValueError, match="multiples of 32; found 33"):
        pack(torch.zeros(33, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match="runs of 3 words; found 4"):
        unpack(torch.zeros(4, dtype=torch.int32), 3)
