"""Pushing adapters and quantized checkpoints to the Hub, with their card."""

import logging
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, EvalResult

from lkq_hf.hub.complete import check_complete
from lkq_hf.sharing.cards import CARD, find_base_model, has_card, render_card
from lkq_hf.sharing.contents import Contents, read_contents
from lkq_hf.sharing.errors import explained
from lkq_hf.sharing.repository import Repository

logger = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
"""Names of a checkpoint's weights, in one file or several. Those of an earlier push are removed: transformers would
load them instead of the new ones, or confuse both."""


def push_to_hub(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    results: Sequence[EvalResult] = (),
) -> CommitInfo:
    """Uploads a directory with an adapter, a quantized checkpoint, or both, after checking that others can load it.

    A card is written for a repository that has none, unless there is one in the directory, which stays as it is. What
    an interrupted or earlier push has uploaded is not sent again.

    Args:
        directory: what ``save_pretrained``, ``lkq-hf train``, ``lkq-hf quantize`` or ``lkq-hf export`` wrote.
        repo_id: the repository; it is made if there is none.
        private: whether a new repository is private; by default as the account's settings say.
        revision: branch to push to, which is made if there is none; by default ``main``.
        create_pr: open a pull request instead of committing.
        token: by default that of the login.
        commit_message: by default the directory's kind.
        results: measured numbers for the card (`read_results`).

    Returns:
        The commit; its ``pr_url`` or ``commit_url`` say where it is.

    Raises:
        FileNotFoundError: files are missing, or the base model is not on the Hub.
        PermissionError: a token is missing, not valid, or may not write.
        ConnectionError: the Hub cannot be reached.
        ValueError: the directory does not hold what can be shared.
    """
    contents = read_contents(directory)
    check_complete(contents)
    with explained(repo_id, token, revision):
        _check_base_model(contents, repo_id, token)
        repository = Repository(repo_id, private=private, revision=revision, create_pr=create_pr, token=token)
        files: dict[str, Path | bytes] = {name: contents.directory / name for name in contents.shared_files()}
        if not has_card(contents.directory):
            files.pop(CARD, None)
            if not repository.has_card():
                card = render_card(contents, repository.id, find_base_model(contents, token), results)
                files[CARD] = str(card).encode()
        if results and not isinstance(files.get(CARD), bytes):
            logger.warning("%s has a card already: the results were not added to it", repository.id)
        kind, replaces = ("adapter", ()) if contents.checkpoint is None else ("checkpoint", WEIGHTS)
        return repository.commit(files, commit_message or f"Upload {kind}", replaces)


def _check_base_model(contents: Contents, repo_id: str, token: str | bool | None) -> None:
    name = (contents.adapter or {}).get("base_model_name_or_path")
    if contents.adapter is None or name == repo_id:
        return
    where = contents.directory / "adapter_config.json"
    if contents.checkpoint is not None:
        raise ValueError(
            f"{where} names {name!r} as the base model, which transformers would load in place of the checkpoint "
            f'beside it; set "base_model_name_or_path" to "{repo_id}" there'
        )
    if find_base_model(contents, token) is None:
        raise FileNotFoundError(
            f"{where} names {name!r} as the base model, and the Hub shows no model of that name to this token; set "
            '"base_model_name_or_path" there to the id under which others find it'
        )
