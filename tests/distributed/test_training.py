"""One training run, whatever the number of processes."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from models import prompt_ids, tiny_model
from peft import get_peft_model
from safetensors.numpy import load_file
from torch.distributed.tensor import DTensor
from workers import launch, use_fsdp

from lkq_hf import LookaheadKVConfig, LookaheadTrainer, LookaheadTrainingArguments
from lkq_hf.adapter.model import adapter_parameters
from lkq_hf.training.data import SeededLengthGroupedSampler

STEP = 8  # prompts, over all processes


def rows(count):
    return [
        {
            "input_ids": prompt_ids(1, 15 + 7 * i % 31, seed=i)[0].tolist(),
            "response_ids": prompt_ids(1, 2 + i % 5, seed=100 + i)[0].tolist(),
        }
        for i in range(count)
    ]


def train(directory, changes=None, architecture="llama", resume=None, sizes=None, adapter_seed=1):
    """A run's losses, weights, validation metrics and, of each parameter, whether it is sharded."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    model = tiny_model(architecture, **sizes or {})
    torch.manual_seed(adapter_seed + rank)  # the first process's adapter is everyone's
    model = get_peft_model(model, LookaheadKVConfig(num_lookahead_tokens=4, r=2))
    values = {
        "output_dir": str(directory), "use_cpu": True, "report_to": [], "max_steps": 6, "logging_steps": 1,
        "per_device_train_batch_size": STEP // processes, "per_device_eval_batch_size": 4 // processes,
        "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "linear", "warmup_steps": 0,
        "optim": "sgd", "learning_rate": 0.1, "recall_budgets": [5, 30, 999],
    }  # fmt: skip
    arguments = LookaheadTrainingArguments(**values | (changes or {}))
    trainer = LookaheadTrainer(model, arguments, train_dataset=rows(22), eval_dataset=rows(8))
    trainer.train(resume_from_checkpoint=resume)
    sharded = {name: isinstance(value, DTensor) for name, value in trainer.model.named_parameters()}
    trainer.save_model(str(directory))
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    weights = {
        name: value.detach().cpu().numpy() for name, value in adapter_parameters(trainer.model, "default").items()
    }
    metrics = {name: value for name, value in trainer.evaluate().items() if "loss" in name or "recall" in name}
    return losses, weights, metrics, sharded


def train_sharded(*arguments):
    """:func:`train` under FSDP2, on CPUs."""
    use_fsdp()
    return train(*arguments)


def assert_same_run(found, expected, tolerance, relative=1e-5):
    """Losses within ``relative``, the same metrics, and weights within ``tolerance``."""
    losses, weights, metrics = found[:3]
    assert losses == pytest.approx(expected[0], rel=relative)
    assert metrics == pytest.approx(expected[2], rel=1e-4)
    assert weights.keys() == expected[1].keys()
    for name, value in weights.items():
        np.testing.assert_allclose(value, expected[1][name], rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process, which saves a checkpoint in the midst of the second epoch."""
    directory = tmp_path_factory.mktemp("alone")
    (run,) = launch(train, directory, {"save_strategy": "steps", "save_steps": 4}, processes=1)
    return directory, run


def test_the_run_trains_something(alone):
    _, (losses, weights, metrics, _) = alone
    assert losses[6] < 0.95 * losses[1]
    assert any(abs(value).max() > 1e-3 for name, value in weights.items() if "lookahead_kv_B" in name)
    assert set(metrics) == {"eval_loss", "eval_recall@5", "eval_recall@30"}


@pytest.mark.parametrize(("processes", "accumulated"), [(2, 1), (2, 2), (4, 1)])
def test_processes_share_the_steps_of_one(alone, tmp_path, processes, accumulated):
    changes = {
        "per_device_train_batch_size": STEP // processes // accumulated, "gradient_accumulation_steps": accumulated
    }  # fmt: skip
    runs = launch(train, tmp_path, changes, processes=processes)
    for run in runs:
        assert_same_run(run, alone[1], 1e-6)
        # What the processes hold is the same to the last bit.
        assert all(np.array_equal(value, runs[0][1][name]) for name, value in run[1].items())


def test_processes_share_the_steps_of_the_eviction_objective(alone, tmp_path):
    changes = {"eviction_weight": 1.0, "eviction_budgets": [4, 12]}
    (expected,) = launch(train, tmp_path, changes, processes=1)
    assert all(expected[0][step] > loss for step, loss in alone[1][0].items())
    for run in (train, train_sharded):
        assert_same_run(launch(run, tmp_path, changes)[0], expected, 1e-6)


def test_adam_takes_the_same_steps(tmp_path):
    changes = {"optim": "adamw_torch", "learning_rate": 5e-3}
    (expected,) = launch(train, tmp_path, changes, processes=1)
    # Adam divides by the size of a gradient, so rounding counts for more where that is small: a tenth of one step.
    assert_same_run(launch(train, tmp_path, changes)[0], expected, 5e-4)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_is_resumed_by_another_number_of_processes(alone, tmp_path, before, after):
    if before == 1:
        directory = alone[0]
    else:
        directory = tmp_path
        launch(train, directory, {"save_strategy": "steps", "save_steps": 4}, processes=before)
    checkpoint = str(directory / "checkpoint-4")
    run = launch(train, tmp_path / "resumed", None, "llama", checkpoint, None, 9, processes=after)[0]
    assert_same_run(run, alone[1], 1e-6)


def test_layers_behind_the_last_scored_one_do_not_stop_ddp(tmp_path):
    """Their adapter weights are without effect, and DDP waits for a gradient of every weight."""
    sizes = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
    (expected,) = launch(train, tmp_path, None, "gemma3", None, sizes, processes=1)
    assert_same_run(launch(train, tmp_path, None, "gemma3", None, sizes)[0], expected, 1e-6)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_fsdp_shards_the_base_and_replicates_the_adapter(alone, tmp_path, accumulated):
    changes = {
        "per_device_train_batch_size": STEP // 2 // accumulated, "gradient_accumulation_steps": accumulated
    }  # fmt: skip
    for run in launch(train_sharded, tmp_path, changes):
        assert run[3] == {name: "lookahead_kv_" not in name for name in run[3]}
        assert_same_run(run, alone[1], 1e-6)
    saved, expected = (load_file(Path(folder) / "adapter_model.safetensors") for folder in (tmp_path, alone[0]))
    assert saved.keys() == expected.keys()
    for name, value in saved.items():
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=1e-6)


def test_checkpoints_are_the_same_with_and_without_fsdp(alone, tmp_path):
    launch(train_sharded, tmp_path, {"save_strategy": "steps", "save_steps": 4})
    checkpoint = tmp_path / "checkpoint-4"
    assert {path.name for path in checkpoint.iterdir()} >= {"adapter_model.safetensors", "optimizer.pt"}
    assert not any("fsdp" in path.name for path in checkpoint.iterdir())
    for run, processes in ((train_sharded, 2), (train, 1)):
        resumed = launch(run, tmp_path / "resumed", None, "llama", str(checkpoint), None, 9, processes=processes)
        assert_same_run(resumed[0], alone[1], 1e-6)
    resumed = launch(train_sharded, tmp_path / "resumed", None, "llama", str(alone[0] / "checkpoint-4"), None, 9)
    assert_same_run(resumed[0], alone[1], 1e-6)


def test_the_order_of_prompts_depends_on_seed_and_epoch_alone():
    lengths = [3, 50, 4, 49, 5, 48, 6, 47, 7, 46, 8]

    def order(seed, epoch):
        sampler = SeededLengthGroupedSampler(lengths, 4, seed)
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler) == 12
        return list(sampler)

    torch.manual_seed(0)
    first = order(0, 0)
    torch.manual_seed(1)
    assert order(0, 0) == first
    assert order(0, 1) != first and order(1, 0) != first
    assert set(first) == set(range(11)) and first[-1] == first[0]
