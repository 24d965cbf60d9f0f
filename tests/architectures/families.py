"""Tries a LookaheadCache on a causal language model of any type that transformers has."""

import copy
import traceback
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten

import pytest
import torch
from masked_reference import assert_turns_equal_masked_attention
from models import add_lookahead, left_padded, prompt_ids
from tiny import tiny_model

import lkq_hf
from lkq_hf import LookaheadCache, prepare_model_for_eviction
from lkq_hf.cache.modules import attention_modules
from lkq_hf.cache.prepare import get_decoder

SCORERS = ("snapkv", "lookahead")
PACKAGE = Path(lkq_hf.__file__).parent

WORKS, REFUSED, NOT_TRIED = "works", "refused", "not tried"


@dataclass(frozen=True)
class Outcome:
    """What came of a family and a scorer.

    Attributes:
        state: WORKS, REFUSED or NOT_TRIED.
        reason: of a refusal, our message; where nothing could be tried, what transformers does without us.
    """

    state: str
    reason: str = ""


def try_family(model_type: str, scorer: str) -> Outcome:
    """Two turns of a padded batch with a tiny random model, held against a full cache with the evicted masked.

    Raises:
        AssertionError: the answers differ, or a refusal came after work.
        Exception: of any kind, where neither we nor transformers meant it.
    """
    try:
        base = tiny_model(model_type)
        _check_plain(base)
    except (Exception, pytest.skip.Exception) as error:  # of transformers, or of the sizes in tiny.py
        return Outcome(NOT_TRIED, shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ..."))
    model = copy.deepcopy(base)
    calls: list[str] = []
    try:
        if scorer == "lookahead":
            add_lookahead(model)
        else:
            prepare_model_for_eviction(model)
        for module in attention_modules(get_decoder(model)):
            module.register_forward_pre_hook(lambda module, _: calls.append(type(module).__name__))
        ids, mask = left_padded([prompt_ids(1, 40)[0], prompt_ids(1, 17, seed=1)[0]])
        assert_turns_equal_masked_attention(base, model, LookaheadCache(7, scorer), ids, mask)
    except Exception as error:
        if isinstance(error, AssertionError) or not is_ours(error):
            raise
        assert len(calls) <= 1, f"the refusal came only after {len(calls)} layers had run: {error}"
        return Outcome(REFUSED, str(error))
    return Outcome(WORKS)


def is_ours(error: Exception) -> bool:
    """Whether a `raise` of this package raised it, and not something that it called."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return PACKAGE in Path(last.filename).parents and (last.line or "").startswith("raise ")


def _check_plain(model: torch.nn.Module) -> None:
    """Reads a text without a cache.

    Raises:
        ValueError: it is no language model over one list of tokens.
    """
    with torch.no_grad():
        logits = model(input_ids=prompt_ids(2, 12), use_cache=False).logits
    if logits.shape[:2] != (2, 12) or not logits.isfinite().all():
        raise ValueError(f"a text of [2, 12] tokens has logits {list(logits.shape)}, or some that are not finite")
