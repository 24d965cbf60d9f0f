"""Model cards of adapters and quantized checkpoints."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from yaml import YAMLError

from lkq_hf.files import read_json, write_json
from lkq_hf.formats import QUANT_METHOD
from lkq_hf.sharing.contents import ADAPTER_WEIGHTS, QUANT_METHODS, Contents, read_contents
from lkq_hf.sharing.results import find_results

CARD = "README.md"
TRAINING = "training.json"
"""What ``lkq-hf train`` writes beside an adapter: its options and its metrics."""

DRAFT = "<!-- A draft: it is written anew when this is pushed. Remove this line to keep the card as it is. -->"

_BY_OTHERS = re.compile(
    r"### Framework versions|- PEFT .*|This is the model card of a .* transformers model that has been pushed on the "
    r"Hub\. This model card has been automatically generated\."
)


@dataclass(frozen=True)
class BaseModel:
    """A base model, and what a card inherits from its card."""

    id: str
    license: dict[str, Any]
    language: str | list[str] | None = None


def find_base_model(contents: Contents, token: str | bool | None = None) -> BaseModel | None:
    """Looks the base model up on the Hub.

    Returns:
        None if the contents record no base model, or if none of that name is visible on the Hub.
    """
    name = contents.base_model
    if not name:
        return None
    try:
        validate_repo_id(name)
        info = HfApi(token=token).model_info(name)
    except (HFValidationError, RepositoryNotFoundError, GatedRepoError):
        return None
    data = info.card_data or ModelCardData()
    fields = {key: data.get(key) for key in ("license", "license_name", "license_link")}
    return BaseModel(name, {key: value for key, value in fields.items() if value}, data.get("language"))


def render_card(
    contents: Contents,
    repo_id: str,
    base_model: BaseModel | None = None,
    results: Sequence[EvalResult] = (),
) -> ModelCard:
    """The card of an adapter, a quantized checkpoint, or both.

    Args:
        contents: what the repository will hold.
        repo_id: its id, which the card's example loads.
        base_model: what the contents were made from; its license and language are inherited.
        results: measured numbers; a training's own are added.

    Raises:
        FileNotFoundError: weights are missing.
    """
    record = contents.directory / TRAINING
    training = read_json(record) if record.is_file() else {}
    results = [*results, *find_results(training)]
    name = repo_id.rpartition("/")[2]
    inherited = base_model.license if base_model else {}
    data = ModelCardData(
        model_name=name,
        base_model=base_model.id if base_model else None,
        base_model_relation=("adapter" if contents.checkpoint is None else "quantized") if base_model else None,
        library_name="peft" if contents.checkpoint is None else "transformers",
        pipeline_tag="text-generation",
        language=base_model.language if base_model else None,
        tags=_tags(contents),
        eval_results=list(results) or None,
        **inherited,
    )
    template = "adapter.md" if contents.checkpoint is None else "checkpoint.md"
    method = contents.quantization.get("quant_method")
    return ModelCard.from_template(
        data,
        template_str=files("lkq_hf.sharing").joinpath("templates", template).read_text(encoding="utf-8"),
        repo_id=repo_id,
        name=name,
        base_model=contents.base_model if contents.checkpoint is None else base_model and base_model.id,
        license=inherited.get("license_name") or inherited.get("license"),
        adapter=contents.adapter,
        adapter_size=_size(contents.directory / ADAPTER_WEIGHTS) if contents.adapter is not None else None,
        quantization=_describe_quantization(contents) if contents.checkpoint is not None else None,
        own_format=method == QUANT_METHOD,
        format=QUANT_METHODS.get(str(method)),
        options=training.get("options", {}),
        results=results,
    )


def write_training_record(directory: Path, options: dict[str, Any], metrics: dict[str, float]) -> None:
    """Writes what an adapter's card says about its training beside the adapter.

    Args:
        directory: of the adapter.
        options: by name; they appear in the card.
        metrics: of the evaluation after the training.
    """
    write_json(directory / TRAINING, {"options": options, "metrics": metrics})


def write_draft(directory: str | Path) -> bool:
    """Writes the card that an adapter can have before anyone knows its repository, in a directory without a card.

    It is written anew when the adapter is pushed, unless the line that calls it a draft is removed.

    Returns:
        Whether it was written.

    Raises:
        ValueError: the directory holds neither an adapter nor a quantized checkpoint, or a card that cannot be read.
    """

    def draft(contents: Contents) -> ModelCard:
        card = render_card(contents, contents.directory.resolve().name)
        card.text = f"{card.text.rstrip()}\n\n{DRAFT}\n"
        return card

    return _write(directory, draft)


def write_card(
    directory: str | Path,
    repo_id: str,
    results: Sequence[EvalResult] = (),
    token: str | bool | None = None,
) -> bool:
    """Writes a README.md into a directory that has none, or only one that PEFT or transformers left unfilled.

    Returns:
        Whether it was written.

    Raises:
        ValueError: the directory holds neither an adapter nor a quantized checkpoint, or a card that cannot be read.
    """
    return _write(
        directory, lambda contents: render_card(contents, repo_id, find_base_model(contents, token), results)
    )


def _write(directory: str | Path, render: Callable[[Contents], ModelCard]) -> bool:
    """Writes a card where there is none that somebody wrote, and returns whether it did."""
    contents = read_contents(directory)
    if has_card(contents.directory):
        return False
    render(contents).save(contents.directory / CARD)
    return True


def has_card(directory: Path) -> bool:
    """Whether the directory holds a card that somebody wrote.

    Raises:
        ValueError: its metadata cannot be read.
    """
    path = directory / CARD
    if not path.is_file():
        return False
    try:
        card = ModelCard.load(path)
    except (YAMLError, ValueError) as error:
        raise ValueError(
            f"{path} should begin with YAML between two lines of ---, found something else ({error}). Mend it, or "
            "remove the file to get a new card"
        ) from error
    return DRAFT not in card.text and not is_unfilled(card)


def is_unfilled(card: ModelCard) -> bool:
    """Whether every line of the card comes from the form that PEFT and transformers leave for a user to fill in."""
    form = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    lines = [line.strip() for line in card.text.splitlines() if line.strip()]
    return bool(lines) and all(line in form or _BY_OTHERS.fullmatch(line) for line in lines)


def _tags(contents: Contents) -> list[str]:
    tags = ["lkq-hf", "long-context"]
    if contents.adapter is not None:
        tags += ["lookahead-kv", "kv-cache"]
    if contents.checkpoint is not None:
        tags += [contents.quantization["quant_method"].replace("_", "-"), "quantized"]
    return tags


def _describe_quantization(contents: Contents) -> dict[str, Any]:
    """What the template says about a checkpoint, whichever of our three formats it is in."""
    settings = dict(contents.quantization)
    if settings["quant_method"] == "compressed-tensors":
        weights = settings["config_groups"]["group_0"]["weights"]  # groups differ by bits alone
        settings |= {
            "bits": weights["num_bits"],
            "group_size": weights["group_size"] or -1,
            "sym": weights["symmetric"],
        }
    size = sum(path.stat().st_size for path in contents.weight_files)
    if (mean := contents.recipe.get("mean_bits")) is not None:
        settings |= {"bits": f"{mean:.2f}", "layers_by_bits": contents.recipe["layers_by_bits"]}
    return settings | {"calibration": contents.recipe.get("calibration"), "size": size}


def _size(path: Path) -> dict[str, int]:
    with safe_open(path, framework="pt") as file:
        count = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118  # not a dict
    return {"parameters": count, "bytes": path.stat().st_size}
