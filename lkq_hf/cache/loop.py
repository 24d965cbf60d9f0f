"""The decoding loop of a cache with static shapes: the device goes from token to token without asking the host.

In ``generate``'s own loop, Python prepares inputs and masks, chooses a token and asks whether to stop, and the device
waits for it at every token. Here one CUDA graph holds a whole step: masks, the compiled forward, logits processors,
the choice of the token, and what the next step reads. The host replays it a few steps ahead of the token that it looks
at. When a token ends the answer, the steps behind it are taken back from the cache and from the random numbers, so
that everything is as ``generate``'s own loop leaves it.

``generate`` calls the loop as its ``custom_generate``. What is not known here, such as other logits processors, goes
to ``generate``'s own loop.
"""

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import CompileConfig, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerationMixin
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from lkq_hf.cache.build import build_layers
from lkq_hf.cache.choice import TokenChoice
from lkq_hf.cache.decode import masks_are_known, masks_on_device
from lkq_hf.cache.evicted import EvictedCache
from lkq_hf.cache.guards import generation_option
from lkq_hf.cache.row_products import RowProducts
from lkq_hf.cache.tensor_parallel import is_divided
from lkq_hf.compat import CACHE_NAMES, pass_cache
from lkq_hf.kernels.cuda_graph import record

AHEAD = 3
"""Steps that are queued behind the token that the host looks at. More bridge longer pauses of the host, and as many
are computed in vain when an answer ends before its greatest length."""

# Options that ask for more than one token after the other, or that generate does not hand on to custom_generate.
_OTHER_MODES = (
    "penalty_alpha",
    "dola_layers",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
    "constraints",
    "force_words_ids",
    "stop_strings",
)
_ARGUMENTS_OF_OTHER_MODES = ("custom_generate", "assistant_model", "synced_gpus", "trust_remote_code")

# Methods that a model must not have of its own, as the loop does what they do.
_METHODS = ("generate", "_sample", "_prefill", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")

_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")

# What the compiler must leave to the loop: graphs of its own.
_MODES_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}

_ROWS = 256  # tokens of a piece of pinned memory

# Models of which a step could not be recorded.
_unrecordable: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()

Refresh = Callable[[PreTrainedModel, EvictedCache, torch.Tensor | None], None]
"""Evicts between two tokens: given a decoder, the cache, and a mask ``[batch, >= text]`` or None."""


def records_on(device: torch.device) -> bool:
    """Whether steps can be recorded on such a device."""
    return device.type == "cuda"


def with_decoding_loop(loop: "DecodingLoop", args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for ``generate`` that let it decode by this loop; the same ones where it cannot apply.

    Args:
        loop: of a model and a cache.
        args, kwargs: what ``generate`` is called with.
    """
    model, strings, changed = loop.model, None, dict(kwargs)
    if changed.get("stop_strings") is not None and changed.get("tokenizer") is not None:
        strings, tokenizer = changed.pop("stop_strings"), changed.pop("tokenizer")
    defaults = model.generation_config

    def option(name: str) -> Any:
        return generation_option(name, defaults, args, changed) if hasattr(defaults, name) else None

    if (
        len(args) > 2  # stopping_criteria and others by place
        or (option("num_beams") or 1) > 1
        or any(option(name) for name in _OTHER_MODES)
        or any(changed.get(name) for name in _ARGUMENTS_OF_OTHER_MODES)
        or not can_be_recorded(model)
    ):
        return kwargs
    if strings is not None:
        # generate keeps the tokenizer from custom_generate, and from itself.
        criteria = [*(changed.get("stopping_criteria") or []), StopStringCriteria(tokenizer, strings)]
        changed["stopping_criteria"] = StoppingCriteriaList(criteria)
    loop.streamer = kwargs.get("streamer")
    return changed | {"custom_generate": loop}


def can_be_recorded(model: Any) -> bool:
    """Whether steps of a model can be recorded, as far as is known before one is."""
    return (
        all(getattr(type(model), name, None) is getattr(GenerationMixin, name, None) for name in _METHODS)
        and model not in _unrecordable
        and records_on(model.device)
        and len(set(getattr(model, "hf_device_map", {"": 0}).values())) == 1
        and not is_divided(model)
    )


class DecodingLoop:
    """What ``generate`` calls to decode, once.

    Attributes:
        model: whose ``generate`` is called.
        decoder: its stack of layers.
        cache: with static shapes.
        refresh: evicts between two tokens.
        streamer: gets each token; ``generate`` does not hand on its own.
    """

    def __init__(self, model: Any, decoder: PreTrainedModel, cache: EvictedCache, refresh: Refresh) -> None:
        self.model, self.decoder, self.cache, self.refresh = model, decoder, cache, refresh
        self.streamer: Any = None

    # The names of arguments are those of GenerationMixin._sample: generate takes others out of what it is given.
    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Reads the prompt and decodes; returns what ``generate`` returns."""
        if not self._knows(input_ids, logits_processor, generation_config, model_kwargs):
            return model._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                streamer=self.streamer,
                **model_kwargs,
            )
        stop = _Stop(input_ids, stopping_criteria, generation_config)
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        inputs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        scores = logits_processor(input_ids, outputs.logits[:, -1].to(copy=True, dtype=torch.float32))
        del outputs  # logits of a whole prompt may be large
        choice = TokenChoice(logits_processor, generation_config.do_sample)
        first = choice.first(scores)
        with model._optimize_model_for_decode():
            step = _Step(self, choice, stop, inputs, scores.shape[-1])
            ids = _Run(self, step, stop).run(first)
        if self.streamer is not None:
            self.streamer.end()
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=ids, **pass_cache(self.cache))  # type: ignore[arg-type]
        return ids

    def _knows(self, input_ids: torch.Tensor, processors: Any, config: Any, inputs: dict[str, Any]) -> bool:
        """Whether the loop does all that is asked for."""
        tensors = {name for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        mask = inputs.get("attention_mask")
        layers = self.cache.layers if self.cache.has_prompt else build_layers(self.decoder.config, False, 1)
        return (
            not config.is_assistant
            and not any(getattr(config, name) for name in _OUTPUTS)
            and TokenChoice.knows(processors)
            and tensors <= {"attention_mask", "position_ids", "inputs_embeds"}
            and (mask is None or mask.ndim == 2)
            and input_ids.device == self.model.device
            and masks_are_known(layers, self.model.config)
            and (not input_ids.is_cuda or self.model._valid_auto_compile_criteria(inputs, config))
        )


class _Stop:
    """What ends an answer.

    Attributes:
        prompt: ids ``[batch, tokens]``.
        config: of the generation.
        most: tokens of an answer; None without a limit.
        ends: ids that end a row.
        pad: id behind the end of a row, a scalar on the device; None where rows are not padded.
        unfinished: for each row, whether its answer goes on.
    """

    def __init__(self, prompt: torch.Tensor, criteria: Any, config: Any) -> None:
        self.prompt, self.config = prompt, config
        lengths = [each.max_length for each in criteria if type(each) is MaxLengthCriteria]
        self.most = min(lengths) - prompt.shape[1] if lengths else None
        ends = [each.eos_token_id for each in criteria if type(each) is EosTokenCriteria]
        self.ends = set(torch.cat(ends).tolist()) if ends else set()
        pads = any(hasattr(each, "eos_token_id") for each in criteria)
        self.pad = config._pad_token_tensor.to(prompt.device) if pads else None
        # The others have to be asked.
        known = (MaxLengthCriteria, EosTokenCriteria)
        self._criteria = StoppingCriteriaList(each for each in criteria if type(each) not in known)
        self._ids = prompt
        self._stream = torch.cuda.Stream(prompt.device) if prompt.is_cuda and self._criteria else None
        self.unfinished = [True] * prompt.shape[0]

    def look(self, token: torch.Tensor, count: int) -> bool:
        """Looks at a token of each row, in order.

        Args:
            token: ``[batch]``, on the CPU.
            count: tokens of the answer up to this one.

        Returns:
            Whether rows have ended, but not all, by more than their ids, which the device does not know of.
        """
        asked, full = self._ask(token), self.most is not None and count >= self.most
        ended = [id_ in self.ends for id_ in token.tolist()]
        before, rows = self.unfinished, range(len(ended))
        self.unfinished = [before[row] and not (ended[row] or asked[row] or full) for row in rows]
        return any(self.unfinished) and any(before[row] and asked[row] and not ended[row] for row in rows)

    def _ask(self, token: torch.Tensor) -> list[bool]:
        if not self._criteria:
            return [False] * token.shape[0]
        with torch.cuda.stream(self._stream):  # past the steps that are queued
            self._ids = torch.cat([self._ids, token.to(self._ids.device)[:, None]], dim=1)
            return self._criteria(self._ids, None).tolist()


class _Step:
    """What the device does for a token. All it reads and writes stays where it is in memory.

    Attributes:
        token: ``[batch, 1]``, the last one chosen.
        text_mask: ``[batch, prompt + 1]``, 0 for padding; None if there is none.
    """

    def __init__(
        self, loop: DecodingLoop, choice: TokenChoice, stop: _Stop, inputs: dict[str, Any], vocabulary: int
    ) -> None:
        self.choice, self.text_mask = choice, inputs.get("attention_mask")
        self._model, self._cache, self._stop, self._vocabulary = loop.model, loop.cache, stop, vocabulary
        self._compile_config = stop.config.compile_config
        self._forward = self._compiled(inputs)
        self._real = None if self.text_mask is None else self.text_mask.bool()
        batch, device = stop.prompt.shape[0], stop.prompt.device
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self._unfinished = torch.ones(batch, dtype=torch.bool, device=device)
        self._ends = torch.tensor(sorted(stop.ends), dtype=torch.long, device=device)
        positions = inputs.get("position_ids")
        self._first_position: Any = None if positions is None else positions[..., -1:]
        # The same strides for all prompts, so that nothing is compiled again.
        contiguous = torch.contiguous_format
        self._position = None if positions is None else positions[..., -1:].clone(memory_format=contiguous)
        unused = ("attention_mask", "position_ids", "inputs_embeds", *CACHE_NAMES)
        self._inputs = {name: value for name, value in inputs.items() if name not in unused}
        self._inputs |= {"return_dict": True, **pass_cache(loop.cache)}

    def _compiled(self, inputs: dict[str, Any]) -> Callable[..., Any]:
        if not self._model._valid_auto_compile_criteria(inputs, self._stop.config):
            return self._model.__call__
        config = copy(self._compile_config or CompileConfig())
        config.mode = _MODES_WITHOUT_GRAPHS.get(config.mode, config.mode)
        if config.options:
            config.options = config.options | {"triton.cudagraphs": False}
        elif config.mode in (None, "default") and config.backend == "inductor":
            config.mode, config.options = None, {"post_grad_custom_pre_pass": RowProducts()}
        return torch.compile(self._model.__call__, **config.to_dict())

    def as_generate_does(self) -> None:
        """From now on, runs the forward that ``generate`` compiles."""
        self._forward = self._model.get_compiled_call(self._compile_config)

    def start(self, ids: torch.Tensor) -> None:
        """Goes on behind a text, ``[batch, tokens]``."""
        self.token.copy_(ids[:, -1:])
        self._unfinished.copy_(torch.tensor(self._stop.unfinished))
        self._end_rows()
        if self._position is not None:
            self._position.copy_(self._first_position + (ids.shape[1] - self._stop.prompt.shape[1] - 1))
        self.choice.start(ids, self._vocabulary)

    def run(self) -> None:
        """Reads a token and chooses the next one."""
        inputs: dict[str, Any] = {"attention_mask": masks_on_device(self._cache, self._model.config, self._real)}
        if self._position is not None:
            inputs["position_ids"] = self._position
        logits = self._forward(input_ids=self.token, **inputs, **self._inputs).logits
        token = self.choice(logits[:, -1].to(copy=True, dtype=torch.float32))
        if self._stop.pad is not None:
            token = torch.where(self._unfinished, token, self._stop.pad)
        self.token.copy_(token[:, None])
        self._end_rows()
        self.choice.note(token)
        if self._position is not None:
            self._position.add_(1)

    def _end_rows(self) -> None:
        """Notes which rows the last tokens end."""
        if self._stop.pad is not None:
            self._unfinished &= (self.token != self._ends).all(dim=1)


class _Chosen(NamedTuple):
    """A token of each row, chosen and not yet looked at.

    Attributes:
        token: ``[batch]``, on the CPU.
        arrived: an event after which it is there; None if it is there.
        random: state of the random numbers before it was chosen; None where none are drawn.
    """

    token: torch.Tensor
    arrived: Any
    random: torch.Tensor | None


class _Run:
    """The host's part of the loop."""

    def __init__(self, loop: DecodingLoop, step: _Step, stop: _Stop) -> None:
        self._loop, self._cache, self._step, self._stop = loop, loop.cache, step, stop
        self._device = stop.prompt.device
        self._rows = _rows(stop.prompt.shape[0], self._device.type == "cuda")
        self._queue: deque[_Chosen] = deque()
        self._answer: list[torch.Tensor] = []  # tokens that were looked at
        self._replay: Callable[[], None] | None = None
        self._has_run = False  # with storage where it is
        self._storage: list[int] = []

    def run(self, first: torch.Tensor) -> torch.Tensor:
        """The text ``[batch, tokens]`` with the answer that begins with these tokens ``[batch]``."""
        self._step.start(torch.cat([self._stop.prompt, first[:, None]], dim=1))
        self._hand_over(None)
        try:
            while any(self._stop.unfinished):
                if len(self._answer) + len(self._queue) != self._stop.most:
                    self._advance()
                if len(self._queue) > AHEAD or len(self._answer) + len(self._queue) == self._stop.most:
                    self._look()
        finally:
            self._take_back()
        return self._text()

    def _advance(self) -> None:
        """Lets the device do a step, unless the answer turns out to have ended before it."""
        if self._replay is None or not self._cache.next_token_fits:
            while self._queue and any(self._stop.unfinished):
                self._look()
            if not any(self._stop.unfinished):
                return
            self._make_room()
        else:
            self._cache.note_token()
        random = _random_state(self._device) if self._step.choice.samples else None
        if self._replay is None and self._has_run:
            self._replay = self._recorded()
        (self._replay or self._step.run)()
        self._has_run = True
        self._hand_over(random)

    def _make_room(self) -> None:
        """What comes before a token and waits for the device."""
        self._cache.end_pieces(1)
        if self._cache.refresh_is_due():
            self._loop.refresh(self._loop.decoder, self._cache, self._text_mask())
        self._cache.get_mask_sizes(1, 0)
        if (storage := self._cache.static_storage()) != self._storage:
            self._storage, self._replay, self._has_run = storage, None, False

    def _text_mask(self) -> torch.Tensor | None:
        mask = self._step.text_mask
        return None if mask is None else nn.functional.pad(mask, (0, len(self._answer) - 1), value=1)

    def _recorded(self) -> Callable[[], None]:
        try:
            return record(self._step.run, self._device)
        except RuntimeError as error:
            _unrecordable.add(self._loop.model)
            self._step.as_generate_does()
            warnings.warn(
                f"steps of {type(self._loop.model).__name__} are launched one by one while it decodes, as they cannot "
                f"be recorded as a CUDA graph: {error}",
                stacklevel=2,
            )
            return self._step.run

    def _hand_over(self, random: torch.Tensor | None) -> None:
        """Has the token copied to the host."""
        row, arrived = next(self._rows), None
        row.copy_(self._step.token[:, 0], non_blocking=True)
        if self._device.type == "cuda":
            arrived = torch.cuda.Event(blocking=True)
            arrived.record(torch.cuda.current_stream(self._device))
        self._queue.append(_Chosen(row, arrived, random))

    def _look(self) -> None:
        """Looks at the next token: streams it, and asks whether to stop."""
        chosen = self._queue.popleft()
        if chosen.arrived is not None:
            chosen.arrived.synchronize()
        self._answer.append(chosen.token)
        if self._loop.streamer is not None:
            self._loop.streamer.put(chosen.token.clone())
        if self._stop.look(chosen.token, len(self._answer)) and self._stop.pad is not None:
            # A row has to be padded from here on.
            self._take_back()
            self._step.start(self._text())

    def _take_back(self) -> None:
        """Undoes the steps behind the tokens that were looked at."""
        if not self._queue:
            return
        if self._queue[-1].arrived is not None:
            self._queue[-1].arrived.synchronize()
        # The first token of all was chosen without a step.
        self._cache.take_back(len(self._queue) - (not self._answer))
        if self._queue[0].random is not None:
            _set_random_state(self._queue[0].random, self._device)
        self._queue.clear()

    def _text(self) -> torch.Tensor:
        answer = torch.stack(self._answer, dim=1).to(self._device)
        return torch.cat([self._stop.prompt, answer], dim=1)


def _rows(batch: int, pinned: bool) -> Iterator[torch.Tensor]:
    """Rows ``[batch]`` of ids on the CPU."""
    while True:
        yield from torch.empty(_ROWS, batch, dtype=torch.long, pin_memory=pinned).unbind()


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(state: torch.Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
