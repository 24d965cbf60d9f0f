"""The same generations on a GPU, where other kernels score, choose, attend and decode."""

import copy
import threading

import pytest
import torch
from accelerate import cpu_offload
from models import (
    ARCHITECTURES,
    add_lookahead,
    base_and_adapted,
    kept_entries,
    left_padded,
    lookahead_model,
    prompt_ids,
    tiny_model,
)
from reference import assert_as_masked, evicted_length, expected_logits, generate
from transformers import AutoModelForCausalLM, DynamicCache

from lkq_hf import LookaheadCache, TwoStageGPTQConfig, prepare_model_for_eviction

item = pytest.mark.item
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

# Of float32 between the GPU's kernels and the CPU's.
CLOSE = 2e-3


@pytest.fixture(autouse=True)
def full_float32_and_a_fresh_compiler():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_float32_matmul_precision(before)


def kept_on_the_cpu(cache):
    """What the cache has kept, on the CPU, where the reference runs."""
    kept = kept_entries(cache)
    assert kept[max(kept)].is_cuda
    return {layer: entries.cpu() for layer, entries in kept.items()}


def assert_as_masked_on_the_cpu(base, ids, tokens, logits, cache, mask=None, **options):
    """``cache``: the cache itself after one reading, or what ``kept_on_the_cpu`` gave after each."""
    stages = cache if isinstance(cache, list) else [kept_on_the_cpu(cache)]
    tokens, logits, mask = (None if tensor is None else tensor.cpu() for tensor in (tokens, logits, mask))
    assert_as_masked(base, ids.cpu(), tokens, logits, stages, mask, tolerance=CLOSE, **options)


def error_on_the_cpu(base, ids, tokens, logits, cache):
    """Of the logits, relative to the masked full cache's."""
    expected = expected_logits(base, ids.cpu(), tokens.cpu(), [kept_on_the_cpu(cache)]).float()
    return (logits.cpu().float() - expected).norm() / expected.norm()


@item("attention: eager, sdpa")
@every_architecture
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padded_rows(architecture, attention):
    base, model = base_and_adapted(architecture)
    model.cuda().set_attn_implementation(attention)
    ids, mask = (tensor.cuda() for tensor in left_padded([prompt_ids(1, n, seed=n)[0] for n in (90, 1, 8, 33)]))
    cache = LookaheadCache(budget=9)
    tokens, logits = generate(model, ids, cache, mask=mask)
    assert_as_masked_on_the_cpu(base, ids, tokens, logits, cache, mask)


@item("attention: flex_attention")
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_flex_attention(architecture):
    base, model = base_and_adapted(architecture)
    model.cuda().set_attn_implementation("flex_attention")
    ids, cache = prompt_ids(2, 40).cuda(), LookaheadCache(budget=7)
    assert_as_masked_on_the_cpu(base, ids, *generate(model, ids, cache), cache)


@item("attention: flash_attention_2, flash_attention_3")
@pytest.mark.parametrize(
    ("attention", "package"),
    [("flash_attention_2", "flash_attn"), ("flash_attention_3", "flash_attn_interface")],
    ids=["2", "3"],
)
def test_flash_attention(attention, package):
    pytest.importorskip(package, reason=f"{package} is not installed")
    base, model = (one.to(torch.bfloat16) for one in base_and_adapted())
    model.cuda().set_attn_implementation(attention)
    ids, cache = prompt_ids(2, 40).cuda(), LookaheadCache(budget=7)
    tokens, logits = generate(model, ids, cache)
    assert error_on_the_cpu(base, ids, tokens, logits, cache) < 0.05


@item("static decode: LookaheadCache(max_new_tokens=...), compiled by generate")
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_static_decode(architecture):
    """As CUDA graphs, for two prompts of different lengths and a second turn."""
    base, model = base_and_adapted(architecture)
    model.cuda().set_attn_implementation("sdpa")
    for length in (40, 57):
        ids, cache = prompt_ids(2, length).cuda(), LookaheadCache(budget=7, max_new_tokens=8)
        tokens, logits = generate(model, ids, cache)
        stages = [kept_on_the_cpu(cache)]
        assert_as_masked_on_the_cpu(base, ids, tokens, logits, stages)
        following = torch.cat([ids, tokens, prompt_ids(2, 5, seed=3).cuda()], dim=1)
        second, second_logits = generate(model, following, cache)
        stages.append(kept_on_the_cpu(cache))
        assert cache.layers[-1].has_static_storage
        assert_as_masked_on_the_cpu(base, following, second, second_logits, stages)


@item("torch.compile of the model, or of its layers (accelerate's compile_regions)")
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_compiled_model(architecture):
    base, model = base_and_adapted(architecture)
    model.cuda().set_attn_implementation("sdpa")
    compiled = torch.compile(model)
    ids, cache = prompt_ids(2, 40).cuda(), LookaheadCache(budget=7)
    with torch.no_grad():
        compiled(input_ids=ids, past_key_values=cache)
    stages = [kept_on_the_cpu(cache)]
    following = torch.cat([ids, prompt_ids(2, 4, seed=3).cuda()], dim=1)
    tokens, logits = generate(compiled, following, cache)
    stages.append(kept_on_the_cpu(cache))
    assert_as_masked_on_the_cpu(base, following, tokens, logits, stages)


@item("half precisions: bfloat16, float16, autocast")
@every_architecture
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precisions(architecture, dtype):
    base, model = (one.to(dtype) for one in base_and_adapted(architecture))
    model.cuda().set_attn_implementation("sdpa")
    ids, cache = prompt_ids(2, 40).cuda(), LookaheadCache(budget=7)
    tokens, logits = generate(model, ids, cache)
    assert cache.layers[-1].keys.dtype == dtype
    assert error_on_the_cpu(base, ids, tokens, logits, cache) < (0.05 if dtype == torch.bfloat16 else 0.01)


@item("prompt-lookup decoding")
@every_architecture
def test_prompt_lookup(architecture):
    base, model = base_and_adapted(architecture)
    model.cuda()
    ids, cache = prompt_ids(1, 20).repeat(1, 2).cuda(), LookaheadCache(budget=7)
    output = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4)
    assert_as_masked_on_the_cpu(base, ids, output[:, 40:], None, cache, evicted_length=evicted_length(cache))


@item("bases quantized by lkq-hf (two_stage_gptq)")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_our_own_quantized_bases(bits, tmp_path):
    from test_models_and_wrappers import word_tokenizer

    tiny_model().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    text = " ".join(f"w{token}" for token in prompt_ids(1, 400)[0].tolist())
    config = TwoStageGPTQConfig(bits=bits, group_size=32, dataset=[text], num_samples=4, model_seqlen=32, device="cpu")
    AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config).save_pretrained(tmp_path / "q")
    base, model = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "q", attn_implementation="eager", device_map=device)
        for device in ("cpu", "cuda")
    )
    base.generation_config.eos_token_id = model.generation_config.eos_token_id = None
    add_lookahead(model)
    ids, cache = prompt_ids(2, 40).cuda(), LookaheadCache(budget=7)
    tokens, logits = generate(model, ids, cache)
    assert error_on_the_cpu(base, ids, tokens, logits, cache) < 0.01


@item("CPU and disk offload of the weights (accelerate, device_map)")
@pytest.mark.parametrize("adapter_first", [True, False])
def test_weights_in_main_memory(adapter_first):
    base = tiny_model()
    model = copy.deepcopy(base)
    if adapter_first:
        add_lookahead(model)
    cpu_offload(model, execution_device="cuda")
    if not adapter_first:
        prepare_model_for_eviction(model)
    ids, cache = prompt_ids(1, 40).cuda(), LookaheadCache(7, scorer="lookahead" if adapter_first else "snapkv")
    assert_as_masked_on_the_cpu(base, ids, *generate(model, ids, cache), cache)


@item("out of memory in a prefill")
@pytest.mark.parametrize("place", ["the mask", "a layer"])
def test_memory_runs_out(place):
    base, model = base_and_adapted()
    model.cuda()
    cache, length, handles = LookaheadCache(budget=7), 4000, []
    allocated, whole = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    if place == "the mask":
        length = int((2 * whole) ** 0.5)  # of which it holds the square
    else:
        attention = model.model.layers[1].self_attn
        handles.append(attention.register_forward_pre_hook(lambda *_: torch.empty(whole, device="cuda")))
    with pytest.raises(torch.OutOfMemoryError):
        model.generate(prompt_ids(1, length).cuda(), past_key_values=cache, max_new_tokens=2)
    for handle in handles:
        handle.remove()
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    assert torch.cuda.memory_allocated() - allocated < 2**27, "cuBLAS keeps its workspace, and nobody anything else"
    ids = prompt_ids(1, 40).cuda()
    assert_as_masked_on_the_cpu(base, ids, *generate(model, ids, cache), cache)


@item("threads: several generations on one model at once")
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_threads(architecture):
    model = lookahead_model(architecture, "sdpa").cuda()
    jobs = [
        (prompt_ids(1, 60).cuda(), lambda: LookaheadCache(7)),
        (prompt_ids(2, 45, seed=7).cuda(), lambda: LookaheadCache(11, "snapkv")),
        (prompt_ids(1, 50, seed=8).cuda(), lambda: DynamicCache(config=model.config)),
    ]

    def answer(job):
        ids, cache = job
        return model.generate(ids, past_key_values=cache(), max_new_tokens=6, do_sample=False)

    alone, together = [answer(job) for job in jobs], [[] for _ in jobs]

    def run(index):
        together[index] += [answer(jobs[index]) for _ in range(4)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, found in zip(alone, together, strict=True):
        assert len(found) == 4 and all(torch.equal(tokens, expected) for tokens in found)
