"""What eviction adds to a prefill, in time and memory, for models with random weights on one CUDA GPU.

    python benchmarks/eviction_overhead.py
    python benchmarks/eviction_overhead.py --prefill --out kernels.json    (the kernels alone)

Two parts. The kernels alone, per layer of Llama-3.1-8B: scoring and selection against plain torch and against the
GPU's copy bandwidth. Then whole prefills, in rounds that run each of these once:

    full        DynamicCache, no eviction
    full + 32   DynamicCache, a prompt longer by the number of lookahead tokens: what reading them costs by itself
    lookahead   LookaheadCache with a LOOKAHEAD_KV adapter
    snapkv      LookaheadCache with the SnapKV scorer
    laq         a draft of 32 tokens from a SnapKV cache, whose queries score the full cache again (Lookahead Q-Cache,
                arXiv 2505.20334); the draft is decoded as transformers decodes

An overhead is the median over the rounds of the difference to the same round's full prefill.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import LLAMA_8B, QWEN35_9B, describe, milliseconds, parser, random_models, save
from tables import RESULTS
from transformers import DynamicCache

from lkq_hf import LookaheadCache
from lkq_hf.attention import observe_attention
from lkq_hf.compat import pass_cache
from lkq_hf.kernels.lookahead_scores import lookahead_scores
from lkq_hf.kernels.select_compact import select_compact
from lkq_hf.scoring import PrefillAttention, SnapKVScorer

BUDGET = 128
LOOKAHEAD_TOKENS = 32
LONGEST_IN_ROUNDS = 65_536  # longer prefills are run once, and without the two slowest comparisons

SMOLLM2 = LLAMA_8B | {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}  # fmt: skip
MODELS = {"Llama-3.1-8B": LLAMA_8B, "SmolLM2-135M": SMOLLM2, "Qwen3.5-9B": QWEN35_9B}
PREFILLS = {  # model: (batch, prompt length)
    "SmolLM2-135M": [(1, 8192), (8, 8192)],
    "Llama-3.1-8B": [(1, 4096), (1, 8192), (1, 32_768), (1, 131_072)],
    "Qwen3.5-9B": [(1, 32_768)],
}


def main() -> None:
    options = parser(__doc__, RESULTS / "eviction_overhead.json")
    shapes = [f"{name}:{batch}:{length}" for name, sizes in PREFILLS.items() for batch, length in sizes]
    options.add_argument("--prefill", nargs="*", metavar="MODEL:BATCH:LENGTH", default=shapes, help="whole prefills")
    given = options.parse_args()
    if not torch.cuda.is_available():
        options.error("this benchmark needs a CUDA GPU, and torch finds none")
    results: dict[str, Any] = {"hardware": describe(), "prefill": []}
    with torch.inference_mode():
        lengths = (4096, 8192, 32_768, 131_072)
        results["kernels"] = [benchmark_kernels(length, results["hardware"]) for length in lengths]
        print(*map(json.dumps, results["kernels"]), sep="\n", flush=True)
        save(given.out, results)
        built = ""
        for shape in given.prefill:
            name, batch, length = shape.split(":")
            if name != built:
                model = adapted = None  # frees the memory of the last ones
                model, adapted = random_models(MODELS[name], num_lookahead_tokens=LOOKAHEAD_TOKENS)
                built = name
            rows = benchmark_prefill(name, model, adapted, int(batch), int(length))
            print(*map(json.dumps, rows), sep="\n", flush=True)
            results["prefill"] += rows
            save(given.out, results)


# The kernels alone


def benchmark_kernels(length: int, hardware: dict[str, Any]) -> dict[str, Any]:
    """Times of one layer of Llama-3.1-8B; keys and values come from memory, not from the L2 cache."""
    heads, kv_heads, head_dim = 32, 8, 128
    scaling = head_dim**-0.5
    query = torch.randn(1, heads, LOOKAHEAD_TOKENS, head_dim, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(
        2, 1, kv_heads, length + LOOKAHEAD_TOKENS, head_dim, device="cuda", dtype=torch.bfloat16
    ).unbind()

    scores = lookahead_scores(query, key, scaling)
    scoring = gpu_microseconds(lambda: lookahead_scores(query, key, scaling))
    selection = gpu_microseconds(lambda: select_compact(scores, key, value, BUDGET))
    plain = gpu_microseconds(lambda: plain_torch(query, key, value, scaling))
    both = host_microseconds(lambda: select_compact(lookahead_scores(query, key, scaling), key, value, BUDGET))
    # The result is worthless if the kernels are wrong.
    torch.testing.assert_close(scores, plain_torch_scores(query, key, scaling), rtol=2e-2, atol=1e-7)
    bytes_per_microsecond = hardware["copy_bandwidth_tb_s"] * 1e6
    key_bytes = key.numel() * key.element_size()
    return {
        "length": length,
        "scoring_us": scoring,
        "selection_us": selection,
        "plain_torch_us": plain,
        "host_us": both,
        "one_read_of_keys_us": key_bytes / bytes_per_microsecond,
        "scoring_share_of_copy_bandwidth_counting_one_read": key_bytes / bytes_per_microsecond / scoring,
    }


def plain_torch_scores(query: torch.Tensor, key: torch.Tensor, scaling: float) -> torch.Tensor:
    batch, heads, n, head_dim = query.shape
    kv_heads, total = key.shape[1:3]
    rows = query.reshape(batch, kv_heads, -1, head_dim) * scaling
    logits = (rows @ key.transpose(-1, -2)).float().view(batch, heads, n, total)
    hidden = torch.ones(n, total, dtype=torch.bool, device=key.device).triu(total - n + 1)
    attention = logits.masked_fill(hidden, -torch.inf).softmax(-1)[..., : total - n]
    return attention.mean(2).view(batch, kv_heads, heads // kv_heads, -1).mean(2)


def plain_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> Any:
    indices = plain_torch_scores(query, key, scaling).topk(BUDGET).indices.sort().values
    indices = indices[..., None].expand(-1, -1, -1, key.shape[-1])
    return key.gather(2, indices), value.gather(2, indices)


def gpu_microseconds(function: Callable[[], Any], repeats: int = 30) -> float:
    """Median time on the GPU with a cold L2 cache, launches excluded (they overlap with the prefill's own work)."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats):
        flush.zero_()
        times.append(milliseconds(graph.replay))
    return 1e3 * statistics.median(times)


def host_microseconds(function: Callable[[], Any], repeats: int = 100) -> float:
    """Time that the CPU takes to launch, which is what small models wait for."""
    function()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed / repeats * 1e6


# Whole prefills


def benchmark_prefill(name: str, model: Any, adapted: Any, batch: int, length: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (batch, length + LOOKAHEAD_TOKENS), device="cuda")
    prompt = input_ids[:, :length]
    methods: dict[str, Callable[[], Any]] = {
        "full": lambda: prefill(model, prompt, DynamicCache(config=model.config)),
        "full + 32": lambda: prefill(model, input_ids, DynamicCache(config=model.config)),
        "lookahead": lambda: prefill(adapted, prompt, LookaheadCache(BUDGET, "lookahead")),
        "snapkv": lambda: prefill(adapted, prompt, LookaheadCache(BUDGET, "snapkv")),
        "laq": lambda: lookahead_q_cache(model, prompt),
    }
    once = length > LONGEST_IN_ROUNDS
    if once:
        del methods["full + 32"], methods["laq"]
    elif "linear_attention" in getattr(model.config, "layer_types", ()):
        del methods["laq"]  # its draft would change the recurrent states
    measured: dict[str, list[tuple[float, int]]] = {method: [] for method in methods}
    if not once:
        for function in methods.values():
            measure(function)
        full_ms, _ = measure(methods["full"])
    rounds = 1 if once else max(3, min(15, round(6000 / full_ms)))
    for index in range(rounds):
        for method, function in methods.items():
            if method != "laq" or index < 3:  # its overhead is so large that three rounds tell
                measured[method].append(measure(function))

    kv_bytes = batch * length * kv_bytes_per_token(model.config)
    full = measured["full"]
    rows = []
    for method, runs in measured.items():
        overheads = [ms - full_ms for (ms, _), (full_ms, _) in zip(runs, full, strict=False)]
        overhead = statistics.median(overheads)
        rows.append(
            {
                "model": name,
                "batch": batch,
                "length": length,
                "method": method,
                "runs": len(runs),
                "ms": statistics.median(ms for ms, _ in runs),
                "overhead_ms": overhead,
                "overhead_percent": 100 * overhead / statistics.median(ms for ms, _ in full),
                "peak_gib": max(peak for _, peak in runs) / 2**30,
                "peak_saved_of_full_kv_percent": 100 * (max(p for _, p in full) - max(p for _, p in runs)) / kv_bytes,
            }
        )
    overheads_by_method = {row["method"]: row["overhead_ms"] for row in rows}
    for row in rows:
        if row["method"] == "laq" and overheads_by_method["lookahead"] > 0:  # otherwise noise is larger than it
            row["times_the_overhead_of_lookahead"] = row["overhead_ms"] / overheads_by_method["lookahead"]
    return rows


def prefill(model: Any, input_ids: torch.Tensor, cache: Any) -> Any:
    return model(input_ids=input_ids, **pass_cache(cache), use_cache=True, logits_to_keep=1)


def measure(function: Callable[[], Any]) -> tuple[float, int]:
    """Milliseconds, and peak bytes above what was allocated before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept: list[Any] = []  # what was computed is held until the peak is read
    took = milliseconds(lambda: kept.append(function()))
    return took, torch.cuda.max_memory_allocated() - before


def kv_bytes_per_token(config: Any) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return 2 * layers.count("full_attention") * config.num_key_value_heads * head_dim * 2


def lookahead_q_cache(model: Any, prompt: torch.Tensor, draft_tokens: int = 32, window: int = 32) -> DynamicCache:
    """The prompt's cache, cut to the budget by the attention of a drafted response (arXiv 2505.20334)."""
    batch, length = prompt.shape
    decoder = model.get_decoder()
    scaling = (model.config.hidden_size // model.config.num_attention_heads) ** -0.5
    full, draft, kept = (DynamicCache(config=model.config) for _ in range(3))
    snapkv = SnapKVScorer(window=window)
    queries: list[list[torch.Tensor]] = [[] for _ in range(model.config.num_hidden_layers)]

    def compress(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: Any) -> None:
        attention = PrefillAttention(query, key, value, length, 0, BUDGET, scaling, None, None, module.layer_idx)
        draft.update(*select_compact(snapkv.score(attention), key, value, BUDGET)[:2], module.layer_idx)

    def collect(module: Any, query: torch.Tensor, *_: Any) -> None:
        queries[module.layer_idx].append(query)

    with observe_attention(decoder, compress):
        token = prefill(model, prompt, full).logits.argmax(-1)
    with observe_attention(decoder, collect):
        for position in range(length, length + draft_tokens):
            positions = torch.full((batch, 1), position, device=prompt.device)
            output = model(input_ids=token, **pass_cache(draft), position_ids=positions, use_cache=True)
            token = output.logits.argmax(-1)
    for index, (layer, drafted) in enumerate(zip(full.layers, draft.layers, strict=True)):
        key = torch.cat([layer.keys, drafted.keys[:, :, BUDGET:]], dim=2)
        scores = lookahead_scores(torch.cat(queries[index], dim=2), key, scaling)
        kept.update(*select_compact(scores, layer.keys, layer.values, BUDGET)[:2], index)
    return kept


if __name__ == "__main__":
    main()
