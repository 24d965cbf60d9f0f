"""Attention over a text that was read before, and over what is new."""

import weakref

import pytest
import torch
from models import add_lookahead, kept_entries, left_padded, lookahead_model, prompt_ids
from tiny import tiny_model
from torch import nn

from lkq_hf import LookaheadCache
from lkq_hf.attention import AttentionCall
from lkq_hf.cache.attend import attend_to_text
from lkq_hf.cache.eviction import Eviction
from lkq_hf.cache.padding import left_padding

BEFORE, NEW = 37, 20
TEXT = BEFORE + NEW
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
MASKS = {
    "no padding": [(), ()],
    "padding on the left": [range(5), ()],
    "padding up to the new tokens": [range(BEFORE + 3), range(1)],
    "padding in the middle": [(*range(4), 20, 21, BEFORE), (30,)],
}


def attention_call(implementation, dtype, queries=NEW, head_dim=32, **options):
    """Of 4 heads that share 2 KV heads, in 2 rows."""
    torch.manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups, module.training = 2, False
    query, key, value = (
        torch.randn(2, heads, length, head_dim, device=DEVICE).to(dtype)
        for heads, length in ((4, queries), (2, TEXT), (2, TEXT))
    )
    return AttentionCall(module, implementation, query, key, value, None, {"scaling": 0.2, "dropout": 0.0} | options)


def definition(call, real, softcap=None, sinks=None):
    """``[batch, queries, heads, head_dim]``: each query sees the real tokens up to itself."""
    query, key, value = (tensor.double() for tensor in (call.query, call.key, call.value))
    logits = call.scaling * query @ key.repeat_interleave(2, 1).mT
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    queries = query.shape[2]
    seen = torch.ones(queries, TEXT, dtype=torch.bool, device=DEVICE).tril(TEXT - queries) & real[:, None, None]
    logits = logits.masked_fill(~seen, -torch.inf)
    sink = logits.new_full((*logits.shape[:-1], 1), -torch.inf)
    if sinks is not None:
        sink = sinks.double().view(1, -1, 1, 1).expand_as(sink)
    weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    return (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)


def padded(name):
    real = torch.ones(2, TEXT, dtype=torch.bool, device=DEVICE)
    for row, places in enumerate(MASKS[name]):
        real[row, list(places)] = False
    return real


def models_mask(real):
    """Of the new tokens alone, as transformers makes it: none where it would only be causal."""
    new = real[:, None, None, BEFORE:]
    return None if new.all() else new & torch.ones(NEW, NEW, dtype=torch.bool, device=DEVICE).tril()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kernels", ["", "torch", "triton"])
def test_what_torch_and_the_kernels_compute_is_the_masked_attention(monkeypatch, kernels, mask, dtype):
    monkeypatch.setenv("LKQ_KERNELS", kernels)
    call, real = attention_call("sdpa", dtype), padded(mask)
    call.mask = models_mask(real)
    text_mask = None if real.all() else real[:, :-3]  # the last ones are appended, of which it says nothing
    found, _ = attend_to_text(call, BEFORE, text_mask, left_padding(real))
    expected, real_query = definition(call, real), real[:, -NEW:]
    torch.testing.assert_close(
        found[real_query].double(), expected[real_query], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )
    if kernels != "torch":  # on a GPU, torch leaves tokens that see nothing undefined
        assert found.isfinite().all()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"s_aux": [0.5, -1.0, 2.0, 0.0]}], ids=str)
def test_flex_attention_keeps_its_softcap_and_sinks(mask, options):
    if "s_aux" in options:
        options = {"s_aux": torch.tensor(options["s_aux"], device=DEVICE)}
    call, real = attention_call("flex_attention", torch.float32, **options), padded(mask)
    found, _ = attend_to_text(call, BEFORE, None if real.all() else real, left_padding(real))
    expected, real_query = (
        definition(call, real, *(options.get(name) for name in ("softcap", "s_aux"))),
        real[:, -NEW:],
    )
    torch.testing.assert_close(found[real_query].double(), expected[real_query], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kernels", ["", "triton"])
@pytest.mark.parametrize("queries", [1, 6])
def test_a_decoder_may_drop_all_but_its_last_queries(monkeypatch, kernels, queries):
    monkeypatch.setenv("LKQ_KERNELS", kernels)
    call, real = attention_call("sdpa", torch.float32, queries), padded("no padding")
    found, _ = attend_to_text(call, BEFORE, None, None)
    torch.testing.assert_close(found.double(), definition(call, real), atol=2e-5, rtol=2e-5)


def test_padding_behind_real_tokens_is_no_left_padding():
    assert left_padding(padded("padding on the left")).tolist() == [5, 0]
    assert left_padding(padded("padding in the middle")) is None


@pytest.mark.one_version
def test_chunks_by_kernels_choose_what_a_whole_prompt_does(monkeypatch):
    model = lookahead_model("llama", "sdpa").to(DEVICE)
    ids, mask = left_padded([prompt_ids(1, 45)[0], prompt_ids(1, 15, seed=1)[0]])
    ids, mask, caches = ids.to(DEVICE), mask.to(DEVICE), []
    for kernels, options, chunk in (("torch", {}, 45), ("triton", {"park": "cpu"}, 31)):
        monkeypatch.setenv("LKQ_KERNELS", kernels)
        caches.append(LookaheadCache(7, **options))
        caches[-1].begin_turn(length=45)
        with torch.no_grad():
            for part, end in zip(ids.split(chunk, 1), (chunk, 45), strict=False):
                logits = model(part, attention_mask=mask[:, :end], past_key_values=caches[-1]).logits[:, -1]
        if len(caches) == 1:
            expected = logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    whole, pieces = map(kept_entries, caches)
    assert all(torch.equal(pieces[layer], kept) for layer, kept in whole.items())


@pytest.mark.parametrize("park", [None, "cpu"])
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_one_layer_at_a_time_holds_more_than_it_keeps(monkeypatch, park, family):
    """Together they would take as much memory as a cache without eviction."""
    handed_in, alive = [], []
    add = Eviction.add

    def watch(self, index, candidates, scores):
        alive.append(sum(reference() is not None for reference in handed_in))
        handed_in.append(weakref.ref(candidates.keys.untyped_storage()))
        add(self, index, candidates, scores)

    monkeypatch.setattr(Eviction, "add", watch)
    model, cache = add_lookahead(tiny_model(family)), LookaheadCache(7, park=park)
    with torch.no_grad():
        for length in (60, 9):
            model(prompt_ids(1, length), past_key_values=cache)
    assert max(alive) == 0


def needs_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")(test))


@pytest.mark.parametrize("mask", ["no padding", "padding on the left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("park", [None, "cpu"])
@needs_gpu
def test_a_prompt_in_chunks_peaks_at_a_third(park, dtype, mask):
    """Of what it takes at once: no mask of a chunk's queries and all keys, and no layer's keys for every head."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "head_dim": 128}
    sizes |= {"initializer_range": 0.02, "max_position_embeddings": 20_000}
    model = lookahead_model("llama", "sdpa", **sizes).to(DEVICE, dtype)
    ids = prompt_ids(1, 16_384).to(DEVICE)
    real = torch.ones_like(ids)
    if mask != "no padding":
        real[:, :100] = 0
    peaks = []
    for chunk, options in ((ids.shape[1], {}), (1024, {"park": park})):
        cache = LookaheadCache(64, **options)
        cache.begin_turn(length=ids.shape[1])
        before, end = torch.cuda.memory_allocated(), 0
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            for part in ids.split(chunk, 1):
                end += part.shape[1]
                model(part, attention_mask=real[:, :end], past_key_values=cache, logits_to_keep=1)
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0] / 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [96, 2048])
@needs_gpu
@torch.no_grad()
def test_flash_attention_serves_what_is_not_padded(monkeypatch, queries, dtype):
    """At sizes of real models, and without a mask or copies of keys and values."""
    query, key, value = (
        torch.randn(1, heads, length, 128, device=DEVICE, dtype=dtype)
        for heads, length in ((32, queries), (8, 32_768 + queries), (8, 32_768 + queries))
    )
    module = nn.Module()
    module.num_key_value_groups = 4
    call = AttentionCall(module, "sdpa", query, key, value, None, {"scaling": 0.1})
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found, _ = attend_to_text(call, 32_768, None, None)
    assert torch.cuda.max_memory_allocated() - before < 4 * query.nbytes + 64 * 2**20
    monkeypatch.setattr("lkq_hf.cache.attend._flash_serves", lambda call: False)
    expected, _ = attend_to_text(call, 32_768, None, None)
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=2e-2)


@pytest.mark.parametrize("chunk", [None, 15])
@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 20}], ids=["growing", "static"])
@needs_gpu
def test_a_parked_conversation_on_a_gpu_is_that_of_a_cpu(options, chunk):
    """Copies to and from pinned memory, of rows that change, beside the work of other layers."""
    runs = []
    for device in ("cpu", DEVICE):
        model, cache = lookahead_model("llama", "sdpa").to(device), LookaheadCache(7, park="cpu", **options)
        ids, mask = (each.to(device) for each in left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 33, seed=1)[0]]))
        runs.append([])
        for turn in range(4):
            ids = model.generate(
                ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=5,
                disable_compile=True, prefill_chunk_size=chunk if turn == 0 else None,
            )  # fmt: skip
            runs[-1] += [ids.cpu(), *(entries.cpu() for entries in kept_entries(cache).values())]
            if turn == 1:
                rows = torch.tensor([1, 0, 1], device=device)
                cache.batch_select_indices(rows)
                ids, mask = ids[rows], mask[rows]
            ids = torch.cat([ids, prompt_ids(len(ids), 4 + turn, seed=20 + turn).to(device)], dim=1)
            mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    for expected, found in zip(*runs, strict=True):
        assert torch.equal(found, expected)
