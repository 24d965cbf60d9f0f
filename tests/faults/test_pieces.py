"""Pieces of a stopped run that are damaged, or belong to another run, are not gone on with."""

import shutil

import pytest
import torch
from models import prompt_ids, tiny_model
from safetensors.torch import load_file

from lkq_hf import LookaheadTrainer, LookaheadTrainingArguments, TwoStageQuantizer
from lkq_hf.training import generate_targets
from lkq_hf.training.checkpoints import last_complete_checkpoint, save_adapter


def prompts(seed=0):
    return [{"input_ids": prompt_ids(1, 6, seed=seed + index)[0].tolist()} for index in range(4)]


def respond(directory, seed=0):
    return generate_targets(tiny_model(), prompts(seed), directory, max_new_tokens=3, shard_size=2)


def test_responses_to_other_prompts(tmp_path):
    respond(tmp_path)
    with pytest.raises(ValueError, match=r"shard-00000000\.parquet holds responses to other prompts"):
        respond(tmp_path, seed=50)


def test_a_damaged_shard(tmp_path):
    expected = respond(tmp_path).to_list()
    shard = tmp_path / "shard-00000002.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"shard-00000002\.parquet is damaged.*delete it, and the run makes"):
        respond(tmp_path)
    shard.unlink()
    assert respond(tmp_path).to_list() == expected


@pytest.fixture(params=["new", "there"])
def stopped(files, tmp_path, monkeypatch, request):
    """Blocks of a quantization that was stopped when they were done, and a function that starts it again.

    Its directory is new, or there already, as mount points are.
    """
    if request.param == "there":
        (tmp_path / "out").mkdir()

    def quantize():
        quantizer = TwoStageQuantizer.from_pretrained(files / "base")
        quantizer.quantize(
            tmp_path / "out", dataset=str(files / "calibration.jsonl"), num_samples=2, model_seqlen=32, group_size=32,
            device="cpu",
        )  # fmt: skip
        return quantizer.report.resumed_blocks

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lkq_hf.quantization.optimum_quantizer.mark_quantized", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize()
    return tmp_path / ("out.partial" if request.param == "new" else "out/.partial"), quantize


def test_a_damaged_block(stopped, tmp_path):
    partial, quantize = stopped
    block = partial / "block-00001.safetensors"
    block.write_bytes(block.read_bytes()[:-20])
    with pytest.raises(
        ValueError, match=r"block-00001\.safetensors is damaged.*delete it, and the run makes it again"
    ):
        quantize()
    block.unlink()
    assert quantize() == 1 and not partial.exists()
    assert (tmp_path / "out" / "config.json").is_file() and not list((tmp_path / "out").glob(".*"))


def test_blocks_of_nobody_knows_what(stopped):
    partial, quantize = stopped
    (partial / "run.json").unlink()
    with pytest.raises(ValueError, match=r"holds results but no run\.json"):
        quantize()
    shutil.rmtree(partial)
    assert quantize() == 0


def training(directory, max_steps):
    from peft import get_peft_model

    from lkq_hf import LookaheadKVConfig

    torch.manual_seed(0)
    arguments = LookaheadTrainingArguments(
        output_dir=str(directory), use_cpu=True, report_to=[], per_device_train_batch_size=2, max_steps=max_steps,
        save_steps=1, disable_tqdm=True,
    )  # fmt: skip
    rows = [row | {"response_ids": [3, 4]} for row in prompts()]
    model = get_peft_model(tiny_model(), LookaheadKVConfig(num_lookahead_tokens=2, r=2))
    return LookaheadTrainer(model, arguments, train_dataset=rows)


def test_the_last_complete_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        training(tmp_path, 1).train(resume_from_checkpoint=True)
    training(tmp_path, 3).train()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"epoch": 1.0, "glo')
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-other").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    trainer = training(tmp_path, 3)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def test_an_adapter_saved_after_a_kill(tmp_path):
    """What was left of the killed one disappears, and the card that is there stays."""
    model = training(tmp_path / "checkpoints", 1).model
    (tmp_path / "out" / ".saving").mkdir(parents=True)
    (tmp_path / "out" / ".saving" / "adapter_model.safetensors").write_bytes(b"half")
    (tmp_path / "out" / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    save_adapter(model, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert "mine" in (tmp_path / "out" / "README.md").read_text()
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) > 10
