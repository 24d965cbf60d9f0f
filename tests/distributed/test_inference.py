"""LookaheadCache in a model that several devices or processes hold together."""

import numpy as np
import pytest
import torch
from models import add_adapter, add_lookahead, kept_entries, left_padded, prompt_ids, save_adapter, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from workers import Group, launch

from lkq_hf import LookaheadCache, LookaheadKVConfig, prepare_model_for_eviction
from lkq_hf.cache.tensor_parallel import is_divided
from lkq_hf.evaluation.profile import set_profile
from lkq_hf.hub import load_adapter

NEW_TOKENS = 6


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with a model of an architecture and its adapter."""

    def save(architecture, **sizes):
        directory = tmp_path_factory.mktemp(architecture)
        model = tiny_model(architecture, **sizes)
        model.save_pretrained(directory / "base")
        save_adapter(add_lookahead(model), directory / "adapter")
        return directory

    return save


def prompts():
    return left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 31, seed=1)[0]])


def answer(model, scorer, **options):
    """Generated tokens, logits of the last step, and the entries kept per layer and KV head."""
    place = "cpu" if model.device.type == "meta" else model.device  # of a model whose first layer is offloaded
    ids, mask = (tensor.to(place) for tensor in prompts())
    cache = LookaheadCache(**{"budget": 8, "scorer": scorer} | options)
    output = model.generate(
        ids, attention_mask=mask, past_key_values=cache, do_sample=False,
        max_new_tokens=NEW_TOKENS, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    shapes = {index: layer.keys.shape for index, layer in enumerate(cache.layers)}
    logits = torch.stack(output.logits).float().cpu().numpy()
    kept = {index: entries.cpu().numpy() for index, entries in kept_entries(cache).items()}
    return output.sequences.cpu().numpy(), logits, kept, shapes


def tensor_parallel(directory, scorer, processes, device="cpu", **changes):
    torch.set_num_threads(1)
    plan = {"tp_plan": "auto"} if processes > 1 else {"device_map": device}
    model = AutoModelForCausalLM.from_pretrained(directory / "base", attn_implementation="eager", **plan, **changes)
    if scorer == "lookahead":
        model.load_adapter(str(directory / "adapter"))
    else:
        prepare_model_for_eviction(model)
    assert is_divided(model) == (processes > 1)
    return answer(model, scorer)


def _replica(directory):
    model = AutoModelForCausalLM.from_pretrained(directory / "base")
    divided = [is_divided(model)]
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return [*divided, is_divided(model)]


def loaded_by_us(directory):
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(directory / "base", attn_implementation="eager", tp_plan="auto")
    load_adapter(model, directory / "adapter")
    return answer(model, "lookahead")


def _trained_in_parallel(directory):
    model = AutoModelForCausalLM.from_pretrained(directory / "base", attn_implementation="eager", tp_plan="auto")
    add_adapter(model, LookaheadKVConfig(num_lookahead_tokens=4, r=2))
    model(input_ids=prompt_ids(1, 20), past_key_values=LookaheadCache(budget=8))


@pytest.mark.parametrize(
    ("architecture", "scorer"),
    [
        ("llama", "snapkv"),
        ("llama", "lookahead"),
        ("qwen3", "lookahead"),
        ("gemma3", "lookahead"),
        ("phi3", "lookahead"),
    ],
)
def test_tensor_parallel_processes_keep_the_entries_of_one(saved, architecture, scorer):
    directory = saved(architecture)
    ((sequences, logits, kept, shapes),) = launch(tensor_parallel, directory, scorer, 1, processes=1)
    runs = launch(tensor_parallel, directory, scorer, 2)
    for run in runs:
        assert np.array_equal(run[0], sequences)
        np.testing.assert_allclose(run[1], logits, rtol=1e-3, atol=1e-3)
    assert kept
    if runs[0][3] == shapes:
        # Nothing but memory is saved where the model's own plan does not divide the heads (fused projections).
        assert architecture == "phi3"
        assert all(np.array_equal(run[2][layer], kept[layer]) for run in runs for layer in kept)
    else:
        for layer, entries in kept.items():
            assert np.array_equal(np.concatenate([run[2][layer] for run in runs], axis=1), entries)
            assert runs[0][3][layer][1] * 2 == shapes[layer][1]


def test_replicas_are_not_divided_and_shards_are(saved):
    assert launch(_replica, saved("llama")) == [[False, True]] * 2


def test_an_adapter_that_we_load_is_the_one_that_transformers_loads(saved):
    directory = saved("llama")
    for ours, theirs in zip(
        launch(loaded_by_us, directory), launch(tensor_parallel, directory, "lookahead", 2), strict=True
    ):
        assert np.array_equal(ours[0], theirs[0]) and np.array_equal(ours[1], theirs[1])
        assert all(np.array_equal(ours[2][layer], entries) for layer, entries in theirs[2].items())


def test_heads_are_selected_by_each_process_alone(saved):
    """Four processes, one KV head each; an odd number of features is cut unevenly."""
    directory = saved("llama", num_key_value_heads=4, intermediate_size=90)
    ((sequences, _, kept, _),) = launch(tensor_parallel, directory, "lookahead", 1, processes=1)
    runs = launch(tensor_parallel, directory, "lookahead", 4, processes=4)
    for layer, entries in kept.items():
        assert np.array_equal(np.concatenate([run[2][layer] for run in runs], axis=1), entries)
    assert all(np.array_equal(run[0], sequences) for run in runs)


TWO_GPUS = {
    "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1, "model.norm": 1,
    "model.rotary_emb": 0, "lm_head": 1,
}  # fmt: skip
PROFILE = {"8": [[1.5, 0.5], [0.25, 2.0], [0.75, 1.0]]}


def conversation(directory, options, **places):
    """Tokens of two turns, and the entries kept after each, of a model loaded to these places."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(directory / "base", attn_implementation="sdpa", **places)
    model.load_adapter(str(directory / "adapter"))
    set_profile(model, PROFILE)
    ids, mask = (tensor.to(model.device) for tensor in prompts())
    cache = LookaheadCache(**{"budget": 8} | options)
    kept, lengths = [], []
    for turn in range(2):
        ids = model.generate(
            ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=NEW_TOKENS,
            disable_compile=True,
        )  # fmt: skip
        kept.append({index: entries.cpu().numpy() for index, entries in kept_entries(cache).items()})
        lengths.append({index: cache.layers[index].prefix.lengths.cpu().numpy() for index in cache.evicted_layers()})
        ids = torch.cat([ids, prompt_ids(2, 5 + turn, seed=7 + turn).to(ids.device)], dim=1)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    return ids.cpu().numpy(), kept, lengths


def conversation_in_parallel(directory, options):
    return conversation(directory, options, tp_plan="auto")


def conversation_on_one(directory, options, device="cpu"):
    return conversation(directory, options, device_map=device)


CACHES = [
    {}, {"allocation": "layer"}, {"allocation": "uniform"}, {"allocation": "profile"}, {"max_new_tokens": 20},
    {"refresh_every": 2}, {"park": "cpu"}, {"park": "cpu", "allocation": "profile"},
]  # fmt: skip


@pytest.fixture(scope="module")
def groups():
    with Group(1) as one, Group(2) as two:
        yield {"one": one, "two": two}


@pytest.mark.parametrize("options", CACHES, ids=str)
def test_heads_of_all_processes_compete_as_those_of_one(saved, groups, options):
    assert_heads_compete(groups, saved("llama"), options)


def assert_heads_compete(groups, directory, options, device="cpu"):
    """Over two turns, those of two processes as those of one."""
    ((ids, kept, lengths),) = groups["one"](conversation_on_one, directory, options, device)
    runs = groups["two"](conversation_in_parallel, directory, options)
    for run in runs:
        assert np.array_equal(run[0], ids)
    for turn in range(2):
        for layer, entries in kept[turn].items():
            assert np.array_equal(np.concatenate([run[1][turn][layer] for run in runs], axis=1), entries)
            assert runs[0][2][turn][layer].shape == (2, 1)
    if options.get("allocation") == "profile":
        assert [lengths[1][layer].tolist() for layer in range(3)] == [[[12, 4]] * 2, [[2, 16]] * 2, [[6, 8]] * 2]
    elif options.get("allocation") != "uniform":
        # One process keeps more than the other: it is not each one's own competition.
        assert any(run[2][0][layer].sum() != 16 for run in runs for layer in range(3))


def _save_a_part(directory, out):
    model = AutoModelForCausalLM.from_pretrained(directory / "base", attn_implementation="sdpa", tp_plan="auto")
    model.load_adapter(str(directory / "adapter"))
    cache = LookaheadCache(budget=8)
    with torch.no_grad():
        model(prompt_ids(1, 40), past_key_values=cache)
    cache.save_pretrained(out)


def test_a_part_of_a_cache_is_not_saved(saved, tmp_path):
    with pytest.raises(RuntimeError, match=r"every process holds a part of the cache, which is neither saved nor"):
        launch(_save_a_part, saved("llama"), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_training_under_tensor_parallelism_is_refused(saved):
    with pytest.raises(RuntimeError, match="cannot be trained under tensor parallelism"):
        launch(_trained_in_parallel, saved("llama"))


def offloaded(directory, folder, elsewhere):
    parts = [
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in range(3)),
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    ]
    device_map = {part: "disk" if part in elsewhere else "cpu" for part in parts}
    return AutoModelForCausalLM.from_pretrained(
        directory / "base", attn_implementation="eager", device_map=device_map, offload_folder=folder
    )


@pytest.mark.parametrize(
    "elsewhere", [["model.layers.1"], ["model.embed_tokens", "model.layers.0", "model.norm"]], ids=["middle", "ends"]
)
@pytest.mark.parametrize("park", [None, "cpu"])
def test_layers_that_are_offloaded(saved, tmp_path, elsewhere, park):
    """accelerate brings them in from disk for each of their forwards; their part of the cache stays."""
    directory = saved("llama")
    expected = tensor_parallel(directory, "snapkv", 1)
    model = offloaded(directory, tmp_path, elsewhere)
    assert any(parameter.is_meta for parameter in model.parameters())
    prepare_model_for_eviction(model)
    found = answer(model, "snapkv", park=park)
    assert np.array_equal(found[0], expected[0])
    for layer, entries in expected[2].items():
        assert np.array_equal(found[2][layer], entries)


def test_an_adapter_on_an_offloaded_model_is_refused(saved, tmp_path):
    directory = saved("llama")
    model = offloaded(directory, tmp_path, ["model.layers.1"])
    with pytest.raises(NotImplementedError, match=r"layers.1.* is offloaded .* tp_plan"):
        model.load_adapter(str(directory / "adapter"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("options", [*CACHES, {"park": "cpu", "max_new_tokens": 20}], ids=str)
def test_conversations_over_layers_on_two_gpus(saved, options):
    directory = saved("llama")
    ids, kept, lengths = conversation(directory, options, device_map={"": 0})
    found, entries, found_lengths = conversation(directory, options, device_map=TWO_GPUS)
    assert np.array_equal(found, ids)
    for turn in range(2):
        for layer in range(3):
            assert np.array_equal(entries[turn][layer], kept[turn][layer])
            assert np.array_equal(found_lengths[turn][layer], lengths[turn][layer])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("max_new_tokens", [None, NEW_TOKENS])
@pytest.mark.parametrize("scorer", ["lookahead", "snapkv"])
def test_layers_on_two_gpus(saved, scorer, max_new_tokens):
    directory = saved("llama")
    device_map = TWO_GPUS
    kept, sequences = [], []
    for places in ({"": 0}, device_map):
        model = AutoModelForCausalLM.from_pretrained(directory / "base", attn_implementation="sdpa", device_map=places)
        if scorer == "lookahead":
            model.load_adapter(str(directory / "adapter"))
        else:
            prepare_model_for_eviction(model)
        ids, mask = (tensor.to("cuda:0") for tensor in prompts())
        cache = LookaheadCache(budget=8, scorer=scorer, max_new_tokens=max_new_tokens)
        sequences.append(
            model.generate(ids, attention_mask=mask, past_key_values=cache, do_sample=False, max_new_tokens=NEW_TOKENS)
        )
        kept.append({layer: entries.cpu() for layer, entries in kept_entries(cache).items()})
        assert {layer.keys.device.index for layer in cache.layers} == set(places.values()) - {None}
    assert torch.equal(*sequences)
    assert all(torch.equal(entries, kept[0][layer]) for layer, entries in kept[1].items())
