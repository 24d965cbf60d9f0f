"""The calibration walk over decoders of different construction."""

import ast
import copy

import pytest
import tiny
import torch
from models import tiny_model
from torch import nn
from transformers import (
    DbrxConfig,
    DbrxForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from lkq_hf.quantization import QuantizedLinear, TwoStageGPTQConfig, block_solver
from lkq_hf.quantization.activations import Activations
from lkq_hf.quantization.blocks import find_blocks, layers_to_quantize
from lkq_hf.quantization.calibrate import find_layers
from lkq_hf.quantization.capture import BlockCall, capture_block_calls, find_sum, observe_order
from lkq_hf.quantization.quantizer import restore_linear
from lkq_hf.quantization.walk import quantize_blocks

COMMON = {"vocab_size": 128, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def gemma3():
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            **COMMON,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            initializer_range=0.2,
        )
    )


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(**COMMON, n_positions=128, n_embd=64, n_layer=2, n_head=2, initializer_range=0.2)
    )


def opt():
    return OPTForCausalLM(
        OPTConfig(
            **COMMON, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=64
        )
    )


def phi3():
    return Phi3ForCausalLM(
        Phi3Config(**COMMON, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
    )


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            **COMMON,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    )


def qwen3():
    return tiny_model("qwen3")


def mistral():
    return tiny_model("mistral")


def built(make):
    torch.manual_seed(0)
    return make().eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(2, 128, (7, 24), generator=torch.Generator().manual_seed(0))


def config(**changes):
    return TwoStageGPTQConfig(**{"bits": 4, "group_size": 32, "sym": False, **changes})


def walk(model, tokens, settings=None, **changes):
    settings = settings or config()
    list_name, layers = find_layers(model, settings)
    changes = {"batch_size": 3, **changes}
    return quantize_blocks(model, list_name, layers, tokens, settings.solver_settings(), **changes)


def packed(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.mark.parametrize("make", [gemma3, gpt2, opt, phi3])
def test_captured_calls_reproduce_the_models_own_hidden_states(make, tokens):
    model = built(make)
    blocks = list(find_blocks(model)[1])
    hidden, calls = capture_block_calls(model, blocks, tokens.split(3))
    expected = []
    hooks = [block.register_forward_hook(lambda _, __, output: expected.append(output)) for block in blocks]
    with torch.no_grad():
        model(input_ids=tokens[:3], use_cache=False)
        for hook in hooks:
            hook.remove()
        state = hidden[0]
        for block, call, output in zip(blocks, calls, expected, strict=True):
            state = call.run(block, state, 0)
            assert torch.equal(state, output[0] if isinstance(output, tuple) else output)
    assert [len(call.arguments) for call in calls] == [3] * len(blocks)


@pytest.mark.parametrize("name", ["openai-gpt", "cpmant", "bamba", "zaya", "glm_moe_dsa"])
def test_what_blocks_return_besides_hidden_states_reaches_the_next_one(name, tokens):
    """Lists, attention weights that nobody takes, a router's states, and an indexer's indices, which the next does."""
    if name not in tiny.CAUSAL_MODELS:
        pytest.skip(f"this transformers has no {name}")
    model = tiny.tiny_model(name)
    blocks = list(find_blocks(model)[1])
    hidden, calls = capture_block_calls(model, blocks, tokens.split(3))
    expected = []
    hooks = [block.register_forward_hook(lambda _, __, output: expected.append(output[0])) for block in blocks]
    with torch.no_grad():
        model(input_ids=tokens[:3], use_cache=False)
        for hook in hooks:
            hook.remove()
        state, extras = hidden[0], ()
        for block, call, output in zip(blocks, calls, expected, strict=True):
            state, extras = call.with_extras([extras] * 3).results(block, state, 0)
            assert torch.equal(state, output)
    assert any(call.takes_extras for call in calls) == (name in ("zaya", "glm_moe_dsa"))


def test_models_that_compute_with_what_blocks_return_are_refused(tokens, tiny_llama):
    class Pair(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, hidden, **kwargs):
            return self.block(hidden, **kwargs), hidden.mean()

    model = tiny_llama
    layers = [Pair(block) for block in model.model.layers]
    original = model.model.forward

    def forward(input_ids, **kwargs):
        hidden, total = model.model.embed_tokens(input_ids), 0.0
        positions = torch.arange(input_ids.shape[1])[None]
        embeddings = model.model.rotary_emb(hidden, positions)
        for layer in layers:
            hidden, value = layer(hidden, position_embeddings=embeddings)
            total = total + value
        return original(inputs_embeds=hidden + total, **kwargs)

    model.model.forward = forward
    with pytest.raises(ValueError, match="computes with what its blocks return besides hidden states"):
        capture_block_calls(model, layers, [tokens])


def test_arguments_that_batches_share_are_kept_once(tokens):
    model = built(gemma3)
    _, calls = capture_block_calls(model, list(find_blocks(model)[1]), tokens[:6].split(3))
    tensors = [
        value
        for call in calls
        for _, kwargs in call.arguments
        for value in kwargs.values()
        if isinstance(value, torch.Tensor)
    ]
    assert len(tensors) > 6 and len({id(tensor) for tensor in tensors}) <= 3  # positions, a mask per layer type


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            gemma3,
            [
                {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
                {"self_attn.o_proj"},
                {"mlp.gate_proj", "mlp.up_proj"},
                {"mlp.down_proj"},
            ],
        ),
        (gpt2, [{"attn.c_attn"}, {"attn.c_proj"}, {"mlp.c_fc"}, {"mlp.c_proj"}]),
        (phi3, [{"self_attn.qkv_proj"}, {"self_attn.o_proj"}, {"mlp.gate_up_proj"}, {"mlp.down_proj"}]),
    ],
)
def test_the_order_inside_a_block_is_that_of_execution(make, expected, tokens):
    model = built(make)
    name, blocks = find_blocks(model)
    _, layers = layers_to_quantize(model, 4, 32)
    names = sorted(layer.removeprefix(f"{name}.0.") for layer in layers if layer.startswith(f"{name}.0."))
    hidden, calls = capture_block_calls(model, list(blocks), [tokens])
    groups = observe_order(blocks[0], names, calls[0], hidden[0])
    assert [set(group.names) for group in groups] == expected
    assert all(group.called_once for group in groups)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        # Gemma normalizes before it adds.
        (gemma3, {"self_attn.q_proj": None, "self_attn.o_proj": None, "mlp.up_proj": None, "mlp.down_proj": None}),
        (gpt2, {"attn.c_attn": None, "attn.c_proj": "ln_2", "mlp.c_fc": None, "mlp.c_proj": ""}),
        (opt, {"self_attn.q_proj": None, "self_attn.out_proj": "final_layer_norm", "fc1": None, "fc2": ""}),
        (phi3, {"self_attn.o_proj": "post_attention_layernorm", "mlp.gate_up_proj": None, "mlp.down_proj": ""}),
        (qwen3, {"self_attn.q_proj": None, "self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": ""}),
        (mistral, {"self_attn.q_proj": None, "self_attn.o_proj": "post_attention_layernorm", "mlp.down_proj": ""}),
        (mixtral, {"self_attn.v_proj": None, "self_attn.o_proj": "post_attention_layernorm"}),
    ],
)
def test_where_a_layers_output_joins_the_residual_stream_is_seen(make, expected, dtype, tokens):
    model = built(make).to(dtype)
    blocks = list(find_blocks(model)[1])
    hidden, calls = capture_block_calls(model, blocks, [tokens])
    for block, call in zip(blocks[:2], calls[:2], strict=True):
        assert {name: find_sum(block, name, call, hidden[0]) for name in expected} == expected


def test_a_layer_that_sees_no_token_or_only_some_has_no_sum():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle, self.expert, self.plain = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, hidden):
            self.idle(hidden[:, :0])
            hidden = hidden + self.plain(hidden)
            return torch.cat([hidden[:, :1], hidden[:, 1:] + self.expert(hidden[:, 1:])], 1)

    torch.manual_seed(0)
    block, call, hidden = Block(), BlockCall([((), {})]), torch.randn(2, 4, 8)
    assert [find_sum(block, name, call, hidden) for name in ("idle", "expert")] == [None, None]


@pytest.mark.parametrize("make", [gemma3, gpt2, opt, phi3, qwen3, mistral])
def test_decoders_of_other_construction_are_quantized_and_stay_close(make, tokens):
    model = built(make)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        report = walk(model, tokens, config(bits=8))
        after = model(input_ids=tokens).logits
    layers = packed(model)
    linears = [n for n, m in built(make).named_modules() if type(m) is nn.Linear or type(m).__name__ == "Conv1D"]
    assert set(layers) == {name for name in linears if "lm_head" not in name and "project" not in name}
    assert [entry.name for entry in report.layers] and len(report.layers) == len(layers)
    assert (after - before).norm() / before.norm() < 0.05
    assert all(entry.losses["descent"] <= entry.losses["gptq"] * 1.001 for entry in report.layers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_that_lies_on_a_gpu_is_quantized_there(tokens, tiny_llama):
    model = copy.deepcopy(tiny_llama).cuda()
    walk(model, tokens, config(bits=8), device="cuda")
    assert all(buffer.is_cuda for layer in packed(model).values() for buffer in layer.buffers())


def test_the_deviation_is_zero_before_anything_is_quantized_and_not_after(tokens, monkeypatch, tiny_llama):
    seen = []
    original = block_solver.quantize_weight

    def spy(weight, moments, settings):
        seen.append(float(moments.deviation.abs().max() / moments.hessian.abs().max()))
        return original(weight, moments, settings)

    monkeypatch.setattr(block_solver, "quantize_weight", spy)
    walk(tiny_llama, tokens)
    assert seen[0] == 0 and all(value > 0 for value in seen[1:]) and len(seen) == 8


def test_moments_are_those_of_the_network_quantized_so_far(tokens, monkeypatch, tiny_llama):
    """The moments of the second block's up projection against hooks on the finished model."""
    found = []
    original = block_solver.quantize_weight

    def spy(weight, moments, settings):
        found.append((moments.hessian.clone(), moments.deviation.clone()))
        return original(weight, moments, settings)

    monkeypatch.setattr(block_solver, "quantize_weight", spy)
    full = copy.deepcopy(tiny_llama)
    walk(tiny_llama, tokens)
    inputs = []
    for model in (full, tiny_llama):
        up = model.model.layers[1].mlp.up_proj
        hook = up.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
        with torch.no_grad():
            model(input_ids=tokens)
        hook.remove()
    x, x_tilde = inputs
    hessian, deviation = found[6]  # q/k/v, o, gate/up, down of the first block; then q/k/v, o, gate/up
    torch.testing.assert_close(hessian, x_tilde.T @ x_tilde / len(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(deviation, (x - x_tilde).T @ x_tilde / len(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sequential", [True, False])
def test_the_deviation_of_a_layer_that_writes_to_the_residual_stream_is_that_of_the_stream(
    sequential, tokens, monkeypatch, tiny_llama
):
    found = {}
    original = block_solver._solve_group

    def spy(modules, moments, prefix, *args):
        solution = original(modules, moments, prefix, *args)
        for name in modules:
            found[prefix + name] = moments
        return solution

    monkeypatch.setattr(block_solver, "_solve_group", spy)
    full = copy.deepcopy(tiny_llama)
    walk(tiny_llama, tokens, true_sequential=sequential)
    writers = {name for name, moments in found.items() if moments.of_output}
    assert writers == {f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")}

    # The second block's attention output, with the weight that it had while its own moments were taken.
    mixed = restore_linear(copy.deepcopy(tiny_llama), torch.float32)
    mixed.model.layers[1].self_attn.o_proj = full.model.layers[1].self_attn.o_proj
    if not sequential:
        mixed.model.layers[1] = full.model.layers[1]
    sums, inputs = [], []
    for model in (full, mixed):
        block = model.model.layers[1]
        hooks = [
            block.post_attention_layernorm.register_forward_pre_hook(
                lambda _, args: sums.append(args[0].flatten(0, 1))
            ),
            block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1))),
        ]
        with torch.no_grad():
            model(input_ids=tokens)
        for hook in hooks:
            hook.remove()
    expected = (sums[0] - sums[1]).T @ inputs[1] / len(inputs[1])
    torch.testing.assert_close(found["model.layers.1.self_attn.o_proj"].deviation, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("make", "corrected"), [(gemma3, False), (phi3, True)])
def test_the_residual_stream_is_corrected_by_default_where_a_layer_writes_to_it(make, corrected, tokens):
    found = []
    for changes in ({}, {"advanced": {"corrected_residual": False}}):
        model = built(make)
        walk(model, tokens, config(bits=2, **changes))
        found.append(model.state_dict())
    default, without = found
    assert any(not torch.equal(value, without[name]) for name, value in default.items()) == corrected


@pytest.mark.one_version
@pytest.mark.parametrize("make", [gemma3, phi3])
@pytest.mark.parametrize("changes", [{}, {"alpha": 0.0}, {"true_sequential": False}])
def test_a_killed_walk_resumes_to_the_same_result(make, tokens, tmp_path, changes, monkeypatch):
    settings = config(advanced=changes)
    sequential = settings.true_sequential
    whole = built(make)
    last = len(find_blocks(whole)[1])
    walk(whole, tokens, settings, true_sequential=sequential)

    calls = 0
    original = block_solver.BlockSolver.solve

    def killed(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(block_solver.BlockSolver, "solve", killed)
    with pytest.raises(KeyboardInterrupt):
        walk(built(make), tokens, settings, true_sequential=sequential, resume_dir=tmp_path)
    resumed = built(make)
    report = walk(resumed, tokens, settings, true_sequential=sequential, resume_dir=tmp_path)
    assert report.resumed_blocks == last - 1
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_resuming_something_else_is_refused(tokens, tmp_path):
    walk(built(gemma3), tokens, resume_dir=tmp_path)
    with pytest.raises(ValueError, match="holds a run with other arguments"):
        walk(built(gemma3), tokens, config(bits=3), resume_dir=tmp_path)
    with pytest.raises(ValueError, match="holds a run with other arguments"):
        walk(built(gemma3), tokens.flip(0), resume_dir=tmp_path)
    other = built(gemma3)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="other base weights"):
        walk(other, tokens, resume_dir=tmp_path)


def test_offloading_to_disk_changes_nothing_and_the_walk_is_deterministic(tokens):
    states = []
    for offload in ("auto", "cpu", "disk"):
        model = built(gemma3)
        walk(model, tokens, offload=offload)
        states.append(model.state_dict())
    for state in states[1:]:
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())


def test_activations_on_disk_are_mapped_files_that_disappear():
    store = Activations(torch.device("cpu"), "disk")
    store.append(torch.arange(6.0).view(1, 2, 3))
    store.replace(0, torch.ones(1, 2, 3))
    assert torch.equal(store.get(0), torch.ones(1, 2, 3))
    directory = store._directory.name
    import os

    assert os.path.getsize(os.path.join(directory, "0")) == 24
    del store
    assert not os.path.exists(directory)


def llama4():
    sizes = {"num_local_experts": 4, "intermediate_size": 32, "intermediate_size_mlp": 64, "num_hidden_layers": 2}
    return tiny_model("llama4_text", **sizes)


def dbrx():
    experts = {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}}
    config = DbrxConfig(
        d_model=64, n_heads=4, n_layers=2, max_seq_len=128, vocab_size=128, ffn_config=experts | {"hidden_size": 64},
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
    )  # fmt: skip
    return DbrxForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "first"), [(llama4, "feed_forward.experts.gate_up_proj"), (dbrx, "ffn.experts.mlp.w1")]
)
def test_experts_of_an_unknown_kind_are_refused_by_name_unless_left_out(make, first, tokens):
    model = built(make)
    with pytest.raises(ValueError, match=r" holds several matrices in one tensor, as experts do") as error:
        find_layers(model, config())
    assert first in str(error.value)
    suggested = ast.literal_eval(str(error.value).split("modules_to_not_convert=")[1])
    report = walk(model, tokens, config(modules_to_not_convert=suggested))
    assert report.layers and not any("experts" in entry.name for entry in report.layers)


def test_decays_of_state_space_models_are_not_taken_for_experts():
    """Kimi Linear's `A_log` has four dimensions, three of them of size 1."""
    model = tiny.tiny_model("kimi_linear") if "kimi_linear" in tiny.CAUSAL_MODELS else tiny_model()
    model.model.layers[1].decay = nn.Parameter(torch.zeros(1, 1, 4, 1))
    model.model.layers[1].kernel = nn.Parameter(torch.zeros(64, 1, 4))
    refused = ["b_proj", "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj"]  # do not pack at these sizes
    _, layers = find_layers(model, config(modules_to_not_convert=refused))
    assert any("q_proj" in name for name in layers)
    model.model.layers[1].experts = nn.Parameter(torch.zeros(4, 64, 32))
    with pytest.raises(ValueError, match=r"layers\.1\.experts .* holds several matrices in one tensor"):
        find_layers(model, config(modules_to_not_convert=refused))


def test_blocks_with_linears_of_another_class_alone_are_refused_by_its_name():
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    with pytest.raises(ValueError, match=r"expected nn\.Linear or Conv1D; FalconLinear may compute something else"):
        find_layers(FalconForCausalLM(FalconConfig(**sizes)), config())


def test_shared_weights_are_refused_by_name(tiny_llama):
    tiny_llama.model.layers[1].mlp.up_proj.weight = tiny_llama.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.up_proj and model\.layers\.1\.mlp\.up_proj share one weight"
    ):
        find_layers(tiny_llama, config())


def test_a_repeated_block_is_refused(tiny_llama):
    tiny_llama.model.layers[1] = tiny_llama.model.layers[0]
    with pytest.raises(ValueError, match="share one weight"):
        find_layers(tiny_llama, config())


def test_replaced_layers_keep_no_weights_alive(tokens, tiny_llama):
    settings = config()
    list_name, layers = find_layers(tiny_llama, settings)
    quantize_blocks(tiny_llama, list_name, layers, tokens, settings.solver_settings(), batch_size=3)
    assert layers and all(layer.weight.is_meta for layer in layers.values())


def test_tied_embeddings_stay_as_they_are(tokens):
    model = built(gemma3)
    before = model.get_input_embeddings().weight.clone()
    walk(model, tokens)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_dead_channels_give_finite_weights(tokens, tiny_llama):
    layer = tiny_llama.model.layers[0]
    with torch.no_grad():
        layer.input_layernorm.weight[:40] = 0
        layer.mlp.gate_proj.weight[:] = 0  # down_proj sees nothing but zeros
        walk(tiny_llama, tokens, config(bits=2))
        assert torch.isfinite(tiny_llama(input_ids=tokens).logits).all()


def test_activations_that_overflow_are_refused_by_layer_name(tokens, tiny_llama):
    with torch.no_grad():
        tiny_llama.model.layers[1].post_attention_layernorm.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate_proj.*calibration inputs contain NaN or infinity"):
        walk(tiny_llama, tokens)


@pytest.mark.real_model
@pytest.mark.slow
def test_on_smollm2_the_default_beats_the_paper_and_the_paper_beats_gptq():
    from real_models import load_smollm2

    model, tokenizer = load_smollm2()
    model.model.layers = model.model.layers[:3]
    text = "The package manager resolves dependencies before it installs anything. " * 4
    tokens = tokenizer(" ".join(f"{text} Case {i}: {i * i}." for i in range(200)), return_tensors="pt").input_ids
    tokens, others = tokens[0, : 12 * 256].view(12, 256).split((8, 4))
    with torch.no_grad():
        expected = model.model(others).last_hidden_state
    errors = {}
    for name, changes in {
        "default": {},
        "paper": {"preset": "paper"},
        "gptq": {"preset": "paper", "advanced": {"stages": ()}},
    }.items():
        quantized = copy.deepcopy(model)
        walk(quantized, tokens, config(bits=2, group_size=64, **changes), batch_size=8)
        with torch.no_grad():
            # Of what the model computes: losses of layers differ in what they aim at.
            errors[name] = float((quantized.model(others).last_hidden_state - expected).norm())
    assert errors["default"] < 0.9 * errors["paper"] < 0.8 * errors["gptq"]
