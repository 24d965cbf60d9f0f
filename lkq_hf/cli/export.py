"""``lkq-hf export``: a quantized checkpoint for other engines."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from lkq_hf.cli.checks import check_writable
from lkq_hf.cli.output import AsJson, report
from lkq_hf.files import check_free


class ExportFormat(StrEnum):
    gptq = "gptq"
    compressed_tensors = "compressed-tensors"


def export(
    source: Annotated[
        Path, typer.Argument(help="Directory of a quantized checkpoint.", metavar="DIR", exists=True, file_okay=False)
    ],
    format: Annotated[ExportFormat, typer.Option(help="Format of the new checkpoint.")],
    out: Annotated[Path, typer.Option(help="Directory for the new checkpoint; must not exist or be empty.")],
    as_json: AsJson = False,
) -> None:
    """Write a quantized checkpoint for GPTQModel or vLLM.

    The formats are plain GPTQ, and pack-quantized of compressed-tensors. Nothing is rounded again.
    """
    check_free(out)
    check_writable(out)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no config.json; expected the directory of a quantized checkpoint")

    from lkq_hf.quantization.export import export_checkpoint, known_readers

    export_checkpoint(source, out, format.value)
    readers = known_readers(out)
    tested = f"tested readers: {', '.join(readers)}" if readers else "no reader was tested that loads this export"
    report(f"Wrote {out}; {tested}", {"checkpoint": out, "format": format.value, "tested_readers": readers})
    if not readers:
        typer.echo(
            "Try it before you rely on it. lkq_hf loads the checkpoint it was made from; docs/serving.md lists what "
            "was tested",
            err=True,
        )
