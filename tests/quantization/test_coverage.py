"""What share of a model's weights is quantized, and how that is said."""

import logging

import pytest
import torch
from models import tiny_model

from lkq_hf.quantization import TwoStageGPTQConfig
from lkq_hf.quantization.block_solver import BlockSolver
from lkq_hf.quantization.calibrate import calibrate
from lkq_hf.quantization.coverage import Coverage, coverage
from lkq_hf.quantization.install import replace_by_packed

ROWS = [{"input_ids": row} for row in torch.randint(3, 120, (4, 50)).tolist()]


def config(**changes):
    return TwoStageGPTQConfig(bits=4, group_size=32, dataset=ROWS, num_samples=4, model_seqlen=16, **changes)


def covered(model, **changes):
    replace_by_packed(model, config(**changes))
    return coverage(model)


def test_shares_are_counted_in_weights():
    # Of 64 features: query and output 64 x 64 each, key and value 64 x 32, and three matrices of 64 x 96, in 3 layers.
    layer = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96
    assert covered(tiny_model()) == Coverage(3 * layer, {})
    found = covered(tiny_model(), modules_to_not_convert=["mlp.up_proj", "1.self_attn.k_proj"])
    left = {"model.layers.*.mlp.up_proj": 3 * 64 * 96, "model.layers.*.self_attn.k_proj": 64 * 32}
    assert found == Coverage(3 * layer - sum(left.values()), left)
    assert found.share == pytest.approx(1 - sum(left.values()) / (3 * layer))
    assert list(found.dense) == list(left), "the largest first"


def test_experts_and_transposed_layers_are_counted():
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1}
    model = tiny_model("mixtral", **experts)
    attention, each, router = 2 * 64 * 64 + 2 * 64 * 32, 3 * 64 * 96, 4 * 64
    assert covered(model) == Coverage(attention + 4 * each, {"model.layers.*.mlp.gate": router})
    whole = covered(tiny_model("mixtral", **experts), modules_to_not_convert=["mlp.experts"])
    assert whole.quantized == attention and sum(whole.dense.values()) == 4 * each + router
    assert covered(tiny_model("gpt2", num_hidden_layers=1)).dense == {}


def test_a_message_names_the_largest():
    many = {f"part{index}": 10 - index for index in range(7)}
    assert str(Coverage(52, many)) == (
        "51.5 % of the linear weights are quantized; in full precision stay part0, part1, part2, part3, part4 and 2 "
        "more"
    )
    assert str(Coverage(3, {})) == "100.0 % of the linear weights are quantized"
    assert Coverage(0, {}).share == 0


@pytest.mark.parametrize(("exclude", "level"), [(["mlp"], logging.WARNING), (["self_attn.k_proj"], logging.INFO)])
def test_a_small_share_is_warned_of_before_the_work(exclude, level, monkeypatch, caplog):
    def solve(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(BlockSolver, "solve", solve)
    model = tiny_model()
    model.name_or_path = model.config.name_or_path = ""
    with caplog.at_level(logging.INFO, logger="lkq_hf"), pytest.raises(KeyboardInterrupt):
        calibrate(model, config(modules_to_not_convert=exclude))
    (record,) = [record for record in caplog.records if "of the linear weights" in record.getMessage()]
    assert record.levelno == level and exclude[0] in record.getMessage()
