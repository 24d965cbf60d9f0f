"""Runs before any test module is imported."""

import os

import torch

# Without a GPU, Triton kernels are tested in Triton's interpreter, which must be asked for before Triton is imported.
# Only tests that force LKQ_KERNELS=triton run them: on the CPU the library itself chooses the torch references.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
