import pytest
import torch

from lkq_hf.kernels.select_compact import select_compact


def make_inputs(device, length, batch=2, kv_heads=3, extra=0, dtype=torch.float32, key_dim=64, value_dim=64):
    torch.manual_seed(0)
    scores = torch.rand(batch, kv_heads, length, device=device) ** 8
    key = torch.randn(batch, kv_heads, length + extra, key_dim, device=device).to(dtype)
    value = torch.randn(batch, kv_heads, length + extra, value_dim, device=device).to(dtype)
    return scores, key, value


def definition(scores, key, value, k):
    """Row by row in Python: the k best, the earlier one among equals, in ascending order."""
    rows = []
    for row in scores.flatten(0, 1).tolist():
        best = sorted(range(len(row)), key=lambda position: (-row[position], position))[:k]
        rows.append(sorted(best))
    indices = torch.tensor(rows, device=scores.device).view(*scores.shape[:2], k)
    batch, head = torch.arange(scores.shape[0])[:, None, None], torch.arange(scores.shape[1])[:, None]
    return key[batch, head, indices], value[batch, head, indices], indices


def check(use_kernels, implementation, scores, key, value, k):
    use_kernels(implementation)
    for found, expected in zip(select_compact(scores, key, value, k), definition(scores, key, value, k), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("length", [1, 7, 128, 1001])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_every_budget(device, use_kernels, implementation, length, share):
    k = max(1, round(share * length))
    check(use_kernels, implementation, *make_inputs(device, length, extra=3), k)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (96, 96), (192, 128), (256, 256)])
def test_dtypes_and_head_sizes(device, use_kernels, implementation, dtype, key_dim, value_dim):
    check(use_kernels, implementation, *make_inputs(device, 90, 1, 2, 0, dtype, key_dim, value_dim), 40)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("k", [1, 50, 199, 300])
def test_ties_go_to_the_earlier_position(device, use_kernels, implementation, k):
    scores, key, value = make_inputs(device, 300)
    scores = (4 * scores).round() / 4  # five values, most of them zero
    scores[0, 0] = 0.5
    scores[0, 1, ::2] *= -1  # negative scores, and -0.0 among the zeros, which equals 0.0
    check(use_kernels, implementation, scores, key, value, k)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("k", [1, 64, 100, 200])
def test_infinities(device, use_kernels, implementation, k):
    """-inf is padding: kept only when nothing else is left. inf is an entry that must stay."""
    scores, key, value = make_inputs(device, 200)
    scores[0, :, :120] = -torch.inf
    scores[1, :, 170:] = torch.inf
    scores[1, 0] = -torch.inf
    check(use_kernels, implementation, scores, key, value, k)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_neighboring_floats_are_told_apart(device, use_kernels, implementation):
    scores, key, value = make_inputs(device, 100, batch=1, kv_heads=1)
    scores[0, 0] = (torch.full((), 0.01).view(torch.int32) + torch.randperm(100, dtype=torch.int32)).view(
        torch.float32
    )
    check(use_kernels, implementation, scores, key, value, 37)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_more_positions_than_one_block(device, use_kernels, implementation):
    scores, key, value = make_inputs(device, 20_001, batch=1, kv_heads=2, key_dim=16, value_dim=16)
    scores[0, 1] = (3 * scores[0, 1]).round()  # ties over several blocks
    check(use_kernels, implementation, scores, key, value, 150)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_strided_inputs_into_given_storage(device, use_kernels, implementation):
    scores, key, value = make_inputs(device, 80, extra=5)
    storage = torch.full((2, 3, 30, 64), -1.0, device=device), torch.full((2, 3, 30, 64), -1.0, device=device)
    out = storage[0][:, :, 4:24], storage[1][:, :, 4:24]
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (key, value)]
    use_kernels(implementation)
    result = select_compact(scores, *strided, 20, out=out)
    expected = definition(scores, key, value, 20)
    for found, wanted in zip((*out, result[2]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert result[0].data_ptr() == out[0].data_ptr() and result[1].data_ptr() == out[1].data_ptr()
    for tensor in storage:
        assert (tensor[:, :, :4] == -1).all() and (tensor[:, :, 24:] == -1).all()


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("expanded", [False, True])
def test_labels_and_scores_are_kept_beside(device, use_kernels, implementation, expanded):
    scores, key, value = make_inputs(device, 90)
    labels = torch.randint(0, 9999, (1, 1, 90) if expanded else (2, 3, 90), dtype=torch.int32, device=device)
    labels = labels.expand(2, 3, -1)
    storage = torch.full((2, 3, 30), -1, dtype=torch.int32, device=device)
    out = (*(torch.empty(2, 3, 20, 64, device=device) for _ in range(2)), storage[..., 5:25])
    out = (*out, torch.empty(2, 3, 20, device=device))
    use_kernels(implementation)
    *_, indices = select_compact(scores, key, value, 20, labels=labels, out=out)
    expected = (*definition(scores, key, value, 20)[:2], labels.gather(-1, indices), scores.gather(-1, indices))
    for found, wanted in zip(out, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert (storage[..., :5] == -1).all() and (storage[..., 25:] == -1).all()


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("length", [16_385, 17_000, 24_577])
def test_pieces_of_a_long_row(device, use_kernels, implementation, length):
    """The last piece may have fewer scores than are kept, and padding may fill whole pieces."""
    scores, key, value = make_inputs(device, length, batch=2, kv_heads=2, key_dim=16, value_dim=16)
    scores[0, 0] = -torch.inf
    scores[0, 1, :-40] = -torch.inf
    scores[1, 0] = 0.5
    scores[1, 1, length - 3 :] = torch.inf
    check(use_kernels, implementation, scores, key, value, 100)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": torch.zeros(2, 3, 10, dtype=torch.float16)}, TypeError, "float32"),
        ({"key": torch.zeros(2, 3, 9, 8)}, ValueError, "key"),
        ({"value": torch.zeros(2, 4, 10, 8)}, ValueError, "value"),
        ({"k": 0}, ValueError, "between 1 and the number of scored positions, 10"),
        ({"k": 11}, ValueError, "found 11"),
        ({"out": (torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 5, 8))}, ValueError, r"out\[1\]"),
        ({"out": (torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 8).half())}, TypeError, r"out\[1\]"),
        ({"labels": torch.zeros(2, 3, 10)}, ValueError, r"int32 \[2, 3, 10\]"),
        ({"labels": torch.zeros(2, 3, 10).int()}, ValueError, "4 tensors with labels, found none"),
    ],
)
def test_errors(change, error, message):
    inputs = {"scores": torch.zeros(2, 3, 10), "key": torch.zeros(2, 3, 10, 8), "value": torch.zeros(2, 3, 10, 8)}
    with pytest.raises(error, match=message):
        select_compact(**inputs | {"k": 4} | change)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("length", [8192, 131_072])
@pytest.mark.parametrize("k", [128, 4096])
def test_long_prompts(device, use_kernels, length, k):
    check(use_kernels, "triton", *make_inputs(device, length, 1, 8, 32, torch.bfloat16, 128, 128), k)
