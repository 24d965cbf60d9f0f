"""The modes that depend on what a model has learnt, on real weights: sinks, drafts that are accepted, turns of a chat.

SmolLM2 has the adapter shipped for it. Gemma 3 (sliding windows in 15 of 18 layers, one KV head of 256) has none: it
is read with one of random weights, which has to be followed as exactly.
"""

import copy
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from models import add_lookahead, kept_entries, left_padded, prompt_ids, tiny_model
from real_models import _read_tokenizer, gemma3_directory, load_gemma3, load_smollm2, smollm2_directory
from reference import assert_as_masked, evicted_length, generate
from torch.nn import functional as F
from transformers import AutoTokenizer, TextStreamer

from lkq_hf import LookaheadCache

item = pytest.mark.item
pytestmark = pytest.mark.real_model

ADAPTER = Path(__file__).parents[2] / "model_cards" / "smollm2-135m-instruct-lookahead"
BUDGET = 40
# Of float32 over 30 layers, between entries read in one order and in another.
CLOSE = 5e-3

PASSAGE = (
    "The lighthouse keeper of Skerry Point wrote down the weather every evening for forty years. In the winter of "
    "1911 the harbour froze, and the mail came over the ice on sledges drawn by dogs. The keeper's daughter, Ada, "
    "counted the ships: in good years more than three hundred passed the point, in bad years fewer than sixty. "
)
SHORT = PASSAGE[: PASSAGE.index("The keeper's daughter")]
QUESTIONS = [
    "Question: Who counted the ships?\nAnswer: The ships were counted by",
    "Question: When did the harbour freeze?\nAnswer: The harbour froze in the winter of",
]


@pytest.fixture(scope="module", params=["smollm2", pytest.param("gemma3", marks=pytest.mark.slow)])
def real(request):
    """The untouched model with eager attention, one with an adapter, and the tokenizer."""
    load = {"smollm2": load_smollm2, "gemma3": load_gemma3}[request.param]
    base, tokenizer = load(attn_implementation="eager")
    for each in (base, model := copy.deepcopy(base)):
        # All rows of a test have the same number of new tokens.
        each.generation_config.eos_token_id = None
        each.generation_config.pad_token_id = tokenizer.pad_token_id
    model.set_attn_implementation("sdpa")
    if request.param == "smollm2":
        model.load_adapter(str(ADAPTER))
    else:
        add_lookahead(model)
    return base, model, tokenizer


@pytest.mark.parametrize(
    ("directory", "special", "ids"),
    [
        (smollm2_directory, ["<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>"], [19556, 905]),
        pytest.param(gemma3_directory, ["<bos>", "<eos>", "<pad>", "<unk>"], [2, 9259, 1902], marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_that_the_models_know(directory, special, ids):
    """Whichever transformers converted the files: 5.17 would take SmolLM2's first special token for its last."""
    tokenizer = AutoTokenizer.from_pretrained(directory())
    assert [getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "unk")] == special
    assert tokenizer("Hello world").input_ids == ids


def test_a_gemma_file_holds_byte_pairs_and_begins_with_bos(tmp_path):
    """With the oldest transformers too, which would read another kind of tokenizer and no begin-of-text token."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "h", "i", "▁", "hi", "▁hi", "  "]
    writer = GGUFWriter(tmp_path / "gemma.gguf", "gemma3")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_types([3] * 4 + [1] * 6)
    writer.add_bos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    _read_tokenizer(tmp_path / "gemma.gguf").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("hi  hi").input_ids == [2, words.index("hi"), words.index("▁"), words.index("▁hi")]
    assert tokenizer("h  ").input_ids == [2, words.index("h"), words.index("  ")]


def ids_of(tokenizer, text):
    return tokenizer(text, return_tensors="pt").input_ids


@item("left-padded batches of very unequal lengths")
def test_padded_rows(real):
    base, model, tokenizer = real
    texts = (PASSAGE + QUESTIONS[0], QUESTIONS[1], SHORT + QUESTIONS[1])
    ids, mask = left_padded([ids_of(tokenizer, text)[0] for text in texts])
    ids = ids.masked_fill(mask == 0, tokenizer.pad_token_id)
    cache = LookaheadCache(budget=BUDGET)
    tokens, logits = generate(model, ids, cache, mask=mask)
    assert_as_masked(base, ids, tokens, logits, cache, mask, tolerance=CLOSE)


@item("prompt-lookup decoding")
def test_prompt_lookup(real):
    base, model, tokenizer = real
    ids, cache = ids_of(tokenizer, PASSAGE * 3), LookaheadCache(budget=2 * BUDGET)
    forwards = []
    handle = model.register_forward_hook(lambda *_: forwards.append(1))
    output = model.generate(ids, past_key_values=cache, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=6)
    handle.remove()
    assert len(forwards) < 24, "some drafts are accepted"
    assert_as_masked(base, ids, output[:, ids.shape[1] :], None, cache, evicted_length=evicted_length(cache))


@item("assistant model")
@pytest.mark.parametrize("assistant", ["bad", "perfect"])
def test_an_assistant(real, assistant):
    base, model, tokenizer = real
    vocabulary = base.config.vocab_size
    helper = copy.deepcopy(base) if assistant == "perfect" else tiny_model(vocab_size=vocabulary)
    ids, cache = ids_of(tokenizer, PASSAGE + QUESTIONS[0]), LookaheadCache(budget=BUDGET)
    output = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False, assistant_model=helper)
    assert_as_masked(base, ids, output[:, ids.shape[1] :], None, cache, evicted_length=evicted_length(cache))


@item("streamers")
def test_a_streamer(real, capsys):
    base, model, tokenizer = real
    ids, cache = ids_of(tokenizer, PASSAGE + QUESTIONS[0]), LookaheadCache(budget=BUDGET)
    tokens, logits = generate(model, ids, cache, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert_as_masked(base, ids, tokens, logits, cache, tolerance=CLOSE)
    assert capsys.readouterr().out.strip() == tokenizer.decode(tokens[0]).strip()


@item("multi-turn with one cache: all ids, or new ids and the full mask")
@pytest.mark.parametrize("style", ["all ids", "new ids"])
def test_turns_of_a_conversation(real, style):
    base, model, tokenizer = real
    ids, mask = left_padded([ids_of(tokenizer, text + QUESTIONS[0])[0] for text in (PASSAGE, SHORT)])
    length, cache, conversation, stages = ids.shape[1], LookaheadCache(budget=BUDGET), ids, []
    following = ids_of(tokenizer, "\n" + QUESTIONS[1]).expand(2, -1)
    for _ in range(3):
        full_mask = F.pad(mask, (0, conversation.shape[1] - length), value=1)
        given = conversation if style == "all ids" else conversation[:, cache.get_seq_length() :]
        tokens, logits = generate(model, given, cache, mask=full_mask)
        stages.append(kept_entries(cache))
        assert_as_masked(base, conversation, tokens, logits, stages, full_mask, CLOSE)
        assert cache.summary()["entries_stored"] == BUDGET + 8 - 1, "each turn returns to the budget"
        conversation = torch.cat([conversation, tokens, following], dim=1)


@item("deepcopy: one prefilled cache for many questions")
def test_many_questions_over_one_document(real):
    base, model, tokenizer = real
    document, cache = ids_of(tokenizer, PASSAGE), LookaheadCache(budget=BUDGET)
    with torch.no_grad():
        model(document, past_key_values=cache)
    for question in QUESTIONS:
        ids = torch.cat([document, prompt_ids(1, 2, vocabulary=1000), ids_of(tokenizer, question)], dim=1)
        one = copy.deepcopy(cache)
        tokens, logits = generate(model, ids, one)
        assert_as_masked(base, ids, tokens, logits, [kept_entries(cache), kept_entries(one)], tolerance=CLOSE)
