"""Calibration windows that the model writes itself.

They are of all kinds of text that the model knows, where a dataset is of one kind: what is calibrated on them as well
loses less on other texts (self-calibration, arXiv 2410.17170; LLM-QAT, arXiv 2305.17888).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lkq_hf.cache.whole_text import NewCache, writing_whole_texts
from lkq_hf.quantization.calibration_data import check_vocabulary, digest
from lkq_hf.quantization.on_device import on_device
from lkq_hf.quantization.processes import Processes
from lkq_hf.runs import Run
from lkq_hf.text.text_start import text_start

AT_ONCE = 32
"""Windows that are written together; fewer where the memory does not reach."""
NAME = "own_text"
"""Of the folder beside a run's finished blocks, and of the file in it."""


class OwnTextError(ValueError):
    """A model cannot write text here."""


def own_windows(share: float, samples: int) -> int:
    """How many of `samples` windows the model writes: all of them only where the share is 1."""
    return samples if share == 1 else min(round(share * samples), samples - 1)


def write_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    count: int,
    length: int,
    seed: int = 0,
    *,
    device: torch.device | str = "cpu",
    resume_dir: str | Path | None = None,
) -> Tensor:
    """Samples windows from the model's distribution: temperature 1, nothing cut off, past the end of a text.

    A window begins with what stands before all texts of the model (`text_start`), or else with any ordinary token.
    Processes of a group share the windows. Windows that an interrupted run has written are taken from its directory.

    Args:
        model: in full precision and whole, in evaluation mode.
        tokenizer: `None` draws first tokens from the whole vocabulary.
        count: windows.
        length: tokens in a window, the first ones included.
        device: where the whole model is for the time.
        resume_dir: of the quantization.

    Returns:
        Token ids, int64 `[count, length]`, on the CPU.

    Raises:
        OwnTextError: the model does not generate, is not whole, or does not fit on the device.
        ValueError: a tokenizer of another model.
    """
    if not model.can_generate():
        raise OwnTextError(f"{type(model).__name__} does not generate text")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise OwnTextError("text is written by the whole model, and block_by_block reads one block at a time")
    processes = Processes.current()
    first = _first_tokens(model, tokenizer, count, seed)
    check_vocabulary(first, model)
    # What the text depends on, besides the weights: each weight would have to be read.
    arguments: dict[str, Any] = {"model": type(model).__name__, "dtype": str(model.dtype), "seed": seed}
    arguments |= {"windows": count, "length": length}
    arguments["first tokens"] = digest(first)[:16]
    name = f"{NAME}.safetensors"
    directory = None if resume_dir is None else Path(resume_dir) / NAME
    run = Run(directory, arguments, name, writes=processes.is_main)
    found = processes.first(name in run)
    if found:
        return run.read(name, load_file)[NAME]
    tokens = torch.zeros(count, length, dtype=torch.int64, device=device)
    starts, rows = first.split(AT_ONCE), tokens.split(AT_ONCE)
    seeds = torch.randint(2**31, (len(starts),), generator=torch.Generator().manual_seed(seed)).tolist()
    own_pieces = range(processes.rank, len(starts), processes.size)
    steps = length - first.shape[1]
    too_large = torch.zeros(1, device=device)
    try:
        with (
            _ready_to_sample(model, device),
            # Of all processes, so that any number of them writes the same.
            writing_whole_texts(model, len(starts) * steps) as new_cache,
            tqdm(
                total=len(own_pieces) * steps, desc="writing text", unit="token", disable=not processes.is_main
            ) as progress,
        ):
            for index in own_pieces:
                torch.manual_seed(seeds[index])
                rows[index].copy_(_sample(model, starts[index].to(device), length, new_cache, progress, AT_ONCE))
    except torch.OutOfMemoryError:
        too_large += 1
    processes.sum(too_large)
    if bool(too_large):
        raise OwnTextError(f"the model, and the cache of {length} tokens, do not fit on {device}")
    processes.sum(tokens)
    tokens = tokens.cpu()
    run.write(name, lambda path: save_file({NAME: tokens}, path))
    return tokens


def interleave(dataset: Tensor, own: Tensor) -> Tensor:
    """Windows of both, `[samples, length]`, as evenly mixed as their numbers allow."""
    count = len(dataset) + len(own)
    steps = torch.arange(count + 1) * len(own) // count
    mixed = dataset.new_empty(count, dataset.shape[1])
    is_own = steps[1:] > steps[:-1]
    mixed[is_own], mixed[~is_own] = own, dataset
    return mixed


def _first_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, count: int, seed: int) -> Tensor:
    """The token that each window begins with, `[count, 1]`."""
    vocabulary = model.config.get_text_config().vocab_size
    if tokenizer is None:
        ordinary = torch.arange(vocabulary)
    elif start := text_start(tokenizer):
        return torch.tensor(start).expand(count, -1).contiguous()
    else:
        added = tokenizer.added_tokens_decoder.items()
        special = {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}
        # Some tokenizers have tokens that their model does not know.
        known = range(min(len(tokenizer), vocabulary))
        ordinary = torch.tensor([token for token in known if token not in special])
    chosen = torch.randint(len(ordinary), (count, 1), generator=torch.Generator().manual_seed(seed))
    return ordinary[chosen]


@contextmanager
def _ready_to_sample(model: PreTrainedModel, device: torch.device | str) -> Iterator[None]:
    """The model on `device`, without the sampling that its authors advise; at the end it is as and where it was."""
    advised = model.generation_config
    device = torch.device(device)
    model.generation_config = GenerationConfig()
    try:
        with (
            on_device(model, device),
            torch.no_grad(),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            yield
    finally:
        model.generation_config = advised


def _sample(
    model: PreTrainedModel, start: Tensor, length: int, new_cache: NewCache, progress: Any, at_once: int
) -> Tensor:
    try:
        pieces = [_continue(model, piece, length, new_cache, progress) for piece in start.split(at_once)]
    except torch.OutOfMemoryError:
        if at_once == 1:
            raise
    else:
        return torch.cat(pieces)
    # The exception is gone by now, and with it what it held of the memory.
    torch.cuda.empty_cache()
    return _sample(model, start, length, new_cache, progress, at_once // 2)


def _continue(model: PreTrainedModel, start: Tensor, length: int, new_cache: NewCache, progress: Any) -> Tensor:
    generated: Any = model.generate(  # type: ignore[operator]
        input_ids=start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=0,
        max_length=length,
        past_key_values=new_cache(length - start.shape[1]),
        stopping_criteria=StoppingCriteriaList([_Progress(progress)]),
    )
    return generated


class _Progress(StoppingCriteria):
    """Never stops; counts."""

    def __init__(self, progress: Any) -> None:
        self.progress = progress

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.progress.update()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
