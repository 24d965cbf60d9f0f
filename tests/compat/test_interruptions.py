"""Ctrl-C, running out of memory and other ends of a prefill that leave nothing behind, and threads that meet there."""

import ctypes
import gc
import os
import signal
import threading
import weakref

import pytest
import torch
from models import base_and_adapted, kept_entries, lookahead_model, prompt_ids, tiny_model
from reference import assert_as_masked, assert_nothing_is_left_behind, generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lkq_hf.attention
from lkq_hf import LookaheadCache, prepare_model_for_eviction
from lkq_hf.attention import start_attending, thread_state

item = pytest.mark.item

PLACES = {
    "the embedding": lambda model: model.model.embed_tokens,
    "a projection": lambda model: model.model.layers[1].self_attn.q_proj,
    "the attention's output": lambda model: model.model.layers[1].self_attn.o_proj,
    "between layers": lambda model: model.model.layers[2],
    "the last norm": lambda model: model.model.norm,
}


def raising(module, error):
    def fail(*_):
        raise error

    return module.register_forward_pre_hook(fail)


@item("Ctrl-C (KeyboardInterrupt) in a prefill")
@pytest.mark.parametrize("call", ["generate", "forward"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_leaves_nothing_behind_at_once(place, error, call):
    base, model = base_and_adapted()
    ids, entries = prompt_ids(1, 40), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    hooks = {name: (list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()}
    cache = LookaheadCache(budget=7)
    handle = raising(PLACES[place](model), error)
    with pytest.raises(error), torch.no_grad():
        if call == "generate":
            generate(model, ids, cache)
        else:
            model(ids, past_key_values=cache)
    handle.remove()
    assert_nothing_is_left_behind(entries)
    assert hooks == {name: (list(m._forward_hooks), list(m._forward_pre_hooks)) for name, m in model.named_modules()}
    assert cache.get_seq_length() == 0
    assert_as_masked(base, ids, *generate(model, ids, cache), cache)


@item("Ctrl-C (KeyboardInterrupt) in a prefill")
@pytest.mark.parametrize("room", [None, 8], ids=["growing", "static"])
@pytest.mark.parametrize("turn", ["first", "later"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_of_any_turn_leaves_the_cache_as_it_was(place, architecture, turn, room):
    base, model = base_and_adapted(architecture)
    model.set_attn_implementation("sdpa")
    cache, stages, seen, ids = LookaheadCache(budget=7, max_new_tokens=room), [], 0, prompt_ids(1, 40)
    if turn == "later":
        tokens, _ = generate(model, ids, cache)
        stages, seen = [kept_entries(cache)], 47
        ids = torch.cat([ids, tokens, prompt_ids(1, 5, seed=3)], dim=1)
    handle = raising(PLACES[place](model), KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, cache)
    handle.remove()
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [seen] * len(cache.layers)
    tokens, logits = generate(model, ids, cache)
    stages.append(kept_entries(cache))
    assert_as_masked(base, ids, tokens, logits, stages)


@item("Ctrl-C (KeyboardInterrupt) in a prefill")
def test_a_signal_in_the_middle():
    """A real one, which Python delivers wherever the forward happens to be."""
    base, model = base_and_adapted()
    ids, entries = prompt_ids(1, 40), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    cache = LookaheadCache(budget=7)
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    # Where tests run in several processes, these ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            generate(model, ids, cache)
    finally:
        signal.signal(signal.SIGINT, before)
    handle.remove()
    assert_nothing_is_left_behind(entries)
    assert_as_masked(base, ids, *generate(model, ids, cache), cache)


@item("Ctrl-C (KeyboardInterrupt) in a prefill")
def test_an_interrupted_model_is_freed():
    model = lookahead_model()
    cache = LookaheadCache(budget=7)
    handle = raising(model.model.layers[1], KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompt_ids(1, 40), cache)
    handle.remove()
    gone = [weakref.ref(model), weakref.ref(cache)]
    del model, cache, handle
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


@item("Ctrl-C (KeyboardInterrupt) in a prefill")
def test_an_interrupt_while_tokens_are_generated():
    base, model = base_and_adapted()
    ids, cache = prompt_ids(1, 40), LookaheadCache(budget=7)
    calls = []

    def interrupt_the_third(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = model.model.norm.register_forward_pre_hook(interrupt_the_third)
    with pytest.raises(KeyboardInterrupt):
        generate(model, ids, cache)
    handle.remove()
    cache.reset()
    assert_as_masked(base, ids, *generate(model, ids, cache), cache)


@item("out of memory in a prefill")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_out_of_memory_inside_the_attention(attention, monkeypatch):
    base, model = base_and_adapted()
    model.set_attn_implementation(attention)
    ids, cache = prompt_ids(1, 40), LookaheadCache(budget=7)
    softmax, product = torch.nn.functional.softmax, torch.nn.functional.scaled_dot_product_attention
    calls = []

    def failing(original):
        def attend(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("out of memory")
            return original(*args, **kwargs)

        return attend

    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "softmax", failing(softmax))
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", failing(product))
        with pytest.raises(torch.OutOfMemoryError):
            generate(model, ids, cache)
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    assert_as_masked(base, ids, *generate(model, ids, cache), cache)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, base.set_attn_implementation(attention) or base(ids).logits)


@item("out of memory in a prefill")
@pytest.mark.parametrize("room", [None, 8], ids=["growing", "static"])
@pytest.mark.parametrize("turn", ["first", "later"])
@pytest.mark.parametrize("place", ["select_compact", "share_out", "compact_segments"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_out_of_memory_in_the_choice(architecture, place, turn, room, monkeypatch):
    """The cache is as before the forward, also where layers with a sliding window have read it already."""
    base, model = base_and_adapted(architecture)
    model.set_attn_implementation("sdpa")
    cache, stages, seen, ids = LookaheadCache(budget=7, max_new_tokens=room), [], 0, prompt_ids(1, 40)
    if turn == "later":
        tokens, _ = generate(model, ids, cache)
        stages, seen = [kept_entries(cache)], 47
        ids = torch.cat([ids, tokens, prompt_ids(1, 5, seed=3)], dim=1)

    def fail(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patched:
        for name in [place, "share_out_stacked"] if place == "share_out" else [place]:
            patched.setattr(f"lkq_hf.cache.eviction.{name}", fail)
        with pytest.raises(torch.OutOfMemoryError):
            generate(model, ids, cache)
    assert cache.get_seq_length() == seen
    assert all(int(layer.get_seq_length()) == seen for layer in cache.layers)
    tokens, logits = generate(model, ids, cache)
    stages.append(kept_entries(cache))
    assert_as_masked(base, ids, tokens, logits, stages)


@item("threads: several generations on one model at once")
def test_a_thread_that_is_interrupted_does_not_disturb_another():
    base, model = base_and_adapted()
    ids, cache = prompt_ids(1, 40), LookaheadCache(budget=7)
    inside, go_on = threading.Event(), threading.Event()
    failing = threading.local()

    def pause(*_):
        if getattr(failing, "yes", False):
            inside.set()
            go_on.wait(10)
            raise KeyboardInterrupt

    def interrupted():
        failing.yes = True
        with pytest.raises(KeyboardInterrupt):
            generate(model, ids, LookaheadCache(budget=7))

    handle = model.model.layers[1].register_forward_pre_hook(pause)
    thread = threading.Thread(target=interrupted)
    thread.start()
    assert inside.wait(10)
    assert lkq_hf.attention._renamed, "the other thread is in the middle of its prefill"
    tokens, logits = generate(model, ids, cache)
    go_on.set()
    thread.join()
    handle.remove()
    assert_as_masked(base, ids, tokens, logits, cache)


class Chased(str):
    """A key of the registry for which another thread ends its prefill between the look-up and the read."""

    __slots__ = ("between", "looked_up")

    def __hash__(self):
        self.looked_up = getattr(self, "looked_up", 0) + 1
        if self.looked_up == 2:
            self.between()
        return str.__hash__(self)


@item("threads: several generations on one model at once")
def test_another_thread_ends_its_prefill_while_the_attention_is_looked_up():
    """It must lead to the same attention function, not silently to the eager one, which takes other masks."""
    model = tiny_model(attention="sdpa")
    expected = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
    key = Chased("sdpa")
    key.between = start_attending(model.model, lambda call: call.run())
    assert ALL_ATTENTION_FUNCTIONS.get(key, "eager") is expected
    assert key.looked_up >= 2 and not lkq_hf.attention._renamed


@item("threads: several generations on one model at once")
def test_a_thread_that_is_stopped_from_outside():
    """As notebooks do it: an exception raised asynchronously in the other thread."""
    _, model = base_and_adapted()
    inside, stopped = threading.Event(), []

    def wait(*_):
        inside.set()
        while True:
            pass

    def run():
        try:
            generate(model, prompt_ids(1, 40), LookaheadCache(budget=7))
        except SystemExit:
            stopped.append((thread_state.attend, thread_state.lookahead_length, dict(lkq_hf.attention._renamed)))

    handle = model.model.layers[1].register_forward_pre_hook(wait)
    thread = threading.Thread(target=run)
    thread.start()
    assert inside.wait(10)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))
    thread.join(10)
    handle.remove()
    assert stopped == [(None, 0, {})]


@item("several models at once, prepared or not")
def test_a_model_without_the_adapter_runs_beside():
    base, model = base_and_adapted()
    other = tiny_model(seed=5)
    ids, cache = prompt_ids(1, 40), LookaheadCache(budget=7)
    with torch.no_grad():
        expected, inner = other(ids).logits, []
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: inner.append(other(ids).logits))
        model(ids, past_key_values=cache)
    handle.remove()
    assert torch.equal(inner[0], expected)
    stages = [kept_entries(cache)]
    follow_up = torch.cat([ids, prompt_ids(1, 4, seed=2)], dim=1)
    tokens, logits = generate(model, follow_up, cache)
    stages.append(kept_entries(cache))
    assert_as_masked(base, follow_up, tokens, logits, stages)


@item("nn.DataParallel", refused="one process for each GPU (accelerate launch, torchrun), or device_map")
def test_a_data_parallel_replica():
    model = lookahead_model()
    replica = model.model._replicate_for_data_parallel()
    with pytest.raises(NotImplementedError, match=r"DataParallel.*accelerate launch"):
        replica(prompt_ids(1, 40), past_key_values=LookaheadCache(budget=7))


def test_removing_the_preparation_gives_the_methods_back():
    model = tiny_model()
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    with prepare_model_for_eviction(model):
        assert "forward" in model.model.__dict__ and "generate" in model.__dict__
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before


def test_a_method_that_another_library_wrapped_is_given_back_to_it():
    model = tiny_model()
    calls, original = [], model.model.forward

    def wrapped(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.model.forward = wrapped
    ids = prompt_ids(1, 40)
    with prepare_model_for_eviction(model), torch.no_grad():
        model(ids, past_key_values=LookaheadCache(budget=7, scorer="snapkv"))
    assert calls == [1] and model.model.forward is wrapped


@item("threads: several generations on one model at once")
@pytest.mark.parametrize("decode_comes", ["before", "within"])
def test_a_static_decode_that_ends_or_begins_in_another_threads_prefill(decode_comes):
    """It gives the model's attention another name, for all threads."""
    model, ids = lookahead_model(attention="sdpa"), prompt_ids(1, 60)
    expected = model.generate(ids, past_key_values=LookaheadCache(16), max_new_tokens=4, do_sample=False)
    decoding, go_on = threading.Event(), threading.Event()

    class Waiting:
        def put(self, _):
            decoding.set()
            go_on.wait(60)

        def end(self):
            pass

    static = {"past_key_values": LookaheadCache(16, max_new_tokens=4), "max_new_tokens": 4, "streamer": Waiting()}
    other = threading.Thread(target=model.generate, args=(ids,), kwargs=static)

    def within_the_prefill(*_):
        if threading.current_thread() is threading.main_thread() and not go_on.is_set():
            if decode_comes == "within":
                other.start()
                decoding.wait(60)
            else:
                go_on.set()
                other.join()
            handle.remove()

    if decode_comes == "before":
        other.start()
        decoding.wait(60)
    handle = model.model.layers[0].register_forward_hook(within_the_prefill)
    found = model.generate(ids, past_key_values=LookaheadCache(16), max_new_tokens=4, do_sample=False)
    go_on.set()
    other.join()
    assert torch.equal(found, expected)
