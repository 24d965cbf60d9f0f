import pytest
import torch

from lkq_hf.kernels import autotune

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is what the candidate says; nothing is captured, and nothing is remembered from other tests."""
    monkeypatch.setattr(autotune, "_fastest", {})
    monkeypatch.setattr(autotune, "interpreting", lambda: False)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    monkeypatch.setattr("triton.testing.do_bench", lambda candidate, **_: candidate.milliseconds)


class Way:
    def __init__(self, value: float, milliseconds: float) -> None:
        self.value, self.milliseconds, self.calls = torch.tensor([1.0, value]), milliseconds, 0

    def __call__(self) -> torch.Tensor:
        self.calls += 1
        return self.value


def test_the_fastest_right_candidate_is_chosen_once() -> None:
    wrong, slow, fast, plain = Way(2.5, 1), Way(2, 5), Way(2.001, 3), Way(2, 9)
    assert torch.equal(autotune.run_fastest("key", [wrong, slow, fast], plain), fast.value)
    assert autotune.choices() == {"key": 2}
    calls = plain.calls
    assert torch.equal(autotune.run_fastest("key", [wrong, slow, fast], plain), fast.value)
    assert plain.calls == calls


def test_the_plain_way_may_win_and_replaces_wrong_ones() -> None:
    plain = Way(2, 9)
    autotune.run_fastest("wrong", [Way(1, 1), Way(float("nan"), 1)], plain)
    autotune.run_fastest("slow", [Way(2, 10)], plain)
    assert autotune.choices() == {"wrong": 2, "slow": 1}


def test_inputs_that_are_not_finite_decide_nothing() -> None:
    plain = Way(float("nan"), 9)
    assert autotune.run_fastest("key", [Way(2, 1)], plain).isnan().any()
    assert autotune.choices() == {}


def test_a_capture_takes_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    plain = Way(2, 9)
    assert torch.equal(autotune.run_fastest("key", [Way(2, 1)], plain), plain.value)
    assert autotune.choices() == {}
