"""What each quantization method costs: increase of the negative log-likelihood over full precision, in nats per token.

Each run also has the KL divergence from the full-precision model (mean and 99th percentile over tokens, in nats) and
the share of tokens for which both models have the same most likely token.

    python benchmarks/texts.py python3.11-doc_*.deb --out python3.11-doc.jsonl.gz
    python benchmarks/texts.py debian-handbook_*.deb --out debian-handbook.jsonl.gz
    python benchmarks/texts.py anarchism_*.deb --characters 8000000 --out anarchism.jsonl.gz
    python benchmarks/quantization.py --calibration python3.11-doc.jsonl.gz \
        --texts debian-handbook.jsonl.gz anarchism.jsonl.gz --device cuda \
        --out benchmarks/results/quantization_smollm2.json

Every method sees the same calibration tokens and the same windows of text. The cells of the table run in the order of
their importance; each is written when it is finished, and cells that are in the file already are not repeated, so a
run may be stopped (``--minutes``) and continued. ``--part 1/2`` and ``--part 2/2``, with a file each, share the cells
between two GPUs. ``report.py`` makes tables and the picture. ``--checkpoints`` measures GPTQ checkpoints of
other tools (`gptqmodel_baseline.py`) likewise.

Versions of transformers convert the tokenizer of a GGUF file differently (5.17 and 5.23 do). For a run that is to
continue or to be compared with one of another version, ``--tokenizer`` names the directory with the tokenizer that the
first one used; ``windows_sha256`` in the results shows whether the texts are the same.
"""

import argparse
import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import MODELS, describe, parser, save
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lkq_hf.evaluation.divergence import token_statistics
from lkq_hf.quantization.calibrate import find_layers
from lkq_hf.quantization.calibration_data import calibration_tokens
from lkq_hf.quantization.config import TwoStageGPTQConfig
from lkq_hf.quantization.packing import group_index, unpack_weight
from lkq_hf.quantization.quantizer import restore_linear
from lkq_hf.quantization.walk import WalkReport, quantize_blocks

PAPER = {"preset": "paper", "alpha": 0.0}
PLAIN = {**PAPER, "stages": ()}
DEFAULT: dict[str, dict[str, Any]] = {"default": {}}
# What the published stages bring, one by one, with the weight of the deviation and the sweeps.
STAGES: dict[str, dict[str, Any]] = {
    "round to nearest": {**PLAIN, "round_to_nearest": True},
    "GPTQ": PLAIN,
    "GPTQ + MSE-searched scales": {**PLAIN, "scale_search": "mse"},
    "stage 1 only": {**PAPER, "stages": ("stage1",)},
    "stage 2 only": {**PAPER, "stages": ("stage2",)},
    "both stages": PAPER,
    "both stages, alpha 0.25 (preset paper)": {"preset": "paper"},
    "both stages, alpha 1": {"preset": "paper", "alpha": 1.0},
    "both stages, 3 sweeps": {**PAPER, "sweeps": 3},
}
# The default with one thing changed.
VARIANTS: dict[str, dict[str, Any]] = {
    "default, alpha 0": {"alpha": 0.0},
    "default, alpha 0.5": {"alpha": 0.5},
    "default, 3 sweeps": {"sweeps": 3},
    "default, group-aware order": {"column_order": "group_aware"},
    "default, damping 0.3": {"damp_percent": 0.3},
}
# The default of before the residual stream's deviation was part of it, and the same with one thing more changed.
UNCORRECTED = "residual not corrected"
UNCORRECTED_VARIANTS: dict[str, dict[str, Any]] = {UNCORRECTED: {"corrected_residual": False}} | {
    f"{UNCORRECTED}, {name}": {"corrected_residual": False, **changes}
    for name, changes in {
        "alpha 0.5": {"alpha": 0.5},
        "alpha 1": {"alpha": 1.0},
        "1 sweep": {"sweeps": 1},
        "3 sweeps": {"sweeps": 3},
        "20 sweeps": {"sweeps": 20},
        "group-aware order": {"column_order": "group_aware"},
        "stored order": {"column_order": "stored"},
        "damping 0.01": {"damp_percent": 0.01},
        "damping 0.03": {"damp_percent": 0.03},
        "damping 0.3": {"damp_percent": 0.3},
        "stage 2 instead of descent": {"stages": ("stage1", "stage2")},
        "no stage 1": {"stages": ("descent",)},
    }.items()
}
METHODS = {**DEFAULT, **STAGES, **VARIANTS, **UNCORRECTED_VARIANTS}


class Cell(NamedTuple):
    method: str
    bits: int
    sym: bool
    seed: int


def cells(bits: list[int], schemes: list[str], seeds: list[int], methods: list[str]) -> Iterator[Cell]:
    """The table, most important cells first. Variants are measured with the first scheme only."""

    def tier(names: Iterable[str], scheme: str, some_seeds: list[int]) -> Iterator[Cell]:
        chosen = [name for name in names if name in methods]
        for seed, method, width in itertools.product(some_seeds, chosen, bits):
            yield Cell(method, width, scheme == "sym", seed)

    yield from tier(DEFAULT, schemes[0], seeds)
    yield from tier(VARIANTS, schemes[0], seeds[:1])
    yield from tier(STAGES, schemes[0], seeds)
    for scheme in schemes[1:]:
        yield from tier(DEFAULT, scheme, seeds)
        yield from tier(STAGES, scheme, seeds)
    yield from tier(VARIANTS, schemes[0], seeds[1:])
    yield from tier(UNCORRECTED_VARIANTS, schemes[0], seeds)


def load(source: str, tokenizer: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model by its short name, its directory or its GGUF file, in float32, and its tokenizer or the one named."""
    path = MODELS[source]() if source in MODELS else Path(source)
    if path.suffix == ".gguf":
        file = {"gguf_file": path.name}
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, **file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        return model, AutoTokenizer.from_pretrained(tokenizer or path.parent, **({} if tokenizer else file))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(tokenizer or path)


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
    model: PreTrainedModel, windows: Tensor, batch_size: int, reference: PreTrainedModel | None = None
) -> dict[str, list[list[float]]]:
    """`token_statistics` of all windows: rows of one value a token."""
    found: dict[str, list[list[float]]] = {}
    for batch in windows.split(batch_size):
        for name, rows in token_statistics(model, batch, reference).items():
            found.setdefault(name, []).extend(rows)
    return found


def quantized(
    model: PreTrainedModel, config: TwoStageGPTQConfig, tokens: Tensor
) -> tuple[PreTrainedModel, WalkReport]:
    """A copy of `model` with dequantized weights in its linear layers, and the report of the walk."""
    model = copy.deepcopy(model)
    list_name, layers = find_layers(model, config)
    how = {"device": model.device, "batch_size": config.batch_size}
    report = quantize_blocks(model, list_name, layers, tokens, config.solver_settings(), **how)
    return restore_linear(model, model.dtype), report


class Measurement:
    """A results file, the model and the windows; writes each finished run."""

    def __init__(
        self, path: Path, settings: dict[str, Any], model: PreTrainedModel, windows: dict[str, Tensor]
    ) -> None:
        self.path = path
        self.model = model
        self.windows = windows
        self.batch_size = 4 if model.device.type == "cuda" else 1
        self.environment = describe()
        self.results: dict[str, Any] = {"settings": settings, "runs": []}
        if path.exists():
            self.results = json.loads(path.read_text())
            if self.results["settings"] != settings:
                raise SystemExit(f"{path} holds runs with other settings: {self.results['settings']}")
        if "full_precision" not in self.results:
            self.results["full_precision"] = {
                name: _window_means(statistics_of(model, each, self.batch_size)["nll"])
                for name, each in windows.items()
            }
        self.full_precision = self.results["full_precision"]
        means = {name: round(statistics.fmean(losses), 4) for name, losses in self.full_precision.items()}
        print("full precision:", means, flush=True)

    def has(self, cell: Cell) -> bool:
        return any(cell == Cell(*(run[field] for field in Cell._fields)) for run in self.results["runs"])

    def add(self, cell: Cell, model: PreTrainedModel, **details: Any) -> dict[str, float]:
        """Measures a quantized model and writes the run; returns its mean increase for each text."""
        increase, divergence = {}, {}
        for name, each in self.windows.items():
            found = statistics_of(model, each, self.batch_size, self.model)
            pairs = zip(_window_means(found["nll"]), self.full_precision[name], strict=True)
            increase[name] = [round(loss - base, 5) for loss, base in pairs]
            kl, same = (torch.tensor(found[key], dtype=torch.float64).flatten() for key in ("kl", "same_top"))
            divergence[name] = {
                "kl": round(kl.mean().item(), 5),
                "kl_p99": round(kl.quantile(0.99).item(), 5),
                "same_top": round(same.mean().item(), 5),
            }
        run = {**cell._asdict(), "increase": increase, "divergence": divergence, **details}
        self.results["runs"].append(run | {"environment": self.environment})
        save(self.path, self.results)
        return {name: round(statistics.fmean(values), 4) for name, values in increase.items()}


def _window_means(rows: list[list[float]]) -> list[float]:
    return [statistics.fmean(row) for row in rows]


def part(text: str) -> tuple[int, int]:
    index, total = map(int, text.split("/"))
    if not 1 <= index <= total:
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, found {text}")
    return index, total


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="smollm2", help="smollm2, gemma3, a model directory, or a .gguf file")
    options.add_argument("--tokenizer", type=Path, metavar="DIR", help="instead of the model's own")
    options.add_argument("--calibration", required=True, type=Path, help="text or jsonl file, may be gzipped")
    options.add_argument("--texts", required=True, nargs="+", type=Path, help="texts to measure on, likewise")
    options.add_argument("--bits", nargs="+", type=int, default=[3, 2, 4])
    options.add_argument("--schemes", nargs="+", choices=["asym", "sym"], default=["asym", "sym"])
    options.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the calibration windows")
    options.add_argument(
        "--part", type=part, default=(1, 1), metavar="I/N", help="only every N-th cell, from the I-th"
    )
    options.add_argument("--minutes", type=float, default=math.inf, help="begin no cell that would end later")
    options.add_argument("--group-size", type=int, default=64)
    options.add_argument("--samples", type=int, default=32, help="calibration windows")
    options.add_argument("--length", type=int, default=512, help="tokens in a calibration window")
    options.add_argument("--windows", type=int, default=32, help="windows of 1,024 tokens from each text")
    options.add_argument("--batch-size", type=int, default=8, help="calibration windows in a block at once")
    options.add_argument("--device", default="cpu")
    options.add_argument("--checkpoints", nargs="+", default=[], metavar="NAME=DIR", help="GPTQ, of other tools")
    given = options.parse_args()
    begin = time.perf_counter()

    model, tokenizer = load(given.model, given.tokenizer)
    model = model.to(given.device).eval()
    windows, digests = {}, {}
    for path in given.texts:
        name = path.name.split(".")[0]
        windows[name], recipe = calibration_tokens(path, tokenizer, given.windows, 1024, seed=1234)
        digests[name] = recipe.tokens_sha256
    # The same wherever the model was read from.
    settings = {"model": f"{model.config.model_type}, {model.num_parameters():,} parameters"}
    settings |= {name: getattr(given, name) for name in ("group_size", "samples", "length")}
    measurement = Measurement(given.out, settings | {"windows_sha256": digests}, model, windows)
    size = given.samples, given.length
    calibration = {seed: calibration_tokens(given.calibration, tokenizer, *size, seed) for seed in given.seeds}
    longest = 0.0
    plan = list(cells(given.bits, given.schemes, given.seeds, given.methods))
    for cell in plan[given.part[0] - 1 :: given.part[1]]:
        if measurement.has(cell):
            continue
        start = time.perf_counter()
        if start - begin + longest > 60 * given.minutes:
            print("the time is over; the same command continues", flush=True)
            break
        how = {"bits": cell.bits, "group_size": given.group_size, "sym": cell.sym}
        switches = {"preset": "default", "batch_size": given.batch_size, **METHODS[cell.method]}
        config = TwoStageGPTQConfig(**how, preset=switches.pop("preset"), advanced=switches)
        tokens, recipe = calibration[cell.seed]
        approximation, report = quantized(model, config, tokens)
        details = {"calibration": recipe.tokens_sha256, "quantization_seconds": round(report.seconds, 2)}
        increase = measurement.add(cell, approximation, **details)
        seconds = time.perf_counter() - start
        longest = max(longest, seconds)
        print(f"{cell}: {increase} ({seconds:.1f} s)", flush=True)
    for name, _, source in (checkpoint.partition("=") for checkpoint in given.checkpoints):
        how = json.loads((Path(source) / "config.json").read_text())["quantization_config"]
        recipe = json.loads((Path(source) / "baseline.json").read_text())["calibration"]
        cell = Cell(name, how["bits"], how["sym"], recipe["seed"])
        if not measurement.has(cell):
            other = load_gptq(Path(source)).to(given.device)
            print(cell, measurement.add(cell, other, calibration=recipe["tokens_sha256"]), flush=True)


if __name__ == "__main__":
    main()
