"""What is found out about a model before the work begins."""

import ast
import re

import pytest
import tiny
import torch
from models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from lkq_hf.quantization import TwoStageGPTQConfig, TwoStageQuantizer
from lkq_hf.quantization.block_solver import BlockSolver
from lkq_hf.quantization.blocks import find_layers
from lkq_hf.quantization.calibrate import calibrate
from lkq_hf.quantization.dry_run import check_that_it_loads, first_of_each_kind
from lkq_hf.quantization.walk import quantize_blocks

TOKENS = torch.randint(3, 120, (4, 50), generator=torch.Generator().manual_seed(0))
ROWS = [{"input_ids": row} for row in TOKENS.tolist()]


def nameless(architecture="llama"):
    """A tiny model without a name for which the Hub would be asked."""
    model = tiny_model(architecture)
    model.name_or_path = model.config.name_or_path = ""
    return model


def config(**changes):
    sizes = {"bits": 4, "group_size": 32, "sym": False, "num_samples": 4, "model_seqlen": 16, "dataset": ROWS}
    return TwoStageGPTQConfig(**sizes | changes)


@pytest.fixture
def no_work(monkeypatch):
    """Fails if a block is solved."""

    def solve(*args):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(BlockSolver, "solve", solve)


class ReadsDtype(nn.Module):
    """As the indexers of DeepSeek 3.2 do: it asks a layer's weight for its dtype."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        return self.mlp(x.to(self.mlp.down_proj.weight.dtype))


class ReadsWeight(nn.Module):
    """Computes with a weight itself where there is one, and with something else where there is none."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, x):
        up = self.mlp.up_proj
        scale = 1.0 if up.weight is None else 1.0 + up.weight.abs().mean()
        return self.mlp(x) * scale


@pytest.mark.parametrize(("wrapper", "culprit"), [(ReadsDtype, "mlp.mlp.down_proj"), (ReadsWeight, "mlp.mlp.up_proj")])
def test_layers_that_a_model_reads_itself_are_named_before_the_work(wrapper, culprit, no_work):
    model = nameless()
    # Not in the first block: every kind of block is tried.
    model.model.layers[2].mlp = wrapper(model.model.layers[2].mlp)
    settings = config()
    list_name, layers = find_layers(model, settings)
    with pytest.raises(ValueError, match="does not run with packed layers") as error:
        quantize_blocks(
            model, list_name, layers, torch.tensor(ROWS[0]["input_ids"])[None, :64], settings.solver_settings()
        )
    assert ast.literal_eval(str(error.value).rpartition("modules_to_not_convert: ")[2]) == [culprit]


def test_blocks_of_each_kind_are_told_by_their_modules_and_layers():
    # A dense block, then one with experts.
    model = tiny.tiny_model("deepseek_v3", num_hidden_layers=2, first_k_dense_replace=1)
    list_name, layers = find_layers(model, config(modules_to_not_convert=["kv_a_proj_with_mqa"]))
    assert first_of_each_kind(list_name, list(model.model.layers), layers) == [0, 1]
    model = nameless()
    list_name, layers = find_layers(model, config(modules_to_not_convert=["layers.1.mlp"]))
    assert first_of_each_kind(list_name, list(model.model.layers), layers) == [0, 1]
    assert first_of_each_kind(list_name, list(model.model.layers), {}) == [0]


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt_oss", "gpt2", "gemma3_text"])
def test_what_can_be_loaded_passes(name):
    check_that_it_loads(tiny.tiny_model(name), config())


def test_what_could_not_be_loaded_is_refused_before_the_work(no_work, tmp_path):
    """A layer is added after the model has been made from its configuration, which knows nothing of it."""
    model = nameless()
    model.model.layers[1].mlp.gate_proj = nn.Linear(64, 96, bias=True)
    settings = config()
    with pytest.raises(ValueError, match="could be saved, but not loaded again") as error:
        calibrate(model, settings)
    assert "model.layers.1.mlp.gate_proj.bias" in str(error.value)
    with pytest.raises(ValueError, match="could be saved, but not loaded again"):
        TwoStageQuantizer.from_pretrained(model).quantize(tmp_path / "out", config=settings)
    assert not (tmp_path / "out").exists()


def test_a_model_that_changes_weights_outside_of_its_blocks_is_refused(no_work):
    """RWKV divides some by powers of 2 before its first forward in eval mode."""
    model = tiny.tiny_model("rwkv")
    with pytest.raises(ValueError, match=r"RwkvForCausalLM does not run with packed layers \(AttributeError"):
        calibrate(model, config())


def test_a_model_without_a_limit_of_positions_has_none(no_work):
    """XLNet and others say -1."""
    model = nameless()
    model.config.max_position_embeddings = -1
    with pytest.raises(AssertionError, match="the work has begun"):
        calibrate(model, config())


def test_a_name_that_transformers_takes_for_another_is_refused(monkeypatch):
    """A model whose files have names from which transformers would not get back to those in memory."""
    import lkq_hf.quantization.dry_run as module

    original = module.revert_weight_conversion

    def renamed(model, state):
        return {name.replace("layers.1.", "layers.one."): value for name, value in original(model, state).items()}

    monkeypatch.setattr(module, "revert_weight_conversion", renamed)
    with pytest.raises(ValueError, match=r"transformers would miss model\.layers\.1\..* and not know .*layers\.one\."):
        check_that_it_loads(tiny_model(), config())


def test_a_refused_attempt_leaves_nothing_that_stops_the_next_one(monkeypatch, tmp_path):
    def forward(self, x):
        return original(self, x.to(self.down_proj.weight.dtype))

    original = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    with pytest.raises(ValueError, match="does not run with packed layers") as error:
        TwoStageQuantizer.from_pretrained(nameless()).quantize(tmp_path / "out", config=config())
    names = ast.literal_eval(str(error.value).rpartition("modules_to_not_convert: ")[2])
    assert names == ["mlp.down_proj"]
    settings = config(modules_to_not_convert=names)
    model = TwoStageQuantizer.from_pretrained(nameless()).quantize(tmp_path / "out", config=settings)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert torch.equal(again(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


def test_all_that_does_not_pack_is_listed_at_once():
    model = tiny_model("qwen2_moe", num_experts=4, moe_intermediate_size=48, shared_expert_intermediate_size=32)
    with pytest.raises(ValueError, match="not every layer can be quantized") as error:
        check(model)
    names = ast.literal_eval(re.search(r"modules_to_not_convert=(\[.*\])", str(error.value))[1])
    assert names == ["mlp.experts", "mlp.shared_expert_gate"]
    check(model, modules_to_not_convert=names)


def check(model, **changes):
    find_layers(model, config(**changes))
