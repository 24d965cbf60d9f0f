import gc
import weakref

import pytest
import torch
from models import Graphs, compiled_by, prompt_ids, tiny_model
from real_models import load_smollm2
from tiny import tiny_model as of_any_type
from transformers import DynamicCache, GenerationMixin

from lkq_hf.cache import whole_text
from lkq_hf.training import TargetCollator, generate_targets, load_targets
from lkq_hf.training import targets as targets_module
from lkq_hf.training.data import before_loop


def prompts(lengths=(9, 4, 12, 6, 7)):
    return [
        {"input_ids": prompt_ids(1, length, seed=index)[0].tolist(), "kind": f"kind{index}"}
        for index, length in enumerate(lengths)
    ]


def test_responses_are_the_models_greedy_answers(tmp_path):
    model = tiny_model()
    rows = prompts()
    made = generate_targets(model, rows, tmp_path, max_new_tokens=6, shard_size=2)
    assert made["kind"] == [row["kind"] for row in rows]
    for row, found in zip(rows, made, strict=True):
        ids = torch.tensor([row["input_ids"]])
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=DynamicCache())
        assert found["input_ids"] == row["input_ids"]
        assert found["response_ids"] == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral", "gemma3"])
def test_the_decoding_loop_gives_the_same_answers(architecture, tmp_path, switch_loop_on):
    model, rows = tiny_model(architecture, "sdpa"), prompts((40, 70, 40, 25, 40, 70))
    hooks, methods = len(model.model._forward_hooks), set(vars(model))
    free = generate_targets(model, rows, tmp_path / "free", max_new_tokens=12)["response_ids"]
    model.generation_config.eos_token_id = [free[0][7], free[1][2]]
    plain = generate_targets(model, rows, tmp_path / "plain", 12, batch_tokens=160, shard_size=4)
    batches = switch_loop_on()
    found = generate_targets(model, rows, tmp_path / "loop", 12, batch_tokens=160, shard_size=4)
    assert found.to_list() == plain.to_list()
    assert batches == [(3, 40), (1, 40), (1, 70), (1, 70)], "one of them with padding"
    assert len({len(each) for each in found["response_ids"]}) > 1, "rows end before others"
    assert (len(model.model._forward_hooks), set(vars(model))) == (hooks, methods)


@pytest.mark.one_version
def test_few_answers_are_not_worth_a_compilation(tmp_path, switch_loop_on, monkeypatch):
    batches = switch_loop_on()
    # Five prompts of 38 tokens and 6 of each answer, in batches of 16 tokens: 26 steps.
    monkeypatch.setattr(whole_text, "LEAST_STEPS", 26)
    generate_targets(tiny_model("llama", "sdpa"), prompts(), tmp_path / "few", max_new_tokens=6, batch_tokens=16)
    assert not batches
    monkeypatch.setattr(whole_text, "LEAST_STEPS", 25)
    generate_targets(tiny_model("llama", "sdpa"), prompts(), tmp_path / "many", max_new_tokens=6, batch_tokens=16)
    assert len(batches) == 5
    answered = [{**row, "response_ids": [7]} for row in prompts()]
    generate_targets(tiny_model("llama", "sdpa"), answered, tmp_path / "answered", max_new_tokens=6, batch_tokens=16)
    assert len(batches) == 5


OTHER_FAMILIES = ["qwen3_5_text", "lfm2", "mamba", "phi3"]


@pytest.mark.parametrize("why", [*OTHER_FAMILIES, "own _sample", "eager attention", "another cache"])
def test_models_that_the_loop_does_not_know_answer_without_it(why, tmp_path, switch_loop_on, monkeypatch):
    model = of_any_type(why) if why in OTHER_FAMILIES else tiny_model("llama", "sdpa")
    if why == "own _sample":
        sample = GenerationMixin._sample
        monkeypatch.setattr(type(model), "_sample", lambda *args, **kwargs: sample(*args, **kwargs), raising=False)
    if why == "eager attention":
        model.set_attn_implementation("eager")
    if why == "another cache":
        model.generation_config.cache_implementation = "static"
    plain = generate_targets(model, prompts(), tmp_path / "plain", max_new_tokens=6)
    batches = switch_loop_on()
    assert generate_targets(model, prompts(), tmp_path / "loop", max_new_tokens=6).to_list() == plain.to_list()
    assert not batches


@pytest.mark.one_version
def test_batches_do_not_pile_up_in_memory(tmp_path, switch_loop_on, monkeypatch):
    model, caches, most = tiny_model("llama", "sdpa"), weakref.WeakSet(), []

    class Counted(whole_text.LookaheadCache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            caches.add(self)
            most.append(len(caches))

    monkeypatch.setattr(whole_text, "LookaheadCache", Counted)
    graphs = Graphs()
    model.generation_config.compile_config = compiled_by(graphs)["compile_config"]
    switch_loop_on()
    rows = prompts((70, 150, 150, 210, 210, 330))
    gc.disable()
    try:
        generate_targets(model, rows, tmp_path, max_new_tokens=6, batch_tokens=330)
    finally:
        gc.enable()
    assert len(most) == 5 and max(most) == 1
    assert graphs.count == 3, "for one prompt, for any number of slots, for several prompts"


@pytest.mark.one_version
@pytest.mark.real_model
def test_the_decoding_loop_gives_the_answers_of_a_real_model(tmp_path, switch_loop_on):
    model, tokenizer = load_smollm2()
    filler = "The ferry left the harbour at noon and the gulls followed it past the old lighthouse. "
    texts = [filler * 8 + "Who left the harbour?", filler * 3 + "What is old?", "List three harbours."]
    chats = [[{"role": "user", "content": text}] for text in texts]
    rows = [
        {"input_ids": tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)}
        for chat in chats
    ]
    plain = generate_targets(model, rows, tmp_path / "plain", max_new_tokens=24)
    batches = switch_loop_on()
    found = generate_targets(model, rows, tmp_path / "loop", max_new_tokens=24)
    assert found.to_list() == plain.to_list()
    assert len(batches) == 1


def test_a_response_ends_with_its_end_token(tmp_path):
    model = tiny_model()
    rows = prompts()
    free = generate_targets(model, rows, tmp_path / "free", max_new_tokens=8)["response_ids"]
    model.generation_config.eos_token_id = [free[0][2], free[1][5]]
    stops = set(model.generation_config.eos_token_id)
    ended = generate_targets(model, rows, tmp_path / "ended", max_new_tokens=8)["response_ids"]
    for whole, found in zip(free, ended, strict=True):
        end = next((index + 1 for index, token in enumerate(whole) if token in stops), len(whole))
        assert found == whole[:end]
    assert len(ended[0]) <= 3


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch):
    model, rows = tiny_model(), prompts()
    whole = generate_targets(model, rows, tmp_path / "whole", max_new_tokens=4, shard_size=2)
    respond, made = targets_module._respond, []

    def stop_at_the_second(model, rows, *args):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(len(rows))
        return respond(model, rows, *args)

    monkeypatch.setattr(targets_module, "_respond", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        generate_targets(model, rows, tmp_path / "stopped", max_new_tokens=4, shard_size=2)
    assert len(load_targets(tmp_path / "stopped")) == 2

    def count(model, rows, *args):
        made.append(len(rows))
        return respond(model, rows, *args)

    monkeypatch.setattr(targets_module, "_respond", count)
    (tmp_path / "stopped" / ".partial-0-shard-00000000.parquet").write_text("left by a killed process")
    resumed = generate_targets(model, rows, tmp_path / "stopped", max_new_tokens=4, shard_size=2)
    assert made == [2, 2, 1]
    assert resumed.to_list() == whole.to_list()
    assert not list((tmp_path / "stopped").glob(".partial-*"))


def test_another_recipe_in_the_same_directory_is_refused(tmp_path):
    model = tiny_model()
    generate_targets(model, prompts(), tmp_path, max_new_tokens=4)
    with pytest.raises(ValueError, match="another directory"):
        generate_targets(model, prompts(), tmp_path, max_new_tokens=5)
    with pytest.raises(ValueError, match="another directory"):
        generate_targets(model, prompts()[:3], tmp_path, max_new_tokens=4)


def test_another_model_in_the_same_directory_is_refused(tmp_path):
    model, rows = tiny_model(), prompts()
    generate_targets(model, rows, tmp_path, max_new_tokens=4, shard_size=2)
    with pytest.raises(ValueError, match=r"dtype was 'torch\.float32', now 'torch\.bfloat16'.*another directory"):
        generate_targets(tiny_model().bfloat16(), rows, tmp_path, max_new_tokens=4, shard_size=2)
    model.name_or_path = "another"
    with pytest.raises(ValueError, match=r"model was 'tiny-llama', now 'another'"):
        generate_targets(model, rows, tmp_path, max_new_tokens=4, shard_size=2)
    # A note that says nothing of the model.
    (tmp_path / "run.json").write_text('{"prompts": 5, "max_new_tokens": 4, "shard_size": 2}')
    with pytest.raises(ValueError, match=r"model was 'not noted', now 'another'"):
        generate_targets(model, rows, tmp_path, max_new_tokens=4, shard_size=2)


def test_processes_share_the_work(tmp_path):
    model, rows = tiny_model(), prompts()
    whole = generate_targets(model, rows, tmp_path / "one", max_new_tokens=4, shard_size=1)
    (tmp_path / "two").mkdir()
    written_by_another = tmp_path / "two" / ".partial-0-shard-00000001.parquet"
    written_by_another.touch()
    for index in range(2):
        shared = generate_targets(
            model, rows, tmp_path / "two", max_new_tokens=4, shard_size=1, process_index=index, num_processes=2
        )
        assert len(shared) == (3, 5)[index]
        assert written_by_another.exists()
    assert shared.to_list() == whole.to_list()


def test_without_prompts_or_shards_there_is_a_message(tmp_path):
    with pytest.raises(ValueError, match="no prompts"):
        generate_targets(tiny_model(), [], tmp_path)
    with pytest.raises(FileNotFoundError, match="generate_targets"):
        load_targets(tmp_path)


def test_the_collator_pads_prompts_left_and_responses_right():
    batch = TargetCollator(pad_token_id=7)(
        [{"input_ids": [1, 2, 3], "response_ids": [4]}, {"input_ids": [5], "response_ids": [8, 9]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3], [7, 7, 5]]
    assert batch["attention_mask"].tolist() == [[True] * 3, [False, False, True]]
    assert batch["response_ids"].tolist() == [[4, 7], [8, 9]]
    assert batch["response_mask"].tolist() == [[True, False], [True, True]]


def test_the_collator_cuts_the_middle_of_prompts_and_the_end_of_responses():
    batch = TargetCollator(max_prompt_length=5, max_response_length=2)(
        [{"input_ids": list(range(1, 10)), "response_ids": [4, 5, 6]}]
    )
    assert batch["input_ids"].tolist() == [[1, 2, 7, 8, 9]]
    assert batch["response_ids"].tolist() == [[4, 5]]


@pytest.mark.parametrize("row", [{"input_ids": [], "response_ids": [1]}, {"input_ids": [1], "response_ids": []}])
def test_the_collator_refuses_empty_rows(row):
    with pytest.raises(ValueError, match="at least one token"):
        TargetCollator()([row])


def test_an_answer_is_cut_before_it_loops():
    assert before_loop([1, 2, 3, 4, 5, 6], size=2) == [1, 2, 3, 4, 5, 6]
    assert before_loop([9, 1, 2, 3, 1, 2, 3, 1, 2], size=2) == [9, 1, 2, 3]
    assert before_loop([7] * 20, size=8) == [7]
    assert before_loop([], size=8) == []


def test_answers_are_made_in_batches_of_one_length(tmp_path, monkeypatch):
    model, rows, seen = tiny_model(), prompts((9, 4, 9, 4, 9, 4)), []
    respond = targets_module._respond

    def record(model, rows, *args):
        seen.append([len(row["input_ids"]) for row in rows])
        return respond(model, rows, *args)

    monkeypatch.setattr(targets_module, "_respond", record)
    made = generate_targets(model, rows, tmp_path, max_new_tokens=2, shard_size=3)
    assert seen == [[4, 4, 4], [9, 9, 9]]
    assert made["input_ids"] == [row["input_ids"] for row in rows]
    assert made.column_names == ["input_ids", "kind", "response_ids"]
