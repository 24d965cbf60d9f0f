"""Whether a directory that is to be shared is all there: others must be able to load it."""

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lkq_hf.adapter.config import LookaheadKVConfig
from lkq_hf.formats import QUANT_METHOD, TOKENIZER_FILES
from lkq_hf.quantization.checkpoint import packed_model, tensor_headers
from lkq_hf.quantization.config import TwoStageGPTQConfig
from lkq_hf.sharing.contents import ADAPTER_WEIGHTS, Contents

PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")


def check_complete(contents: Contents) -> None:
    """Checks that others can load what the directory holds.

    Raises:
        FileNotFoundError: weights or a tokenizer are missing.
        ValueError: a config has values that no version of ours writes, a weight file is damaged or disagrees with its
            config, or there are files that are not safetensors.
    """
    if pickles := [name for name in contents.shared_files() if name.endswith(PICKLES)]:
        raise ValueError(
            f"{contents.directory} holds {', '.join(pickles)}: a pickle can run code on the computer that loads it, "
            "and is not shared. Save the weights as safetensors, and remove it"
        )
    tensors = {name: shape for path in contents.weight_files for name, shape in _shapes(path)}
    if contents.adapter is not None:
        _check_adapter(contents, tensors)
    if contents.checkpoint is not None:
        if not any((contents.directory / name).is_file() for name in TOKENIZER_FILES):
            raise FileNotFoundError(
                f"{contents.directory} has no tokenizer; save the base model's there with tokenizer.save_pretrained"
            )
        _check_checkpoint(contents)


def _check_adapter(contents: Contents, tensors: dict[str, list[int]]) -> None:
    config = LookaheadKVConfig.from_pretrained(str(contents.directory))
    tokens = [shape for name, shape in tensors.items() if name.endswith("lookahead_kv_tokens")]
    if [shape[0] for shape in tokens] != [config.num_lookahead_tokens]:
        raise ValueError(
            f"{contents.directory / ADAPTER_WEIGHTS} should hold {config.num_lookahead_tokens} lookahead tokens, "
            f"found tensors of shape {tokens}; the file is damaged, or belongs to another config"
        )


def _check_checkpoint(contents: Contents) -> None:
    if contents.quantization["quant_method"] != QUANT_METHOD:
        return  # exports: their own libraries know what belongs into them
    settings = TwoStageGPTQConfig.from_dict(dict(contents.quantization))
    files = [path for path in contents.weight_files if path.name != ADAPTER_WEIGHTS]
    packed_model(contents.directory, settings, tensor_headers(files))


def _shapes(path: Path) -> Iterator[tuple[str, list[int]]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dict
                yield name, file.get_slice(name).get_shape()
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or truncated ({error}); save it again") from error
