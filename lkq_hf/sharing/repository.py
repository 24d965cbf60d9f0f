"""A repository on the Hub that takes commits."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import filter_repo_objects

from lkq_hf import __version__
from lkq_hf.sharing.cards import CARD, has_card


class Repository:
    """A repository and its branch, which are made if there are none.

    Use it inside of `explained`.

    Args:
        repo_id: the repository.
        private: whether a new repository is private; by default as the account's settings say.
        revision: branch to push to; by default ``main``.
        create_pr: open a pull request instead of committing.
        token: by default that of the login.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | bool | None = None,
    ) -> None:
        self.api = HfApi(token=token, library_name="lkq-hf", library_version=__version__)
        self.id = self.api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        self.revision = revision
        self.create_pr = create_pr
        if revision is not None and not revision.startswith("refs/pr/") and not create_pr:
            self.api.create_branch(self.id, branch=revision, exist_ok=True)

    def has_card(self) -> bool:
        """Whether it holds a card that somebody wrote."""
        if not self.api.file_exists(self.id, CARD, revision=self.revision):
            return False
        return has_card(Path(self.api.hf_hub_download(self.id, CARD, revision=self.revision)).parent)

    def commit(self, files: Mapping[str, Path | bytes], message: str, replaces: Sequence[str] = ()) -> CommitInfo:
        """Uploads files and removes what they replace, in one commit: others find all of it or nothing.

        Args:
            files: by their names in the repository.
            message: of the commit.
            replaces: patterns of names; what matches one and is not among ``files`` is removed.

        Raises:
            ConnectionError: the upload was interrupted.
        """
        earlier = self.api.list_repo_files(self.id, revision=self.revision) if replaces else []
        replaced = set(filter_repo_objects(earlier, allow_patterns=list(replaces))) - set(files)
        try:
            return self.api.create_commit(
                self.id,
                [
                    *(CommitOperationAdd(name, content) for name, content in files.items()),
                    *map(CommitOperationDelete, sorted(replaced)),
                ],
                commit_message=message,
                revision=self.revision,
                create_pr=self.create_pr,
            )
        except (RuntimeError, ConnectionError) as error:
            cause = getattr(error.__cause__, "server_message", None) or error.__cause__ or error
            raise ConnectionError(
                f"the upload to {self.id} was interrupted ({cause}); push again, and it goes on where it was"
            ) from error
