"""Pushing adapters and quantized checkpoints to the Hub, with their card."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, EvalResult, HfApi
from huggingface_hub.utils import filter_repo_objects

from lkq_hf import __version__
from lkq_hf.hub.cards import CARD, find_base_model, has_card, render_card, write_card
from lkq_hf.hub.contents import Contents, check_complete, read_contents
from lkq_hf.hub.errors import explained

logger = logging.getLogger(__name__)

_REPLACED = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
"""Names of a checkpoint's weights, in one file or several."""


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
    api = HfApi(token=token, library_name="lkq-hf", library_version=__version__)
    with explained(repo_id, token, revision):
        _check_base_model(contents, repo_id, token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/") and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        files: dict[str, Path | bytes] = {name: contents.directory / name for name in contents.shared_files()}
        if not has_card(contents.directory):
            files.pop(CARD, None)
            if not repository_has_card(api, repo_id, revision):
                card = render_card(contents, repo_id, find_base_model(contents, token), results)
                files[CARD] = str(card).encode()
        if results and not isinstance(files.get(CARD), bytes):
            logger.warning("%s has a card already: the results were not added to it", repo_id)
        kind = "adapter" if contents.checkpoint is None else "checkpoint"
        replaced = _replaced_files(api, contents, repo_id, revision)
        return commit(api, repo_id, files, replaced, commit_message or f"Upload {kind}", revision, create_pr)


def commit(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path | bytes],
    replaced: Sequence[str],
    message: str,
    revision: str | None,
    create_pr: bool,
) -> CommitInfo:
    """Uploads files and removes those that they replace, in one commit, so that others find all of it or nothing.

    Raises:
        ConnectionError: the upload was interrupted.
    """
    try:
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *map(CommitOperationDelete, replaced),
            ],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
        )
    except (RuntimeError, ConnectionError) as error:
        cause = getattr(error.__cause__, "server_message", None) or error.__cause__ or error
        raise ConnectionError(
            f"the upload to {repo_id} was interrupted ({cause}); push again, and it goes on where it was"
        ) from error


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


def _replaced_files(api: HfApi, contents: Contents, repo_id: str, revision: str | None) -> list[str]:
    """Weights of an earlier push that transformers would load instead of, or confuse with, the new ones."""
    if contents.checkpoint is None:
        return []
    earlier = filter_repo_objects(api.list_repo_files(repo_id, revision=revision), allow_patterns=_REPLACED)
    return sorted(set(earlier) - set(contents.shared_files()))


def repository_has_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether a repository holds a card that somebody wrote."""
    if not api.file_exists(repo_id, CARD, revision=revision):
        return False
    return has_card(Path(api.hf_hub_download(repo_id, CARD, revision=revision)).parent)


def add_card_to_pushes(model: Any) -> None:
    """Lets `model.push_to_hub` and `model.save_pretrained(..., push_to_hub=True)` upload a card of ours.

    They would upload an unfilled form. Called while the model is being saved, and a change of this one object only.
    """
    if hasattr(type(model), "_upload_modified_files"):
        model._upload_modified_files = MethodType(_upload_modified_files, model)


def _upload_modified_files(self: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    # The card decorates the push: whatever goes wrong with it must not stop the weights.
    try:
        write_card(working_dir, repo_id, token=kwargs.get("token"))
    except (OSError, ValueError) as error:
        logger.warning("no model card was written for %s: %s", repo_id, error)
    return type(self)._upload_modified_files(self, working_dir, repo_id, *args, **kwargs)
