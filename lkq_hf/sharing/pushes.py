"""Cards for what models push by themselves."""

import logging
from types import MethodType
from typing import Any

from lkq_hf.sharing.cards import write_card

logger = logging.getLogger(__name__)


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
