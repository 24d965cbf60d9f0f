"""What the Hub refuses, in words that say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# Of httpx or httpx2, whichever this huggingface_hub is built on.
HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]

LOG_IN = "log in with `hf auth login`, or pass a token from your account's settings"


@contextmanager
def explained(repo_id: str, token: str | bool | None = None, revision: str | None = None) -> Iterator[None]:
    """Turns the errors of huggingface_hub about a repository into errors of Python with a plain sentence.

    Raises:
        FileNotFoundError: no such repository or revision, as far as the token can see.
        PermissionError: a token is missing, not valid, or has no right; or the repository is gated.
        ConnectionError: the Hub cannot be reached, or failed.
        ValueError: not the id of a repository.
    """
    try:
        yield
    except GatedRepoError as error:
        raise PermissionError(
            f"{repo_id} is gated: ask for access on its page, and {LOG_IN} of the account that has it"
        ) from error
    except RepositoryNotFoundError as error:
        if has_token(token):
            advice = "check the id; a private repository needs a token with access to it"
        else:
            advice = f"check the id; if it is private, {LOG_IN}"
        raise FileNotFoundError(f"there is no repository {repo_id} on the Hub, or it is private: {advice}") from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} has no branch, tag or commit {revision!r}") from error
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"{repo_id} needs a token: {LOG_IN}") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise ConnectionError(
            f"the Hub cannot be reached for {repo_id}, and the cache does not hold it: check the connection, "
            "HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from error
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not the id of a repository, such as name/model") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = error.server_message or f"HTTP {status}"
        if status == 401:
            if has_token(token):
                raise PermissionError(f"{repo_id}: the token is not valid ({said}): {LOG_IN}") from error
            raise PermissionError(f"{repo_id}: a token is needed ({said}): {LOG_IN}") from error
        if status == 403:
            raise PermissionError(f"{repo_id}: no right to do that ({said}); use a token that has it") from error
        raise ConnectionError(f"the Hub refused a request about {repo_id} ({said}); try again") from error
    except HTTPError as error:
        raise ConnectionError(f"the Hub cannot be reached for {repo_id} ({error}); check the connection") from error


def has_token(token: str | bool | None) -> bool:
    """Whether requests carry a token: the given one, or that of the environment or the login."""
    return token is not False and (isinstance(token, str) or get_token() is not None)
