"""The peer: quantize a model with GPTQModel, on the very calibration windows that lkq-hf uses for a file and seed.

GPTQModel wants newer torch than lkq-hf does, so it lives in an environment of its own:

    python -m venv venv-gptqmodel
    venv-gptqmodel/bin/pip install torch==2.14.1 torchvision==0.29.1 peft==0.21.*
    venv-gptqmodel/bin/pip install --no-build-isolation gptqmodel==7.7.0
    GPTQMODEL_CPU_WORKERS=2 PYTHONPATH=. venv-gptqmodel/bin/python benchmarks/gptqmodel_baseline.py \\
        MODEL --dataset python-doc.jsonl --bits 3 --seed 0 --settings strongest --out OUT

``strongest`` are the settings that lost the fewest nats among those tried: MSE-searched grids (norm 2.4), group-aware
order, and GPTAQ with alpha 0.25. ``defaults`` are GPTQModel's own.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import GPTAQConfig
from transformers import AutoTokenizer

from lkq_hf.quantization.calibration_data import calibration_tokens


def settings(name: str, device: str) -> dict:
    if name == "defaults":
        return {}
    return {"mse": 2.4, "act_group_aware": True, "gptaq": GPTAQConfig(alpha=0.25, device=device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of the full-precision model")
    parser.add_argument("--dataset", type=Path, required=True, help="text or jsonl file to calibrate on")
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--settings", choices=("strongest", "defaults"), default="strongest")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--sym", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    tokens, recipe = calibration_tokens(
        arguments.dataset,
        AutoTokenizer.from_pretrained(arguments.model),
        samples=arguments.samples,
        length=arguments.length,
        seed=arguments.seed,
    )
    windows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    torch.manual_seed(arguments.seed)
    config = QuantizeConfig(
        bits=arguments.bits,
        group_size=arguments.group_size,
        sym=arguments.sym,
        format="gptq" if arguments.sym else "gptq_v2",
        device=arguments.device,
        **settings(arguments.settings, arguments.device),
    )
    start = time.perf_counter()
    model = GPTQModel.load(str(arguments.model), config, dtype=torch.float32)
    model.quantize(windows, batch_size=1)
    model.save(str(arguments.out))
    recipe_of_run = {
        "settings": arguments.settings,
        "seconds": round(time.perf_counter() - start, 1),
        "calibration": recipe.to_dict(),
    }
    (arguments.out / "baseline.json").write_text(json.dumps(recipe_of_run, indent=2) + "\n")
    print(json.dumps(recipe_of_run))


if __name__ == "__main__":
    main()
