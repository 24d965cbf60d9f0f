"""Decoding through ``generate`` after a long prompt: tokens per second and memory by cache, random weights.

    python benchmarks/decode_speed.py                   # an 8B Llama on one CUDA GPU
    python benchmarks/decode_speed.py --quantized 4     # also with packed 4-bit weights, against bf16
    python benchmarks/decode_speed.py --small           # a smoke run on any machine

Each cell is a cache and a batch size:

    dynamic                   DynamicCache
    static                    StaticCache, compiled
    static, short prompt      StaticCache, compiled, after a prompt of as many tokens as the budget keeps
    snapkv                    LookaheadCache, storage that grows
    snapkv, static            LookaheadCache(max_new_tokens=...), compiled, by the decoding loop of lkq_hf.cache.loop
    snapkv, static, generate's loop     the same, compiled and replayed by transformers' own loop
    snapkv, static, uniform   as the first of both with as many entries in every head
    lookahead                 the same two on a model with a LOOKAHEAD_KV adapter, which is idle while decoding
    lookahead, static

A cache is filled with random entries, as a prefill would leave it, so that the prompt need not be read for every cell;
``generate`` then goes on from it. A streamer takes the time when each token has come to the host. The median of the
intervals counts; beginning_ms is what the first three take beyond it, such as the recording of a graph. A run before
that compiles (first_call_s, less where the compiler remembers an earlier cell or run). With batch 1 the whole is timed
too: a random prompt read and answered, by what is compiled already.

Every finished cell is written at once. When the time given by --minutes is over, the remaining cells are skipped and
named; --batches and --cells choose some.
"""

import argparse
import gc
import itertools
import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import DEVICE, LLAMA_8B, SMALL, answer, describe, free_memory, parser, random_models, save, synchronize
from tables import RESULTS
from torch import nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from lkq_hf import LookaheadCache
from lkq_hf.cache.layers import EvictedLayer
from lkq_hf.cache.prepare import get_decoder
from lkq_hf.evaluation.prefill import cache_bytes
from lkq_hf.quantization.linear import QuantizedLinear
from lkq_hf.quantization.packing import group_index, pack_zeros
from lkq_hf.quantization.shared_input import share_inputs

GROUP_SIZE = 128
TOKENS_TO_WARM_UP = 8  # two steps compile and record, the others show that nothing is compiled any more
BEGINNING = 3  # steps
QUANTIZED = ("snapkv", "snapkv, static", "snapkv, static, generate's loop")  # with packed weights


@dataclass(frozen=True)
class Sizes:
    prompt: int
    budget: int
    tokens: int  # timed, where the decode is compiled
    tokens_uncompiled: int


@dataclass(frozen=True)
class Method:
    empty_cache: Callable[[Any, Sizes], Cache]  # of a model's config
    compiled: bool
    adapted: bool = False
    short: bool = False  # the prompt is as long as the budget
    own_loop: bool = False  # transformers' own


def main() -> None:
    made = parser(__doc__, RESULTS / "decode_speed.json")
    made.add_argument("--small", action="store_true", help="a tiny model and short prompts, on any device")
    made.add_argument("--quantized", type=int, choices=(2, 3, 4, 8), metavar="BITS", help="also packed weights")
    made.add_argument("--batches", type=int, nargs="+", default=[1, 16, 4], help="in the order in which to run")
    made.add_argument("--cells", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    made.add_argument("--prompt", type=int, default=32_768, help="tokens")
    made.add_argument("--budget", type=int, default=1024, help="entries kept")
    made.add_argument("--minutes", type=float, default=4.0, help="after which no cell is begun")
    options = made.parse_args()
    if DEVICE == "cpu" and not options.small:
        made.error("this benchmark needs a CUDA GPU, and torch finds none; --small runs anywhere")

    started = time.perf_counter()
    sizes = Sizes(options.prompt, options.budget, 128, 32)
    if options.small:
        sizes = Sizes(256, 32, 12, 12)
    results: dict[str, Any] = {"hardware": describe(), "sizes": vars(sizes), "cells": [], "skipped": []}
    model, adapted = random_models(SMALL if options.small else LLAMA_8B)
    for batch in options.batches:
        for name in options.cells:
            chosen = adapted if METHODS[name].adapted else model
            run_cell(results, options, started, "bf16", name, chosen, batch, sizes)
    if options.quantized is not None:
        del adapted
        quantize_at_random(model, options.quantized)
        for batch in options.batches:
            for name in [name for name in QUANTIZED if name in options.cells]:
                run_cell(results, options, started, f"W{options.quantized}", name, model, batch, sizes)


def run_cell(
    results: dict[str, Any],
    options: argparse.Namespace,
    started: float,
    weights: str,
    name: str,
    model: Any,
    batch: int,
    sizes: Sizes,
) -> None:
    """Measures one cell and writes all results so far; an error is a result too."""
    cell: dict[str, Any] = {"weights": weights, "batch": batch, "cache": name}
    if time.perf_counter() - started > 60 * options.minutes:
        results["skipped"].append(cell)
    else:
        try:
            cell |= measure(model, METHODS[name], batch, sizes)
        except Exception as error:  # a cell that fails, out of memory say, must not cost the others
            cell["error"] = f"{type(error).__name__}: {error}"[:500]
            traceback.print_exc()
        results["cells"].append(cell)
        print(json.dumps(cell), flush=True)
        free_memory()
    save(options.out, results)


# One cell


class StepClock(BaseStreamer):
    """Takes the time when each token has come to the host; ``generate`` hands in the prompt first."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self.marks.append(time.perf_counter())
        self._has_prompt = True

    def end(self) -> None:
        pass

    def milliseconds(self) -> list[float]:
        """Of each token but the first."""
        return [1e3 * (end - start) for start, end in itertools.pairwise(self.marks)]


def measure(model: Any, method: Method, batch: int, sizes: Sizes) -> dict[str, Any]:
    tokens = sizes.tokens if method.compiled else sizes.tokens_uncompiled
    *_, first_call = generate(model, method, filled_cache(model, method, batch, sizes), batch, TOKENS_TO_WARM_UP)
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    cache = filled_cache(model, method, batch, sizes)
    ids, steps, _ = generate(model, method, cache, batch, tokens)
    beginning = sum(steps[:BEGINNING])
    steps.sort()
    milliseconds = statistics.median(steps)
    result = {
        "tokens_per_second": 1e3 * batch / milliseconds,
        "ms_per_step": milliseconds,
        "ms_per_step_p10_p90": [steps[len(steps) // 10], steps[len(steps) * 9 // 10]],
        "beginning_ms": beginning - BEGINNING * milliseconds,
        "steps": len(steps),
        "first_call_s": first_call,
        "cache_gib": cache_bytes(cache) / 2**30,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None,
        "first_tokens": ids[0, -tokens:][:8].tolist(),
    }
    if batch == 1:
        del cache
        prompt = sizes.budget if method.short else sizes.prompt
        for answer in (TOKENS_TO_WARM_UP, sizes.tokens):
            *_, seconds = generate(model, method, method.empty_cache(model.config, sizes), 1, answer, prompt)
        result |= {"prompt": prompt, "answer": sizes.tokens, "prompt_and_answer_s": seconds}
    return result


def generate(
    model: Any, method: Method, cache: Cache, batch: int, tokens: int, prompt: int | None = None
) -> tuple[torch.Tensor, list[float], float]:
    """Token ids, milliseconds of each step, and seconds of the call.

    An empty cache first reads ``prompt`` tokens, a filled one the one new token that ``generate`` always expects.
    """
    length = int(cache.get_seq_length()) + 1 if prompt is None else prompt
    input_ids = torch.randint(model.config.vocab_size, (batch, length), device=DEVICE)
    clock = StepClock()
    options: dict[str, Any] = {"custom_generate": partial(sample, clock)} if method.own_loop else {}
    synchronize()
    start = time.perf_counter()
    ids = answer(model, input_ids, cache, tokens, streamer=clock, disable_compile=not method.compiled, **options)
    synchronize()
    return ids, clock.milliseconds(), time.perf_counter() - start


def sample(clock: StepClock, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Transformers' own loop, for ``custom_generate``, which gets no streamer."""
    return model._sample(*args, streamer=clock, **kwargs)


# Caches as a prefill leaves them


def filled_cache(model: Any, method: Method, batch: int, sizes: Sizes) -> Cache:
    """A cache that holds random entries; those of one batch size are equal in all caches of one kind."""
    torch.manual_seed(batch)
    config = model.config
    cache = method.empty_cache(config, sizes)
    length = sizes.budget if method.short else sizes.prompt
    shape = (batch, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
    if isinstance(cache, LookaheadCache):
        cache.build_layers(config)
        eviction = cache.begin_eviction(get_decoder(model), length)
    for index in range(config.num_hidden_layers):
        key, value = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        if isinstance(cache, LookaheadCache):
            # Some heads win far more than others, as on real models.
            scores = torch.rand(shape[:3], device=DEVICE) + 0.05 * torch.randn(*shape[:2], 1, device=DEVICE)
            eviction.add(index, EvictedLayer().candidates(key, value, length, None), scores)
        else:
            cache.update(key, value, index)
    if isinstance(cache, LookaheadCache):
        cache.evict_to(eviction.settle(length))
    return cache


def lookahead_cache(scorer: str, static: bool, allocation: str = "global") -> Callable[[Any, Sizes], Cache]:
    return lambda config, sizes: LookaheadCache(
        sizes.budget,
        scorer,
        max_new_tokens=sizes.tokens if static else None,
        allocation=allocation,
        evict_later_turns=False,
    )


def static_cache(config: Any, sizes: Sizes, short: bool = False) -> Cache:
    return StaticCache(config=config, max_cache_len=(sizes.budget if short else sizes.prompt) + sizes.tokens)


METHODS = {
    "dynamic": Method(lambda config, sizes: DynamicCache(config=config), compiled=False),
    "static, short prompt": Method(partial(static_cache, short=True), compiled=True, short=True),
    "snapkv": Method(lookahead_cache("snapkv", static=False), compiled=False),
    "snapkv, static": Method(lookahead_cache("snapkv", static=True), compiled=True),
    "snapkv, static, generate's loop": Method(lookahead_cache("snapkv", static=True), compiled=True, own_loop=True),
    "snapkv, static, uniform": Method(lookahead_cache("snapkv", static=True, allocation="uniform"), compiled=True),
    "static": Method(static_cache, compiled=True),
    "lookahead": Method(lookahead_cache("lookahead", static=False), compiled=False, adapted=True),
    "lookahead, static": Method(lookahead_cache("lookahead", static=True), compiled=True, adapted=True),
}


# Models


def quantize_at_random(model: Any, bits: int) -> None:
    """Puts a packed Linear with random integers in the place of every linear module of the decoder's layers."""
    for layer in model.get_decoder().layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, attribute = name.rpartition(".")
                setattr(layer.get_submodule(parent), attribute, random_packed(module, bits))
    share_inputs(model)
    gc.collect()


def random_packed(linear: nn.Linear, bits: int) -> QuantizedLinear:
    packed = QuantizedLinear(
        linear.in_features, linear.out_features, bits=bits, group_size=GROUP_SIZE, sym=True, device=DEVICE
    )
    zeros = torch.full((linear.out_features, linear.in_features // GROUP_SIZE), 2 ** (bits - 1), device=DEVICE)
    packed.qweight.random_(-(2**31), 2**31 - 1)
    packed.qzeros.copy_(pack_zeros(zeros.int(), bits, sym=True))
    # The spread of the weights that it replaces.
    packed.scales.fill_(float(linear.weight.std()) * 12**0.5 / 2**bits)
    packed.g_idx.copy_(group_index(linear.in_features, GROUP_SIZE, DEVICE))
    packed.validate()
    return packed


if __name__ == "__main__":
    main()
