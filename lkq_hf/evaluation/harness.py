"""lm-eval's harness with a LookaheadCache: the model ``lkq-hf``.

    python -m lkq_hf.evaluation.harness run --model lkq-hf \
        --model_args pretrained=MODEL,adapter=ADAPTER,budget=128 --tasks TASK

takes every argument of ``lm_eval``. Importing this module registers the model with lm-eval, and nothing else does.
"""

import os
from typing import Any

import torch
from tqdm.auto import tqdm

from lkq_hf.cache import LookaheadCache, prepare_model_for_eviction
from lkq_hf.compat import pass_cache
from lkq_hf.evaluation.decoding import Answers, score_answers

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError("this needs lm-eval, which is not installed; run: pip install lkq-hf[lm-eval]") from error


@register_model("lkq-hf")
class LookaheadLM(HFLM):
    """A causal language model whose prompts are read into a LookaheadCache.

    Generation requests generate from the evicted cache. Likelihood requests read their context into it, and are scored
    over what was kept, one by one. ``loglikelihood_rolling``, which has no context, is that of the full cache.

    Args:
        pretrained: directory or Hub id of a model, quantized checkpoints included, or a model in memory.
        adapter: directory or Hub id of a lookahead adapter, which the lookahead scorer needs.
        budget: see `LookaheadCache`; None for the full cache.
        scorer: a name, as for `LookaheadCache`.
        arguments: those of lm-eval's ``HFLM``.

    Raises:
        ValueError, TypeError: the budget, the scorer or the adapter does not fit.
    """

    def __init__(
        self,
        pretrained: Any,
        adapter: str | os.PathLike[str] | None = None,
        budget: int | float | None = None,
        scorer: str = "lookahead",
        **arguments: Any,
    ) -> None:
        if budget is not None:
            LookaheadCache(budget, scorer)  # an error in these shall come before the model is loaded
            if scorer == "lookahead" and adapter is None and isinstance(pretrained, str):
                raise ValueError("the lookahead scorer needs an adapter: pass adapter=..., or another scorer")
        super().__init__(pretrained, **arguments)
        if adapter is not None:
            self.model.load_adapter(str(adapter))
        self.budget = budget
        self.scorer = scorer
        if budget is not None:
            prepare_model_for_eviction(self.model)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        if self.budget is not None:
            generation_kwargs |= pass_cache(LookaheadCache(self.budget, self.scorer))
        return super()._model_generate(context, max_length, stop, **generation_kwargs)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **arguments: Any,
    ) -> list[tuple[float, bool]]:
        if self.budget is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **arguments)
        results = []
        for key, context, continuation in tqdm(requests, disable=disable_tqdm or self.rank > 0):
            answer = self._evicted_loglikelihood(context[len(continuation) - self.max_length :], continuation)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
            results.append(answer)
        return results

    @torch.no_grad()
    def _evicted_loglikelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-likelihood of a continuation, and whether greedy decoding gives it."""
        prompt = torch.tensor([context], device=self.device)
        ids = torch.tensor([continuation], device=self.device)
        cache = LookaheadCache(self.budget, self.scorer)  # type: ignore[arg-type]
        logits = self.model(input_ids=prompt, **pass_cache(cache), use_cache=True, logits_to_keep=1).logits[:, -1]
        answers = Answers(ids, torch.ones_like(ids, dtype=torch.bool))
        nll, chosen = score_answers(self.model, logits, torch.ones_like(prompt), cache, answers)
        return -nll.sum().item(), torch.equal(chosen, ids)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
