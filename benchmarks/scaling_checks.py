"""Real runs on one GPU or several: what `scaling.py` computes, and what it does not.

    python benchmarks/scaling_checks.py quantizing experts --results checks.json
    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 2 \
        benchmarks/scaling_checks.py training refining "sharing out" --results checks.json
    python benchmarks/scaling.py report --merge checks.json          # into the tables of docs/scaling.md

The stages of an 8B adapter, on one GPU in two processes of about two minutes each; prompts need no GPU:

    python benchmarks/scaling_checks.py prompts --device cpu --results prompts.json
    python benchmarks/scaling_checks.py answers "answers, plain" "answers, continuous" --results answers.json
    python benchmarks/scaling_checks.py training evaluating judging profile --results training.json

Sizes are those of real models, weights are random. Of each run: seconds of the slowest process, and the peak memory of
the fullest GPU.

    prompts               prompts of SmolLM2 from Python's language reference
    answers               a batch by generate_targets, beside others; "plain" without its loop, "continuous" by
                          transformers' generate_batch
    training              a step of LookaheadTrainer with some prompts for each process
    evaluating, judging   the parts of an evaluation, and at the end the numbers for allocation="profile"
    profile
    quantizing            two layers of the 8B model, by the default method
    experts               one layer of Qwen3-30B-A3B (128 experts)
    refining              one layer of the 8B model, with its refinement
    tuning                a step of tuning all scales of the 8B model, after its layers are rounded to nearest
    refined               all of the 8B model, by the refined preset, with what is compiled for it
    sharing out           one threshold over all heads of the 8B model, with four times a budget of 1,024 provisional
                          entries a head; under tensor parallelism also the gathering of the scores that it needs
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from common import describe, documents_of, save, seconds_of, synchronize
from experts import SHAPE as EXPERTS
from experts import SMALL as FEW_EXPERTS
from peft import get_peft_model
from real_models import smollm2_directory
from scaling import (
    ANSWERED,
    BETWEEN_GPUS,
    COMMON,
    MODELS,
    RECIPE,
    WORK,
    build,
    collect,
    median_seconds,
    peak,
    random_moments,
    row_of,
    sizes_of,
)  # fmt: skip
from torch.distributed.device_mesh import init_device_mesh
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    Qwen3MoeConfig,
    TrainerCallback,
)  # fmt: skip

from lkq_hf import LookaheadKVConfig, LookaheadTrainer, LookaheadTrainingArguments, prepare_model_for_eviction
from lkq_hf.cache import whole_text
from lkq_hf.cache.allocation import MOST, share_out
from lkq_hf.cache.tensor_parallel import DividedHeads
from lkq_hf.evaluation.judge import AnswerJudge
from lkq_hf.evaluation.profile import measure_profile
from lkq_hf.quantization import TwoStageGPTQConfig
from lkq_hf.quantization.calibrate import calibrate, find_layers
from lkq_hf.quantization.refinement import BlockRefinement, EndToEnd
from lkq_hf.quantization.solve import quantize_weight
from lkq_hf.quantization.walk import quantize_blocks
from lkq_hf.training import generate_targets
from lkq_hf.training.prompts import PromptBuilder, PromptMix

# By plan, (model, layers, prompts in a forward).
TRAINING = {
    "one GPU": [("8B", 32, 1), ("8B", 32, 4), ("8B", 32, 8), ("8B", 32, 16)],
    "DDP": [("8B", 32, 8)],
    # Two GPUs of 80 GB hold the second and one does not.
    "FSDP2": [("8B", 32, 8), ("70B", 56, 1)],
}
BUDGET = 1024

Figures = dict[str, float]
Add = Callable[..., None]


def run_prompts(plan: str, device: str, shrink: int, add: Add) -> None:
    tokens, count = RECIPE["prompt_tokens"], 200 // shrink
    tokenizer = AutoTokenizer.from_pretrained(smollm2_directory())
    # Documents are tokenized once for all prompts, and Python's are fewer than anyone's own.
    builder = PromptBuilder(documents_of(None), tokenizer, PromptMix(min_length=tokens, max_length=tokens))
    start = time.perf_counter()
    for index in range(count):
        builder.prompt(index)
    add("prompts", "8B", 0, tokens, {"seconds": (time.perf_counter() - start) / count, "bytes": 0})


def run_answers(plan: str, device: str, shrink: int, add: Add, way: str = "") -> None:
    model = build(sizes_of("8B", shrink), 32 // shrink, device, shrink)
    tokens, answer = RECIPE["prompt_tokens"] // shrink, RECIPE["response_tokens"] // shrink
    random = torch.Generator().manual_seed(0)

    def prompts(count: int) -> list[list[int]]:
        return torch.randint(3, 1000 // shrink, (count, tokens), generator=random).tolist()

    def respond(batches: int) -> None:
        with tempfile.TemporaryDirectory() as directory:
            rows = [{"input_ids": each} for each in prompts(batches * ANSWERED)]
            generate_targets(model, rows, directory, answer, batch_tokens=ANSWERED * (tokens + answer))

    def continuous(batches: int) -> None:
        config = GenerationConfig(max_new_tokens=answer, do_sample=False, eos_token_id=-1, pad_token_id=0)
        found = model.generate_batch(prompts(batches * ANSWERED), generation_config=config)
        if sum(len(each.generated_tokens) for each in found.values()) != answer * ANSWERED * batches:
            raise RuntimeError("generate_batch has not answered everything")

    whole_text.LEAST_STEPS = math.inf if way else 0  # type: ignore[assignment]
    run = continuous if "continuous" in way else respond
    collect(device)
    run(1)
    # Of a call of its own, what it compiles is not counted: many batches share it.
    one, three = (seconds_of(partial(run, batches), 1, warm_up=0)[0][0] for batches in (1, 3))
    figures = {"seconds": (three - one) / 2, "bytes": peak(device)}
    add("answers" + way, "8B", 32, RECIPE["prompt_tokens"], figures, ANSWERED)


def run_training(plan: str, device: str, shrink: int, add: Add) -> None:
    for name, layers, prompts in TRAINING[plan]:
        make = _build_repeated if plan == "FSDP2" else build
        model = make(sizes_of(name, shrink), layers // shrink or 1, device, shrink)
        figures = _steps(model, RECIPE["prompt_tokens"] // shrink, prompts, device, shrink)
        add("training", name, layers, RECIPE["prompt_tokens"], figures, prompts)


def run_adapted(plan: str, device: str, shrink: int, add: Add, work: str) -> None:
    """What comes between the steps of a training, and after them."""
    model = get_peft_model(build(sizes_of("8B", shrink), 32 // shrink, device, shrink), LookaheadKVConfig()).eval()
    prepare_model_for_eviction(model)
    rows = [row_of(RECIPE["prompt_tokens"] // shrink, shrink)] * 8
    judge = AnswerJudge(rows, [budget // shrink for budget in (64, 128, 256)])
    budgets = [budget // shrink for budget in (64, 128, 256, 512, 1024)]
    with _trainer(model, rows, 8, device) as trainer:
        runs: dict[str, Callable[[], Any]] = {
            "evaluating": lambda: trainer.evaluate(rows),
            "judging": lambda: judge(model),
            "profile": lambda: measure_profile(model, [row["input_ids"] for row in rows], budgets, progress=False),
        }
        collect(device)
        seconds = seconds_of(runs[work], 1)[0][0]
    add(work, "8B", 32, RECIPE["prompt_tokens"], {"seconds": seconds, "bytes": peak(device)}, len(rows))


def run_quantizing(plan: str, device: str, shrink: int, add: Add) -> None:
    model = build(sizes_of("8B", shrink), 2, device, shrink)
    add(
        "quantizing", "8B", 2, RECIPE["calibration_tokens"], _walk(model, RECIPE["calibration_tokens"], device, shrink)
    )


def run_experts(plan: str, device: str, shrink: int, add: Add) -> None:
    shape = (EXPERTS if shrink == 1 else FEW_EXPERTS) | {"num_hidden_layers": 1}
    with torch.device(device):
        config = Qwen3MoeConfig(**shape, norm_topk_prob=True)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    tokens = RECIPE["calibration_tokens"] // 4
    add("experts", "Qwen3-30B-A3B", 1, tokens, _walk(model, tokens, device, shrink))


def run_refining(plan: str, device: str, shrink: int, add: Add) -> None:
    model = build(sizes_of("8B", shrink), 1, device, shrink)
    refinement = BlockRefinement() if shrink == 1 else BlockRefinement(steps=2)
    tokens = RECIPE["calibration_tokens"] // 4
    add("refining", "8B", 1, tokens, _walk(model, tokens, device, shrink, refinement=refinement))


def run_tuning(plan: str, device: str, shrink: int, add: Add) -> None:
    """A step's seconds are what two walks of different numbers of steps differ in; the first walk of all compiles.

    The model waits in main memory, as in the quantizer.
    """
    tokens, few, more = RECIPE["calibration_tokens"] // 4, 2, 12
    walks = []
    for steps in (few, few, more):
        model = build(sizes_of("8B", shrink), 32 // shrink, device, shrink).cpu()
        switches = {"stages": (), "round_to_nearest": True, "end_to_end": EndToEnd(steps=steps)}
        walks.append(_walk(model, tokens, device, shrink, **switches))
        del model
    step = (walks[2]["seconds"] - walks[1]["seconds"]) / (more - few)
    add("tuning", "8B", 32, tokens, {"seconds": step, "bytes": walks[2]["bytes"]})


def run_refined(plan: str, device: str, shrink: int, add: Add) -> None:
    """As users run it: the model waits in main memory, and writes half of the windows."""
    model = build(sizes_of("8B", shrink), 32 // shrink, device, shrink).cpu()
    tokens = RECIPE["calibration_tokens"]
    windows = _windows(tokens, shrink)
    config = TwoStageGPTQConfig(
        preset="refined",
        dataset=[{"input_ids": row} for row in windows.tolist()],
        num_samples=len(windows),
        model_seqlen=windows.shape[1],
        group_size=_group_size(shrink),
        device=device,
    )
    report = calibrate(model, config)
    add("refined", "8B", 32, tokens, {"seconds": report.seconds, "bytes": report.peak_memory})


def run_sharing_out(plan: str, device: str, shrink: int, add: Add) -> None:
    processes, layers = PartialState().num_processes, MODELS["8B"]["num_hidden_layers"]
    shape = 1, COMMON["num_key_value_heads"] // processes, MOST * BUDGET // shrink
    scores = [torch.rand(shape, device=device) for _ in range(layers)]
    collect(device)
    if processes > 1:
        mesh = init_device_mesh(torch.device(device).type, (processes,))
        divided, own = DividedHeads(mesh, COMMON["num_key_value_heads"]), scores
        seconds = median_seconds(lambda: divided.gather(own), 9)
        add("gathering", "8B", layers, MOST * BUDGET, {"seconds": seconds, "bytes": peak(device)})
        scores = divided.gather(own)
    seconds = median_seconds(lambda: share_out(scores, BUDGET // shrink, "global"), 9)
    add("sharing out", "8B", layers, MOST * BUDGET, {"seconds": seconds, "bytes": peak(device)})


RUNS: dict[str, Callable[[str, str, int, Add], None]] = {
    "prompts": run_prompts, "answers": run_answers, "answers, plain": partial(run_answers, way=", plain"),
    "answers, continuous": partial(run_answers, way=", continuous"), "training": run_training,
    **{work: partial(run_adapted, work=work) for work in ("evaluating", "judging", "profile")},
    "quantizing": run_quantizing, "experts": run_experts, "refining": run_refining, "tuning": run_tuning,
    "refined": run_refined, "sharing out": run_sharing_out,
}  # fmt: skip


class _Clock(TrainerCallback):
    """Seconds of each step, and the peak memory after the first two."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        synchronize()
        self.seconds.append(time.perf_counter() - self._start)


@contextmanager
def _trainer(model: Any, rows: list[Any], prompts: int, device: str, *callbacks: Any) -> Iterator[Any]:
    """Of seven steps with so many prompts for each process, in the order of the rows; gives back its memory."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = LookaheadTrainingArguments(
            output_dir=directory, report_to=[], use_cpu=device == "cpu", save_strategy="no", disable_tqdm=True,
            per_device_train_batch_size=prompts, per_device_eval_batch_size=prompts, max_steps=7,
            train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = LookaheadTrainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))
        yield trainer
        trainer.accelerator.free_memory()


def _steps(model: Any, tokens: int, prompts: int, device: str, shrink: int) -> Figures:
    """Seconds of a step with so many prompts for each process, and the peak bytes, of LookaheadTrainer.

    A fifth of the prompts ends inside an answer, where lengths differ. Sorted by length, as they are in a training,
    they fill one of five batches, which then is padded.
    """
    collect(device)
    clock = _Clock(device)
    of_a_step = prompts * PartialState().num_processes
    even, uneven = ([row_of(tokens + by * row, shrink) for row in range(of_a_step)] for by in (0, 1))
    rows = 3 * even + uneven + 3 * even
    with _trainer(get_peft_model(model, LookaheadKVConfig()), rows, prompts, device, clock) as trainer:
        trainer.train()
    return {"seconds": statistics.mean(clock.seconds[2:]), "bytes": peak(device)}


def _build_repeated(sizes: dict[str, int], layers: int, device: str, shrink: int) -> Any:
    """A model all of whose layers are one in memory: each process cuts its own part out of them, and no GPU has to
    hold the whole before."""
    one = build(sizes, 1, device, shrink)
    with torch.device("meta"):
        config = LlamaConfig(**one.config.to_dict() | {"num_hidden_layers": layers})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.config._name_or_path = "random"
    model.model.rotary_emb = one.model.rotary_emb
    for part in ("model.embed_tokens", "model.norm", "lm_head"):
        model.get_submodule(part).load_state_dict(one.get_submodule(part).state_dict(), assign=True)
    for layer in model.model.layers:
        layer.load_state_dict(one.model.layers[0].state_dict(), assign=True)
    return model.eval()


def _group_size(shrink: int) -> int:
    return 128 if shrink == 1 else 32


def _windows(tokens: int, shrink: int) -> torch.Tensor:
    """Random calibration windows, int64 `[windows, length]`: the length shrinks, and not their number."""
    return torch.randint(3, 1000 // shrink, (tokens // 2048, 2048 // shrink), generator=torch.Generator())


def _walk(model: Any, tokens: int, device: str, shrink: int, **changes: Any) -> Figures:
    """Seconds of a calibration walk by the default method, and the peak bytes."""
    config = TwoStageGPTQConfig(group_size=_group_size(shrink))
    name, layers = find_layers(model, config)
    settings = replace(config.solver_settings(), **changes)
    windows = _windows(tokens, shrink)
    linear = {module.in_features: module for module in layers.values() if isinstance(module, torch.nn.Linear)}
    for module in linear.values():
        rows = module.weight[:128].to(device)
        quantize_weight(rows, random_moments(module.in_features, device), settings)  # compiles
    collect(device)
    report = quantize_blocks(model, name, layers, windows, settings, device=device, batch_size=8)
    return {"seconds": report.seconds, "bytes": report.peak_memory}


def bandwidth(device: str, shrink: int) -> float:
    """GB/s that a GPU sends and receives, in an all-reduce or in an all-gather, whichever is less; of 1 GiB."""
    processes = torch.distributed.get_world_size()
    part = torch.ones(2**28 // shrink**4 // processes, device=device)
    whole = part.repeat(processes)
    sent = whole.numel() * whole.element_size() * (processes - 1) / processes
    reducing = median_seconds(lambda: torch.distributed.all_reduce(whole))
    gathering = median_seconds(lambda: torch.distributed.all_gather_into_tensor(whole, part))
    return min(2 * sent / reducing, sent / gathering) / 1e9


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="+", choices=list(RUNS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shrink", type=int, default=1, help="divides all sizes: a quick check without a GPU")
    parser.add_argument("--results", type=Path, required=True)
    options = parser.parse_args(arguments)
    state = PartialState(cpu=options.device == "cpu")
    place = str(state.device) if options.device == "cuda" else options.device
    plan = "FSDP2" if parse_flag_from_env("ACCELERATE_USE_FSDP") else "DDP" if state.num_processes > 1 else "one GPU"
    results: dict[str, Any] = {"hardware": describe(), "shrink": options.shrink, "links": {}, "checks": []}
    if state.num_processes > 1:
        results["links"][BETWEEN_GPUS] = round(bandwidth(place, options.shrink), 1)

    def add(work: str, name: str, layers: int, tokens: int, figures: Figures, prompts: int = 1) -> None:
        # The slowest process, and the fullest GPU.
        values = torch.tensor([figures["seconds"], figures["bytes"]], dtype=torch.float64, device=place)
        if state.num_processes > 1:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        seconds, size = values.tolist()
        of_heads = work in ("gathering", "sharing out") and state.num_processes > 1
        row = {"work": work, "model": name, "layers": layers, "tokens": tokens, "seconds": seconds}
        row["plan"] = "tensor parallel" if of_heads else plan
        results["checks"].append(row | {"prompts": prompts, "gpus": state.num_processes, "bytes": int(size)})
        if state.is_main_process:
            print(WORK[work], json.dumps(results["checks"][-1]), flush=True)
            save(options.results, results)

    failed = []
    for work in options.work:
        try:
            RUNS[work](plan, place, options.shrink, add)
        except Exception:  # the others are still worth their time
            traceback.print_exc()
            failed.append(work)
        collect(place)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
