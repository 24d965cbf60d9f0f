"""On two GPUs, what this folder's other files test on CPUs; and models of which a layer is as large as Llama 8B's.

pytest tests/distributed tests/compat -m gpu -n 0 --junit-xml gpus.xml
"""

import gc
import time

import numpy as np
import pytest
import torch
from accelerate import PartialState, dispatch_model
from models import add_adapter, add_lookahead, kept_entries, prompt_ids, save_adapter, tiny_model
from test_command_line import assert_same_results, contents, evaluation, printed_by, targets
from test_inference import CACHES, NEW_TOKENS, assert_heads_compete, tensor_parallel
from test_quantization import (
    assert_equal_states,
    assert_moments_of_all_tokens,
    assert_nearly_equal_walks,
    reduced_moments,
    walk,
)
from test_refinement import assert_gradients_are_those_of_all
from test_training import assert_same_run, train
from transformers import AutoModelForCausalLM, LlamaConfig
from workers import Group, command_line, use_fsdp

from lkq_hf import LookaheadCache, LookaheadKVConfig
from lkq_hf.quantization import TwoStageGPTQConfig
from lkq_hf.quantization.calibrate import find_layers
from lkq_hf.quantization.walk import quantize_blocks

DEVICE = "cuda"
CARDS = ("cuda:0", "cuda:1")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072, "eos_token_id": None,
}  # fmt: skip
BUDGET = 512
# Float32 sums in another order; a plain step of a size of 0.1 (see test_training.py).
LOSSES, WEIGHTS = 1e-4, 1e-5


def group(processes):
    return Group(processes, gpus=DEVICE == "cuda", seconds=200)


@pytest.fixture(scope="module")
def groups():
    """One process, two, and two under FSDP2, which are started together."""
    with group(1) as one, group(2) as two, group(2) as sharded:
        yield {"one": one, "two": two, "sharded": sharded}


@pytest.fixture(scope="module")
def alone(groups, tmp_path_factory):
    """A training run of one process, and its directory."""
    directory = tmp_path_factory.mktemp("alone")
    return directory, groups["one"](training, directory, {"save_strategy": "steps", "save_steps": 4})[0]


def training(directory, changes=None, resume=None, sharded=False):
    if sharded:
        use_fsdp(gpus=True)
    changes = {"use_cpu": DEVICE == "cpu", **(changes or {})}
    return train(directory, changes, "llama", resume, None, 1 if resume is None else 9)


def test_nccl_is_what_the_processes_speak(groups):
    expected = "nccl" if DEVICE == "cuda" else "gloo"
    assert groups["two"](backend_and_device) == [(expected, place) for place in CARDS]


def backend_and_device():
    state = PartialState(cpu=DEVICE == "cpu")
    return torch.distributed.get_backend(), str(state.device)


def test_ddp_takes_the_steps_of_one_process(alone, groups, tmp_path, record_property):
    runs = groups["two"](training, tmp_path, {"per_device_train_batch_size": 4})
    record_property("largest difference", differences(runs[0], alone[1]))
    for run in runs:
        assert_same_run(run, alone[1], WEIGHTS, LOSSES)
        assert all(np.array_equal(value, runs[0][1][name]) for name, value in run[1].items())


def test_fsdp2_takes_them_too(alone, groups, tmp_path, record_property):
    """And its checkpoints are resumed by one process, as one process's are by it."""
    runs = groups["sharded"](training, tmp_path, {"save_strategy": "steps", "save_steps": 4}, None, True)
    record_property("largest difference", differences(runs[0], alone[1]))
    for run in runs:
        assert run[3] == {name: "lookahead_kv_" not in name for name in run[3]}
        assert_same_run(run, alone[1], WEIGHTS, LOSSES)
    (resumed,) = groups["one"](training, tmp_path / "one", None, str(tmp_path / "checkpoint-4"))
    assert_same_run(resumed, alone[1], WEIGHTS, LOSSES)
    resumed = groups["sharded"](training, tmp_path / "two", None, str(alone[0] / "checkpoint-4"), True)[0]
    assert_same_run(resumed, alone[1], WEIGHTS, LOSSES)


def test_one_process_resumes_the_run_of_two(alone, groups, tmp_path):
    groups["two"](training, tmp_path, {"save_strategy": "steps", "save_steps": 4})
    (resumed,) = groups["one"](training, tmp_path / "one", None, str(tmp_path / "checkpoint-4"))
    assert_same_run(resumed, alone[1], WEIGHTS, LOSSES)
    resumed = groups["two"](training, tmp_path / "two", None, str(alone[0] / "checkpoint-4"))[0]
    assert_same_run(resumed, alone[1], WEIGHTS, LOSSES)


@pytest.mark.parametrize("name", ["two", "sharded"])
def test_processes_share_the_steps_of_the_eviction_objective(groups, tmp_path, name):
    changes = {"eviction_weight": 1.0, "eviction_budgets": [4, 12]}
    (expected,) = groups["one"](training, tmp_path, changes)
    changes["per_device_train_batch_size"] = 4
    for run in groups[name](training, tmp_path, changes, None, name == "sharded"):
        assert_same_run(run, expected, WEIGHTS, LOSSES)


def differences(found, expected):
    """The largest of losses (relative) and of weights (absolute)."""
    losses = max(abs(found[0][step] / loss - 1) for step, loss in expected[0].items())
    weights = max(float(np.abs(found[1][name] - value).max()) for name, value in expected[1].items())
    return f"losses {losses:.1e}, weights {weights:.1e}"


def test_targets_are_the_same_files(files, groups, tmp_path):
    for name in ("one", "two"):
        printed_by(groups[name](command_line, *targets(files, tmp_path / name, DEVICE)))
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and len(contents(tmp_path / "two")) == 6


@pytest.mark.parametrize("command", ["perplexity", "eviction"])
def test_evaluations_are_the_same(files, groups, tmp_path, command):
    for name in ("one", "two"):
        printed_by(groups[name](command_line, *evaluation(files, tmp_path / name, command, DEVICE)))
    assert_same_results(tmp_path / "one", tmp_path / "two", 2)


def test_moments_are_summed_over_gpus(groups):
    assert_moments_of_all_tokens(groups["two"](reduced_moments, DEVICE), DEVICE)


def walk_of(architecture):
    return walk(architecture, device=DEVICE, bits=4)


def test_refinement_takes_the_steps_of_one_gpu(groups):
    assert_gradients_are_those_of_all(groups, DEVICE)


@pytest.mark.parametrize("architecture", ["llama", "routed", "mixtral"])
def test_two_gpus_make_the_checkpoint_of_one(groups, architecture):
    (alone,) = groups["one"](walk_of, architecture)
    runs = groups["two"](walk_of, architecture)
    for run in runs:
        assert_equal_states(run[0], runs[0][0])
        assert_nearly_equal_walks(run, alone)


@pytest.mark.parametrize(
    ("architecture", "scorer"), [("llama", "lookahead"), ("llama", "snapkv"), ("qwen3", "lookahead")]
)
def test_tensor_parallel_gpus_keep_the_entries_of_one(groups, tmp_path, architecture, scorer):
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / "base")
    save_adapter(add_lookahead(model), tmp_path / "adapter")
    ((sequences, logits, kept, _),) = groups["one"](tensor_parallel, tmp_path, scorer, 1, DEVICE)
    runs = groups["two"](tensor_parallel, tmp_path, scorer, 2, DEVICE)
    for run in runs:
        assert np.array_equal(run[0], sequences)
        np.testing.assert_allclose(run[1], logits, rtol=1e-3, atol=1e-3)
    for layer, entries in kept.items():
        assert np.array_equal(np.concatenate([run[2][layer] for run in runs], axis=1), entries)


@pytest.mark.parametrize("options", CACHES, ids=str)
def test_heads_of_two_gpus_compete_as_those_of_one(groups, tmp_path, options):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    save_adapter(add_lookahead(model), tmp_path / "adapter")
    assert_heads_compete(groups, tmp_path, options, DEVICE)


def large_llama(layers, **changes):
    """Of Llama 3.1 8B's sizes, on the first GPU, in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA_8B | changes, num_hidden_layers=layers)
    with torch.device(CARDS[0]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def spread(model):
    """A model's layers on two GPUs, as from_pretrained(device_map=...) does it."""
    first, second = CARDS
    places = {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": second, "lm_head": second}
    layers = len(model.model.layers)
    places |= {f"model.layers.{index}": CARDS[2 * index // layers] for index in range(layers)}
    return dispatch_model(model, places, skip_keys=model._skip_keys_device_placement)


def collect():
    gc.collect()
    torch.cuda.empty_cache()


def add_and_save_adapter(model, directory):
    """Of a model, which keeps it, with a LoRA that changes something."""
    add_adapter(model, LookaheadKVConfig())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    changed = [value for name, value in model.named_parameters() if "lookahead_kv_B" in name]
    for index, value in enumerate(changed):
        value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(index)) * 0.01)
    save_adapter(model, directory)


def large_answer(model, length):
    """Tokens, logits, entries kept and seconds of a generation."""
    ids = prompt_ids(1, length, vocabulary=2000).to(model.device)
    for _ in range(2):  # The first time compiles.
        cache, start = LookaheadCache(budget=BUDGET), time.perf_counter()
        output = model.generate(
            ids, past_key_values=cache, do_sample=False, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
        tokens = output.sequences.cpu().numpy()
        seconds = time.perf_counter() - start
    kept = {index: entries.cpu().numpy() for index, entries in kept_entries(cache).items()}
    places = {layer.keys.device for layer in cache.layers}
    return tokens, torch.stack(output.logits).float().cpu().numpy(), kept, seconds, places


def test_8b_lies_on_two_gpus(tmp_path, record_property, length=8192, layers=32, **changes):
    model = large_llama(layers, **changes)
    add_and_save_adapter(model, tmp_path)
    expected = large_answer(model, length)
    del model
    collect()
    model = spread(large_llama(layers, **changes))
    model.load_adapter(str(tmp_path))
    found = large_answer(model, length)
    record_property("seconds on one GPU and on two", f"{expected[3]:.3f}, {found[3]:.3f}")
    assert {str(place) for place in found[4]} == set(CARDS)
    assert np.array_equal(found[0], expected[0])
    assert found[2] and all(np.array_equal(found[2][layer], entries) for layer, entries in expected[2].items())


def large_in_parallel(directory, length, plan):
    where = {"tp_plan": "auto"} if plan else {"device_map": DEVICE}
    model = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32, **where)
    model.load_adapter(str(directory / "adapter"))
    answer = large_answer(model, length)
    return *answer[:4], [layer.keys.shape[1] for layer in answer_cache_layers(model)]


def answer_cache_layers(model):
    cache = LookaheadCache(budget=BUDGET)
    model(input_ids=prompt_ids(1, BUDGET + 8, vocabulary=2000).to(model.device), past_key_values=cache)
    return cache.layers


def test_layers_of_8b_under_tensor_parallelism(groups, tmp_path, record_property, length=4096, layers=8, **changes):
    model = large_llama(layers, **changes)
    model.save_pretrained(tmp_path / "base")
    add_and_save_adapter(model, tmp_path / "adapter")
    del model
    collect()
    (alone,) = groups["one"](large_in_parallel, tmp_path, length, False)
    runs = groups["two"](large_in_parallel, tmp_path, length, True)
    record_property("seconds on one GPU and on two", f"{alone[3]:.3f}, {runs[0][3]:.3f}")
    same = []
    for layer, entries in alone[2].items():
        found = np.concatenate([run[2][layer] for run in runs], axis=1)
        same += [(one & two).sum() / one.sum() for one, two in zip(entries[0], found[0], strict=True)]
    record_property("share of entries that are the same", f"mean {np.mean(same):.5f}, least {min(same):.5f}")
    # Sums over the GPUs come in another order, so the last entries of a budget may change places.
    assert np.mean(same) > 0.998 and min(same) > 0.98
    for run in runs:
        assert np.array_equal(run[0], alone[0])
        np.testing.assert_allclose(run[1], alone[1], rtol=1e-2, atol=1e-2 * np.abs(alone[1]).max())
        assert [2 * heads for heads in run[4]] == alone[4]


def packed_layers_on_two_gpus():
    """Logits of a quantized model on one GPU and spread over two, and where its last layer is."""
    model = tiny_model(hidden_size=256, intermediate_size=512, head_dim=64)
    config = TwoStageGPTQConfig(bits=4, group_size=32)
    name, layers = find_layers(model, config)
    quantize_blocks(model, name, layers, prompt_ids(4, 32), config.solver_settings(), device=CARDS[0])
    model.to(CARDS[0])
    ids = prompt_ids(2, 40).to(CARDS[0])
    with torch.no_grad():
        expected = model(ids).logits
        found = spread(model)(ids).logits
    last = model.model.layers[-1].mlp.down_proj.qweight.device
    return expected.cpu().numpy(), found.cpu().numpy(), str(last)


def test_packed_layers_on_two_gpus(groups):
    """Kernels run where a layer is, whichever GPU is the current one."""
    # In a process of its own: a kernel on the wrong GPU may end all that its process can do with GPUs.
    ((expected, found, last),) = groups["one"](packed_layers_on_two_gpus)
    assert last == CARDS[1]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
