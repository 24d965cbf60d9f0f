"""Loading adapters from the Hub, with errors that name what is there instead."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from lkq_hf.adapter.config import LookaheadKVConfig
from lkq_hf.adapter.injection import inject_trained_adapter
from lkq_hf.files import check_safetensors, read_json
from lkq_hf.formats import PEFT_TYPE
from lkq_hf.sharing.contents import ADAPTER_CONFIG, ADAPTER_WEIGHTS, MODEL_CONFIG
from lkq_hf.sharing.errors import explained


def load_adapter(
    model: PreTrainedModel,
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    adapter_name: str = "default",
) -> None:
    """Loads a LOOKAHEAD_KV adapter into a model, as ``model.load_adapter`` does, after checking that it is one.

    ``model.load_adapter`` only warns about tensors that the config does not ask for; here they are an error.

    Args:
        model: the base model.
        source: a directory, or the id of a repository.
        revision: a branch, tag or commit.
        subfolder: where in the repository or directory the adapter lies.
        token: by default that of the login.
        adapter_name: its name in the model.

    Raises:
        FileNotFoundError: no such repository or revision, or no weights in it.
        PermissionError: a token is missing or has no access.
        ValueError: another kind of repository or adapter, one for another base model, or weights that do not fit the
            config.
    """
    config_file = _adapter_config_file(source, revision, subfolder, token)
    weights_file = _find(source, ADAPTER_WEIGHTS, revision, subfolder, token)
    if weights_file is None:
        raise FileNotFoundError(f"{source} has no {ADAPTER_WEIGHTS}: the adapter is incomplete; save it again")
    check_safetensors(weights_file)
    config = LookaheadKVConfig.from_pretrained(str(config_file.parent))
    inject_trained_adapter(model, config, load_file(weights_file), adapter_name)


def adapter_config(
    source: str | Path,
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
) -> dict[str, Any]:
    """The adapter_config.json of a LOOKAHEAD_KV adapter in a directory or repository.

    Raises:
        FileNotFoundError: no such repository or revision.
        PermissionError: a token is missing or has no access.
        ValueError: it holds something else.
    """
    return read_json(_adapter_config_file(source, revision, subfolder, token))


def _adapter_config_file(source: str | Path, revision: str | None, subfolder: str, token: str | bool | None) -> Path:
    path = _find(source, ADAPTER_CONFIG, revision, subfolder, token)
    if path is None:
        if _find(source, MODEL_CONFIG, revision, subfolder, token) is not None:
            found = "a model without an adapter; load it with AutoModelForCausalLM.from_pretrained"
        else:
            found = f"neither an {ADAPTER_CONFIG} nor a {MODEL_CONFIG}"
        where = f"{source}/{subfolder}" if subfolder else source
        raise ValueError(f"{where} should hold a {PEFT_TYPE} adapter; found {found}")
    config = read_json(path)
    if config.get("peft_type") != PEFT_TYPE:
        raise ValueError(
            f"{source} should hold a {PEFT_TYPE} adapter; found one of type {config.get('peft_type')} for "
            f"{config.get('base_model_name_or_path')}, which cannot score a cache"
        )
    return path


def _find(
    source: str | Path, name: str, revision: str | None, subfolder: str, token: str | bool | None
) -> Path | None:
    local = Path(source)
    if local.is_dir():
        path = local / subfolder / name
        return path if path.is_file() else None
    with explained(str(source), token, revision):
        try:
            found = hf_hub_download(str(source), name, revision=revision, subfolder=subfolder or None, token=token)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None
    return Path(found)
