"""The decoding loop against ``generate``'s own: the same tokens, and the same cache after them.

On a CPU its steps run directly in the place of a CUDA graph.
"""

import copy
import threading

import pytest
import torch
from models import Graphs, Waits, compiled_by, kept_entries, lookahead_model, padded_prompts, prompt_ids, tiny_model
from transformers import LogitsProcessor, StoppingCriteria

from lkq_hf import LookaheadCache, prepare_model_for_eviction
from lkq_hf.cache import loop
from lkq_hf.kernels import ragged_attention

NEW_TOKENS = 20


class Loops:
    """Switches the loop on, and counts what it did."""

    def __init__(self, monkeypatch):
        self.answers = self.recordings = self.taken_back = 0
        self._patch = monkeypatch
        run, take_back = loop._Run.run, LookaheadCache.take_back

        def counted_run(one, first):
            self.answers += 1
            return run(one, first)

        def counted_take_back(cache, count):
            self.taken_back += count
            return take_back(cache, count)

        monkeypatch.setattr(loop._Run, "run", counted_run)
        monkeypatch.setattr(LookaheadCache, "take_back", counted_take_back)
        monkeypatch.setattr(loop, "record", self.record)
        monkeypatch.setattr(loop, "_unrecordable", set())
        # The kernel's references take numbers from the device, but for this one.
        monkeypatch.setattr(ragged_attention, "_attend", ragged_attention.ragged_attention_reference)

    def record(self, run, device):
        self.recordings += 1

        def replay():
            with Waits():
                run()

        return replay

    def switch(self, on):
        self._patch.setattr(loop, "records_on", lambda device: on)


@pytest.fixture
def loops(monkeypatch):
    return Loops(monkeypatch)


def static_cache(budget=7, scorer="lookahead", max_new_tokens=NEW_TOKENS, **options):
    return LookaheadCache(budget, scorer, max_new_tokens=max_new_tokens, **options)


def generate(model, ids, cache, mask=None, new_tokens=NEW_TOKENS, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "max_new_tokens": new_tokens} | options
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)


def both(loops, run, answers=1):
    """What ``run()`` returns with the loop, and with ``generate``'s own."""
    before = loops.answers
    loops.switch(True)
    found = run()
    assert loops.answers - before == answers
    loops.switch(False)
    expected = run()
    assert loops.answers - before == answers
    return found, expected


def assert_same_cache(found, expected):
    assert int(found.get_seq_length()) == int(expected.get_seq_length())
    assert found._since_reading >= int(found.layers[found.evicted_layers()[0]].tail_length)
    for one, other in zip(found.layers, expected.layers, strict=True):
        for name in ("_filled", "_offset", "_first"):
            assert int(getattr(one, name)) == int(getattr(other, name))
        filled = int(one._filled)
        torch.testing.assert_close(one.keys[:, :, :filled], other.keys[:, :, :filled])
        torch.testing.assert_close(one.values[:, :, :filled], other.values[:, :, :filled])
    for index, kept in kept_entries(expected).items():
        assert torch.equal(kept_entries(found)[index], kept)
    batch, length = found.batch, int(found.get_seq_length())
    assert torch.equal(found.text.known(batch, length), expected.text.known(batch, length))
    assert found.text.given == expected.text.given


def assert_same_answers(loops, model, ids, mask=None, cache=static_cache, answers=1, **options):
    """Returns the text."""
    caches = []

    def run():
        torch.manual_seed(0)
        caches.append(cache())
        text = generate(model, ids, caches[-1], mask, **{k: v() if callable(v) else v for k, v in options.items()})
        return text, torch.rand(())

    (found, random), (expected, expected_random) = both(loops, run, answers)
    assert torch.equal(found, expected)
    assert torch.equal(random, expected_random), "as many random numbers were drawn"
    assert_same_cache(*caches)
    return found


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3"])
def test_a_padded_batch(architecture, loops):
    model = lookahead_model(architecture, "sdpa")
    before = set(vars(model))
    assert_same_answers(loops, model, *padded_prompts())
    assert loops.recordings == 1 and loops.taken_back == 0, "the greatest length is known, nothing runs past it"
    assert set(vars(model)) == before


def test_one_prompt_that_fits_into_the_budget(loops):
    assert_same_answers(loops, lookahead_model("llama", "sdpa"), prompt_ids(1, 12), cache=lambda: static_cache(50))


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 4, 5, 6])
def test_short_answers(new_tokens, loops):
    assert_same_answers(loops, lookahead_model("llama", "sdpa"), *padded_prompts(), new_tokens=new_tokens)


@pytest.mark.parametrize("ends", [(0, 0), (3, 3), (2, 11), (12, 4), (1, 19)])
def test_rows_that_end_before_others_by_their_ids(ends, loops):
    model, (ids, mask) = lookahead_model("llama", "sdpa"), padded_prompts()
    plain = generate(model, ids, static_cache(), mask)[:, ids.shape[1] :]
    eos = sorted({int(plain[row, place]) for row, place in enumerate(ends)})
    text = assert_same_answers(loops, model, ids, mask, eos_token_id=eos, pad_token_id=0)
    assert text.shape[1] < ids.shape[1] + NEW_TOKENS or 19 in ends
    assert loops.taken_back <= loop.AHEAD


class EndsRows(StoppingCriteria):
    """Ends each row at a number of tokens of its own, and notes what it is given."""

    def __init__(self, lengths):
        self.lengths, self.calls = torch.tensor(lengths), []

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is None
        self.calls.append(input_ids.clone())
        return input_ids.shape[1] >= self.lengths.to(input_ids.device)


@pytest.mark.parametrize("pads", [True, False])
@pytest.mark.parametrize("lengths", [(45, 52), (52, 41), (47, 47), (99, 43), (99, 99)])
def test_criteria_of_a_users_own(lengths, pads, loops):
    model, (ids, mask) = lookahead_model("llama", "sdpa"), padded_prompts()
    criteria = []

    def criterion():
        criteria.append(EndsRows(lengths))
        return [criteria[-1]]

    options = {"eos_token_id": 159, "pad_token_id": 0} if pads else {}
    text = assert_same_answers(loops, model, ids, mask, stopping_criteria=criterion, **options)
    assert text.shape[1] == min(max(lengths), ids.shape[1] + NEW_TOKENS)
    found, expected = (each.calls for each in criteria)
    assert len(found) == len(expected)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_greatest_time(loops):
    text = assert_same_answers(loops, lookahead_model("llama", "sdpa"), *padded_prompts(), max_time=0.0)
    assert text.shape[1] == 41


class Streamer:
    def __init__(self):
        self.given, self.ended = [], False

    def put(self, value):
        assert value.device.type == "cpu"
        self.given.append(value.clone())

    def end(self):
        self.ended = True


def test_streamers(loops):
    model, ids = lookahead_model("llama", "sdpa"), prompt_ids(1, 40)
    eos = int(generate(model, ids, static_cache())[0, 50])
    streamers = []

    def streamer():
        streamers.append(Streamer())
        return streamers[-1]

    text = assert_same_answers(loops, model, ids, streamer=streamer, eos_token_id=eos)
    for each in streamers:
        assert each.ended
        assert torch.equal(torch.cat([value.view(1, -1) for value in each.given], 1), text)
    assert [value.shape for value in streamers[0].given] == [value.shape for value in streamers[1].given]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 0, "top_p": 0.8},
        {"min_p": 0.05},
        {"typical_p": 0.8},
        {"epsilon_cutoff": 0.01},
        {"renormalize_logits": True, "remove_invalid_values": True},
        {"repetition_penalty": 1.7, "temperature": 1.2},
        {"num_return_sequences": 3},
    ],
)
@pytest.mark.parametrize("ends", [False, True])
def test_sampling(options, ends, loops):
    model, (ids, mask) = lookahead_model("llama", "sdpa"), padded_prompts()
    if ends:
        torch.manual_seed(0)
        plain = generate(model, ids, static_cache(), mask, do_sample=True, **options)
        options = options | {"eos_token_id": plain[:, 48].unique().tolist(), "pad_token_id": 0}
    assert_same_answers(loops, model, ids, mask, do_sample=True, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 2.0},
        {"min_new_tokens": 9},
        {"min_length": 50},
        {"suppress_tokens": [5, 60, 80, 100]},
    ],
)
def test_processors_of_logits(options, loops):
    model, (ids, mask) = lookahead_model("llama", "sdpa"), padded_prompts()
    plain = generate(model, ids, static_cache(), mask)[:, ids.shape[1] :]
    eos = plain[:, 4].tolist()
    assert_same_answers(loops, model, ids, mask, eos_token_id=eos, pad_token_id=0, **options)
    # With a row that ends by a criterion, behind which tokens are chosen again.
    options = options | {"stopping_criteria": lambda: [EndsRows((44, 55))], "eos_token_id": [159]}
    assert_same_answers(loops, model, ids, mask, pad_token_id=0, **options)


class Backwards(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return -scores


@pytest.mark.parametrize(
    "options",
    [
        {"logits_processor": [Backwards()]},
        {"no_repeat_ngram_size": 2},
        {"output_logits": True, "return_dict_in_generate": True},
        {"num_beams": 2},
        {"custom_generate": lambda model, *given, **named: model._sample(*given, **named)},
    ],
)
def test_what_is_not_known_goes_to_generates_own_loop(options, loops):
    model, (ids, mask) = lookahead_model("llama", "sdpa"), padded_prompts()
    found, expected = both(loops, lambda: generate(model, ids, static_cache(), mask, **options), answers=0)
    assert torch.equal(getattr(found, "sequences", found), getattr(expected, "sequences", expected))


def test_a_streamer_in_generates_own_loop(loops):
    model, ids = lookahead_model("llama", "sdpa"), prompt_ids(1, 40)
    streamers = Streamer(), Streamer()
    each = iter(streamers)
    both(
        loops,
        lambda: generate(model, ids, static_cache(), streamer=next(each), logits_processor=[Backwards()]),
        answers=0,
    )
    found, expected = (torch.cat([value.view(1, -1) for value in one.given], 1) for one in streamers)
    assert torch.equal(found, expected) and found.shape[1] == 60


@pytest.mark.parametrize(("architecture", "attention"), [("llama", "eager"), ("phi3", "sdpa")])
def test_models_with_other_masks_or_inputs_go_to_generates_own_loop(architecture, attention, loops):
    model = lookahead_model(architecture, attention)
    found, expected = both(loops, lambda: generate(model, prompt_ids(1, 40), static_cache()), answers=0)
    assert torch.equal(found, expected)


@pytest.mark.one_version
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("eos_at", [None, 30, 37])
def test_refreshes_between_steps(architecture, eos_at, loops):
    model, (ids, mask) = lookahead_model(architecture, "sdpa"), padded_prompts()
    options = {"new_tokens": 50}

    def cache():
        return static_cache(max_new_tokens=50, refresh_every=4)

    if eos_at is not None:
        text = generate(model, ids, cache(), mask, **options)
        options |= {"eos_token_id": text[:, ids.shape[1] + eos_at].tolist(), "pad_token_id": 0}
    assert_same_answers(loops, model, ids, mask, cache=cache, **options)


@pytest.mark.one_version
def test_steady_refreshes_leave_the_recording(loops):
    """Storage moves at the first refresh, for it has another size than the prompt left; later ones write into it."""
    model = lookahead_model("llama", "sdpa")
    assert_same_answers(
        loops, model, prompt_ids(2, 40), cache=lambda: static_cache(max_new_tokens=80, refresh_every=4), new_tokens=80
    )
    assert loops.recordings <= 2


@pytest.mark.one_version
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_answers_longer_than_the_storage(architecture, loops):
    model, (ids, mask) = lookahead_model(architecture, "sdpa"), padded_prompts()
    assert_same_answers(loops, model, ids, mask, cache=lambda: static_cache(max_new_tokens=5), new_tokens=150)
    assert loops.recordings == 2, "once more, when storage grew"


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_later_turns(architecture, loops):
    """Tokens past the end of an answer are not in the cache that the next turn goes on from."""
    model = lookahead_model(architecture, "sdpa")
    plain = generate(model, prompt_ids(2, 40), static_cache())
    eos = plain[:, 46].tolist()

    def run():
        cache, ids, texts = static_cache(), prompt_ids(2, 40), []
        for turn in range(3):
            text = generate(model, ids, cache, eos_token_id=eos, pad_token_id=0)
            texts.append(text)
            ids = torch.cat([text, prompt_ids(2, 1 + 4 * turn, seed=turn)], dim=1)
        cache.crop(-2)
        return texts, cache

    (found, cache), (expected, expected_cache) = both(loops, run, answers=3)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert_same_cache(cache, expected_cache)


def test_a_prompt_in_chunks(loops):
    model, (ids, mask) = lookahead_model("llama", "sdpa"), padded_prompts()
    assert_same_answers(loops, model, ids, mask, prefill_chunk_size=16)


def test_embeddings_for_a_prompt(loops):
    model, ids = lookahead_model("llama", "sdpa"), prompt_ids(2, 40)
    embeds = model.get_input_embeddings()(ids).detach()

    def run():
        return model.generate(
            inputs_embeds=embeds, past_key_values=static_cache(), max_new_tokens=NEW_TOKENS, do_sample=False
        )

    found, expected = both(loops, run)
    assert torch.equal(found, expected) and found.shape == (2, NEW_TOKENS)


def test_a_dictionary_for_a_result(loops):
    model, ids = lookahead_model("llama", "sdpa"), prompt_ids(2, 40)
    found, expected = both(loops, lambda: generate(model, ids, static_cache(), return_dict_in_generate=True))
    assert torch.equal(found.sequences, expected.sequences) and found.keys() == expected.keys()


def test_a_step_that_cannot_be_recorded(loops, monkeypatch):
    model, ids = lookahead_model("llama", "sdpa"), prompt_ids(2, 40)
    expected = generate(model, ids, static_cache())

    def record(run, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(loop, "record", record)
    monkeypatch.setattr(loop._Step, "as_generate_does", lambda step: None)  # which compiles
    loops.switch(True)
    with pytest.warns(UserWarning, match="one by one.*not permitted") as warned:
        assert torch.equal(generate(model, ids, static_cache()), expected)
        assert torch.equal(generate(model, ids, static_cache()), expected)
    assert sum("one by one" in str(each.message) for each in warned) == 1
    assert loops.answers == 1, "the second answer is left to generate's own loop"


def test_an_error_between_two_tokens(loops):
    model, ids = lookahead_model("llama", "sdpa"), prompt_ids(2, 40)

    class Fails(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] == 47:
                raise KeyboardInterrupt
            return torch.zeros(2, dtype=torch.bool)

    def run():
        cache = static_cache()
        with pytest.raises(KeyboardInterrupt):
            generate(model, ids, cache, stopping_criteria=[Fails()])
        return cache

    found, expected = both(loops, run)
    assert loops.taken_back == loop.AHEAD
    assert_same_cache(found, expected)


def test_copies_and_threads(loops):
    """Each thread has a model and caches of its own, made from one that has read a prompt."""
    loops.switch(False)
    models = [lookahead_model("llama", "sdpa", seed=seed) for seed in range(2)]
    ids = prompt_ids(2, 40)
    first, expected = [], []
    for model in models:
        cache = static_cache()
        text = generate(model, ids, cache, new_tokens=5)
        first.append((cache, torch.cat([text, ids[:, :3]], dim=1)))
        expected.append(generate(model, first[-1][1], copy.deepcopy(cache)))
    found = [[], []]

    def work(place):
        cache, text = first[place]
        for _ in range(3):
            found[place].append(generate(models[place], text, copy.deepcopy(cache)))

    loops.switch(True)
    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answers, right in zip(found, expected, strict=True):
        assert len(answers) == 3 and all(torch.equal(answer, right) for answer in answers)


@pytest.mark.parametrize("rows", [1, 2])
def test_one_compiled_graph_for_all_prompts(rows, reset_compiler, loops, monkeypatch):
    monkeypatch.setattr(loop, "record", lambda run, device: run)
    model, graphs = lookahead_model("llama", "sdpa"), Graphs()
    for length in (40, 41):
        ids, mask = padded_prompts(length)
        ids, mask = ids[:rows], mask[:rows]
        loops.switch(True)
        found = generate(model, ids, static_cache(), mask, **compiled_by(graphs))
        loops.switch(False)
        assert torch.equal(found, generate(model, ids, static_cache(), mask))
    assert graphs.count == 1 and loops.answers == 2


@pytest.mark.one_version
@pytest.mark.real_model
def test_a_real_model(real_prompts, loops):
    model, tokenizer, ids, mask = real_prompts

    def cache():
        return static_cache(48, "snapkv", 12)

    assert_same_answers(loops, model, ids, mask, cache, new_tokens=12, eos_token_id=None)
    text = assert_same_answers(loops, model, ids, mask, cache, do_sample=True, new_tokens=12, top_p=0.9)
    words = tokenizer.decode(text[0, ids.shape[1] :]).split()
    found = assert_same_answers(
        loops, model, ids, mask, cache, do_sample=True, new_tokens=12, top_p=0.9, stop_strings=words[3],
        tokenizer=lambda: tokenizer,
    )  # fmt: skip
    assert words[3] in tokenizer.decode(found[0, ids.shape[1] :])


@pytest.fixture
def on_gpu(reset_compiler):
    model = tiny_model("llama", "sdpa").to("cuda")
    prepare_model_for_eviction(model)
    return model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 20, "top_p": 0.9},
        {"do_sample": True, "repetition_penalty": 1.3, "min_p": 0.02, "min_new_tokens": 5},
        {"stopping_criteria": [EndsRows((52, 60))], "eos_token_id": 159},
    ],
)
@pytest.mark.parametrize("ends", [False, True])
def test_on_a_gpu(options, ends, on_gpu, monkeypatch):
    """The recorded loop against generate's own, both compiled."""
    ids, mask = (tensor.cuda() for tensor in padded_prompts())

    def run(**more):
        torch.manual_seed(0)
        caches.append(static_cache(7, "snapkv"))
        return generate(on_gpu, ids, caches[-1], mask, **(options | more)), torch.rand((), device="cuda")

    caches, more = [], {}
    if ends:
        more = {"eos_token_id": run()[0][:, 48].unique().tolist(), "pad_token_id": 0}
    runs = [run(**more), run(**more)]
    assert not loop._unrecordable
    monkeypatch.setattr(loop, "records_on", lambda device: False)
    expected, random = run(**more)
    for text, following in runs:
        assert torch.equal(text, expected) and torch.equal(following, random)
    for cache in caches[-3:-1]:
        assert_same_cache(cache, caches[-1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_refreshes_and_growth_on_a_gpu(on_gpu, monkeypatch):
    ids, mask = (tensor.cuda() for tensor in padded_prompts())
    found = []
    for on in (True, False):
        monkeypatch.setattr(loop, "records_on", lambda device, on=on: on)
        refreshed, grown = static_cache(7, "streaming", 80, refresh_every=8), static_cache(7, "snapkv", 5)
        found.append((generate(on_gpu, ids, refreshed, mask, 80), generate(on_gpu, ids, grown, mask, 80)))
    assert not loop._unrecordable
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
