import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lkq_hf.kernels.lookahead_scores as module
from lkq_hf.kernels.lookahead_scores import lookahead_scores

SCALING = 0.2


def definition(query, key, scaling, mask=None, row_mask=None, softcap=None, row_power=1.0, reduce_heads=True):
    """The whole matrix of attention at once, in float64."""
    batch, heads, n, _ = query.shape
    kv_heads, total = key.shape[1:3]
    key = key.double().repeat_interleave(heads // kv_heads, dim=1)
    logits = query.double() @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    hidden = torch.ones(n, total, dtype=torch.bool, device=key.device).triu(total - n + 1)
    if mask is not None:
        padding = torch.cat([~mask, mask.new_zeros(batch, n)], dim=-1)
        hidden = hidden | padding[:, None, None]
    probabilities = logits.masked_fill(hidden, -torch.inf).softmax(-1)[..., : total - n] ** row_power
    if row_mask is None:
        scores = probabilities.mean(2)
    else:
        scores = torch.stack([rows[:, real].mean(1) for rows, real in zip(probabilities, row_mask, strict=True)])
    if reduce_heads:
        scores = scores.unflatten(1, (kv_heads, -1)).mean(2)
    scores = scores ** (1 / row_power)
    return scores if mask is None else scores.masked_fill(~mask[:, None], -torch.inf)


def make_inputs(device, batch=2, kv_heads=2, ratio=4, n=32, length=150, head_dim=64, dtype=torch.float32, spread=2.0):
    torch.manual_seed(0)
    query = spread * torch.randn(batch, kv_heads * ratio, n, head_dim, device=device)
    key = spread * torch.randn(batch, kv_heads, length + n, head_dim, device=device)
    return query.to(dtype), key.to(dtype)


def left_padding(device, length, padding):
    return torch.arange(length, device=device) >= torch.tensor(padding, device=device)[:, None]


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize(
    ("dtype", "ratio", "head_dim", "n", "length"),
    [
        (torch.float32, 1, 64, 8, 1),
        (torch.float16, 2, 64, 1, 40),
        (torch.float32, 4, 128, 32, 333),
        (torch.float32, 3, 256, 16, 65),
        (torch.float16, 1, 96, 32, 129),
        (torch.float16, 12, 64, 64, 70),
        (torch.float16, 4, 256, 32, 100),
        (torch.bfloat16, 3, 64, 32, 513),
        (torch.bfloat16, 4, 128, 32, 257),
        (torch.bfloat16, 12, 128, 8, 31),
        (torch.bfloat16, 2, 80, 5, 200),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduce_heads", [True, False])
def test_matches_the_definition(device, use_kernels, implementation, dtype, ratio, head_dim, n, length, reduce_heads):
    query, key = make_inputs(device, 1, 2, ratio, n, length, head_dim, dtype)
    use_kernels(implementation)
    scores = lookahead_scores(query, key, SCALING, reduce_heads=reduce_heads)
    assert scores.dtype == torch.float32
    # Every dtype is multiplied exactly and summed in float32, so one tolerance serves all.
    expected = definition(query, key, SCALING, reduce_heads=reduce_heads)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("reduce_heads", [True, False])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_masks_and_softcap(device, use_kernels, implementation, reduce_heads, softcap):
    query, key = make_inputs(device, batch=3, ratio=3, n=8, length=300, dtype=torch.bfloat16)
    options = {
        # The second row's padding fills whole splits of the keys; the third row also has a hole and right padding.
        "mask": left_padding(device, 300, [0, 290, 5]),
        "row_mask": torch.arange(8, device=device) < torch.tensor([8, 3, 1], device=device)[:, None],
        "softcap": softcap,
        "reduce_heads": reduce_heads,
    }
    options["mask"][2, 100:200] = False
    options["mask"][2, 297:] = False
    use_kernels(implementation)
    scores = lookahead_scores(query, key, SCALING, **options)
    torch.testing.assert_close(scores.double(), definition(query, key, SCALING, **options), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize(
    ("row_power", "ratio", "reduce_heads"),
    # 12 heads of 16 rows: more than one block of rows.
    [(2.0, 3, True), (3.5, 3, False), (3.5, 12, True), (2.0, 12, False)],
)
def test_power_means(device, use_kernels, implementation, row_power, ratio, reduce_heads):
    query, key = make_inputs(device, ratio=ratio, n=16, length=150)
    options = {
        "mask": left_padding(device, 150, [0, 100]),
        "row_mask": torch.arange(16, device=device) < torch.tensor([16, 9], device=device)[:, None],
        "row_power": row_power,
        "reduce_heads": reduce_heads,
    }
    use_kernels(implementation)
    scores = lookahead_scores(query, key, SCALING, **options)
    torch.testing.assert_close(scores.double(), definition(query, key, SCALING, **options), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_padded_prompt_scores_as_it_does_alone(device, use_kernels, implementation):
    query, key = make_inputs(device, length=140)
    use_kernels(implementation)
    padded = lookahead_scores(query, key, SCALING, mask=left_padding(device, 140, [0, 90]))
    alone = lookahead_scores(query[1:], key[1:, :, 90:], SCALING)
    assert torch.isneginf(padded[1, :, :90]).all()
    torch.testing.assert_close(padded[1:, :, 90:], alone)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_rows_that_do_not_count_change_nothing(device, use_kernels, implementation):
    query, key = make_inputs(device, n=16, length=90)
    row_mask = torch.arange(16, device=device).expand(2, -1) < 11
    use_kernels(implementation)
    scores = lookahead_scores(query, key, SCALING, row_mask=row_mask)
    torch.testing.assert_close(scores, lookahead_scores(query[:, :, :11], key[:, :, :101], SCALING))
    nothing = lookahead_scores(query, key, SCALING, row_mask=torch.zeros_like(row_mask))
    torch.testing.assert_close(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_strided_inputs(device, use_kernels, implementation):
    """A model's keys are a transposed view, and the queries are a slice of the prompt's."""
    query, key = make_inputs(device, ratio=2, n=8, length=77)
    longer = torch.randn(2, 4, 50, 64, device=device)
    longer[:, :, 42:] = query
    transposed = key.transpose(1, 2).contiguous().transpose(1, 2)
    columns = key.transpose(-1, -2).contiguous().transpose(-1, -2)
    use_kernels(implementation)
    expected = definition(query, key, SCALING)
    for view in (transposed, columns):
        scores = lookahead_scores(longer[:, :, 42:], view, SCALING)
        torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_large_logits_do_not_overflow(device, use_kernels, implementation):
    query, key = make_inputs(device, n=8, length=100, dtype=torch.bfloat16, spread=30.0)
    use_kernels(implementation)
    for softcap in (None, 50.0):
        scores = lookahead_scores(query, key, 1.0, softcap=softcap)
        expected = definition(query, key, 1.0, softcap=softcap)
        torch.testing.assert_close(scores.double(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("reduce_heads", [True, False])
@pytest.mark.parametrize("row_power", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("chunk_bytes", [module._CHUNK_BYTES, 2**12])
def test_gradients(monkeypatch, softcap, reduce_heads, row_power, chunk_bytes):
    monkeypatch.setattr(module, "_CHUNK_BYTES", chunk_bytes)
    query, key = make_inputs("cpu", ratio=3, n=4, length=5, head_dim=3, dtype=torch.float64, spread=1.0)
    mask = left_padding("cpu", 5, [0, 3])
    row_mask = torch.arange(4) < torch.tensor([4, 2])[:, None]

    def real_scores(query, key):
        scores = lookahead_scores(
            query,
            key,
            0.4,
            mask=mask,
            row_mask=row_mask,
            softcap=softcap,
            row_power=row_power,
            reduce_heads=reduce_heads,
        )
        return scores.masked_fill(~mask[:, None], 0)

    assert torch.autograd.gradcheck(real_scores, (query.requires_grad_(), key.requires_grad_()))


def test_gradients_where_powers_underflow():
    """A large power of a small probability is 0 in float32; its gradient is 0 too, not infinite."""
    query, key = make_inputs("cpu", ratio=1, n=4, length=64, spread=8.0)
    inputs = query.requires_grad_(), key.requires_grad_()
    scores = lookahead_scores(*inputs, 1.0, row_power=4.0)
    assert (scores == 0).any()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(scores.sum(), inputs))


@pytest.mark.parametrize("row_power", [1.0, 2.0])
def test_gradients_through_the_kernel(device, use_kernels, row_power):
    query, key = make_inputs(device, ratio=3, n=16, length=300, spread=1.0)
    mask = left_padding(device, 300, [0, 250])
    weights = torch.randn(2, 6, 300, device=device)
    gradients = {}
    for implementation in ("torch", "triton"):
        use_kernels(implementation)
        inputs = query.clone().requires_grad_(), key.clone().requires_grad_()
        scores = lookahead_scores(*inputs, SCALING, mask=mask, row_power=row_power, reduce_heads=False)
        gradients[implementation] = torch.autograd.grad(scores, inputs, weights)
    torch.testing.assert_close(gradients["triton"], gradients["torch"], rtol=1e-3, atol=1e-6)


def test_reference_memory_is_bounded(monkeypatch):
    """No tensor of the forward or the backward pass grows with rows times length."""
    limit = 2**20
    monkeypatch.setattr(module, "_CHUNK_BYTES", limit)
    query, key = make_inputs("cpu", batch=1, ratio=8, n=32, length=10_000, head_dim=16)
    assert 4 * query.shape[1] * query.shape[2] * 10_000 > 16 * limit

    class LargestTensor(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
            return result

    with LargestTensor() as largest:
        query.requires_grad_()
        lookahead_scores(query, key.requires_grad_(), SCALING).sum().backward()
    assert largest.bytes <= 2 * key.numel() * key.element_size()


def test_cpu_tensors_use_the_reference_unless_forced(monkeypatch):
    monkeypatch.delenv("LKQ_KERNELS", raising=False)
    monkeypatch.setitem(__import__("sys").modules, "lkq_hf.kernels.lookahead_scores_triton", None)
    lookahead_scores(*make_inputs("cpu"), SCALING)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(2, 8, 4, 32)}, ValueError, "query"),
        ({"query": torch.zeros(2, 7, 4, 64)}, ValueError, "7 query heads"),
        ({"key": torch.zeros(2, 2, 3, 64)}, ValueError, "only 3 keys"),
        ({"mask": torch.ones(2, 14, dtype=torch.bool)}, ValueError, r"\[2, 10\]"),
        ({"mask": torch.ones(2, 10)}, TypeError, "boolean"),
        ({"row_mask": torch.ones(2, 10, dtype=torch.bool)}, ValueError, r"\[2, 4\]"),
        ({"row_power": 0.0}, ValueError, "row_power"),
    ],
)
def test_errors(change, error, message):
    inputs = {"query": torch.zeros(2, 8, 4, 64), "key": torch.zeros(2, 2, 14, 64), "scaling": 1.0}
    with pytest.raises(error, match=message):
        lookahead_scores(**inputs | change)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("length", [8192, 32_768, 131_072])
def test_long_prompts(device, use_kernels, length):
    query, key = make_inputs(device, 1, 8, 4, 32, length, 128, torch.bfloat16, spread=1.0)
    use_kernels("triton")
    scores = lookahead_scores(query, key, SCALING)
    use_kernels("torch")
    torch.testing.assert_close(scores, lookahead_scores(query, key, SCALING), rtol=1e-3, atol=1e-9)
