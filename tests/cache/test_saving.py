"""A cache that is saved goes on in another process where it was."""

import copy
import dataclasses
import gc
import json
import pickle
from dataclasses import dataclass

import pytest
import torch
from models import add_adapter, add_lookahead, kept_entries, left_padded, lookahead_model, prompt_ids, tiny_model
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from small_checkpoint import small_tokenizer
from transformers import AutoModelForCausalLM

from lkq_hf import LookaheadCache, TwoStageGPTQConfig, prepare_model_for_eviction
from lkq_hf.cache.fingerprint import differences, fingerprint
from lkq_hf.cache.saving import _digest_of_file
from lkq_hf.scoring import LookaheadScorer, RandomScorer, SnapKVScorer, StreamingScorer

NOTE = "lookahead_cache.json"


def turn(model, cache, ids, mask=None, tokens=5):
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        past_key_values=cache,
        max_new_tokens=tokens,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences, torch.stack(output.logits)


def followed(ids):
    """A conversation and its next question."""
    return torch.cat([ids, prompt_ids(ids.shape[0], 7, seed=3)], dim=1)


def assert_same(model, found, expected, ids, mask=None):
    """Both caches hold the same, and one more turn over them is the same."""
    assert found.summary()["layers"] == expected.summary()["layers"]
    assert found.get_seq_length() == expected.get_seq_length()
    assert (found.nbytes == expected.nbytes) or expected.is_compileable
    assert found.parked_nbytes == expected.parked_nbytes
    for index, entries in kept_entries(expected).items():
        assert torch.equal(kept_entries(found)[index], entries)
    (tokens, logits), (own_tokens, own_logits) = (
        turn(model, cache, ids, mask, tokens=12) for cache in (found, expected)
    )
    assert torch.equal(tokens, own_tokens)
    torch.testing.assert_close(logits, own_logits, rtol=0, atol=0)
    for index, entries in kept_entries(expected).items():
        assert torch.equal(kept_entries(found)[index], entries)


OPTIONS = {
    "global": {},
    "uniform": {"allocation": "uniform"},
    "layer": {"allocation": "layer", "budget": 0.2},
    "profile": {"allocation": "profile"},
    "static": {"max_new_tokens": 30},
    "static, little room": {"max_new_tokens": 1},
    "parked": {"park": "cpu"},
    "parked, static": {"park": "cpu", "max_new_tokens": 30},
    "refreshed": {"refresh_every": 3},
    "refreshed, by queries": {"refresh_every": 3, "scorer": SnapKVScorer(window=3)},
    "later turns whole": {"evict_later_turns": False},
    "within the budget": {"budget": 100},
    "within the budget, static": {"budget": 100, "max_new_tokens": 30},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_loaded_cache_goes_on_as_the_saved_one(architecture, name, padded, tmp_path):
    rows = 3 if architecture == "llama" else 2
    profile = {"8": [[1.5, 0.5]] * rows}
    model = add_lookahead(tiny_model(architecture, "sdpa"), budget_profile=profile)
    again = add_lookahead(tiny_model(architecture, "sdpa"), budget_profile=profile)
    ids, mask = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 31 if padded else 40, seed=1)[0]])
    cache = LookaheadCache(**{"budget": 8} | OPTIONS[name])
    answered, _ = turn(model, cache, ids, mask)
    cache.save_pretrained(tmp_path / "cache")
    loaded = LookaheadCache.from_pretrained(tmp_path / "cache", again)
    assert {key: getattr(loaded, key) for key in ("budget", "scorer", "allocation", "park", "refresh_every")} == {
        key: getattr(cache, key) for key in ("budget", "scorer", "allocation", "park", "refresh_every")
    }
    longer = torch.cat([answered, prompt_ids(2, 7, seed=3)], dim=1)
    whole = torch.cat([mask, torch.ones(2, longer.shape[1] - 40, dtype=torch.long)], dim=1)
    assert_same(again, loaded, cache, longer, whole)
    loaded.save_pretrained(tmp_path / "again")
    assert LookaheadCache.from_pretrained(tmp_path / "again", again).nbytes > 0


def test_beams_and_copies_can_be_saved(tmp_path):
    model = lookahead_model(attention="sdpa")
    cache = LookaheadCache(budget=8)
    model.generate(prompt_ids(1, 40), past_key_values=cache, max_new_tokens=4, num_beams=3, do_sample=False)
    copy.deepcopy(cache).save_pretrained(tmp_path)
    loaded = LookaheadCache.from_pretrained(tmp_path, model)
    ids = torch.cat([prompt_ids(1, 40).expand(3, -1), prompt_ids(3, 9, seed=6)], 1)
    assert_same(model, loaded, cache, ids)


def test_sliding_windows_that_recorded_their_past_are_saved_without_it(tmp_path):
    model = lookahead_model("gemma3", attention="sdpa")
    cache = LookaheadCache(budget=8)
    ids = prompt_ids(1, 10).repeat(1, 4)
    model.generate(ids, past_key_values=cache, max_new_tokens=9, prompt_lookup_num_tokens=3, do_sample=False)
    assert cache.records_past
    cache.save_pretrained(tmp_path)
    loaded = LookaheadCache.from_pretrained(tmp_path, model)
    assert loaded.layers[0].keys.shape[2] == 7
    more = prompt_ids(1, 6, seed=7)
    with torch.no_grad():
        logits = [model(more, past_key_values=each).logits for each in (loaded, cache)]
    # What recorded its past goes on without evicting; the loaded one evicts after this turn.
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("name", ["parked", "parked, static"])
def test_parked_entries_may_be_left_out(name, tmp_path):
    model = lookahead_model(attention="sdpa")
    cache = LookaheadCache(budget=8, **OPTIONS[name])
    answered, _ = turn(model, cache, prompt_ids(1, 40))
    cache.save_pretrained(tmp_path / "whole")
    cache.save_pretrained(tmp_path / "small", parked=False)
    sizes = [sum(path.stat().st_size for path in (tmp_path / each).iterdir()) for each in ("whole", "small")]
    assert sizes[0] - sizes[1] >= cache.parked_nbytes > 0
    small = LookaheadCache.from_pretrained(tmp_path / "small", model)
    left_out = LookaheadCache.from_pretrained(tmp_path / "whole", model, park=None)
    assert small.park is None and left_out.park is None and small.parked_nbytes == left_out.parked_nbytes == 0
    assert_same(model, small, left_out, torch.cat([answered, prompt_ids(1, 7, seed=3)], dim=1))
    with pytest.raises(ValueError, match=r"park='cpu' needs everything .* without its parked entries"):
        LookaheadCache.from_pretrained(tmp_path / "small", model, park="cpu")


@pytest.mark.parametrize(
    "scorer",
    [
        "lookahead", "snapkv", "streaming", "random", LookaheadScorer(3, "sum", 0.5, 2.0), SnapKVScorer(4, 3, "avg"),
        StreamingScorer(2), RandomScorer(7),
    ],
)  # fmt: skip
def test_scorers_of_ours_are_saved_with_their_parameters(scorer, tmp_path):
    model = lookahead_model()
    cache = LookaheadCache(budget=8, scorer=scorer)
    turn(model, cache, prompt_ids(1, 40))
    cache.save_pretrained(tmp_path)
    loaded = LookaheadCache.from_pretrained(tmp_path, model).scorer
    assert type(loaded) is type(cache.scorer) and dataclasses.asdict(loaded) == dataclasses.asdict(cache.scorer)


@dataclass(frozen=True)
class Backwards(StreamingScorer):
    def score(self, attention):
        return -super().score(attention)


def test_another_scorer_has_to_be_passed(tmp_path):
    model = lookahead_model()
    cache = LookaheadCache(budget=8, scorer=Backwards())
    turn(model, cache, prompt_ids(1, 40))
    cache.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not one of .*\(Backwards\): pass the scorer"):
        LookaheadCache.from_pretrained(tmp_path, model)
    assert LookaheadCache.from_pretrained(tmp_path, model, scorer=Backwards()).scorer == Backwards()


def test_options_replace_the_saved_ones_and_the_model_is_prepared(tmp_path):
    model, plain = lookahead_model(attention="sdpa"), tiny_model(attention="sdpa")
    cache = LookaheadCache(budget=8)
    answered, _ = turn(model, cache, prompt_ids(1, 40))
    cache.save_pretrained(tmp_path)
    # A model that was never prepared, and has no adapter: later turns are kept whole.
    loaded = LookaheadCache.from_pretrained(tmp_path, plain, evict_later_turns=False, max_new_tokens=20)
    assert loaded.is_compileable
    expected = LookaheadCache.from_pretrained(tmp_path, model, evict_later_turns=False)
    ids = torch.cat([answered, prompt_ids(1, 7, seed=3)], dim=1)
    found, own = turn(plain, loaded, ids), turn(model, expected, ids)
    assert torch.equal(found[0], own[0])
    torch.testing.assert_close(found[1], own[1])
    with pytest.raises(TypeError, match=r"unknown arguments \['budgets'\]"):
        LookaheadCache.from_pretrained(tmp_path, model, budgets=4)


def test_another_dtype_is_cast(tmp_path):
    model = lookahead_model(attention="sdpa")
    cache = LookaheadCache(budget=8)
    answered, _ = turn(model, cache, prompt_ids(1, 40))
    cache.save_pretrained(tmp_path)
    half = copy.deepcopy(model).to(torch.bfloat16)
    loaded = LookaheadCache.from_pretrained(tmp_path, half)
    assert {loaded.layers[0].keys.dtype, loaded.layers[0].prefix.pool.keys.dtype} == {torch.bfloat16}
    turn(half, loaded, torch.cat([answered, prompt_ids(1, 7, seed=3)], dim=1))
    loaded.save_pretrained(tmp_path)
    back = LookaheadCache.from_pretrained(tmp_path, model)
    assert back.layers[0].keys.dtype == torch.float32


def test_the_hash_of_the_ids_is_compared(tmp_path):
    model = lookahead_model()
    cache = LookaheadCache(budget=8)
    ids = prompt_ids(2, 40)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)
    with pytest.raises(ValueError, match=r"should be the tokens .* \[2, 40\], got \[2, 39\]"):
        cache.save_pretrained(tmp_path, input_ids=ids[:, 1:])
    cache.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="saved without input_ids"):
        LookaheadCache.from_pretrained(tmp_path, model, input_ids=ids)
    cache.save_pretrained(tmp_path, input_ids=ids)
    LookaheadCache.from_pretrained(tmp_path, model, input_ids=torch.cat([ids, ids], 1))
    LookaheadCache.from_pretrained(tmp_path, model)
    other = ids.clone()
    other[1, 17] += 1
    with pytest.raises(ValueError, match="cache of another text"):
        LookaheadCache.from_pretrained(tmp_path, model, input_ids=other)
    with pytest.raises(ValueError, match=r"got \[2, 5\]"):
        LookaheadCache.from_pretrained(tmp_path, model, input_ids=ids[:, :5])


def test_what_cannot_be_saved(tmp_path):
    model = lookahead_model(attention="sdpa")
    with pytest.raises(ValueError, match="which model filled it"):
        LookaheadCache(budget=8).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no prompt has been read"):
        LookaheadCache(budget=8).save_pretrained(tmp_path, model=model)
    cache = LookaheadCache(budget=8)
    cache.begin_turn(length=40)
    with torch.no_grad():
        model(prompt_ids(1, 40)[:, :20], past_key_values=cache)
    with pytest.raises(ValueError, match="in the middle of a prompt"):
        cache.save_pretrained(tmp_path)
    drafted = LookaheadCache(budget=8)
    drafted.activate_past_recording()
    with torch.no_grad():
        model(prompt_ids(1, 40), past_key_values=drafted)
    with pytest.raises(ValueError, match=r"crop\(0\)"):
        drafted.save_pretrained(tmp_path)
    drafted.crop(0)
    drafted.save_pretrained(tmp_path)


def test_a_pickled_cache_no_longer_knows_its_model(tmp_path):
    model = lookahead_model()
    cache = LookaheadCache(budget=8)
    answered, _ = turn(model, cache, prompt_ids(1, 40))
    unpickled = pickle.loads(pickle.dumps(cache))
    with pytest.raises(ValueError, match="unpickled"):
        unpickled.save_pretrained(tmp_path)
    unpickled.save_pretrained(tmp_path, model=model)
    assert_same(model, LookaheadCache.from_pretrained(tmp_path, model), cache, followed(answered))
    # A cache keeps no model alive.
    assert cache.model() is model.model
    del model
    gc.collect()
    assert cache.model() is None


def saved(directory, **options):
    model = lookahead_model(attention="sdpa")
    cache = LookaheadCache(**{"budget": 8, "park": "cpu", "refresh_every": 3, "scorer": SnapKVScorer(3)} | options)
    turn(model, cache, prompt_ids(1, 40))
    cache.save_pretrained(directory)
    return model


def fine_tuned(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)
    return model


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda: tiny_model(seed=3), "the weights in .* are others"),
        (lambda: fine_tuned(tiny_model()), "the weights in .* are others"),
        (lambda: tiny_model(hidden_size=32), "hidden_size is 32 and should be 64"),
        (lambda: tiny_model("qwen3"), "model_type is qwen3 and should be llama"),
        (lambda: tiny_model(seed=3).to(torch.bfloat16), "the weights in .* are others"),
        (lambda: with_a_lora(tiny_model()), "with another adapter"),
    ],
)
def test_another_model_is_refused(other, said, tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=f"cache of another model .tiny-llama.: .*{said}"):
        LookaheadCache.from_pretrained(tmp_path, other())


def with_a_lora(model):
    add_adapter(model, LoraConfig(target_modules=["k_proj"]), "style")
    return model


def test_a_quantized_model_is_another_one(tmp_path):
    model = tiny_model(vocab_size=1024)
    model.save_pretrained(tmp_path / "base")
    small_tokenizer().save_pretrained(tmp_path / "base")
    texts = ["w1 w2 w3 " * 40] * 2
    config = TwoStageGPTQConfig(bits=4, group_size=16, dataset=texts, num_samples=2, model_seqlen=16)
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    caches = []
    for each in (model, quantized):
        prepare_model_for_eviction(each)
        caches.append(LookaheadCache(budget=8, scorer="snapkv"))
        turn(each, caches[-1], prompt_ids(1, 40))
    caches[0].save_pretrained(tmp_path / "cache")
    with pytest.raises(ValueError, match="tensors have other names, as those of a quantized model"):
        LookaheadCache.from_pretrained(tmp_path / "cache", quantized)
    caches[1].save_pretrained(tmp_path / "cache")
    LookaheadCache.from_pretrained(tmp_path / "cache", quantized)
    with pytest.raises(ValueError, match="as those of a quantized model"):
        LookaheadCache.from_pretrained(tmp_path / "cache", model)


def test_lookahead_adapters_do_not_make_another_model():
    base, adapted = tiny_model(), lookahead_model()
    assert differences(fingerprint(base.model), fingerprint(adapted.model)) == []
    assert "lookahead" not in json.dumps(fingerprint(adapted.model))


def edit(directory, **changes):
    note = json.loads((directory / NOTE).read_text())
    (directory / NOTE).write_text(json.dumps(note | changes))


def edit_tensors(directory, change):
    """Changes the tensors as somebody would who also writes the right hash."""
    note = json.loads((directory / NOTE).read_text())
    path = directory / note["tensors"]["file"]
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    edit(directory, tensors={"file": path.name, "sha256": _digest_of_file(path)})


def put(name, value):
    def change(tensors):
        found = f"layers.1.{name}"
        tensors[found] = value(tensors[found]) if callable(value) else value

    return change


def with_value(value, *place):
    def change(tensor):
        tensor = tensor.clone()
        tensor[place or (0,) * tensor.ndim] = value
        return tensor

    return change


def drop(name):
    return lambda tensors: tensors.pop(f"layers.1.{name}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put("kept.keys", with_value(float("nan"))), "kept.keys of layer 1 holds values that are not finite"),
        (put("tail.values", with_value(float("inf"))), "tail.values of layer 1 holds values that are not finite"),
        (put("parked.0.keys", with_value(float("nan"))), "parked.0.keys of layer 1 holds values that are not finite"),
        (put("queries", with_value(float("nan"))), "queries of layer 1 holds values that are not finite"),
        (put("kept.keys", lambda t: t.int()), "kept.keys of layer 1 should hold floating-point numbers"),
        (put("tail.keys", lambda t: t.to(torch.float8_e5m2)), "tail.keys of layer 1 should hold floating-point numb"),
        (put("kept.positions", with_value(40)), "positions of layer 1 should be from 0 to 39, found"),
        (put("kept.positions", with_value(-1)), "positions of layer 1 should be from 0 to 39, found -1"),
        (put("kept.positions", with_value(0, 1)), "positions of layer 1 should ascend"),
        (put("kept.positions", lambda t: t.long()), "kept.positions of layer 1 should be int32"),
        (put("kept.positions", lambda t: t[:-1]), r"kept.positions of layer 1 should have shape \[\d+\], found"),
        (put("kept.lengths", with_value(1000)), "lengths of layer 1 do not add up"),
        (put("kept.lengths", lambda t: t - torch.tensor([[20, -20]], dtype=torch.int32)), "do not add up"),
        (put("kept.lengths", lambda t: torch.cat([t, 0 * t], 1)), "features over all KV heads, found 4 heads"),
        (put("kept.values", lambda t: t[:, :8]), "should have 32 features over all KV heads, found 2 heads of 8"),
        (put("kept.values", lambda t: t[:8]), "other numbers of keys than of values"),
        (put("tail.keys", lambda t: t[:, :, 1:]), r"tail.keys of layer 1 should have shape \[1, any, "),
        (put("tail.keys", lambda t: t.repeat(2, 1, 1, 1)), "tail.keys of layer 1 should have shape"),
        (put("parked.0.values", lambda t: t[:, :, :3]), "other numbers of keys than of values"),
        (put("queries", lambda t: t[:, :3]), "queries of 3 heads for 2 KV heads"),
        (put("more", torch.zeros(2)), "1 unexpected tensors"),
        (drop("tail.keys"), "tail.keys of layer 1 is missing"),
        (drop("kept.positions"), "kept.positions of layer 1 is missing"),
        (drop("parked.0.keys"), "parked.0.keys of layer 1 is missing"),
        (drop("queries"), "queries of layer 1 is missing"),
    ],
)
def test_tensors_that_no_cache_holds_are_refused(change, said, tmp_path):
    model = saved(tmp_path)
    if "more" in said or "unexpected" in said:
        edit_tensors(tmp_path, lambda tensors: tensors.update({"layers.1.more": torch.zeros(2)}))
    else:
        edit_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=f"is damaged: .*{said}"):
        LookaheadCache.from_pretrained(tmp_path, model)


def layers_with(**changes):
    def change(note):
        note["layers"][1] |= changes

    return change


def with_field(path, value):
    def change(note):
        *way, last = path.split(".")
        for step in way:
            note = note[step]
        note[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_field("format", 99), "has format 99, and this version reads up to 1: upgrade"),
        (with_field("format", "1"), "format should hold something else"),
        (with_field("batch", 2), "should have shape"),
        (with_field("batch", 0), "batch should hold"),
        (with_field("batch", True), "batch should hold"),
        (with_field("tokens_seen", 43), "should have shape"),
        (with_field("tokens_seen", 10**12), "tokens_seen should hold"),
        (with_field("layers", []), "kinds"),
        (with_field("layers", {}), "layers should hold"),
        (with_field("tensors.file", "../other.safetensors"), "tensors should hold"),
        (with_field("tensors.file", "other.safetensors"), "other.safetensors, which .* names, is missing"),
        (with_field("options", {}), "options should hold"),
        (with_field("options.budget", "8"), "budget must be"),
        (with_field("options.allocation", "all"), "unknown allocation"),
        (with_field("options.max_new_tokens", 10**12), "room for 1000000000000 tokens"),
        (with_field("options.park", "disk"), "park must be"),
        (with_field("scorer", 3), "scorer should hold"),
        (with_field("scorer.parameters", {"window": 3}), "other parameters of the scorer snapkv"),
        (with_field("scorer.parameters.window", "3"), "'3' as window of the scorer snapkv"),
        (with_field("scorer.parameters.window", 0), "window must be at least 1"),
        (with_field("scorer.parameters.pooling", 3), "3 as pooling of the scorer snapkv"),
        (with_field("model.weights", {}), "tensors have other names"),
        (with_field("model.weights", 4), "model should hold"),
        (with_field("model.dtype", "int8"), "model should hold"),
        (layers_with(kind="window"), "kinds"),
        (layers_with(source_length=39), "different lengths|should have shape|positions of layer 1"),
        (layers_with(source_length=None), "lengths|shape"),
        (layers_with(source_length=10**6), "kept entries of 1000000 of"),
        (layers_with(parked_pieces=0), "unexpected tensors"),
        (layers_with(parked_pieces=9), "parked.* is missing"),
        (layers_with(parked_pieces=-1), "-1 parked pieces"),
        (layers_with(queries=None), "unexpected tensors"),
        (layers_with(queries={"scaling": "a"}), "queries without a scaling"),
        (layers_with(queries={"scaling": 1.0, "softcap": "a"}), "softcap of 'a'"),
    ],
)
def test_notes_that_no_cache_has_are_refused(change, said, tmp_path):
    model = saved(tmp_path)
    note = json.loads((tmp_path / NOTE).read_text())
    change(note)
    (tmp_path / NOTE).write_text(json.dumps(note))
    with pytest.raises((ValueError, TypeError), match=said):
        LookaheadCache.from_pretrained(tmp_path, model)


def test_damaged_and_missing_files_are_named(tmp_path):
    model = saved(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], b"", whole[:-3] + b"abc"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"is damaged: {path.name} is truncated, or is not the file"):
            LookaheadCache.from_pretrained(tmp_path, model)
    path.write_bytes(b"abc" * 100)
    edit(tmp_path, tensors={"file": path.name, "sha256": _digest_of_file(path)})
    with pytest.raises(ValueError, match="is not safetensors"):
        LookaheadCache.from_pretrained(tmp_path, model)
    path.unlink()
    with pytest.raises(ValueError, match="is missing"):
        LookaheadCache.from_pretrained(tmp_path, model)
    (tmp_path / NOTE).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        LookaheadCache.from_pretrained(tmp_path, model)
    (tmp_path / NOTE).unlink()
    with pytest.raises(FileNotFoundError, match="holds no saved cache"):
        LookaheadCache.from_pretrained(tmp_path, model)


def test_a_saved_cache_is_replaced_and_nothing_else_is_left(tmp_path):
    model = saved(tmp_path)
    first = {path.name for path in tmp_path.iterdir()}
    assert len(first) == 2
    (tmp_path / ".partial-of-a-killed-process").write_text("half")
    (tmp_path / "notes.txt").write_text("mine")
    cache = LookaheadCache(budget=8)
    answered, _ = turn(model, cache, prompt_ids(1, 30, seed=4))
    cache.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - first == {
        "notes.txt", json.loads((tmp_path / NOTE).read_text())["tensors"]["file"],
    }  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 3
    assert_same(model, LookaheadCache.from_pretrained(tmp_path, model), cache, followed(answered))


def test_the_file_holds_no_path_and_no_text(tmp_path):
    directory = tmp_path / "base"
    tiny_model().save_pretrained(directory)
    model = add_lookahead(AutoModelForCausalLM.from_pretrained(directory))
    cache = LookaheadCache(budget=8)
    with torch.no_grad():
        model(prompt_ids(1, 40), past_key_values=cache)
    cache.save_pretrained(tmp_path / "cache")
    text = (tmp_path / "cache" / NOTE).read_text()
    assert str(tmp_path) not in text and json.loads(text)["model"]["name"] == "base"
