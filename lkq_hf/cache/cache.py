"""The cache that a user passes to ``generate``."""

import os
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from lkq_hf.cache.evicted import EvictedCache
from lkq_hf.cache.saving import load_cache, save_cache
from lkq_hf.cache.sharing import download_cache, push_cache
from lkq_hf.scoring import Scorer


class LookaheadCache(EvictedCache):
    """A KV cache that holds a budget of entries, however long the text is.

    Every forward that reads (the first prompt, a later turn, a chunk of a prompt) scores all entries and keeps the
    best ones. Tokens generated since then are kept. They compete with the other entries when the next turn is read,
    or earlier with ``refresh_every``. Nothing is evicted while the whole text fits into the budget.

    A cache serves one conversation, in one generation at a time. ``generate`` compares the text that it is called with
    to what the cache has read, and refuses another one.

    Positions stay true: the cache reports the length of the text it has read (`get_seq_length`), not the number
    of entries it stores. Sliding windows and recurrent states, which are bounded already, are left as they are.

    Args:
        budget: entries to keep per layer and KV head on average: a number of tokens (int), or a fraction of the text's
            length (float above 0, at most 1), padding included.
        scorer: what decides: "lookahead" (needs a ``LOOKAHEAD_KV`` adapter on the model), "snapkv", "streaming",
            "random", or a `Scorer`. For the scorers that need no adapter, a model without one
            is prepared once with `prepare_model_for_eviction`.
        max_new_tokens: asks for static shapes: storage is laid out once, for what the prompt keeps and this many
            tokens, and on a GPU ``generate`` then compiles the decode and replays whole steps as a CUDA graph, without
            waiting for Python between tokens. The tokens are the same, also those sampled under a seed; the first call
            compiles. Pass what you pass to ``generate``; if more tokens come, the storage grows, which compiles again.
            None, the default, is storage that grows with every token, without compiling.
        allocation: how heads share the budget. "global": all heads of all layers compete. "layer": the heads of a
            layer compete. "uniform": every head keeps the same number. "profile": the adapter's config says how many.
        evict_later_turns: whether later turns return to the budget. False keeps them whole.
        refresh_every: number of generated tokens after which entries are evicted again while an answer is generated.
            The last ``refresh_every`` tokens are never dropped, so at most the budget and twice as many tokens are
            stored. None, the default, keeps an answer whole until the next turn.
        park: "cpu" keeps a copy of everything in main memory: each turn attends to the whole text while it is read,
            and then keeps the best entries for its question. None, the default, drops what is evicted for good.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is out of its range, or names an unknown scorer, allocation or place.

    Example:

        >>> model.load_adapter("username/my-model-lookahead")
        >>> model.generate(**inputs, past_key_values=LookaheadCache(budget=256))
        >>> model.generate(  # the same, compiled
        ...     **inputs, past_key_values=LookaheadCache(budget=256, max_new_tokens=512), max_new_tokens=512
        ... )

    Source: LookaheadKV (arXiv 2603.10899).
    """

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        model: nn.Module | None = None,
        input_ids: torch.Tensor | None = None,
        parked: bool = True,
    ) -> None:
        """Writes the cache to a directory, for `from_pretrained` in another process.

        A cache that is there already is replaced; a process that is killed meanwhile leaves the old one. The text is
        not saved, but keys and values say much about it.

        Args:
            directory: made if there is none.
            model: the model that filled the cache; needed only where the cache does not know it any more, as after
                unpickling.
            input_ids: ``[batch, tokens]`` that were read. Their hash is saved, to be compared with the text that the
                loaded cache is to go on with. Needed only where the cache does not know them, as after embeddings.
            parked: whether entries in main memory (``park="cpu"``) are saved too. They are as many as the whole text
                has; without them, the cache is loaded as one without parking.

        Raises:
            ValueError: nothing was read yet, a prompt is read in pieces and its last one is missing, drafted tokens
                wait to be accepted, or ``input_ids`` are not as many as were read.
            NotImplementedError: the model is divided among processes.
        """
        save_cache(self, Path(directory), model, input_ids, parked)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        model: nn.Module,
        *,
        scorer: str | Scorer | None = None,
        input_ids: torch.Tensor | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> Self:
        """The cache in a directory or a repository on the Hub, ready to go on.

        The model is prepared for eviction if it is not yet. It has to be the one that filled the cache: sizes and a
        sample of the weights are compared. If it is in another dtype, the entries are cast.

        Args:
            source: a directory that `save_pretrained` wrote, or the id of a repository.
            model: the model.
            scorer: scorer of later turns; needed only if the saved one is not one of ours.
            input_ids: ids of a text that begins with what was read, to be compared with the saved hash.
            revision: a branch, tag or commit of the repository.
            token: by default that of the login.
            options: arguments of the cache that replace the saved ones; ``park=None`` leaves parked entries out.

        Raises:
            FileNotFoundError: there is no such directory or repository, or no cache in it.
            PermissionError: a token is missing or has no access.
            ValueError: it is the cache of another model or text, or a file is damaged.
            NotImplementedError: the model is divided among processes.
        """
        directory = Path(source)
        if not directory.is_dir():
            if directory.is_absolute() or str(source).startswith((".", "~")) or str(source).count("/") > 1:
                raise FileNotFoundError(
                    f"there is no directory {source}; expected one with a saved cache, or an id on the Hub"
                )
            directory = download_cache(str(source), revision, token)
        return load_cache(cls, directory, model, scorer, input_ids, options)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Uploads the cache with a card; see `lkq_hf.hub.push_cache`, which takes the same options."""
        return push_cache(self, repo_id, **options)
