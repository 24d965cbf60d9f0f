"""Every way of choosing tokens that ``generate`` has, on every architecture."""

import copy
import threading

import pytest
import torch
from models import ARCHITECTURES, base_and_adapted, kept_entries, lookahead_model, prompt_ids, tiny_model
from reference import (
    GREEDY,
    assert_as_masked,
    evicted_length,
    expected_logits,
    generate,
    skip_if_it_fails_without_the_cache,
)
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from lkq_hf import LookaheadCache, prepare_model_for_eviction
from lkq_hf.compat import find_cache

item = pytest.mark.item
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@item("greedy")
@every_architecture
def test_greedy(architecture):
    base, model = base_and_adapted(architecture)
    ids, cache = prompt_ids(2, 40), LookaheadCache(budget=7)
    assert_as_masked(base, ids, *generate(model, ids, cache), cache)


@item("sampling (temperature, top-k, top-p, min-p, penalties)")
@every_architecture
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.7},
        {"top_k": 5},
        {"top_p": 0.6},
        {"min_p": 0.1},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_sampling(architecture, options):
    base, model = base_and_adapted(architecture)
    ids, runs = prompt_ids(2, 40), []
    for _ in range(2):
        torch.manual_seed(3)
        cache = LookaheadCache(budget=7)
        runs.append(generate(model, ids, cache, do_sample=True, **options))
    assert torch.equal(runs[0][0], runs[1][0]), "a seed says what is drawn"
    tokens, logits = runs[1]
    torch.testing.assert_close(logits, expected_logits(base, ids, tokens, cache), atol=1e-4, rtol=1e-4)


@item("beam search, beam sampling")
@every_architecture
@pytest.mark.parametrize("sample", [False, True], ids=["search", "sampling"])
def test_beams(architecture, sample):
    """A beam's score is the likelihood of its tokens under the masked full cache."""
    base, model = base_and_adapted(architecture)
    ids, cache = prompt_ids(2, 40), LookaheadCache(budget=7)
    torch.manual_seed(3)
    output = model.generate(
        ids, past_key_values=cache, max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=sample,
        return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    # All beams of a row keep the same entries; two of its three are returned.
    returned = {}
    for layer, kept in kept_entries(cache).items():
        assert torch.equal(kept, kept[::3].repeat_interleave(3, dim=0))
        returned[layer] = kept[::3].repeat_interleave(2, dim=0)
    tokens = output.sequences[:, 40:]
    logits = expected_logits(base, output.sequences[:, :40], tokens, [returned])
    likelihood = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0].sum(-1)
    torch.testing.assert_close(output.sequences_scores, likelihood, atol=1e-3, rtol=1e-3)


@item("num_return_sequences")
@every_architecture
def test_several_sequences_of_one_prompt(architecture):
    base, model = base_and_adapted(architecture)
    ids, cache = prompt_ids(1, 40), LookaheadCache(budget=7)
    torch.manual_seed(3)
    tokens, logits = generate(model, ids, cache, do_sample=True, num_return_sequences=3)
    assert len({tuple(row) for row in tokens.tolist()}) > 1
    expected = expected_logits(base, ids.expand(3, -1), tokens, cache)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def repeating_prompt():
    return prompt_ids(1, 20).repeat(1, 2)


@item("prompt-lookup decoding")
@every_architecture
def test_prompt_lookup(architecture):
    base, model = base_and_adapted(architecture)
    ids, cache = repeating_prompt(), LookaheadCache(budget=7)
    output = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=4)
    assert_as_masked(base, ids, output[:, 40:], None, cache, evicted_length=evicted_length(cache))


@item("assistant model")
@every_architecture
@pytest.mark.parametrize("assistant", ["bad", "perfect"])
def test_an_assistant_model(architecture, assistant):
    base, model = base_and_adapted(architecture)
    helper = copy.deepcopy(base) if assistant == "perfect" else tiny_model(architecture, seed=4)
    ids, cache = prompt_ids(1, 40), LookaheadCache(budget=7)
    skip_if_it_fails_without_the_cache(model, ids, assistant_model=helper)
    output = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False, assistant_model=helper)
    chosen_from = evicted_length(cache)
    assert chosen_from > 40 or assistant == "bad", "drafts that are accepted at once take part in the choice"
    assert_as_masked(base, ids, output[:, 40:], None, cache, evicted_length=chosen_from)


@item("assistant model")
def test_a_prepared_model_as_assistant_of_another():
    base, model = base_and_adapted()
    helper = lookahead_model(seed=4)
    ids, cache = prompt_ids(1, 40), LookaheadCache(budget=7)
    output = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, assistant_model=helper)
    assert_as_masked(base, ids, output[:, 40:], None, cache, evicted_length=evicted_length(cache))


@item("early-exit assistant")
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_first_layers_as_assistant(architecture):
    base, model = base_and_adapted(architecture)
    ids, cache = prompt_ids(1, 40), LookaheadCache(budget=7)
    skip_if_it_fails_without_the_cache(model, ids, assistant_early_exit=1)
    output = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False, assistant_early_exit=1)
    assert_as_masked(base, ids, output[:, 40:], None, cache, evicted_length=evicted_length(cache))


def search_one_step_ahead(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
    """A decoding of one's own that copies, selects and crops the cache: of the four best tokens, the one after which
    the model is surest."""
    cache = find_cache(kwargs, LookaheadCache)
    logits = model(input_ids, attention_mask=kwargs["attention_mask"], past_key_values=cache).logits[:, -1]
    while True:
        best = logits.topk(4).indices[0]
        cache.batch_repeat_interleave(4)
        logits = model(best[:, None], past_key_values=cache).logits[:, -1]
        chosen = logits.softmax(-1).amax(-1).argmax()[None]
        cache.batch_select_indices(chosen)
        input_ids, logits = torch.cat([input_ids, best[chosen][None]], dim=1), logits[chosen]
        if stopping_criteria(input_ids, None).all():
            return input_ids


@item("custom_generate (a function)")
@every_architecture
def test_a_search_of_ones_own(architecture):
    base, model = base_and_adapted(architecture)
    ids, cache = prompt_ids(1, 40), LookaheadCache(budget=7)
    found = model.generate(ids, past_key_values=cache, max_new_tokens=6, custom_generate=search_one_step_ahead)
    sequence = ids
    for _ in range(6):
        # One more token, of whose logits only those before it matter.
        ahead = torch.cat([sequence[:, 40:], torch.zeros_like(ids[:, :1])], dim=1)
        best = expected_logits(base, ids, ahead, cache)[0, -1].topk(4).indices
        widened = copy.deepcopy(cache)
        widened.batch_repeat_interleave(4)
        ahead = torch.cat([sequence[:, 40:].expand(4, -1), best[:, None], torch.zeros_like(best[:, None])], dim=1)
        sure = expected_logits(base, ids.expand(4, -1), ahead, widened)[:, -1].softmax(-1).amax(-1)
        sequence = torch.cat([sequence, best[sure.argmax()][None, None]], dim=1)
    assert torch.equal(found, sequence)


@item(
    "custom_generate (a Hub repository), contrastive search, DoLa",
    refused="trust_remote_code and access to the Hub, as without the cache",
)
@pytest.mark.parametrize(
    "options", [{"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}], ids=lambda o: next(iter(o))
)
def test_what_transformers_moved_to_the_hub(options):
    model, cache = lookahead_model(), LookaheadCache(budget=7)
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(prompt_ids(1, 40), past_key_values=cache, max_new_tokens=4, do_sample=False, **options)
    assert cache.get_seq_length() == 0


class Collector(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.reshape(-1))

    def end(self):
        self.ended = True


@item("streamers")
@every_architecture
def test_a_streamer_gets_the_tokens_as_they_come(architecture):
    base, model = base_and_adapted(architecture)
    ids, cache, streamer = prompt_ids(1, 40), LookaheadCache(budget=7), Collector()
    tokens, logits = generate(model, ids, cache, streamer=streamer)
    assert_as_masked(base, ids, tokens, logits, cache)
    assert streamer.ended and [len(piece) for piece in streamer.pieces] == [40] + [1] * 8
    assert torch.equal(torch.cat(streamer.pieces[1:]), tokens[0])


class StopAt(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


@item("stopping criteria, end-of-sequence tokens")
@every_architecture
def test_stopping(architecture):
    model = lookahead_model(architecture)
    ids = prompt_ids(1, 40)
    tokens, _ = generate(model, ids, LookaheadCache(budget=7), new_tokens=12)
    end = tokens[0, 5]
    length = tokens[0].tolist().index(end) + 1
    for options in ({"stopping_criteria": [StopAt(end)]}, {"eos_token_id": int(end)}):
        cache = LookaheadCache(budget=7)
        stopped, _ = generate(model, ids, cache, new_tokens=12, **options)
        assert torch.equal(stopped, tokens[:, :length])
        assert cache.get_seq_length() == 40 + length - 1


class Forbid(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores.index_fill(-1, torch.tensor([5, 6, 7]), -torch.inf)


@item("logits processors, classifier-free guidance")
def test_logits_processors():
    base, model = base_and_adapted()
    ids, cache = prompt_ids(1, 40), LookaheadCache(budget=7)
    tokens, logits = generate(model, ids, cache, logits_processor=[Forbid()])
    assert not torch.isin(tokens, torch.tensor([5, 6, 7])).any()
    torch.testing.assert_close(logits, expected_logits(base, ids, tokens, cache), atol=1e-4, rtol=1e-4)


@item("logits processors, classifier-free guidance")
def test_classifier_free_guidance():
    """The unconditional half has a cache of its own, which is not evicted."""
    base, model = base_and_adapted()
    ids, cache = prompt_ids(1, 40), LookaheadCache(budget=7)
    output = model.generate(
        ids, past_key_values=cache, guidance_scale=2.0, max_new_tokens=6, output_scores=True, **GREEDY
    )
    tokens = output.sequences[:, 40:]
    conditional = expected_logits(base, ids, tokens, cache).log_softmax(-1)
    # It starts from the last token of the prompt.
    with torch.no_grad():
        unconditional = base(output.sequences[:, 39:]).logits[:, :-1].log_softmax(-1)
    expected = unconditional + 2.0 * (conditional - unconditional)
    torch.testing.assert_close(torch.stack(output.scores, 1), expected, atol=1e-3, rtol=1e-3)


@item("output_logits, output_scores, output_hidden_states, output_attentions")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_have_the_shapes_of_the_stored_entries(architecture):
    base, model = base_and_adapted(architecture)
    ids, cache = prompt_ids(2, 40), LookaheadCache(budget=7)
    outputs = [
        one.generate(
            ids, past_key_values=each, max_new_tokens=3, output_scores=True, output_hidden_states=True,
            output_attentions=True, **GREEDY,
        )
        for one, each in ((model, cache), (base, DynamicCache(config=base.config)))
    ]  # fmt: skip
    found, full = outputs
    assert [states[0].shape for states in found.hidden_states] == [states[0].shape for states in full.hidden_states]
    for one, other in zip(
        found.hidden_states[0] + found.attentions[0], full.hidden_states[0] + full.attentions[0], strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    prefix = cache.layers[-1].prefix
    _, _, _, stored = prefix.padded()
    unused = ~stored.repeat_interleave(2, dim=1)  # query heads of a KV head
    for step in (1, 2):
        weights = found.attentions[step][-1]
        assert weights.shape == (2, 4, 1, prefix.longest + step)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 1))
        assert not weights[:, :, 0, : prefix.longest][unused].any() and weights[..., -step:].all()
    torch.testing.assert_close(found.scores[0], full.scores[0], atol=1e-4, rtol=1e-4)


@item(
    "continuous batching: generate_batch(past_key_values=...), transformers serve",
    refused="generate, with padded prompts: continuous batching keeps every token in a paged cache of its own",
)
@pytest.mark.parametrize("adapter", [True, False])
def test_continuous_batching(adapter):
    model, cache = lookahead_model() if adapter else tiny_model(), LookaheadCache(budget=7, scorer="snapkv")
    handle = prepare_model_for_eviction(model)
    prompts = prompt_ids(2, 40).tolist()
    with pytest.raises(NotImplementedError, match=r"ignores past_key_values: nothing would be evicted"):
        model.generate_batch(prompts, past_key_values=cache, max_new_tokens=4)
    assert not cache.layers
    # Without the cache it is the model's own method.
    assert model.generate_batch([]) == {}
    handle.remove()
    assert adapter or "generate_batch" not in vars(model)


@item("use_cache=False", refused="leave use_cache or past_key_values out")
@every_architecture
def test_use_cache_false(architecture):
    model, cache = lookahead_model(architecture), LookaheadCache(budget=7)
    for call in (model.generate, model):
        with pytest.raises(ValueError, match=r"use_cache=False.*leave one of them out"):
            call(prompt_ids(1, 40), past_key_values=cache, use_cache=False)
    assert not cache.layers


def chunked(model, cache, how):
    if how == "argument":
        return model.generate(prompt_ids(1, 40), past_key_values=cache, max_new_tokens=4, prefill_chunk_size=16)
    config = GenerationConfig(max_new_tokens=4, prefill_chunk_size=16 if how == "config" else None)
    if how == "model":
        model.generation_config.prefill_chunk_size = 16
    return model.generate(prompt_ids(1, 40), config, past_key_values=cache)


@item("prefill_chunk_size")
@pytest.mark.parametrize("how", ["argument", "config", "model"])
def test_a_prompt_in_chunks(how):
    model, cache = lookahead_model(), LookaheadCache(budget=7)
    lengths = []
    model.model.layers[0].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    chunked(model, cache, how)
    # 16 tokens, of which nothing is evicted yet: until the last chunk, 4 times the budget is kept. Then 16 and the
    # remaining 8 with 5 lookahead tokens.
    assert lengths[:3] == [16, 21, 13]
    assert cache.get_seq_length() == 43 and cache.summary()["entries_stored"] == 7 + 3


@item("prefill_chunk_size")
def test_a_prompt_in_one_chunk_is_whole():
    base, model = base_and_adapted()
    ids = prompt_ids(1, 40)
    for options in ({"prefill_chunk_size": 40}, {"prefill_chunk_size": None}):
        cache = LookaheadCache(budget=7)
        assert_as_masked(base, ids, *generate(model, ids, cache, **options), cache)
    model.generation_config.prefill_chunk_size = 16
    cache = LookaheadCache(budget=7)
    assert_as_masked(base, ids, *generate(model, ids, cache, prefill_chunk_size=None), cache)


@item(
    "cache_implementation beside the cache: offloading, static",
    refused="pass one of the two; static shapes: LookaheadCache(max_new_tokens=...)",
)
@pytest.mark.parametrize("implementation", ["offloaded", "static"])
def test_another_cache_implementation(implementation):
    model, cache = lookahead_model(), LookaheadCache(budget=7)
    with pytest.raises(ValueError, match="use only one of the two"):
        model.generate(prompt_ids(1, 40), past_key_values=cache, cache_implementation=implementation)
    assert cache.get_seq_length() == 0


@item(
    "quantized KV cache (QuantizedCache)",
    refused="choose one: QuantizedCache keeps every token in few bits, LookaheadCache few tokens in full",
)
def test_a_quantized_cache_beside():
    model, cache = lookahead_model(), LookaheadCache(budget=7)
    with pytest.raises(ValueError, match="use only one of the two"):
        model.generate(prompt_ids(1, 40), past_key_values=cache, cache_implementation="quantized")
    assert cache.get_seq_length() == 0


@item("threads: several generations on one model at once")
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_threads_with_options_of_their_own(architecture):
    model = lookahead_model(architecture, "sdpa")
    jobs = [
        (prompt_ids(1, 60), lambda: LookaheadCache(7), {}),
        (prompt_ids(2, 45, seed=7), lambda: LookaheadCache(11, "snapkv"), {"num_beams": 2}),
        (prompt_ids(1, 50, seed=8), lambda: DynamicCache(config=model.config), {}),
        (repeating_prompt(), lambda: LookaheadCache(9), {"prompt_lookup_num_tokens": 4}),
    ]

    def answer(job):
        ids, cache, options = job
        return model.generate(ids, past_key_values=cache(), max_new_tokens=6, do_sample=False, **options)

    alone = [answer(job) for job in jobs]
    together = [[] for _ in jobs]

    def run(index):
        together[index] += [answer(jobs[index]) for _ in range(4)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, found in zip(alone, together, strict=True):
        assert len(found) == 4 and all(torch.equal(tokens, expected) for tokens in found)
    assert kept_entries(LookaheadCache(7)) == {}
