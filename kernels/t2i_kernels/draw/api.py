"""From logits to codes: schema, checks and backends."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from .. import native, triton_backend
from ..checks import check_device, check_floating
from ..registry import LIBRARY, Backend, Reason, register, register_op, select
from . import reference

SCHEMA = (
    "(Tensor logits, Tensor seeds, Tensor positions, Tensor? guidance, float temperature,"
    " int top_k, float top_p) -> Tensor codes"
)


def draw(
    logits: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    guidance: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Draw one code for each of T positions of N images.

    A code is the argmax of ``logits / temperature + g`` among the likely ones (the Gumbel-max
    trick, arXiv 1411.0030, section 2), where the noise g is a function of (seed, position, code)
    and of nothing else.

    Args:
        logits: [N, T, K] of fp32 (the reference also fp64, Triton also bf16 and fp16, which it
            widens first); with guidance [2N, T, K], the unconditional half behind.
        seeds: int64 [N].
        positions: int64 [N], of the first of the T tokens of each image.
        guidance: fp32 [N, T], a scale s for each: the logits are uncond + s (cond − uncond), and
            the conditional ones themselves where s is 1.
        temperature: 0 takes the most likely code; else 1e-6 to 1e6.
        top_k: keep the k most likely codes, and those that tie with the last one; 0 keeps all.
        top_p: of those keep the fewest whose probabilities reach p (nucleus sampling,
            arXiv 1904.09751); 1 keeps all.
        backend: name of the backend to use; chosen by ``registry`` otherwise.

    Returns:
        int64 [N, T].

    Raises:
        TypeError, ValueError: a wrong type, shape, device or option; on the CPU also logits that
            are NaN or inf, or −inf alone, of which Triton makes a device assertion on a GPU.
        BackendError: the backend asked for cannot run the call.
    """
    call = _bind(
        logits,
        seeds,
        positions,
        guidance=guidance,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    return select("draw", backend, *call).run(*call)


def _bind(logits, seeds, positions, *, guidance=None, temperature=1.0, top_k=0, top_p=1.0) -> tuple:
    _check(logits, seeds, positions, guidance, temperature, top_k, top_p)
    return logits, seeds, positions, guidance, float(temperature), int(top_k), float(top_p)


def _check(logits, seeds, positions, guidance, temperature, top_k, top_p) -> None:
    check_floating("logits", logits)
    if logits.dim() != 3 or logits.shape[2] < 1:
        raise ValueError(f"logits: expected [rows, tokens, codes], got {tuple(logits.shape)}")
    if guidance is not None and len(logits) % 2:
        raise ValueError(f"logits: expected an even number of rows, got {len(logits)}")
    rows = len(logits) // 2 if guidance is not None else len(logits)
    check_noise(seeds, positions, guidance, rows, logits.shape[1])
    for name, tensor in (("seeds", seeds), ("positions", positions), ("guidance", guidance)):
        if tensor is not None:
            check_device(name, tensor, "logits", logits)
    check_options(temperature, top_k, top_p)


def check_noise(seeds, positions, guidance, images: int, tokens: int) -> None:
    """Raises TypeError and ValueError for what is not of so many images and tokens."""
    if guidance is not None and not isinstance(guidance, Tensor):
        raise TypeError(f"guidance: expected a tensor, got {type(guidance).__name__}")
    for name, tensor in (("seeds", seeds), ("positions", positions)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype != torch.int64 or tuple(tensor.shape) != (images,):
            raise ValueError(
                f"{name}: expected int64 {(images,)}, one for each image, got {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
    if guidance is not None and (
        guidance.dtype != torch.float32 or tuple(guidance.shape) != (images, tokens)
    ):
        raise ValueError(
            f"guidance: expected float32 {(images, tokens)}, got {guidance.dtype} "
            f"{tuple(guidance.shape)}"
        )


def check_options(temperature: float, top_k: int, top_p: float) -> None:
    """Raises ValueError for an option out of range."""
    if temperature != 0 and not 1e-6 <= temperature <= 1e6:
        raise ValueError(f"temperature: expected 0 or 1e-6 to 1e6, got {temperature}")
    if not isinstance(top_k, Integral) or not 0 <= top_k < 1 << 63:
        raise ValueError(f"top_k: expected a whole number, 0 to keep all codes, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected 0 < top_p <= 1, got {top_p}")


def _fake(logits, seeds, *rest):
    return seeds.new_empty(len(seeds), logits.shape[1])


def add_backend(name: str, available, supports) -> None:
    """Define the overload ``t2i::draw.<name>`` and offer it to the registry."""
    LIBRARY.define(f"draw.{name}{SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"t2i::draw.{name}", _fake, lib=LIBRARY)
    register("draw", Backend(name, available, supports, getattr(torch.ops.t2i.draw, name)))


def _cpu_supports(logits, *rest) -> Reason:
    if logits.device.type != "cpu":
        return f"logits are on {logits.device}"
    if logits.dtype != torch.float32:
        return f"logits are {logits.dtype}, not float32"
    return None


def _triton_supports(logits, *rest) -> Reason:
    if logits.dtype == torch.float64:
        return "float64 is for the reference only"
    if logits.shape[2] > 65536:
        return "codes are above 65536, which one program draws from"
    return triton_backend.runs_on("logits", logits)


register_op("draw", _bind)
add_backend("reference", lambda: None, lambda *call: None)
LIBRARY.impl("draw.reference", reference.draw, "CompositeExplicitAutograd")
add_backend("cpu", native.reason, _cpu_supports)
add_backend("triton", triton_backend.reason, _triton_supports)
triton_backend.implement("draw", "draw")
