"""The configuration files of examples/accelerate, read by accelerate; test_training.py runs with fsdp2.yaml's."""

import json
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from workers import launch_environment

from lkq_hf import LookaheadKVConfig

FOLDER = Path(__file__).parents[2] / "examples" / "accelerate"
KINDS = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero3": DistributedType.DEEPSPEED,
}


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == KINDS[name]
    assert not config.use_cpu and config.num_processes == 8


def test_every_file_is_tested_and_explained():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)
    readme = (FOLDER / "README.md").read_text()
    assert all(f"{name}.yaml" in readme for name in KINDS)


def test_launch_sets_fsdp2_up():
    environment = launch_environment("fsdp2.yaml")
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    assert "ACCELERATE_USE_FSDP" not in launch_environment("ddp.yaml")


def test_zero3_keeps_the_adapter_whole():
    config = load_config_from_file(str(FOLDER / "deepspeed_zero3.yaml"))
    zero = json.loads((FOLDER.parents[1] / config.deepspeed_config["deepspeed_config_file"]).read_text())
    # The largest weight of a default adapter for Llama-3.1-405B: hidden size 16,384, intermediate size 53,248.
    defaults = LookaheadKVConfig()
    largest = max(defaults.num_lookahead_tokens * 16_384, defaults.r * 53_248)
    assert zero["zero_optimization"]["stage"] == 3
    assert zero["zero_optimization"]["stage3_param_persistence_threshold"] >= largest
