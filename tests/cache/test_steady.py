"""Refreshes whose shapes stay: the same as any other, without waiting, and recorded."""

import copy
import pickle

import pytest
import torch
from models import Waits, kept_entries, left_padded, lookahead_model, prompt_ids
from torch.fx.experimental.proxy_tensor import make_fx

from lkq_hf import LookaheadCache
from lkq_hf.cache import prepare, recorded, refresh
from lkq_hf.cache.recorded import RecordedRefresh
from lkq_hf.cache.steady import SteadyRefresh
from lkq_hf.kernels import cuda_graph, ragged_attention

pytestmark = pytest.mark.one_version


@pytest.fixture
def steadily(monkeypatch):
    """Whether each refresh was a steady one, in order."""
    found, refresh_steadily = [], prepare.refresh_steadily

    def noted(*arguments):
        found.append(refresh_steadily(*arguments))
        return found[-1]

    monkeypatch.setattr(prepare, "refresh_steadily", noted)
    return found


def generate(model, ids, cache, mask=None, new_tokens=30, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": new_tokens, "do_sample": False} | options
    output = model.generate(
        ids, attention_mask=mask, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **options
    )
    return output.sequences, torch.stack(output.logits, dim=1)


def assert_same(found, expected):
    for layer, kept in kept_entries(expected).items():
        assert torch.equal(kept_entries(found)[layer], kept)
    for one, other in zip(found.layers, expected.layers, strict=True):
        for name in ("starts", "lengths", "source_length"):
            assert torch.equal(*(torch.as_tensor(getattr(layer.prefix, name)) for layer in (one, other)))
        assert int(one.get_seq_length()) == int(other.get_seq_length())
        for stored, expected_tail in zip(one.stored_tail(), other.stored_tail(), strict=True):
            torch.testing.assert_close(stored, expected_tail)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize("allocation", ["global", "layer", "uniform"])
@pytest.mark.parametrize("scorer", ["lookahead", "snapkv", "streaming"])
def test_equals_any_other_refresh(scorer, allocation, static, steadily, monkeypatch):
    model = lookahead_model("llama", "sdpa")
    ids, mask = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 25, seed=1)[0]])

    def cache():
        return LookaheadCache(7, scorer, 30 if static else None, allocation, refresh_every=4)

    found = cache()
    text, logits = generate(model, ids, found, mask)
    assert len(steadily) == 6 and all(steadily)
    monkeypatch.setattr(prepare, "refresh_steadily", lambda *_: False)
    expected = cache()
    expected_text, expected_logits = generate(model, ids, expected, mask)
    assert torch.equal(text, expected_text)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
    assert_same(found, expected)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_padding_among_recent_tokens_is_not_kept(static, steadily, monkeypatch):
    """As where a later turn is kept whole."""
    model = lookahead_model("llama", "sdpa")
    ids = prompt_ids(2, 40)
    caches = []
    for steady_path in (True, False):
        if not steady_path:
            monkeypatch.setattr(prepare, "refresh_steadily", lambda *_: False)
        cache = LookaheadCache(7, "lookahead", 40 if static else None, evict_later_turns=False, refresh_every=6)
        text, _ = generate(model, ids, cache, new_tokens=6)
        mask = torch.ones(2, 52)
        mask[1, 46:49] = 0
        text, logits = generate(model, torch.cat([text, prompt_ids(2, 6, seed=3)], 1), cache, mask, 12)
        caches.append((text, logits, cache))
    assert steadily == [True, True]
    (text, logits, found), (expected_text, expected_logits, expected) = caches
    assert torch.equal(text, expected_text)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
    assert_same(found, expected)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Kernels without numbers on the host, and recordings of torch's operations in the place of a GPU's kernels."""
    recordings = []
    monkeypatch.setattr(ragged_attention, "_attend", ragged_attention.ragged_attention_reference)

    def record(run, device):
        before = {}

        def traced():
            run()
            return torch.zeros(())

        # Recording does nothing: what tracing does is taken back.
        for tensor in stored[0]:
            before[tensor] = tensor.clone()
        with Waits():
            graph = make_fx(traced)()
        for tensor, values in before.items():
            tensor.copy_(values)
        recordings.append(graph)
        return graph

    stored = [[]]
    prepare_refresh = SteadyRefresh.prepare.__func__

    def prepared(cls, decoder, cache, *arguments):
        layers, pool = cache.layers, cache.layers[0].prefix.pool
        stored[0] = [pool.keys, pool.values, pool.positions]
        for layer in layers:
            stored[0] += [layer.keys, layer.values, layer._filled, layer._offset]
            stored[0] += [layer.prefix.starts, layer.prefix.lengths]
        return prepare_refresh(cls, decoder, cache, *arguments)

    monkeypatch.setattr(SteadyRefresh, "prepare", classmethod(prepared))
    monkeypatch.setattr(recorded, "record", record)
    monkeypatch.setattr(refresh, "is_on_gpu", lambda _: True)
    return recordings


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_what_is_recorded_once_serves_all_later_refreshes(allocation, as_on_a_gpu, steadily, monkeypatch):
    model = lookahead_model("llama", "sdpa")
    ids, mask = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 25, seed=1)[0]])
    found = LookaheadCache(7, "lookahead", 30, allocation, refresh_every=4)
    text, logits = generate(model, ids, found, mask)
    assert len(steadily) == 6 and len(as_on_a_gpu) == 1
    monkeypatch.setattr(prepare, "refresh_steadily", lambda *_: False)
    expected = LookaheadCache(7, "lookahead", 30, allocation, refresh_every=4)
    expected_text, expected_logits = generate(model, ids, expected, mask)
    assert torch.equal(text, expected_text)
    torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
    assert_same(found, expected)


def test_recorded_anew_where_weights_or_storage_are_others(as_on_a_gpu):
    model = lookahead_model("llama", "sdpa")
    cache = LookaheadCache(7, "lookahead", 14, refresh_every=4)
    text, _ = generate(model, prompt_ids(1, 40), cache, new_tokens=24)
    assert len(as_on_a_gpu) == 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    cache.begin_turn()
    text, _ = generate(model, torch.cat([text, prompt_ids(1, 3, seed=2)], 1), cache, new_tokens=24)
    assert len(as_on_a_gpu) == 2
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache.recorded_refresh))):
        inside = copied.recorded_refresh if isinstance(copied, LookaheadCache) else copied
        assert isinstance(inside, RecordedRefresh) and inside._replay is None


def test_what_cannot_be_recorded_is_launched_kernel_by_kernel(as_on_a_gpu, monkeypatch):
    model = lookahead_model("llama", "sdpa")
    expected, _ = generate(model, prompt_ids(1, 40), LookaheadCache(7, "lookahead", 30, refresh_every=4))

    def record(run, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recorded, "record", record)
    with pytest.warns(UserWarning, match="kernel by kernel.*not permitted") as warned:
        found, _ = generate(model, prompt_ids(1, 40), LookaheadCache(7, "lookahead", 30, refresh_every=4))
    assert torch.equal(found, expected) and sum("kernel by kernel" in str(one.message) for one in warned) == 1


def test_a_recording_for_which_memory_has_to_be_freed_first(monkeypatch):
    tried = []

    def capture(run, device):
        tried.append(run)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run

    monkeypatch.setattr(cuda_graph, "_capture", capture)
    assert cuda_graph.record(print, torch.device("cuda")) is print and tried == [print, print]


@pytest.mark.parametrize(
    ("architecture", "options", "steady_ones"),
    [
        ("llama", {"budget": 0.2}, [False] * 6),  # of a text that grows
        ("llama", {"budget": 7, "park": "cpu"}, [False] * 6),
        ("gemma3", {"budget": 7}, [False] * 6),
        ("llama", {"budget": 60}, [False, *[True] * 4]),  # the first eviction is a refresh
    ],
)
def test_other_refreshes(architecture, options, steady_ones, steadily):
    model = lookahead_model(architecture, "sdpa")
    tokens = 30 if options["budget"] != 60 else 45
    generate(model, prompt_ids(1, 40), LookaheadCache(refresh_every=4, **options), new_tokens=tokens)
    assert steadily == steady_ones
