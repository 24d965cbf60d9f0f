"""Runs before any test module is imported."""

import os
import socket

import pytest
import torch

# No test reaches the real Hub: tests/hub answers at this address, which huggingface_hub reads when it is imported.
with socket.create_server(("127.0.0.1", 0)) as _free:
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{_free.getsockname()[1]}"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

# Without a GPU, Triton kernels are tested in Triton's interpreter, which must be asked for before Triton is imported.
# Only tests that force LKQ_KERNELS=triton run them: on the CPU the library itself chooses the torch references.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from fast_interpreter import speed_up

    speed_up()


@pytest.fixture
def reset_compiler():
    """What torch.compile remembers of other tests is forgotten, and what it learns in this one."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def switch_loop_on(monkeypatch):
    """Called, lets the decoding loop run on a CPU and returns a list to which each of its batches adds its shape."""
    from lkq_hf.cache import loop, whole_text

    def switch():
        batches, run = [], loop._Run.run

        def noted(one, first):
            batches.append(tuple(one._stop.prompt.shape))
            return run(one, first)

        monkeypatch.setattr(loop._Run, "run", noted)
        monkeypatch.setattr(loop, "records_on", lambda device: True)
        monkeypatch.setattr(loop, "record", lambda run, device: run)
        monkeypatch.setattr(whole_text, "LEAST_STEPS", 0)
        return batches

    return switch
