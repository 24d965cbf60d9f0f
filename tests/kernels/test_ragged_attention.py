import math

import pytest
import torch

from lkq_hf.kernels.ragged_attention import ragged_attention, ragged_attention_reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def make_inputs(
    device, lengths, slots, q=1, groups=3, dtype=torch.float32, head_dim=64, value_dim=64, tail_mask=None, seed=0
):
    """Arguments of the operation; ``lengths`` is a list of one list for each row."""
    torch.manual_seed(seed)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    batch, kv_heads = lengths.shape
    gaps = torch.randint(0, 5, (batch * kv_heads,))  # segments need not touch
    starts = (torch.cumsum(lengths.flatten() + gaps, 0) - lengths.flatten()).view(batch, kv_heads)
    capacity = int((lengths + starts).max()) + 3
    return {
        # As modules hand it over: heads are a transposed dimension.
        "query": torch.randn(batch, q, kv_heads * groups, head_dim).transpose(1, 2).to(device, dtype),
        "keys": torch.randn(capacity, head_dim).to(device, dtype),
        "values": torch.randn(capacity, value_dim).to(device, dtype),
        "starts": starts.to(device),
        "lengths": lengths.to(device),
        "longest": int(lengths.max()),
        "tail_key": torch.randn(batch, kv_heads, slots, head_dim).to(device, dtype),
        "tail_value": torch.randn(batch, kv_heads, slots, value_dim).to(device, dtype),
        "tail_mask": None if tail_mask is None else tail_mask.to(device),
        "scaling": head_dim**-0.5,
    }


def definition(
    query,
    keys,
    values,
    starts,
    lengths,
    longest,
    tail_key,
    tail_value,
    tail_mask,
    scaling,
    softcap=None,
    sinks=None,
):
    """One query of one head at a time."""
    batch, heads, q, _ = query.shape
    groups, slots = heads // tail_key.shape[1], tail_key.shape[2]
    output = torch.zeros(batch, heads, q, values.shape[-1], dtype=torch.float64)
    for row in range(batch):
        for head in range(heads):
            start, length = int(starts[row, head // groups]), int(lengths[row, head // groups])
            for token in range(q):
                if tail_mask is None:
                    seen = torch.arange(slots) <= slots - q + token
                else:
                    seen = tail_mask.expand(batch, -1, -1, -1)[row, 0, token].cpu()
                key, value = (
                    torch.cat([pool[start : start + length], tail[row, head // groups][seen.to(tail.device)]]).double()
                    for pool, tail in ((keys, tail_key), (values, tail_value))
                )
                logits = scaling * key @ query[row, head, token].double()
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                weights = logits.exp()
                total = weights.sum() + (0 if sinks is None else math.exp(sinks[head]))
                if len(key):
                    output[row, head, token] = (weights @ value / total).cpu()
    return output


def ways(function):
    return pytest.mark.parametrize("way", ["reference", "torch", "triton"])(function)


def check(use_kernels, way, inputs):
    if way == "reference":
        found = ragged_attention_reference(**inputs)
    else:
        use_kernels(way)
        found = ragged_attention(**inputs)
    compare(found, inputs)


def compare(found, inputs):
    assert found.dtype == inputs["query"].dtype
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double().cpu(), definition(**inputs), rtol=tolerance, atol=tolerance)


def random_mask(batch, q, slots, share=0.5):
    mask = torch.rand(batch, 1, q, slots) < share
    mask[..., 0] = True
    return mask


@ways
@pytest.mark.parametrize("q", [1, 3])
@pytest.mark.parametrize("slots", [3, 65])
def test_lengths(device, use_kernels, way, q, slots):
    check(use_kernels, way, make_inputs(device, [[0, 1, 130], [64, 7, 65]], slots, q))


@ways
@pytest.mark.parametrize("q", [1, 2])
def test_an_empty_tail(device, use_kernels, way, q):
    mask = torch.zeros(1, 1, q, 0, dtype=torch.bool)
    check(use_kernels, way, make_inputs(device, [[0, 1, 20]], slots=0, q=q, tail_mask=mask))


@ways
@pytest.mark.parametrize("lengths", [[[0, 0]], [[0], [0]]])
def test_no_prefix(device, use_kernels, way, lengths):
    check(use_kernels, way, make_inputs(device, lengths, slots=9, q=2))


@ways
@pytest.mark.parametrize(
    ("dtype", "groups", "head_dim", "value_dim"),
    [
        (torch.float32, 1, 16, 16),
        (torch.float32, 8, 128, 64),
        (torch.float16, 3, 64, 64),
        (torch.float16, 4, 80, 80),
        (torch.bfloat16, 4, 128, 128),
        (torch.bfloat16, 20, 192, 128),
    ],
    ids=str,
)
def test_dtypes_groups_and_head_sizes(device, use_kernels, way, dtype, groups, head_dim, value_dim):
    check(use_kernels, way, make_inputs(device, [[40, 90]], 5, 2, groups, dtype, head_dim, value_dim))


@pytest.mark.parametrize("way", ["reference", "torch"])
def test_float64(device, use_kernels, way):
    check(use_kernels, way, make_inputs(device, [[0, 5], [30, 1]], slots=4, q=2, dtype=torch.float64))


@ways
def test_longest_is_a_bound(device, use_kernels, way):
    check(use_kernels, way, make_inputs(device, [[3, 40], [0, 17]], slots=2) | {"longest": 400})


@ways
@pytest.mark.parametrize("q", [1, 3])
def test_masks(device, use_kernels, way, q):
    mask = random_mask(3, q, 150)
    mask[0, ..., :140] = False  # padding: whole tiles are hidden
    mask[1, ..., 4:] = False  # room for tokens to come
    inputs = make_inputs(device, [[5, 30], [0, 12], [33, 1]], 150, q, tail_mask=mask)
    inputs["tail_key"][1, :, 4:] = inputs["tail_value"][1, :, 4:] = 1e4
    check(use_kernels, way, inputs)


@ways
def test_one_mask_for_all_rows(device, use_kernels, way):
    check(use_kernels, way, make_inputs(device, [[5, 30], [0, 12]], 20, q=2, tail_mask=random_mask(1, 2, 20)))


@ways
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("q", [1, 2])
def test_softcap_and_sinks(device, use_kernels, way, has_sinks, softcap, q):
    inputs = make_inputs(device, [[0, 130], [3, 20]], slots=6, q=q, head_dim=16, tail_mask=random_mask(2, q, 6))
    inputs["query"] *= 4
    sinks = torch.randn(6, device=device) if has_sinks else None
    check(use_kernels, way, inputs | {"sinks": sinks, "softcap": softcap})


@ways
def test_segments_that_are_the_same_memory(device, use_kernels, way):
    inputs = make_inputs(device, [[50, 20], [50, 20], [35, 8]], slots=3)
    inputs["starts"][1] = inputs["starts"][0]
    inputs["starts"][2] = inputs["starts"][0] + 10
    check(use_kernels, way, inputs)


@ways
def test_parts_of_larger_storage(device, use_kernels, way):
    inputs = make_inputs(device, [[50, 20], [7, 90]], slots=40, head_dim=32, value_dim=64)
    both = torch.cat([inputs["keys"], inputs["values"]], 1)
    inputs["keys"], inputs["values"] = both[:, :32], both[:, 32:]
    inputs["tail_key"], inputs["tail_value"] = inputs["tail_key"][:, :, 5:9], inputs["tail_value"][:, :, 5:9]
    check(use_kernels, way, inputs)


@ways
def test_large_logits(device, use_kernels, way):
    inputs = make_inputs(device, [[50, 20]], slots=5)
    query, scaling = 100 * inputs["query"], 3.0
    pools = {name: inputs[name].double() for name in ("keys", "values", "tail_key", "tail_value")}
    use_kernels(way if way == "triton" else "torch")
    function = ragged_attention_reference if way == "reference" else ragged_attention
    found = function(**inputs | {"query": query, "scaling": scaling})
    expected = ragged_attention_reference(**inputs | pools | {"query": query.double(), "scaling": scaling})
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@ways
@pytest.mark.parametrize("slots", [0, 4])
def test_nothing_seen_is_zero(device, use_kernels, way, slots):
    mask = torch.zeros(2, 1, 2, slots, dtype=torch.bool)
    check(use_kernels, way, make_inputs(device, [[0, 5], [3, 0]], slots, q=2, tail_mask=mask))


@ways
@pytest.mark.parametrize("q", [1, 2])
def test_nothing_seen_but_a_sink_is_zero(device, use_kernels, way, q):
    mask = torch.zeros(1, 1, q, 4, dtype=torch.bool)
    inputs = make_inputs(device, [[0, 5]], slots=4, q=q, tail_mask=mask)
    check(use_kernels, way, inputs | {"sinks": torch.randn(6, device=device)})


@ways
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_queries(device, use_kernels, way, masked, has_sinks, dtype):
    q, slots = 45, 50
    mask = random_mask(2, q, slots) if masked else None
    if masked:
        mask[1, :, 7] = False  # this query sees nothing
    inputs = make_inputs(device, [[30, 9], [0, 0]], slots, q, 4, dtype, 16, 16, mask)
    check(use_kernels, way, inputs | {"sinks": torch.randn(8, device=device) if has_sinks else None})


@pytest.mark.parametrize("programs", [1, 8, 1000])
@pytest.mark.parametrize(("q", "masked"), [(1, False), (5, False), (5, True)])
def test_divisions_of_the_work(device, q, masked, programs):
    """However long the chunks, and whether or not a thread block has everything."""
    triton_kernels = pytest.importorskip("lkq_hf.kernels.ragged_attention_triton")
    mask = random_mask(2, q, 40) if masked else None
    inputs = make_inputs(device, [[100, 0], [17, 64]], 40, q, 4, head_dim=16, value_dim=16, tail_mask=mask)
    inputs |= {"sinks": torch.randn(8, device=device), "longest": 150}
    tile = triton_kernels.Tile(rows=16, entries=16, warps=4, stages=2, programs=programs)
    compare(triton_kernels.ragged_attention_triton(**inputs, tile=tile), inputs)


def test_more_parts_than_are_combined_at_a_time(device):
    triton_kernels = pytest.importorskip("lkq_hf.kernels.ragged_attention_triton")
    inputs = make_inputs(device, [[16 * 40, 30]], 3, groups=1, head_dim=16, value_dim=256)
    # One of the last entries has the largest logit.
    inputs["keys"][inputs["starts"][0, 0] + 16 * 39] = 4 * inputs["query"][0, 0, 0]
    tile = triton_kernels.Tile(rows=16, entries=16, warps=4, stages=2, programs=1000)
    assert triton_kernels.MOST_COMBINED // 256 < 40
    compare(triton_kernels.ragged_attention_triton(**inputs, tile=tile), inputs)


def test_a_tail_without_the_queries_is_refused(device):
    inputs = make_inputs(device, [[4, 5]], slots=2, q=3)
    with pytest.raises(ValueError, match="hold the 3 tokens of the queries, found 2"):
        ragged_attention(**inputs)


@pytest.mark.parametrize("q", [1, 3])
def test_registration(device, q):
    inputs = make_inputs(device, [[4, 5], [0, 9]], slots=4, q=q, value_dim=32)
    torch.library.opcheck(torch.ops.lkq_hf.ragged_attention, (*inputs.values(), 20.0, torch.zeros(6)))


def test_compiled(device, reset_compiler):
    inputs = make_inputs(device, [[4, 5], [0, 9]], slots=4)
    others = {name: value for name, value in inputs.items() if name != "query"}
    compiled = torch.compile(lambda query: 2 * ragged_attention(query, **others), fullgraph=True, backend="aot_eager")
    compare(compiled(inputs["query"]) / 2, inputs)


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestOnGPU:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("q", [1, 7, 300])
    @pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (128, 128), (192, 128), (256, 256)])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_long_segments(self, device, use_kernels, q, head_dim, value_dim, dtype):
        lengths = torch.randint(0, 4000, (2, 4), generator=torch.Generator().manual_seed(1)).tolist()
        inputs = make_inputs(device, lengths, 320, q, 4, dtype, head_dim, value_dim)
        use_kernels("triton")
        found = ragged_attention(**inputs)
        wide = {
            name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }
        tolerance = TOLERANCE[dtype]
        expected = ragged_attention_reference(**wide)
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)

    def test_one_graph_serves_every_prompt(self, device, use_kernels):
        use_kernels("triton")
        mask = torch.zeros(2, 1, 1, 128, dtype=torch.bool)
        mask[..., :3] = True
        inputs = make_inputs(device, [[500, 3], [90, 1000]], 128, dtype=torch.bfloat16, tail_mask=mask)
        inputs["longest"] = 1500
        ragged_attention(**inputs)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = ragged_attention(**inputs)
        for seed, lengths in enumerate([[[500, 3], [90, 1000]], [[0, 700], [1, 64]], [[1500, 0], [0, 0]]]):
            other = make_inputs(device, lengths, 128, dtype=torch.bfloat16, tail_mask=mask, seed=seed)
            for name in ("query", "starts", "lengths", "tail_key", "tail_value"):
                inputs[name].copy_(other[name])
            for name in ("keys", "values"):
                inputs[name][: len(other[name])] = other[name][: len(inputs[name])]
            inputs["tail_mask"][..., : 3 + seed] = True
            graph.replay()
            compare(output, inputs)

    @pytest.mark.parametrize("q", [1, 5, 300])
    def test_nothing_waits_for_the_device(self, device, use_kernels, q):
        inputs = make_inputs(device, [[500, 3], [90, 1000]], 320, q, dtype=torch.bfloat16)
        use_kernels("triton")
        ragged_attention(**inputs)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            ragged_attention(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_compiled_with_cuda_graphs(self, device, reset_compiler):
        inputs = make_inputs(device, [[500, 3], [90, 1000]], 128, dtype=torch.bfloat16)
        others = {name: value for name, value in inputs.items() if name != "query"}
        compiled = torch.compile(
            lambda query: 2 * ragged_attention(query, **others), fullgraph=True, mode="reduce-overhead"
        )
        for _ in range(4):
            compare(compiled(inputs["query"]) / 2, inputs)
