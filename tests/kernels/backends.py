"""The backends that a test of an operator runs on, as the registry has them."""

from __future__ import annotations

import pytest

from t2i_kernels import explain, registry


def backends(op: str) -> list:
    """One parameter for each backend of ``op`` in this version, skipped with the reason where this
    machine lacks it."""
    return [
        pytest.param(
            row.backend, marks=[] if row.available else [pytest.mark.skip(reason=row.reason)]
        )
        for row in explain(op)
        if row.backend in registry.backends(op)
    ]


def skip_unless_supported(backend: str, op: str, *args, **kwargs) -> None:
    """Skip a test whose call ``backend`` says it does not cover."""
    (row,) = (row for row in explain(op, *args, **kwargs) if row.backend == backend)
    if not row.available:
        pytest.skip(row.reason)
