import pytest
import torch

from lkq_hf.kernels.decode_attention import decode_attention

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def make_inputs(device, slots, batch=2, kv_heads=2, groups=3, dtype=torch.float32, head_dim=64, value_dim=64):
    torch.manual_seed(0)
    # As modules hand it over: heads are a transposed dimension.
    query = torch.randn(batch, 1, kv_heads * groups, head_dim, device=device).transpose(1, 2).to(dtype)
    key = torch.randn(batch, kv_heads, slots, head_dim, device=device).to(dtype)
    value = torch.randn(batch, kv_heads, slots, value_dim, device=device).to(dtype)
    mask = torch.rand(batch, 1, 1, slots, device=device) < 0.5
    mask[..., 0] = True
    return query, key, value, mask


def definition(query, key, value, mask, scaling):
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.double().repeat_interleave(groups, 1) for tensor in (key, value))
    logits = scaling * query.double() @ key.transpose(-1, -2)
    return logits.masked_fill(~mask, -torch.inf).softmax(-1) @ value


def check(use_kernels, implementation, query, key, value, mask, scaling=0.2):
    use_kernels(implementation)
    found = decode_attention(query, key, value, mask, scaling)
    assert found.dtype == query.dtype
    expected = definition(query, key, value, mask, scaling)
    tolerance = TOLERANCE[query.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("slots", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("groups", [1, 4, 12, 20])
def test_slots_and_groups(device, use_kernels, implementation, slots, groups):
    check(use_kernels, implementation, *make_inputs(device, slots, groups=groups))


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(8, 8), (80, 80), (128, 128), (192, 128), (256, 256)])
def test_dtypes_and_head_sizes(device, use_kernels, implementation, dtype, head_dim, value_dim):
    check(
        use_kernels,
        implementation,
        *make_inputs(device, 150, dtype=dtype, head_dim=head_dim, value_dim=value_dim),
        scaling=head_dim**-0.5,
    )


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_rows_see_different_entries_and_never_the_rest(device, use_kernels, implementation):
    query, key, value, mask = make_inputs(device, 400, batch=3)
    mask[0, ..., :390] = False  # padding
    mask[1, ..., 20:] = False  # room for tokens to come: whole tiles are hidden
    mask[2] = True
    key[1, :, 20:], value[1, :, 20:] = 1e4, 1e4
    check(use_kernels, implementation, query, key, value, mask)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_one_mask_for_all_rows_and_a_part_of_larger_storage(device, use_kernels, implementation):
    query, key, value, mask = make_inputs(device, 200, batch=3)
    check(use_kernels, implementation, query, key[:, :, 50:150], value[:, :, 50:150], mask[:1, ..., :100])


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_large_logits(device, use_kernels, implementation):
    query, key, value, mask = make_inputs(device, 200)
    check(use_kernels, implementation, 100 * query, key, value, mask, scaling=3.0)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_nothing_seen_is_zero(device, use_kernels, implementation):
    use_kernels(implementation)
    query, key, value, mask = make_inputs(device, 100)
    mask[1] = False
    found = decode_attention(query, key, value, mask, 0.2)
    assert torch.equal(found[1], torch.zeros_like(found[1])) and found[0].abs().sum() > 0


def test_registration(device):
    query, key, value, mask = make_inputs(device, 10)
    torch.library.opcheck(decode_attention, (query, key, value, mask, 0.2))
