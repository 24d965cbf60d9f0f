import time

import pytest
import torch

from lkq_hf.kernels import autotune

pytest.importorskip("triton")


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is what the candidate says; nothing is captured, and nothing is remembered from other tests."""
    monkeypatch.setattr(autotune, "_fastest", {})
    monkeypatch.setattr(autotune, "interpreting", lambda: False)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(autotune, "time_on_gpu", lambda way, weights: way.func.milliseconds)
    monkeypatch.setattr(autotune, "_copies", lambda weight: [weight])


X, WEIGHT = torch.tensor(1.0), (torch.tensor(1.0),)


class Way:
    def __init__(self, value: float, milliseconds: float) -> None:
        self.value, self.milliseconds, self.calls = torch.tensor([1.0, value]), milliseconds, 0

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.value * weight


@pytest.mark.usefixtures("without_a_gpu")
def test_the_fastest_right_candidate_is_chosen_once() -> None:
    wrong, slow, fast, plain = Way(2.5, 1), Way(2, 5), Way(2.001, 3), Way(2, 9)
    assert torch.equal(autotune.run_fastest("key", [wrong, slow, fast], plain, X, WEIGHT), fast.value)
    assert autotune.choices() == {"key": 2}
    calls = plain.calls
    assert torch.equal(autotune.run_fastest("key", [wrong, slow, fast], plain, X, WEIGHT), fast.value)
    assert plain.calls == calls


@pytest.mark.usefixtures("without_a_gpu")
def test_of_equally_fast_candidates_the_first_is_chosen() -> None:
    autotune.run_fastest("key", [Way(2, 5), Way(2, 3.05), Way(2, 3)], Way(2, 3), X, WEIGHT)
    assert autotune.choices() == {"key": 1}


@pytest.mark.usefixtures("without_a_gpu")
def test_the_plain_way_may_win_and_replaces_wrong_ones() -> None:
    plain = Way(2, 9)
    autotune.run_fastest("wrong", [Way(1, 1), Way(float("nan"), 1)], plain, X, WEIGHT)
    autotune.run_fastest("slow", [Way(2, 10)], plain, X, WEIGHT)
    assert autotune.choices() == {"wrong": 2, "slow": 1}


@pytest.mark.usefixtures("without_a_gpu")
def test_inputs_that_are_not_finite_decide_nothing() -> None:
    plain = Way(float("nan"), 9)
    assert autotune.run_fastest("key", [Way(2, 1)], plain, X, WEIGHT).isnan().any()
    assert autotune.choices() == {}


@pytest.mark.usefixtures("without_a_gpu")
def test_a_capture_takes_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    plain = Way(2, 9)
    assert torch.equal(autotune.run_fastest("key", [Way(2, 1)], plain, X, WEIGHT), plain.value)
    assert autotune.choices() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_slow_host_is_not_what_is_timed() -> None:
    source, target = torch.rand(2, 2**26, device="cuda")

    def copy_late(source: torch.Tensor) -> None:
        time.sleep(0.002)
        target.copy_(source)

    assert autotune.time_on_gpu(target.copy_, [(source,)]) < 1
    assert autotune.time_on_gpu(copy_late, [(source,)]) < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_weights_are_read_from_memory() -> None:
    weight = (torch.rand(2**20, device="cuda"),)
    weights = autotune._copies(weight)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    assert weights[0] is weight and 2 * cache - 2**22 < len(weights[1:]) * 2**22 <= 2 * cache
    assert all(torch.equal(copy[0], weight[0]) for copy in weights[1:])
    target = torch.empty_like(weight[0])
    assert autotune.time_on_gpu(target.copy_, weights) > 1.2 * autotune.time_on_gpu(target.copy_, [weight])
