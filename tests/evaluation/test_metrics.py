import math

import evaluate
import pytest

from lkq_hf.evaluation.metrics import METRICS, load_metric, metric_path


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("a metric must load without network")

    monkeypatch.setattr("socket.socket.connect", no_network)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_loads_by_path(name):
    assert evaluate.load(metric_path(name)).description.strip()


def test_unknown_metrics_are_refused():
    with pytest.raises(ValueError, match="bleu"):
        metric_path("bleu")


def test_answer_match_counts_whole_words_of_any_case():
    metric = load_metric("answer_match")
    predictions = ["It is 12345.", "It is 123456.", "Osaka and\nNew  York", "none"]
    references = [["12345"], ["12345"], ["new york", "Lisbon"], ["x"]]
    assert metric.compute(predictions=predictions, references=references)["answer_match"] == pytest.approx(1.5 / 4)
    any_of = metric.compute(predictions=predictions, references=references, match="any")
    assert any_of["answer_match"] == pytest.approx(2 / 4)
    assert metric.compute(predictions=["a b"], references=["B"]) == {"answer_match": 1.0}


def test_answer_match_refuses_what_it_cannot_judge():
    metric = load_metric("answer_match")
    with pytest.raises(ValueError, match="empty"):
        metric.compute(predictions=["a"], references=[[""]])
    with pytest.raises(ValueError, match="most"):
        metric.compute(predictions=["a"], references=[["a"]], match="most")


def test_word_f1():
    metric = load_metric("word_f1")
    # 2 common words, 3 in the answer ("the" is not counted), 4 in the reference
    one = metric.compute(predictions=["The red, red car"], references=["a red bus and car"])
    assert one["word_f1"] == pytest.approx(2 * 2 / (3 + 4))
    best = metric.compute(predictions=["red car", ""], references=[["blue", "red car!"], ["", "x"]])
    assert best["word_f1"] == 1.0
    assert metric.compute(predictions=["", "a b"], references=["word", ""])["word_f1"] == 0.0


def test_token_agreement_judges_positions_and_prefixes():
    metric = load_metric("token_agreement")
    result = metric.compute(predictions=[[1, 2, 9, 4], [5]], references=[[1, 2, 3, 4], [5, 6]])
    assert result == {"token_agreement": pytest.approx(4 / 6), "agreed_prefix": pytest.approx(3 / 6)}


def test_nll_gap_and_perplexity():
    changed, unchanged = [[1.0, 3.0], [2.0]], [[1.0, 1.0], [1.0]]
    result = load_metric("nll_gap").compute(predictions=changed, references=unchanged)
    assert result == {"nll": 2.0, "reference_nll": 1.0, "nll_gap": 1.0}
    assert load_metric("perplexity").compute(predictions=changed)["perplexity"] == pytest.approx(math.exp(2.0))
    with pytest.raises(ValueError, match="tokens"):
        load_metric("nll_gap").compute(predictions=[[1.0]], references=[[1.0, 2.0]])


def test_topk_recall_and_retained_mass():
    recall = load_metric("topk_recall").compute(predictions=[[0, 5, 7], [1, 2]], references=[[5, 7, 8], [1, 2]])
    assert recall["topk_recall"] == pytest.approx((2 / 3 + 1) / 2)
    metric = load_metric("retained_attention_mass")
    mass = metric.compute(predictions=[[0, 2], [1]], references=[[2.0, 1.0, 1.0], [0.25, 0.75]])
    assert mass["retained_attention_mass"] == pytest.approx((0.75 + 0.75) / 2)
    with pytest.raises(ValueError, match="outside"):
        metric.compute(predictions=[[3]], references=[[1.0]])


def test_metrics_of_the_same_inputs_combine():
    texts = evaluate.combine([metric_path("answer_match"), metric_path("word_f1")])
    assert texts.compute(predictions=["the code 77"], references=["code 77"]) == {"answer_match": 1.0, "word_f1": 1.0}
    nlls = evaluate.combine([load_metric("nll_gap"), load_metric("perplexity")])
    result = nlls.compute(predictions=[[2.0]], references=[[1.0]])
    assert result["nll_gap"] == 1.0 and result["perplexity"] == pytest.approx(math.exp(2.0))
    ids = evaluate.combine([load_metric("token_agreement"), load_metric("topk_recall")])
    assert ids.compute(predictions=[[1, 2]], references=[[1, 3]])["topk_recall"] == 0.5


def test_batches_add_up():
    metric = load_metric("token_agreement")
    metric.add_batch(predictions=[[1]], references=[[1]])
    metric.add(predictions=[2], references=[3])
    assert metric.compute()["token_agreement"] == 0.5
