"""Backends of the operators: what each supports, and which one runs.

An operator is registered in torch once for each backend, as an overload of one schema
(``t2i::vq_nearest.cpu``). The registry chooses among them in Python, from the metadata of a call
alone: under ``torch.compile`` that happens while tracing, so a compiled graph names the path it
took.

The choice, for a call:

- a backend asked for by name (argument, ``use_backend``, ``T2I_BACKEND``) is used, or the call is
  an error that says why it cannot be;
- otherwise the first of ``cuda``, ``triton``, ``cpu``, ``reference`` that supports the call.
  Falling back to the reference on a GPU warns once, with every reason;
- with ``T2I_STRICT=1`` (read on import, as ``T2I_BACKEND`` is) that fallback is an error on every
  device: the reference then runs only where it is asked for by name.

A new backend is a new file beside ``reference.py`` and a call of its operator's ``add_backend``.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

ORDER = ("cuda", "triton", "cpu", "reference")

# Every overload of every operator is defined here, so that an install without a compiler has them.
LIBRARY = torch.library.Library("t2i", "FRAGMENT")

Reason = str | None


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    ``available()`` is None or why this machine lacks it; it is asked once, while the package is
    imported, so it must not import a compiler or wake a device. ``supports(*call)`` is None or why
    this call is not covered; it reads nothing but metadata, and its reasons name limits rather than
    the values of a call: each new reason is another warning. ``run(*call)`` takes the operator's
    positional arguments in the order of its schema.
    """

    name: str
    available: Callable[[], Reason]
    supports: Callable[..., Reason]
    run: Callable[..., Any]


@dataclass(frozen=True)
class Choice:
    """A row of ``explain``: ``reason`` is None where the backend can run the call."""

    backend: str
    chosen: bool
    reason: Reason

    @property
    def available(self) -> bool:
        return self.reason is None


class Explanation(list[Choice]):
    """The backends of an operator in the order of choice; prints as a table."""

    def __init__(self, op: str, rows: list[Choice]) -> None:
        super().__init__(rows)
        self.op = op

    @property
    def chosen(self) -> str | None:
        """Name of the backend that would run, None if none can."""
        return next((row.backend for row in self if row.chosen), None)

    def __str__(self) -> str:
        lines = [
            f"  {'>' if row.chosen else ' '} {row.backend:<10} {row.reason or 'available'}"
            for row in self
        ]
        return "\n".join([self.op, *lines])

    __repr__ = __str__


class BackendError(RuntimeError):
    """No backend may run a call; the message has the reason of each."""


class _Op:
    def __init__(self, bind: Callable[..., tuple]) -> None:
        self.bind = bind
        self.backends: dict[str, Backend] = {}
        self.missing: dict[str, str] = {}  # backend -> why this machine lacks it


_ops: dict[str, _Op] = {}
_warned: set[tuple[str, ...]] = set()
_strict = os.environ.get("T2I_STRICT", "0") not in ("", "0")
_asked: str | None = None


def register_op(op: str, bind: Callable[..., tuple]) -> None:
    """Add an operator. ``bind`` turns the arguments of its public function into the positional
    arguments of its schema, and raises where they are wrong."""
    _ops[op] = _Op(bind)


def register(op: str, backend: Backend) -> None:
    """Add a backend to an operator; its place in the order follows from its name."""
    if backend.name not in ORDER:
        raise ValueError(f"backend name {backend.name!r}: expected one of {', '.join(ORDER)}")
    entry = _ops[op]
    entry.backends[backend.name] = backend
    entry.backends = {name: entry.backends[name] for name in ORDER if name in entry.backends}
    entry.missing.pop(backend.name, None)
    reason = backend.available()
    if reason is not None:
        entry.missing[backend.name] = reason


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator inside the block on the backend ``name``, or fail with the reason.

    Process-wide, as ``T2I_BACKEND``, so threads must not ask for different ones at a time. An
    argument ``backend=`` of a call goes before it.

    Raises:
        ValueError: no backend is called that.
    """
    global _asked
    before, _asked = _asked, _known(name, "use_backend")
    try:
        yield
    finally:
        _asked = before


def select(op: str, asked: str | None, *call: Any) -> Backend:
    """The backend that runs ``call``; see the module for the rules.

    Raises:
        ValueError: ``asked`` is no backend's name.
        BackendError: the one asked for cannot run it, or none can.
    """
    entry = _ops[op]
    asked = asked or _asked
    if asked is not None:
        reason = _reason(entry, _known(asked, "backend"), call)
        if reason is not None:
            raise BackendError(f"{op}: backend {asked!r} was asked for, but {reason}")
        return entry.backends[asked]
    for name, backend in entry.backends.items():
        if name not in entry.missing and backend.supports(*call) is None:
            if name == "reference" and (_strict or call[0].is_cuda):
                _fall_back(op, entry, call)
            return backend
    raise BackendError(f"no backend supports this call\n{_explain(op, entry, call)}")


def has_kernel(op: str, *call: Any) -> bool:
    """Whether ``select`` would choose another backend than the reference: for callers that know
    what is faster than that. ``call`` are the arguments of the operator's schema."""
    entry = _ops[op]
    names = entry.backends if _asked is None else {_asked} & entry.backends.keys()
    return any(
        name != "reference"
        and name not in entry.missing
        and entry.backends[name].supports(*call) is None
        for name in names
    )


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Which backends could run a call of ``op`` and which one would, each with its reason.

    With the arguments of the operator's public function the answer is for that call; without any it
    says what this machine has. Nothing is run.

    Raises:
        ValueError: ``op`` is no operator, or the arguments are wrong as in the call itself.
    """
    if op not in _ops:
        raise ValueError(f"op {op!r}: expected one of {', '.join(_ops)}")
    asked = kwargs.pop("backend", None) or _asked
    if asked is not None:
        _known(asked, "backend")
    entry = _ops[op]
    call = entry.bind(*args, **kwargs) if args or kwargs else None
    return _explain(op, entry, call, asked)


def ops() -> tuple[str, ...]:
    """Names of the operators."""
    return tuple(_ops)


def backends(op: str) -> tuple[str, ...]:
    """Names of the backends that this version has for ``op``, whatever this machine has."""
    return tuple(_ops[op].backends)


def _explain(op: str, entry: _Op, call: tuple | None, asked: str | None = None) -> Explanation:
    reasons = {name: _reason(entry, name, call) for name in ORDER}
    able = [name for name in ORDER if reasons[name] is None and asked in (None, name)]
    if _strict and able[:1] == ["reference"] and asked is None:
        able = []
    return Explanation(op, [Choice(name, name in able[:1], reasons[name]) for name in ORDER])


def _reason(entry: _Op, name: str, call: tuple | None) -> Reason:
    if name not in entry.backends:
        return f"this version has no {name} implementation of it"
    if name in entry.missing:
        return entry.missing[name]
    return None if call is None else entry.backends[name].supports(*call)


def _fall_back(op: str, entry: _Op, call: tuple) -> None:
    reasons = tuple(
        f"{name}: {_reason(entry, name, call)}" for name in ORDER if name != "reference"
    )
    if _strict:
        raise BackendError(f"{op}: T2I_STRICT=1 forbids the reference; " + "; ".join(reasons))
    if (op, *reasons) not in _warned:
        _warned.add((op, *reasons))
        _warn(f"{op} runs on the slow reference: " + "; ".join(reasons))


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)


# As torch.compiler.assume_constant_result does, which would import the compiler: run while tracing,
# since a graph cannot hold a warning.
_warn._dynamo_marked_constant = True


def _known(name: str, source: str) -> str:
    if name not in ORDER:
        raise ValueError(f"{source} {name!r}: expected one of {', '.join(ORDER)}")
    return name


if os.environ.get("T2I_BACKEND"):
    _asked = _known(os.environ["T2I_BACKEND"], "T2I_BACKEND")
