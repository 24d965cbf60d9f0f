"""Models that embed every token once per layer as well (Gemma 3n, small Gemma 4)."""

import pytest
import torch
from models import add_lookahead, kept_entries, prompt_ids
from tiny import tiny_model

from lkq_hf import LookaheadCache, prepare_model_for_eviction
from lkq_hf.cache.eviction import Eviction
from lkq_hf.cache.prepare import get_decoder
from lkq_hf.scoring import LookaheadScorer, OracleScorer

FAMILIES = ["gemma3n_text", "gemma4_text"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_is_appended_with_all_its_embeddings(family):
    """The oracle keeps what the response attends to in one forward over both."""
    model = tiny_model(family)
    ids, response = prompt_ids(2, 40), prompt_ids(2, 6, seed=5)
    with torch.no_grad():
        attentions = model(torch.cat([ids, response], 1), output_attentions=True, use_cache=False).attentions
        prepare_model_for_eviction(model)
        cache = LookaheadCache(7, OracleScorer(response), allocation="uniform")
        model(ids, past_key_values=cache)
    kept = kept_entries(cache)
    assert sorted(kept) == [1, 2]
    for layer, entries in kept.items():
        scores = attentions[layer][:, :, 40:, :40].mean(2).unflatten(1, (2, -1)).mean(2)
        for row in range(2):
            for head in range(2):
                best = set(scores[row, head].topk(7).indices.tolist())
                assert best == set(entries[row, head].nonzero()[:, 0].tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_has_embeddings_for_each_layer_and_they_count(family, monkeypatch):
    model = add_lookahead(tiny_model(family), target_modules=[])
    ids = prompt_ids(2, 40)
    tokens = get_decoder(model).lookahead
    assert tokens.active_rows().shape == (1, 5, 6, 8)
    assert add_lookahead(tiny_model("qwen3")).model.lookahead.active_rows() is None
    seen = []

    def note(eviction, index, candidates, scores):
        seen.append(scores)
        eviction.layers.append(index)

    monkeypatch.setattr(Eviction, "add", note)
    monkeypatch.setattr(Eviction, "settle", lambda *_: {})

    def scores():
        seen.clear()
        with torch.no_grad():
            model(ids, past_key_values=LookaheadCache(7))
        return torch.stack(seen)

    before = scores()
    assert torch.equal(scores(), before)
    with torch.no_grad():
        tokens.lookahead_kv_rows["default"].add_(5 * torch.randn(5, 6, 8))
    difference = (scores() - before).abs().amax((1, 2, 3)) / before.abs().amax((1, 2, 3))
    assert (difference > 1e-2).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_given_by_their_embeddings(family):
    model = add_lookahead(tiny_model(family))
    ids = prompt_ids(2, 40)
    decoder = get_decoder(model)
    embeds = decoder.get_input_embeddings()(ids)
    rows = decoder.embed_tokens_per_layer(ids).unflatten(-1, (6, 8))
    with torch.no_grad():
        expected, cache = LookaheadCache(7), LookaheadCache(7)
        plain = decoder(ids, past_key_values=expected)[0]
        found = decoder(inputs_embeds=embeds, per_layer_inputs=rows, past_key_values=cache)[0]
        torch.testing.assert_close(found, plain)
        for layer, kept in kept_entries(expected).items():
            assert torch.equal(kept_entries(cache)[layer], kept)
        with pytest.raises(ValueError, match=r"once per layer.*per_layer_inputs"):
            decoder(inputs_embeds=embeds, past_key_values=LookaheadCache(7))


def test_a_scorer_that_has_no_embeddings_for_its_tokens_is_refused():
    class Forgetful(LookaheadScorer):
        def suffix_per_layer(self, decoder):
            return None

    model = add_lookahead(tiny_model("gemma3n_text"))
    with pytest.raises(NotImplementedError, match=r"Forgetful has no such embeddings.*suffix_per_layer"):
        model(prompt_ids(1, 40), past_key_values=LookaheadCache(7, Forgetful()))
