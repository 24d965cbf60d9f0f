"""Saving a cache to a directory, and loading it into another process.

A directory holds ``lookahead_cache.json``, which says what was read and by which model, and one safetensors file. The
json names that file with its hash and is written last, so that a reader finds the old cache or the new one, and whole.
"""

import hashlib
from contextlib import suppress
from dataclasses import fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lkq_hf.cache.evicted import EvictedCache
from lkq_hf.cache.eviction import static_capacity, static_longest
from lkq_hf.cache.fingerprint import differences, fingerprint, is_fingerprint
from lkq_hf.cache.history import digest_of
from lkq_hf.cache.layers import EvictedLayer, LastQueries, UncompressedSlidingLayer
from lkq_hf.cache.prefix import Pool, Prefix
from lkq_hf.cache.prepare import get_decoder, prepare_model_for_eviction
from lkq_hf.cache.tensor_parallel import find_mesh
from lkq_hf.files import read_json, remove_partial, staging, write_atomically, write_json
from lkq_hf.scoring import SCORERS, Scorer

NAME = "lookahead_cache.json"
FORMAT = 1
MAX_TOKENS = 2**31 - 1

OPTIONS = ("budget", "max_new_tokens", "allocation", "evict_later_turns", "refresh_every", "park")
"""Arguments of a cache that are saved, beside its scorer."""

SavedCache = TypeVar("SavedCache", bound=EvictedCache)

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class DamagedCacheError(ValueError):
    """A file holds what no cache of ours does."""


def save_cache(
    cache: EvictedCache,
    directory: Path,
    model: Any = None,
    input_ids: torch.Tensor | None = None,
    parked: bool = True,
) -> None:
    """See `LookaheadCache.save_pretrained`."""
    decoder = cache.model() if model is None else get_decoder(model)
    _check_savable(cache, decoder)
    tensors: dict[str, torch.Tensor] = {}
    layers = [_describe(index, layer, parked, tensors) for index, layer in enumerate(cache.layers)]
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    options = {name: getattr(cache, name) for name in OPTIONS}
    seen = int(cache.get_seq_length())
    content = {
        "format": FORMAT,
        "model": fingerprint(decoder),
        "options": options | ({} if parked else {"park": None}),
        "scorer": _describe_scorer(cache.scorer),
        "batch": cache.batch,
        "tokens_seen": seen,
        "input_ids_sha256": _digest_of_text(cache, seen, input_ids),
        "layers": layers,
    }
    digest = _write_tensors(directory, tensors)
    name = _file_name(digest)
    write_json(directory / NAME, content | {"tensors": {"file": name, "sha256": digest}})
    remove_partial(directory)
    for path in directory.glob("cache-*.safetensors"):
        if path.name != name:
            path.unlink(missing_ok=True)


def _write_tensors(directory: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Adds a safetensors file to a directory, which appears there whole, and returns its hash."""
    with staging(directory) as temporary:
        path = temporary / "tensors.safetensors"
        # safetensors has a temporary file of its own, which a killed process leaves.
        write_atomically(path, lambda partial: save_file(tensors, partial))
        digest = _digest_of_file(path)
        path.replace(directory / _file_name(digest))
    return digest


def _file_name(digest: str) -> str:
    return f"cache-{digest[:16]}.safetensors"


def load_cache(
    kind: type[SavedCache],
    directory: Path,
    model: Any,
    scorer: str | Scorer | None,
    input_ids: torch.Tensor | None,
    options: dict[str, Any],
) -> SavedCache:
    """See `LookaheadCache.from_pretrained`."""
    prepare_model_for_eviction(model)
    decoder = get_decoder(model)
    _refuse_tensor_parallel(decoder)
    content = read_note(directory)
    expected, found = content["model"], fingerprint(decoder)
    if changes := differences(expected, found):
        raise ValueError(
            f"{directory} holds the cache of another model ({expected['name']}): {'; '.join(changes[:3])}. Load that "
            "model, or read the text again with this one."
        )
    if input_ids is not None:
        _check_ids(directory, content, input_ids)
    cache = _new_cache(kind, content, scorer, options)
    cache.build_layers(decoder.config)
    cache.remember_model(decoder)
    try:
        tensors = _read_tensors(directory, content)
        kinds = list(map(_kind, cache.layers))
        if (saved := [layer.get("kind") for layer in content["layers"]]) != kinds:
            raise DamagedCacheError(f"the model's layers are of the kinds {kinds}, those of the file {saved}")
        same_dtype = expected["dtype"] == found["dtype"]
        _fill(cache, content, _Tensors(tensors, decoder, None if same_dtype else decoder.dtype))
        with suppress(ValueError):  # no adapter is active yet
            cache.bind_scorer(decoder)
        tensors_left = sorted(tensors)
        if tensors_left:
            raise DamagedCacheError(f"it holds {len(tensors_left)} unexpected tensors ({tensors_left[0]}, ...)")
    except DamagedCacheError as error:
        raise ValueError(f"{directory} is damaged: {error}. Save the cache or download it again.") from error
    return cache


def read_note(directory: Path) -> dict[str, Any]:
    """What ``lookahead_cache.json`` says, with fields of the right types.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it was written by a later version, or holds something else.
    """
    path = directory / NAME
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no saved cache: expected {NAME} in it, as save_pretrained writes")
    content = read_json(path)
    if isinstance(content.get("format"), int) and content["format"] > FORMAT:
        raise ValueError(
            f"{path} has format {content['format']}, and this version reads up to {FORMAT}: upgrade lkq-hf"
        )
    tensors = content.get("tensors")
    checks = {
        "format": content.get("format") == FORMAT,
        "model": is_fingerprint(content.get("model")),
        "options": isinstance(content.get("options"), dict) and content["options"].keys() == set(OPTIONS),
        "scorer": isinstance(content.get("scorer"), dict),
        "batch": _is_count(content.get("batch")),
        "input_ids_sha256": "input_ids_sha256" in content and isinstance(content["input_ids_sha256"], str | None),
        "tokens_seen": _is_count(content.get("tokens_seen")),
        "layers": isinstance(content.get("layers"), list)
        and all(isinstance(layer, dict) for layer in content["layers"]),
        "tensors": isinstance(tensors, dict)
        and all(isinstance(tensors.get(name), str) for name in ("file", "sha256"))
        and Path(tensors["file"]).name == tensors["file"],
    }
    if wrong := [name for name, right in checks.items() if not right]:
        raise ValueError(f"{path} is damaged: {', '.join(wrong)} should hold something else. Save the cache again.")
    return content


# Saving


def _check_savable(cache: EvictedCache, decoder: Any) -> None:
    if decoder is None:
        raise ValueError(
            "this cache does not know which model filled it (it was unpickled, or the model is gone): pass the model, "
            "cache.save_pretrained(directory, model=model)"
        )
    _refuse_tensor_parallel(decoder)
    if not cache.has_prompt:
        raise ValueError("there is nothing to save: no prompt has been read into this cache")
    if cache.is_unsettled:
        raise ValueError(
            "this cache is in the middle of a prompt or of drafted tokens: save it when the last piece has been read, "
            "or after crop(0)"
        )


def _refuse_tensor_parallel(decoder: Any) -> None:
    if find_mesh(decoder) is not None:
        raise NotImplementedError(
            "under tensor parallelism every process holds a part of the cache, which is neither saved nor loaded. "
            'Load the model with device_map="auto" in the place of tp_plan.'
        )


def _describe(index: int, layer: Any, parked: bool, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the json says of a layer; its tensors are added to ``tensors``."""
    kind, prefix = _kind(layer), f"layers.{index}."
    if isinstance(layer, UncompressedSlidingLayer):
        tensors[prefix + "window.keys"], tensors[prefix + "window.values"] = layer.stored_window()
        return {"kind": kind}
    if not isinstance(layer, EvictedLayer):
        return {"kind": kind}
    tensors[prefix + "tail.keys"], tensors[prefix + "tail.values"] = layer.stored_tail()
    if layer.prefix is not None:
        keys, values, positions, valid = layer.prefix.padded()
        tensors |= {
            prefix + "kept.keys": keys[valid],
            prefix + "kept.values": values[valid],
            prefix + "kept.positions": positions[valid],
            prefix + "kept.lengths": layer.prefix.lengths,
        }
    chunks = layer.parked.chunks() if layer.parked is not None and parked else []
    for number, (keys, values) in enumerate(chunks):
        tensors[f"{prefix}parked.{number}.keys"], tensors[f"{prefix}parked.{number}.values"] = keys, values
    queries = layer.last_queries
    if queries is not None:
        tensors[prefix + "queries"] = queries.query
    return {
        "kind": kind,
        "source_length": None if layer.prefix is None else layer.prefix.source_length,
        "parked_pieces": len(chunks),
        "queries": None if queries is None else {"scaling": queries.scaling, "softcap": queries.softcap},
    }


def _kind(layer: Any) -> str:
    if isinstance(layer, EvictedLayer):
        return "evicted"
    return "window" if isinstance(layer, UncompressedSlidingLayer) else "shared"


def _describe_scorer(scorer: Scorer) -> dict[str, Any]:
    """Name and parameters of a scorer of ours; of any other, its class, so that a message can name it."""
    name = next((name for name, kind in SCORERS.items() if type(scorer) is kind), None)
    if name is None or not is_dataclass(scorer):
        return {"name": None, "class": type(scorer).__name__}
    return {"name": name, "parameters": {field.name: getattr(scorer, field.name) for field in fields(scorer)}}


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of_text(cache: EvictedCache, seen: int, input_ids: torch.Tensor | None) -> str | None:
    if input_ids is None:
        return cache.text.digest(cache.batch, seen)
    return _digest_of_ids(input_ids, cache.batch, seen)


def _digest_of_ids(input_ids: torch.Tensor, batch: int, seen: int) -> str:
    if input_ids.shape != (batch, seen):
        raise ValueError(
            f"input_ids should be the tokens that the cache has read, [{batch}, {seen}], got {list(input_ids.shape)}"
        )
    return digest_of(input_ids)


# Loading


def _check_ids(directory: Path, content: dict[str, Any], input_ids: torch.Tensor) -> None:
    if content["input_ids_sha256"] is None:
        raise ValueError(f"{directory} was saved without input_ids, so that they cannot be compared: leave them out")
    seen = content["tokens_seen"]
    if _digest_of_ids(input_ids[:, :seen], content["batch"], seen) != content["input_ids_sha256"]:
        raise ValueError(f"{directory} holds the cache of another text than these input_ids: read them anew")


def _new_cache(
    kind: type[SavedCache], content: dict[str, Any], scorer: str | Scorer | None, changes: dict[str, Any]
) -> SavedCache:
    if unknown := changes.keys() - set(OPTIONS):
        raise TypeError(f"unknown arguments {sorted(unknown)}; expected some of {', '.join(OPTIONS)}")
    if scorer is None:
        scorer = _saved_scorer(content["scorer"])
    saved = content["options"]
    if saved["max_new_tokens"] is not None and not _is_count(saved["max_new_tokens"], 2**20):
        raise ValueError(f"the saved cache has room for {saved['max_new_tokens']} tokens: its file is damaged")
    park = changes.get("park")
    if park is not None and saved["park"] is None and any(layer.get("source_length") for layer in content["layers"]):
        raise ValueError(
            f"park={park!r} needs everything that was read, and this cache was saved without its parked entries"
        )
    return kind(scorer=scorer, **saved | changes)


def _saved_scorer(scorer: dict[str, Any]) -> Scorer:
    name, parameters = scorer.get("name"), scorer.get("parameters")
    if name not in SCORERS:
        raise ValueError(
            f"the saved cache was evicted by a scorer that is not one of {', '.join(SCORERS)} "
            f"({scorer.get('class') or name}): pass the scorer of later turns, from_pretrained(..., scorer=...)"
        )
    kind: Any = SCORERS[name]
    if not isinstance(parameters, dict) or parameters.keys() != {field.name for field in fields(kind)}:
        raise ValueError(f"the saved cache has other parameters of the scorer {name} than this version knows")
    for field in fields(kind):
        value = parameters[field.name]
        fitting = isinstance(value, str) if isinstance(field.default, str) else value is None or _is_number(value)
        if not fitting:
            raise ValueError(f"the saved cache has {value!r} as {field.name} of the scorer {name}: it is damaged")
    return kind(**parameters)


def _read_tensors(directory: Path, content: dict[str, Any]) -> dict[str, torch.Tensor]:
    path = directory / content["tensors"]["file"]
    if not path.is_file():
        raise DamagedCacheError(f"{path.name}, which {NAME} names, is missing")
    if _digest_of_file(path) != content["tensors"]["sha256"]:
        raise DamagedCacheError(f"{path.name} is truncated, or is not the file that {NAME} was written for")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DamagedCacheError(f"{path.name} is not safetensors ({error})") from error


class _Tensors:
    """The tensors of a file, handed out once, checked, and on the device of their layer."""

    def __init__(self, tensors: dict[str, torch.Tensor], decoder: Any, dtype: torch.dtype | None) -> None:
        self._tensors, self._dtype = tensors, dtype
        self._attentions: dict[int, Any] = {}
        for module in decoder.modules():
            if isinstance(index := getattr(module, "layer_idx", None), int):
                self._attentions.setdefault(index, module)

    def take(self, index: int, name: str, shape: tuple[int | None, ...], on_device: bool = True) -> torch.Tensor:
        """Keys, values or queries; None in the shape stands for any size."""
        tensor = self._pop(index, name, shape)
        if tensor.dtype not in _DTYPES:
            raise DamagedCacheError(f"{name} of layer {index} should hold floating-point numbers, not {tensor.dtype}")
        # A copy, and not a view of the file, which may change.
        tensor = tensor.to(self._device(index) if on_device else "cpu", self._dtype or tensor.dtype, copy=True)
        if not bool(torch.isfinite(tensor).all()):
            raise DamagedCacheError(f"{name} of layer {index} holds values that are not finite")
        return tensor

    def take_pair(
        self, index: int, name: str, shape: tuple[int | None, ...], on_device: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values."""
        pair = (
            self.take(index, f"{name}.keys", shape, on_device),
            self.take(index, f"{name}.values", shape, on_device),
        )
        if pair[0].shape[:-1] != pair[1].shape[:-1]:
            raise DamagedCacheError(f"{name} of layer {index} has other numbers of keys than of values")
        return pair

    def take_whole(self, index: int, name: str, shape: tuple[int | None, ...]) -> torch.Tensor:
        """int32, in main memory."""
        tensor = self._pop(index, name, shape)
        if tensor.dtype != torch.int32:
            raise DamagedCacheError(f"{name} of layer {index} should be int32, not {tensor.dtype}")
        return tensor

    def _pop(self, index: int, name: str, shape: tuple[int | None, ...]) -> torch.Tensor:
        tensor = self._tensors.pop(f"layers.{index}.{name}", None)
        if tensor is None:
            raise DamagedCacheError(f"{name} of layer {index} is missing")
        found = tuple(tensor.shape)
        if len(found) != len(shape) or any(a not in (None, b) for a, b in zip(shape, found, strict=True)):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise DamagedCacheError(f"{name} of layer {index} should have shape [{wanted}], found {list(found)}")
        return tensor

    def check_features(self, index: int, heads: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Compares heads and features with what the model's projections make, where it has them."""
        for name, tensor in (("k_proj", key), ("v_proj", value)):
            projection = getattr(self._attentions.get(index), name, None)
            features = getattr(projection, "out_features", None)
            if features is not None and heads * tensor.shape[-1] != features:
                raise DamagedCacheError(
                    f"layer {index} should have {features} features over all KV heads, found {heads} heads of "
                    f"{tensor.shape[-1]}"
                )

    def _device(self, index: int) -> torch.device:
        attention = self._attentions[index]
        for tensor in chain(attention.parameters(), attention.buffers()):  # quantized weights are buffers
            if not tensor.is_meta:
                return tensor.device
        for module in attention.modules():  # offloaded
            place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if place is not None:
                return torch.device(place)
        raise NotImplementedError(f"layer {index} of this model is on no device: move the model to one first")


def _fill(cache: EvictedCache, content: dict[str, Any], tensors: _Tensors) -> None:
    batch, seen = content["batch"], content["tokens_seen"]
    prefixes = _prefixes(cache, content, tensors)
    for index, (layer, note) in enumerate(zip(cache.layers, content["layers"], strict=True)):
        if isinstance(layer, UncompressedSlidingLayer):
            stored = min(seen, layer.sliding_window - 1)
            keys, values = tensors.take_pair(index, "window", (batch, None, stored, None))
            tensors.check_features(index, keys.shape[1], keys, values)
            layer.restore_window(keys, values, seen)
        elif isinstance(layer, EvictedLayer):
            prefix = prefixes.get(index)
            first = 0 if prefix is None else prefix.source_length
            keys, values = tensors.take_pair(index, "tail", (batch, None, seen - first, None))
            heads = keys.shape[1]
            tensors.check_features(index, heads, keys, values)
            if prefix is not None and prefix.lengths.shape[1] != heads:
                raise DamagedCacheError(f"layer {index} has other numbers of KV heads before the tail than in it")
            chunks = _parked(index, note, tensors, (batch, heads, None, keys.shape[-1]), first, seen)
            if cache.park is None:
                chunks = []
            layer.restore(prefix, (keys, values), chunks, _queries(index, note, tensors, batch, keys))
    cache.text.given = seen
    if content["input_ids_sha256"] is not None:
        cache.text.saved = seen, content["input_ids_sha256"]
    cache.end_restoring()


def _prefixes(cache: EvictedCache, content: dict[str, Any], tensors: _Tensors) -> dict[int, Prefix]:
    """What each layer has kept, layers of one shape and device in one pool."""
    parts: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    kinds: dict[Any, list[int]] = {}
    for index in cache.evicted_layers():
        length = content["layers"][index].get("source_length")
        if length is None:
            continue
        if not _is_count(length) or length > content["tokens_seen"]:
            raise DamagedCacheError(f"layer {index} kept entries of {length!r} of {content['tokens_seen']} tokens")
        lengths = tensors.take_whole(index, "kept.lengths", (content["batch"], None))
        keys, values = tensors.take_pair(index, "kept", (None, None))
        positions = tensors.take_whole(index, "kept.positions", (keys.shape[0],))
        _check_positions(index, positions, lengths, length)
        tensors.check_features(index, lengths.shape[1], keys, values)
        parts[index] = keys, values, positions, lengths
        kinds.setdefault((keys.device, keys.dtype, keys.shape[1], values.shape[1]), []).append(index)
    lengths_of_texts = {content["layers"][index]["source_length"] for index in parts}
    if len(lengths_of_texts) > 1 or (parts and len(parts) < len(cache.evicted_layers())):
        raise DamagedCacheError("its layers kept entries of texts of different lengths")
    prefixes = {}
    for indices in kinds.values():
        prefixes.update(_one_pool({index: parts[index] for index in indices}, cache, *lengths_of_texts))
    return prefixes


def _one_pool(
    parts: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]],
    cache: EvictedCache,
    source_length: int,
) -> dict[int, Prefix]:
    keys, values, _, lengths = next(iter(parts.values()))
    total = sum(part[0].shape[0] for part in parts.values())
    capacity, budget = total, cache.entries_to_keep(source_length)
    if cache.is_compileable:
        static = static_capacity(budget, lengths.shape[0], sum(part[3].shape[1] for part in parts.values()))
        # A file may claim a budget that its entries are far from.
        capacity = static if total <= static <= 2 * total else total
    pool = Pool.empty(capacity, keys, values)
    prefixes, done = {}, 0
    for index, (keys, values, positions, lengths) in parts.items():
        here = slice(done, done + keys.shape[0])
        pool.keys[here], pool.values[here], pool.positions[here] = keys, values, positions.to(keys.device)
        starts = done + lengths.flatten().cumsum(0).sub(lengths.flatten()).view(lengths.shape)
        longest = int(lengths.max())
        if cache.is_compileable:
            longest = max(static_longest(budget, cache.allocation), static_longest(longest, "uniform"))
        prefixes[index] = Prefix(pool, starts.to(keys.device), lengths.to(keys.device), longest, source_length)
        done = here.stop
    return prefixes


def _check_positions(index: int, positions: torch.Tensor, lengths: torch.Tensor, source_length: int) -> None:
    if lengths.numel() == 0 or int(lengths.min()) < 0 or int(lengths.long().sum()) != positions.shape[0]:
        raise DamagedCacheError(f"the lengths of layer {index} do not add up to its {positions.shape[0]} entries")
    if positions.numel() == 0:
        raise DamagedCacheError(f"layer {index} kept nothing")
    if int(positions.min()) < 0 or int(positions.max()) >= source_length:
        raise DamagedCacheError(
            f"positions of layer {index} should be from 0 to {source_length - 1}, found {int(positions.min())} to "
            f"{int(positions.max())}"
        )
    owner = torch.arange(lengths.numel()).repeat_interleave(lengths.flatten().long())
    if bool(((positions[1:] <= positions[:-1]) & (owner[1:] == owner[:-1])).any()):
        raise DamagedCacheError(f"positions of layer {index} should ascend within each head")


def _parked(
    index: int, note: dict[str, Any], tensors: _Tensors, shape: tuple[int | None, ...], first: int, seen: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    pieces = note.get("parked_pieces")
    if not isinstance(pieces, int) or not _is_count(pieces, least=0):
        raise DamagedCacheError(f"layer {index} has {pieces!r} parked pieces")
    chunks = []
    for number in range(pieces):
        chunks.append(tensors.take_pair(index, f"parked.{number}", shape, on_device=False))
    length = sum(keys.shape[2] for keys, _ in chunks)
    if chunks and not first <= length <= seen:
        raise DamagedCacheError(f"layer {index} has {length} parked entries, expected {first} to {seen}")
    return chunks


def _queries(
    index: int, note: dict[str, Any], tensors: _Tensors, batch: int, keys: torch.Tensor
) -> LastQueries | None:
    about = note.get("queries")
    if about is None:
        return None
    if not isinstance(about, dict) or not _is_number(about.get("scaling")):
        raise DamagedCacheError(f"layer {index} has queries without a scaling")
    softcap = about.get("softcap")
    if softcap is not None and not _is_number(softcap):
        raise DamagedCacheError(f"layer {index} has queries with a softcap of {softcap!r}")
    query = tensors.take(index, "queries", (batch, None, None, keys.shape[-1]))
    if query.shape[1] == 0 or query.shape[1] % keys.shape[1]:
        raise DamagedCacheError(f"layer {index} has queries of {query.shape[1]} heads for {keys.shape[1]} KV heads")
    return LastQueries(query, about["scaling"], softcap)


def _is_count(value: Any, most: int = MAX_TOKENS, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) < 1e9
