"""``lkq-hf push``: an adapter or a quantized checkpoint to the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from lkq_hf.cli.output import AsJson, report


def push(
    directory: Annotated[
        Path,
        typer.Argument(
            help="Directory of an adapter, a quantized checkpoint, or both.",
            metavar="DIR",
            exists=True,
            file_okay=False,
        ),
    ],
    repo_id: Annotated[
        str, typer.Argument(help="Repository, such as name/model; made if there is none.", metavar="REPO_ID")
    ],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who sees a new repository; by default your settings.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; made if there is none. By default main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    token: Annotated[
        str | None, typer.Option(help="Token of your account; better: `hf auth login` or HF_TOKEN.", metavar="TOKEN")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="JSON file of lkq-hf evaluate, whose numbers go into the card; repeatable.", exists=True),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter or a quantized checkpoint to the Hub.

    The directory is checked first, and a model card is written if there is none. What an interrupted push has
    uploaded is not sent again.
    """
    from lkq_hf.hub import push_to_hub, read_results

    commit = push_to_hub(
        directory,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        token=token,
        commit_message=message,
        results=[result for path in results or [] for result in read_results(path)],
    )
    url = commit.pr_url or commit.commit_url
    report(url, {"repo_id": commit.repo_url.repo_id, "url": url, "commit": commit.oid})
