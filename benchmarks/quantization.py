"""What quantization settings cost: increase of the negative log-likelihood over full precision, in nats per token.

    python benchmarks/texts.py python3.11-doc_*.deb --out python3.11-doc.jsonl.gz
    python benchmarks/texts.py debian-handbook_*.deb --out debian-handbook.jsonl.gz
    python benchmarks/texts.py anarchism_*.deb --characters 8000000 --out anarchism.jsonl.gz
    python benchmarks/quantization.py prepare --calibration python3.11-doc.jsonl.gz \\
        --texts debian-handbook.jsonl.gz anarchism.jsonl.gz --out windows.safetensors
    python benchmarks/quantization.py write --windows windows.safetensors --device cuda
    python benchmarks/quantization.py run --windows windows.safetensors --groups default stages --device cuda \\
        --processes 6 --minutes 9 --out benchmarks/results/quantization_smollm2_gpu

The settings are in quantization.yaml. `prepare` makes the windows of tokens, so that all settings see the same ones,
and `run` needs neither texts nor a tokenizer. `write` adds windows that the model writes itself, which settings with
`own_text` need. The processes take the settings in their order. A run holds the windows'
increase, the KL divergence from the full-precision model (mean and 99th percentile over tokens, in nats), the share of
tokens for which both models have the same most likely token, and the seconds. Each is written when it is finished, and
what the file holds is not repeated: the same command goes on after a stop.

``--checkpoints NAME=DIR`` measures GPTQ checkpoints of other tools (gptqmodel_baseline.py) on the same windows.
"""

import argparse
import copy
import fcntl
import itertools
import json
import math
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from common import MODELS, describe, save
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, multiprocessing, nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from lkq_hf.evaluation.divergence import token_statistics
from lkq_hf.quantization.calibrate import find_layers
from lkq_hf.quantization.calibration_data import calibration_tokens, digest
from lkq_hf.quantization.config import PRESETS, TwoStageGPTQConfig
from lkq_hf.quantization.mixed_bits import describe_widths, set_widths
from lkq_hf.quantization.own_text import interleave, own_windows, write_windows
from lkq_hf.quantization.packing import group_index, unpack_weight
from lkq_hf.quantization.quantizer import restore_linear
from lkq_hf.quantization.refinement import BlockRefinement, EndToEnd
from lkq_hf.quantization.walk import quantize_blocks

SETTINGS: dict[str, dict[str, dict[str, Any]]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
WINDOW = 1024
"""Tokens of a window that is measured on."""


@dataclass(frozen=True)
class Experiment:
    """One setting; `config` is its entry of quantization.yaml."""

    method: str
    bits: float
    sym: bool
    seed: int
    group_size: int = 64
    samples: int = 32
    length: int = 512
    config: dict[str, Any] = field(default_factory=dict)

    def calibration(self, tensors: dict[str, Tensor]) -> Tensor:
        """The calibration windows, int64 `[samples, length]`."""
        size = f"{self.samples}x{self.length}.{self.seed}"
        dataset = tensors[f"calibration.{size}"]
        share = self.config.get("own_text", PRESETS[self.config.get("preset", "default")].get("own_text", 0))
        count = own_windows(share, self.samples)
        return interleave(dataset[count:], tensors[f"own.{size}"][:count] if count else dataset[:0]).long()


def model_and_tokenizer(source: str, tokenizer: str | None = None) -> tuple[PreTrainedModel, Any]:
    """A model by its short name, its directory or its GGUF file, in float32, and its tokenizer or the one named."""
    path = MODELS[source]() if source in MODELS else Path(source)
    file, how = {}, {}
    if path.suffix == ".gguf":
        file, how = {"gguf_file": path.name}, {"quantization_config": GgufConfig(dequantize=True)}
        path = path.parent
    model = AutoModelForCausalLM.from_pretrained(path, **file, **how, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(tokenizer or path, **({} if tokenizer else file))


def prepare(given: argparse.Namespace) -> None:
    """Writes the windows; the digests of their tokens are in the file's metadata."""
    _, tokenizer = model_and_tokenizer(given.model, given.tokenizer)
    sources = {}
    for size, seed in itertools.product(given.sizes, given.seeds):
        samples, length = map(int, size.split("x"))
        sources[f"calibration.{samples}x{length}.{seed}"] = given.calibration, samples, length, seed
    sources |= {f"text.{path.name.split('.')[0]}": (path, given.windows, WINDOW, 1234) for path in given.texts}
    tensors, digests = {}, {}
    for name, (path, samples, length, seed) in sources.items():
        tokens, recipe = calibration_tokens(path, tokenizer, samples, length, seed)
        tensors[name], digests[name] = tokens.int(), recipe.tokens_sha256
    save_file(tensors, given.out, metadata=digests)


def write(given: argparse.Namespace) -> None:
    """Adds to the windows a share of as many that the model writes itself."""
    model, tokenizer = model_and_tokenizer(given.model)
    tensors, digests, _ = windows_of(given)
    for name in [name for name in tensors if name.startswith("calibration.")]:
        _, size, seed = name.split(".")
        own, (count, length) = f"own.{size}.{seed}", map(int, size.split("x"))
        if int(seed) in given.seeds and size in given.sizes:
            count = own_windows(given.share, count)
            tokens = write_windows(model.eval(), tokenizer, count, length, int(seed), device=given.device)
            tensors[own], digests[own] = tokens.int(), digest(tokens)
            save_file(tensors, given.windows, metadata=digests)


def quantized(
    model: PreTrainedModel, experiment: Experiment, tokens: Tensor
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A copy of the model with dequantized weights in its linear layers, and what the walk reports."""
    model = copy.deepcopy(model)
    switches = dict(experiment.config)
    preset = switches.pop("preset", "default")
    switches.pop("own_text", None)  # the windows hold it already
    steps = {"refinement": BlockRefinement, "end_to_end": EndToEnd}
    chosen = {name: made(**switches.pop(name)) for name, made in steps.items() if name in switches}
    how = {"bits": experiment.bits, "sym": experiment.sym, "group_size": experiment.group_size}
    how |= {"num_samples": experiment.samples, "model_seqlen": experiment.length}
    by_layer = switches.pop("widths_by_layer", False)
    config = TwoStageGPTQConfig(**how, preset=preset, advanced=switches)
    name, layers = find_layers(model, config)
    details: dict[str, Any] = {}
    if by_layer:
        # Also for a whole number, which users get as one width for all.
        config.mean_bits = float(experiment.bits)
        start = time.perf_counter()
        set_widths(model, config, name, layers, tokens, model.device)
        details["choosing_seconds"] = round(time.perf_counter() - start, 2)
        details |= describe_widths(config, name, layers)
    settings = replace(config.solver_settings(), **chosen)
    report = quantize_blocks(model, name, layers, tokens, settings, device=model.device, batch_size=config.batch_size)
    details |= {"quantization_seconds": round(report.seconds, 2), "peak_memory": report.peak_memory}
    if report.blocks:
        details["blocks"] = [[round(block.before, 6), round(block.after, 6)] for block in report.blocks]
    if report.end_to_end is not None:
        details["end_to_end_divergence"] = [report.end_to_end.before, report.end_to_end.after]
    return restore_linear(model, model.dtype), details


def autoround(
    model: PreTrainedModel, experiment: Experiment, tokens: Tensor, tokenizer: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The same by AutoRound."""
    import auto_round

    model = copy.deepcopy(model).cpu()
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens.cpu()]
    start = time.perf_counter()
    result = auto_round.AutoRound(
        copy.deepcopy(model),
        tokenizer,
        bits=experiment.bits,
        group_size=experiment.group_size,
        sym=experiment.sym,
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=DataLoader(rows, batch_size=8),
        seed=experiment.seed,
        device_map=0 if torch.cuda.is_available() else "cpu",
        **experiment.config["autoround"],
    ).quantize()
    seconds = time.perf_counter() - start
    for name, module in result[0].named_modules():
        if isinstance(module, nn.Linear) and getattr(module, "scale", None) is not None:
            # The peer keeps the product in half precision: the levels and scales it stores are exact.
            weight = module.weight.detach().float().cpu()
            scales = module.scale.detach().float().cpu().view(len(weight), -1, 1)
            levels = (weight.view(len(weight), scales.shape[1], -1) / scales).round()
            with torch.no_grad():
                model.get_submodule(name).weight.copy_((levels * scales).view_as(weight))
    return model, {"quantization_seconds": round(seconds, 2), "peer_version": auto_round.__version__}


def load_gptq(directory: Path) -> PreTrainedModel:
    """A GPTQ checkpoint of any tool, dequantized in float32.

    Raises:
        ValueError: groups that are not consecutive columns, or an asymmetric version 1 checkpoint.
    """
    config = AutoConfig.from_pretrained(directory)
    how = json.loads((directory / "config.json").read_text())["quantization_config"]
    del config.quantization_config
    version_1 = how.get("checkpoint_format", "gptq") == "gptq"
    if version_1 and not how["sym"]:
        raise ValueError("asymmetric zero points of version 1 cannot be told apart; write checkpoint_format gptq_v2")
    tensors = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    state = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "qweight":
            scales, zeros = tensors[f"{module}.scales"], tensors[f"{module}.qzeros"]
            in_features = tensor.shape[0] * 32 // how["bits"]
            size = in_features // scales.shape[0]
            if not torch.equal(tensors[f"{module}.g_idx"].int(), group_index(in_features, size)):
                raise ValueError(f"{module}: groups are not consecutive columns")
            weight = unpack_weight(tensor, zeros, scales, bits=how["bits"], group_size=size, sym=version_1)
            state[f"{module}.weight"] = weight.dequantize(torch.float32)
        elif kind not in ("qzeros", "scales", "g_idx"):
            state[name] = tensor.float()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state)
    return model.eval()


def statistics_of(
    model: PreTrainedModel, windows: Tensor, reference: PreTrainedModel | None = None
) -> dict[str, list[list[float]]]:
    """`token_statistics` of all windows: rows of one value a token."""
    found: dict[str, list[list[float]]] = {}
    for batch in windows.long().split(4 if model.device.type == "cuda" else 1):
        for name, rows in token_statistics(model, batch, reference).items():
            found.setdefault(name, []).extend(rows)
    return found


def window_means(model: PreTrainedModel, texts: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: [statistics.fmean(row) for row in statistics_of(model, each)["nll"]] for name, each in texts.items()}


def measure(
    model: PreTrainedModel, original: PreTrainedModel, texts: dict[str, Tensor], full_precision: dict[str, list[float]]
) -> dict[str, Any]:
    """Losses over full precision by window, and how the two models' predictions differ by token."""
    increase, divergence = {}, {}
    for name, windows in texts.items():
        found = statistics_of(model, windows, original)
        pairs = zip(found["nll"], full_precision[name], strict=True)
        increase[name] = [round(statistics.fmean(own) - full, 5) for own, full in pairs]
        kl, same = (torch.tensor(found[key], dtype=torch.float64).flatten() for key in ("kl", "same_top"))
        shares = {"kl": kl.mean(), "kl_p99": kl.quantile(0.99), "same_top": same.mean()}
        divergence[name] = {key: round(value.item(), 5) for key, value in shares.items()}
    return {
        "increase": increase,
        "mean": {name: round(statistics.fmean(values), 4) for name, values in increase.items()},
        "worst_window": max(max(values) - statistics.fmean(values) for values in increase.values()),
        "divergence": divergence,
    }


def number(text: str) -> float:
    return int(text) if text.isdigit() else float(text)


class Results:
    """A results file that several processes add runs to."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_suffix(".json")

    def read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {"runs": []}

    def add(self, run: dict[str, Any]) -> None:
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = self.read()
            save(self.path, found | {"runs": [*found["runs"], run]})

    def has(self, experiment: Experiment) -> bool:
        own = asdict(experiment)
        runs = (run for run in self.read()["runs"] if "error" not in run)
        return any(all(run.get(key) == value for key, value in own.items() if key != "config") for run in runs)

    def begin(self, about: dict[str, Any], model: PreTrainedModel, texts: dict[str, Tensor]) -> dict[str, list[float]]:
        """Notes what all runs share, and returns the losses in full precision."""
        found = self.read()
        if found.get("settings", about) != about:
            raise SystemExit(f"{self.path} holds runs of other windows or another model: {found['settings']}")
        if "full_precision" not in found:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save(self.path, {"settings": about, "full_precision": window_means(model, texts), "runs": []})
        return self.read()["full_precision"]


def work(index: int, counter: Any, experiments: list[Experiment], given: argparse.Namespace) -> None:
    """One process: takes the next experiment until none is left or the time is over."""
    torch.set_num_threads(given.threads)
    if given.device.startswith("cuda"):
        torch.set_float32_matmul_precision("highest")
    model, tokenizer = model_and_tokenizer(given.model)
    model = model.to(given.device).eval()
    tensors, _, texts = windows_of(given)
    results = Results(given.out)
    full_precision, environment = results.read()["full_precision"], describe()
    while time.time() < given.end:
        with counter.get_lock():
            position = counter.value
            counter.value += 1
        if position >= len(experiments):
            break
        experiment = experiments[position]
        tokens = experiment.calibration(tensors)
        run = asdict(experiment) | {"calibration": digest(tokens)}
        try:
            if "autoround" in experiment.config:
                approximation, details = autoround(model, experiment, tokens, tokenizer)
            else:
                approximation, details = quantized(model, experiment, tokens)
            run |= details | measure(approximation.to(given.device), model, texts, full_precision)
            del approximation
        except Exception:
            # One setting that fails must not end the others, whose device time is paid for.
            run["error"] = traceback.format_exc(limit=4)
        results.add(run | {"environment": environment})
        shown = {key: run[key] for key in ("mean", "worst_window", "quantization_seconds", "error") if key in run}
        print(experiment, json.dumps(shown), flush=True)


def windows_of(given: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Tensor]]:
    """All windows, their digests, and the windows of the texts that are measured on."""
    tensors = load_file(given.windows)
    with safe_open(given.windows, "pt") as file:
        digests = file.metadata()
    texts = {name.removeprefix("text."): each for name, each in tensors.items() if name.startswith("text.")}
    return tensors, digests, texts


def experiments(given: argparse.Namespace) -> Iterable[Experiment]:
    """By group of settings, the most important first; variants are measured with the first scheme only."""
    size = {"group_size": given.group_size, "samples": given.samples, "length": given.length}
    for group in given.groups:
        schemes = given.schemes if group in ("default", "stages", "refined", "own") else given.schemes[:1]
        for scheme, seed, (name, config) in itertools.product(schemes, given.seeds, SETTINGS[group].items()):
            if name in (given.methods or [name]):
                yield from (
                    Experiment(name, bits, scheme == "sym", seed, **size, config=config) for bits in given.bits
                )


def run(given: argparse.Namespace) -> None:
    model, _ = model_and_tokenizer(given.model)
    model = model.to(given.device).eval()
    _, digests, texts = windows_of(given)
    # The same wherever the model was read from.
    about = {"model": f"{model.config.model_type}, {model.num_parameters():,} parameters"}
    about["windows_sha256"] = {name: digests[f"text.{name}"] for name in texts}
    results = Results(given.out)
    full_precision = results.begin(about, model, texts)
    for name, _, source in (each.partition("=") for each in given.checkpoints):
        how = json.loads((Path(source) / "config.json").read_text())["quantization_config"]
        baseline = json.loads((Path(source) / "baseline.json").read_text())
        recipe = baseline["calibration"]
        sizes = recipe["samples"], recipe["length"]
        other = Experiment(name, how["bits"], how["sym"], recipe["seed"], how["group_size"], *sizes)
        if not results.has(other):
            found = measure(load_gptq(Path(source)).to(given.device), model, texts, full_precision)
            details = {"calibration": recipe["tokens_sha256"], "quantization_seconds": baseline["seconds"]}
            details["environment"] = describe()
            results.add(asdict(other) | found | details)
    del model
    waiting = [experiment for experiment in experiments(given) if not results.has(experiment)]
    print(f"{len(waiting)} experiments are to be run", flush=True)
    given.end = time.time() + 60 * given.minutes
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    count = min(given.processes, len(waiting))
    # Daemons end with this process, if it ends in order: not by SIGTERM's default.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    processes = [context.Process(target=work, args=(i, counter, waiting, given), daemon=True) for i in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    first, writer, second = (commands.add_parser(name) for name in ("prepare", "write", "run"))
    for command in (first, writer, second):
        command.add_argument("--model", default="smollm2", help="smollm2, gemma3, a model directory, or a .gguf file")
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the calibration windows")
    for command in (first, second):
        command.add_argument("--out", type=Path, required=True)
    for command in (writer, second):
        command.add_argument("--windows", type=Path, required=True, help="made by prepare")
        command.add_argument("--device", default="cpu")
    for command in (first, writer):
        command.add_argument(
            "--sizes", nargs="+", default=["32x512", "128x2048"], help="calibration windows x tokens of one"
        )
    writer.add_argument("--share", type=float, default=1.0, help="0.5 is enough for --preset refined")
    writer.set_defaults(do=write)
    first.add_argument("--tokenizer", help="directory, instead of the model's own")
    first.add_argument("--calibration", type=Path, required=True, help="text or jsonl file, may be gzipped")
    first.add_argument("--texts", type=Path, nargs="+", required=True, help="texts to measure on, likewise")
    first.add_argument("--windows", type=int, default=32, help="of each text")
    first.set_defaults(do=prepare)
    second.add_argument("--groups", nargs="+", choices=list(SETTINGS), default=["default", "variants", "stages"])
    second.add_argument("--methods", nargs="+", metavar="METHOD", help="of these groups, by default all")
    second.add_argument("--bits", nargs="+", type=number, default=[3, 2, 4], help="3.0 or 3.5 is a mean")
    second.add_argument("--schemes", nargs="+", choices=["asym", "sym"], default=["asym", "sym"])
    second.add_argument("--group-size", type=int, default=64)
    second.add_argument("--samples", type=int, default=32, help="calibration windows")
    second.add_argument("--length", type=int, default=512, help="tokens in a calibration window")
    second.add_argument("--checkpoints", nargs="+", default=[], metavar="NAME=DIR", help="GPTQ, of other tools")
    second.add_argument("--processes", type=int, default=1)
    second.add_argument("--threads", type=int, default=1, help="of each process")
    second.add_argument("--minutes", type=float, default=math.inf, help="begin no experiment after these")
    second.set_defaults(do=run)
    given = parser.parse_args(arguments)
    given.do(given)


if __name__ == "__main__":
    main()
