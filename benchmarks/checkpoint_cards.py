"""Quantize SmolLM2-135M-Instruct to 4 and 3 bits, measure the checkpoints, and write their cards for the Hub.

    python benchmarks/checkpoint_cards.py --calibration python3.11-doc.jsonl.gz \
        --texts debian-handbook.jsonl.gz anarchism.jsonl.gz --device cuda --checkpoints out --cards model_cards

The texts are those of quantization.py. Checkpoints, with their cards, land in ``--checkpoints``; the cards alone in
``--cards``. The commands that a card names do the same without this script.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from common import describe, parser, save
from huggingface_hub import EvalResult
from quantization import load
from tables import RESULTS
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lkq_hf.evaluation.journal import Journal
from lkq_hf.evaluation.perplexity import evaluate_perplexity, text_windows
from lkq_hf.hub import check_complete, read_contents
from lkq_hf.quantization import TwoStageGPTQConfig, TwoStageQuantizer
from lkq_hf.sharing.cards import CARD, BaseModel, render_card
from lkq_hf.text.documents import read_documents

BASE = BaseModel("HuggingFaceTB/SmolLM2-135M-Instruct", {"license": "apache-2.0"}, "en")
WINDOW = 1024
COMMANDS = """

## Made and measured with

```sh
python benchmarks/texts.py python3.11-doc_*.deb --out {calibration.name}
lkq-hf quantize {base} --bits {bits} --group-size {group_size} --no-sym --dtype bfloat16 \\
    --dataset {calibration.name} --num-samples {samples} --model-seqlen {length} --out {name}
lkq-hf evaluate perplexity {name} --text TEXT --window {window} --max-windows {windows} --out perplexity
```

in the repository of lkq-hf (`benchmarks/checkpoint_cards.py` does all of it), on {hardware} in {seconds:.0f} s. The
base model's weights were dequantized from a 4-bit GGUF file, so that 4 bits may lose less here than on the original
weights. Each value is over the first {windows} windows of {window} tokens of a text that was not calibrated on: Debian
packages debian-handbook and anarchism.
"""


def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[Path], count: int
) -> dict[str, Any]:
    rows = {}
    for text in texts:
        windows = text_windows(read_documents([text]), tokenizer, WINDOW, count)
        with tempfile.TemporaryDirectory() as directory:
            journal = Journal(Path(directory), {"text": text.name})
            rows[text.name.split(".")[0]] = evaluate_perplexity(model, windows, journal, batch_size=4)["rows"][0]
    return rows


def card_results(base: dict[str, Any], quantized: dict[str, Any]) -> list[EvalResult]:
    found = []
    for text, row in quantized.items():
        for name, kind, value in (
            ("Perplexity", "perplexity", row["perplexity"]),
            ("Perplexity of the base model", "perplexity", base[text]["perplexity"]),
            ("NLL lost, nats per token", "nll", row["nll"] - base[text]["nll"]),
        ):
            found.append(EvalResult("text-generation", "custom", text, kind, round(value, 4), metric_name=name))
    return found


def main() -> None:
    options = parser(__doc__, RESULTS / "checkpoint_cards.json")
    options.add_argument("--model", default="smollm2", help="smollm2, its directory, or its .gguf file")
    options.add_argument("--calibration", required=True, type=Path)
    options.add_argument("--texts", required=True, nargs="+", type=Path)
    options.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    options.add_argument("--group-size", type=int, default=64)
    options.add_argument("--samples", type=int, default=128)
    options.add_argument("--length", type=int, default=2048)
    options.add_argument("--windows", type=int, default=128, help="windows of 1,024 tokens from each text")
    options.add_argument("--device", default="cpu")
    options.add_argument("--checkpoints", type=Path, required=True)
    options.add_argument("--cards", type=Path, required=True)
    given = options.parse_args()
    machine = describe()
    results: dict[str, Any] = {"environment": machine, "window": WINDOW, "windows": given.windows, "checkpoints": {}}
    for bits in given.bits:
        model, tokenizer = load(given.model)
        model = model.to(torch.bfloat16).eval()
        tokenizer.name_or_path = BASE.id  # what the checkpoint records, wherever the weights were read from
        if "base" not in results:
            results["base"] = perplexity(model.to(given.device), tokenizer, given.texts, given.windows)
            model.to("cpu")
        name = f"smollm2-135m-instruct-w{bits}-g{given.group_size}"
        directory = given.checkpoints / name
        config = TwoStageGPTQConfig(
            bits=bits,
            group_size=given.group_size,
            sym=False,
            dataset=given.calibration,
            tokenizer=tokenizer,
            num_samples=given.samples,
            model_seqlen=given.length,
            device=given.device,
            meta={"base_model": BASE.id},
        )
        quantizer = TwoStageQuantizer.from_pretrained(model)
        quantizer.quantize(directory, config=config)
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(given.device)
        rows = perplexity(loaded, tokenizer, given.texts, given.windows)
        seconds = quantizer.report.seconds
        results["checkpoints"][name] = {"quantization_seconds": round(seconds, 1), "rows": rows}
        contents = read_contents(directory)
        check_complete(contents)
        card = render_card(contents, f"YOU/{name}", BASE, card_results(results["base"], rows))
        place = machine.get("gpu") or f"a CPU (threads: {machine['threads']})"
        filled = vars(given) | {"bits": bits, "name": name, "base": BASE.id, "window": WINDOW, "seconds": seconds}
        card.text = card.text.rstrip() + COMMANDS.format(hardware=place, **filled)
        for target in (directory, given.cards / name):
            target.mkdir(parents=True, exist_ok=True)
            card.save(target / CARD)
        save(given.out, results)
        print(name, rows, flush=True)


if __name__ == "__main__":
    main()
