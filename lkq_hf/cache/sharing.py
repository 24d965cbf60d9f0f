"""Sharing the compressed cache of a text."""

from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from lkq_hf.cache.evicted import EvictedCache
from lkq_hf.cache.saving import NAME, read_note, save_cache
from lkq_hf.sharing.cards import CARD
from lkq_hf.sharing.errors import explained
from lkq_hf.sharing.repository import Repository


def push_cache(
    cache: EvictedCache,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
    **saving: Any,
) -> CommitInfo:
    """Uploads a cache, in the place of one that may be there, with a card if the repository has none.

    Keys and values say much about the text that was read: push only what others may read.

    Args:
        cache: what to upload.
        repo_id: the repository; it is made if there is none.
        private: whether a new repository is private; by default as the account's settings say.
        revision: branch to push to, which is made if there is none; by default ``main``.
        create_pr: open a pull request instead of committing.
        token: by default that of the login.
        commit_message: by default "Upload cache".
        saving: as for `LookaheadCache.save_pretrained`.

    Raises:
        PermissionError: a token is missing, not valid, or may not write.
        ConnectionError: the Hub cannot be reached.
        ValueError: the cache cannot be saved.
    """
    with TemporaryDirectory() as folder:
        directory = Path(folder)
        save_cache(cache, directory, **saving)
        with explained(repo_id, token, revision):
            repository = Repository(repo_id, private=private, revision=revision, create_pr=create_pr, token=token)
            content: dict[str, Path | bytes] = {path.name: path for path in directory.iterdir()}
            if not repository.has_card():
                content[CARD] = str(render_cache_card(directory, repository.id)).encode()
            return repository.commit(content, commit_message or "Upload cache", ["cache-*.safetensors"])


def render_cache_card(directory: Path, repo_id: str) -> ModelCard:
    """The card of a saved cache.

    Args:
        directory: what `LookaheadCache.save_pretrained` wrote.
        repo_id: id of the repository that will hold it.
    """
    note = read_note(directory)
    name = repo_id.rpartition("/")[2]
    data = ModelCardData(
        model_name=name, library_name="lkq-hf", tags=["lkq-hf", "lookahead-cache", "kv-cache", "long-context"]
    )
    return ModelCard.from_template(
        data,
        template_str=files("lkq_hf.sharing").joinpath("templates", "cache.md").read_text(encoding="utf-8"),
        repo_id=repo_id,
        name=name,
        note=note,
        size=(directory / note["tensors"]["file"]).stat().st_size,
        parked=any(layer.get("parked_pieces") for layer in note["layers"]),
    )


def download_cache(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The directory to which the files of a cache on the Hub were downloaded.

    Raises:
        FileNotFoundError: no such repository or revision, or no cache in it.
        PermissionError: a token is missing or has no access.
        ConnectionError: the Hub cannot be reached, and nothing was downloaded before.
        ValueError: not the id of a repository, or the json in it is damaged.
    """
    with explained(repo_id, token, revision):
        try:
            directory = Path(hf_hub_download(repo_id, NAME, revision=revision, token=token)).parent
            # Of the same commit: another one may have been pushed meanwhile.
            hf_hub_download(repo_id, read_note(directory)["tensors"]["file"], revision=directory.name, token=token)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise FileNotFoundError(
                f"{repo_id} holds no saved cache: expected {NAME} and the file that it names, as "
                "LookaheadCache.push_to_hub uploads"
            ) from error
    return directory
