"""Kernels: one operation per file, each with its torch reference (the definition), its Triton kernel and its dispatch.

A user never names a kernel. ``LKQ_KERNELS=torch`` or ``LKQ_KERNELS=triton`` forces one of the two; see
`lkq_hf.kernels.dispatch`.
"""
