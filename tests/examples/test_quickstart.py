from pathlib import Path

import pytest
from children import run, script

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"


@pytest.mark.real_model
def test_quickstart_answers_and_compares() -> None:
    output = run(script, SCRIPT, "--length", 500, "--questions", 1, "--budget", 64)
    assert "58203" in output
    for method in ("full cache", "LookaheadCache", "SnapKV", "sinks + recent"):
        assert f"\n{method}" in output
    # Conclusions are computed from the run: four caches, of which three are much smaller than the full one.
    sizes = [float(line.split(" MiB")[0].split()[-1]) for line in output.splitlines() if " MiB" in line]
    assert len(sizes) == 4
    assert max(sizes[1:]) < sizes[0] / 3
