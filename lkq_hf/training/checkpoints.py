"""What a training leaves on disk, so that a process killed in the middle of writing it does no harm."""

import json
import os
import shutil
from pathlib import Path

from peft import PeftModel
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from lkq_hf.files import staging

CARD = "README.md"


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint of a trainer that was written to its end; None if there is none.

    ``transformers.trainer_utils.get_last_checkpoint`` also finds one whose writing was cut short.
    """
    steps: dict[int, Path] = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.rpartition("-")[2]
        if number.isdecimal() and _is_complete(path):
            steps[int(number)] = path
    return str(steps[max(steps)]) if steps else None


def _is_complete(checkpoint: Path) -> bool:
    # The trainer writes its state last.
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    return True


def save_adapter(model: PeftModel, directory: str | os.PathLike[str]) -> None:
    """``model.save_pretrained(directory)``, each file written whole or not at all.

    A model card that is there stays, as with PEFT.
    """
    target = Path(directory)
    with staging(target) as temporary:
        if (target / CARD).exists():
            shutil.copy(target / CARD, temporary / CARD)
        model.save_pretrained(str(temporary))
        for file in sorted(temporary.iterdir()):
            file.replace(target / file.name)
