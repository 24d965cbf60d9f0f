"""What reading a prompt in chunks costs, where nothing is parked: planted facts that are found.

    python benchmarks/chunked_prefill.py --prompts 8 --out benchmarks/results/chunked_prefill

Each prompt hides one fact and ends with the question. SmolLM2-135M-Instruct with the shipped adapter reads it at once,
in chunks, and in chunks with everything parked. Without parking each chunk attends to what was kept of those before,
four times the budget. Texts are Python's language reference, unless ``--texts`` names others.
"""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from common import parser, real_model, save
from tqdm import tqdm

from lkq_hf import LookaheadCache, shipped_adapter
from lkq_hf.evaluation.environment import environment
from lkq_hf.evaluation.tasks.needles import Needle
from lkq_hf.text.documents import read_documents
from lkq_hf.text.passages import Corpus


def finds(model: Any, tokenizer: Any, prompt: Any, budget: int, chunk: int | None, park: str | None) -> bool:
    inputs = torch.tensor([prompt["input_ids"]], device=model.device)
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        past_key_values=LookaheadCache(budget, park=park),
        prefill_chunk_size=chunk,
        max_new_tokens=Needle.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    text = tokenizer.decode(output[0, inputs.shape[1] :], skip_special_tokens=True)
    return all(value in text for value in prompt["reference"])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--texts", nargs="+", type=Path)
    options.add_argument("--length", type=int, default=1024)
    options.add_argument("--budgets", nargs="+", type=int, default=[32, 64])
    options.add_argument("--chunks", nargs="+", type=int, default=[256])
    options.add_argument("--prompts", type=int, default=12)
    given = options.parse_args()
    model, tokenizer = real_model(adapter=shipped_adapter(), dtype=torch.float32)
    python = [{"document": name, "text": text} for name, text in topics.items()]
    task = Needle(Corpus(read_documents(given.texts) if given.texts else python, tokenizer))
    ways: dict[str, tuple[int | None, str | None]] = {"at once": (None, None)}
    for chunk in given.chunks:
        ways |= {f"in chunks of {chunk}": (chunk, None), f"in chunks of {chunk}, parked": (chunk, "cpu")}
    found = {name: dict.fromkeys(map(str, given.budgets), 0) for name in ways}
    results: dict[str, Any] = {"about": environment(model.device), "length": given.length, "budgets": given.budgets}
    results |= {"full cache": 0, "found": found}
    for count, prompt in enumerate(tqdm(task.examples(given.prompts, given.length), total=given.prompts), 1):
        results["full cache"] += finds(model, tokenizer, prompt, given.length, None, None)
        for name, way in ways.items():
            for budget in given.budgets:
                found[name][str(budget)] += finds(model, tokenizer, prompt, budget, *way)
        save(given.out, results | {"prompts": count})
    print(found)


if __name__ == "__main__":
    main()
