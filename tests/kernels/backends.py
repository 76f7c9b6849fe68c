"""The backends that a test of an operator runs on, as the registry has them."""

from __future__ import annotations

import os

import pytest

from t2i_kernels import explain, registry, triton_backend

ON_GPU = os.environ.get("T2I_TEST_DEVICE", "").startswith("cuda")


def backends(op: str) -> list:
    """One parameter for each backend of ``op`` in this version, skipped with the reason where this
    machine lacks it."""
    return [
        pytest.param(row.backend, marks=[pytest.mark.skip(reason=reason)] if reason else [])
        for row in explain(op)
        if row.backend in registry.backends(op)
        for reason in [row.reason or _without_gpu(row.backend)]
    ]


def _without_gpu(backend: str) -> str | None:
    needed = backend == "cuda" or (backend == "triton" and not triton_backend.INTERPRETED)
    return "it needs T2I_TEST_DEVICE=cuda" if needed and not ON_GPU else None


def skip_where_it_asserts() -> None:
    """Skip what a GPU finds out only as it runs: the device is lost to the process then."""
    if ON_GPU:
        pytest.skip("a GPU asserts it, and is lost to the process")


def skip_unless_supported(backend: str, op: str, *args, **kwargs) -> None:
    """Skip a test whose call ``backend`` says it does not cover."""
    (row,) = (row for row in explain(op, *args, **kwargs) if row.backend == backend)
    if not row.available:
        pytest.skip(row.reason)
