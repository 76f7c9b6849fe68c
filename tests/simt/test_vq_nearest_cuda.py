"""vq_nearest of csrc/cuda, run by csrc/simt with its checker, against distances in fp64."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from device import empty, put
from torch import Tensor

import build
from t2i_kernels import NearestCodes

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
import test_vq_nearest as contract  # noqa: E402

METRICS = contract.METRICS
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# (order, seed, preempt)
ORDERS = [("forward", 1, 0), ("reverse", 1, 0), ("random", 1, 0), ("random", 2, 7)]


def run(
    module: ModuleType, z: Tensor, codebook: Tensor, metric: str, distance=True, counts=True
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """(indices [N], distance [N], counts [K], the first rows of z and codebook that are not finite,
    or -1) of z [outer, inner, d]."""
    n, (k, d) = z.shape[:2].numel(), codebook.shape
    out = {
        "indices": empty(module, (n,), torch.int64, "indices"),
        "distance": empty(module, (n * distance,), torch.float32, "distance"),
        "counts": empty(module, (k * counts,), torch.int64, "counts"),
        "invalid": empty(module, (2,), torch.int64, "invalid"),
        "workspace": empty(
            module, (module.vq_nearest_workspace(n, k, d),), torch.uint8, "workspace"
        ),
    }
    placed = {"z": put(module, z, "z"), "codebook": put(module, codebook, "codebook")}
    call = module.VqNearest()
    for name, tensor in {**out, **placed}.items():
        setattr(call, name, tensor.data_ptr() if tensor.numel() else 0)
    call.z_type = getattr(module.FloatType, TYPES[z.dtype])
    call.codebook_type = getattr(module.FloatType, TYPES[codebook.dtype])
    call.num_vectors, call.inner, call.num_codes, call.dim = n, max(z.shape[1], 1), k, d
    call.outer_stride, call.inner_stride, call.dim_stride = z.stride()
    call.code_stride, call.code_dim_stride = codebook.stride()
    call.cosine = metric == "cosine"
    module.vq_nearest(call)
    results = (out[name].clone() for name in ("indices", "distance", "counts"))
    return *results, out["invalid"].tolist()


def search(module: ModuleType):
    """``t2i_kernels.vq_nearest`` by this kernel."""

    def vq_nearest(
        z, codebook, metric, *, return_distance=False, return_counts=False, backend=None
    ):
        rows = z[None] if z.dim() == 1 else z
        rows = rows.flatten(1, -2) if rows.dim() > 2 else rows[None]
        *found, invalid = run(module, rows, codebook, metric, return_distance, return_counts)
        for name, row, of in zip(
            ("z", "codebook"), invalid, (len(found[0]), len(codebook)), strict=True
        ):
            if row >= 0:
                raise ValueError(f"{name} holds NaN or infinite values, in row {row} of {of}")
        indices, distance = found[0].view(z.shape[:-1]), found[1]
        if not (return_distance or return_counts):
            return indices
        return NearestCodes(
            indices,
            distance.view(z.shape[:-1]) if return_distance else None,
            found[2] if return_counts else None,
        )

    return vq_nearest


@pytest.fixture(scope="module")
def checked():
    return build.build(checked=True)


@pytest.fixture(params=ORDERS, ids=lambda order: "-".join(map(str, order)))
def module(request, checked):
    order, seed, preempt = request.param
    checked.configure(getattr(checked.Order, order), seed, preempt)
    yield checked
    checked.configure()


@pytest.fixture
def compare(module, monkeypatch):
    """``contract.compare`` of this kernel."""
    monkeypatch.setattr(contract, "vq_nearest", search(module))
    monkeypatch.setattr(contract, "skip_unless_supported", lambda *call: None)
    torch.manual_seed(0)
    return lambda *call, **options: contract.compare(None, *call, **options)


@pytest.mark.parametrize(
    "check",
    [check for check in contract.CHECKS if check is not contract.check_no_gradient],
    ids=lambda check: check.__name__[6:],
)
def test_contract(check, compare, module, request):
    slow = check in (contract.check_many_codes, contract.check_not_finite, contract.check_types)
    if slow and "forward-1-0" not in request.node.name:
        pytest.skip("slow, and no other code than the rest")
    check(None)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128])
def test_edges(compare, dim, metric):
    """Of warps' and blocks' vectors, and of pairs, blocks and tiles of codes."""
    for n, k in [(1, 7), (16, 8), (17, 9), (31, 16), (32, 17), (63, 31), (64, 33), (65, 63),
                 (127, 65), (128, 127), (129, 129), (40, 256), (40, 257), (40, 513)]:  # fmt: skip
        if dim > 16 and n * k > 8000:
            continue
        compare(*contract.gaussian(n, k, dim), metric)


def near_ties(n: int, k: int, d: int, relative: float) -> tuple[Tensor, Tensor]:
    """All codes are nearly as near as the nearest."""
    codes = torch.nn.functional.normalize(torch.randn(k, d).double(), dim=-1)
    codes *= 1 + relative * torch.rand(k, 1)
    return 0.1 * torch.randn(n, d) * relative, codes.float()


@pytest.mark.parametrize("relative", [1e-3, 1e-5, 1e-6, 1e-7, 0.0])
@pytest.mark.parametrize("metric", METRICS)
def test_near_ties(compare, relative, metric):
    """In fp32's last bits, in one lane's codes and in many."""
    for size in [(40, 500, 2), (70, 300, 4), (40, 300, 8), (20, 150, 16)]:
        compare(*near_ties(*size, relative), metric)
    codes = torch.randn(1, 4) * (1 + relative * torch.rand(600, 1))
    compare(codes[::9] + relative * torch.randn(67, 4), codes, metric)


def test_near_ties_in_blocks_apart(compare):
    """Two codes of a lane that only fp64 tells apart, and blocks without any behind them."""
    z = torch.randn(64, 4)
    codes = 10 + torch.randn(1100, 4)
    for first in (0, 256):
        offsets = torch.nn.functional.normalize(torch.randn(64, 4), dim=1)
        codes[first : first + 64] = z + 1e-4 * offsets
    compare(z, codes, "l2")


@pytest.mark.parametrize("metric", METRICS)
def test_magnitudes(compare, metric):
    """fp32's whole range; vectors far longer and far shorter than codes, and some of each."""
    for power in (-149, -130, -60, -24, -15, 0, 15, 16, 24, 25, 60, 124):
        for code_power in {power, min(-power, 124), 0, -140, 124}:
            z, codes = torch.randn(33, 4).clamp(-4, 4), torch.randn(70, 4).clamp(-4, 4)
            z, codes = (z.double() * 2.0**power).float(), (codes.double() * 2.0**code_power).float()
            compare(z, codes, metric)
    z = torch.randn(120, 4).double() * 2.0 ** torch.arange(-60, 60)[:, None]
    compare(z.float(), torch.randn(150, 4) * 2.0 ** torch.randint(-20, 20, (150, 1)), metric)


@pytest.mark.parametrize("power", [6, 9, 10, 11, 12, 13, 17, 24, 40])
def test_long_vectors(compare, power):
    """What codes differ by along the vector weighs as much as |c|²/2, a small part of the score."""
    z, codes = torch.randn(50, 4), torch.randn(200, 4)
    z[:, 0] = 2.0**power
    codes[:, 0] *= 2.0**-power
    compare(z, codes, "l2")
    compare(z * 2.0**-60, codes * 2.0**-60, "l2")


@pytest.mark.parametrize("dim", [4, 8, 128])
def test_below_powers_of_two(compare, dim):
    """Entries as large as scaling leaves them, |c|²/2 as large as fp16 has to hold."""
    below = 2.0 - 2.0**-20
    codes = below * (1 - 2.0**-12 * torch.randint(0, 3, (40, dim)))
    codes[::3] *= torch.randint(0, 2, (14, dim)) * 2 - 1
    for power in (-120, 0, 100):
        z = codes[:20] * 2.0**power
        compare(z, codes * 2.0**power, "l2")
        compare(z, codes, "cosine")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [3, 8, 16])
def test_codes_split_among_blocks(compare, dim, metric):
    for n, k in [(1, 3000), (20, 1300), (150, 1025)]:
        compare(*contract.gaussian(n, k, dim), metric)
    compare(*contract.duplicated(20, 1500, dim), metric, exact=metric == "l2")
    z, codes = contract.gaussian(20, 1500, dim)
    z[[3, 7]] = math.nan
    with pytest.raises(ValueError, match="row 3 of 20"):
        contract.vq_nearest(z, codes, metric)


def test_signed_zeros(compare):
    values = torch.tensor(list(itertools.product([0.0, -0.0, 1.0], repeat=2)))
    for metric in METRICS:
        compare(values, values[2:], metric, exact=metric == "l2")
        compare(values, -0.0 * values, metric, exact=True)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_other_vectors_beside_what_is_not_finite(module, value, metric):
    torch.manual_seed(0)
    z, codes = contract.gaussian(200, 300, 5)
    *whole, invalid = run(module, z[None], codes, metric)
    assert invalid == [-1, -1]
    broken = z.clone()
    broken[[150, 7, 199], [0, 4, 2]] = value
    indices, distance, counts, invalid = run(module, broken[None], codes, metric)
    assert invalid == [7, -1]
    kept = broken.isfinite().all(1)
    assert torch.equal(indices[kept], whole[0][kept]) and torch.equal(
        distance[kept], whole[1][kept]
    )
    assert (indices[~kept] == 0).all() and distance[~kept].isnan().all()
    assert torch.equal(counts, torch.bincount(indices[kept], minlength=300))
    codes[[250, 40], 3] = value
    indices, distance, counts, invalid = run(module, broken[None], codes, metric)
    assert invalid == [7, 40] and not indices.any() and not counts.any() and distance.isnan().all()


@pytest.mark.parametrize("metric", METRICS)
def test_strides(compare, module, metric):
    """Images where they are; dimensions and rows apart; nothing between is read."""
    for dtype in TYPES:
        images, codes = torch.randn(3, 6, 5, 9).to(dtype), torch.randn(40, 150).to(dtype)[::6]
        z, codes = images.permute(0, 2, 3, 1).flatten(1, 2), codes[:6, ::2].T
        assert z.data_ptr() == images.data_ptr()
        found = run(module, z, codes, metric)
        expected = run(module, z.contiguous().view(1, -1, 6), codes.contiguous(), metric)
        for got, value in zip(found, expected, strict=True):
            assert torch.equal(got, value) if isinstance(got, Tensor) else got == value
        compare(z.flatten(0, 1), codes, metric)


def test_same_with_and_without_distance(module):
    """Without, a vector with one candidate is not measured."""
    for z, codes in (contract.trained(150, 300, 4), contract.lattice(150, 300, 4)):
        for metric in METRICS:
            expected = run(module, z[None], codes, metric)
            indices, distance, counts, _ = run(module, z[None], codes, metric, False, False)
            assert torch.equal(indices, expected[0]) and not len(distance) and not len(counts)


def test_operands_are_read_without_bank_conflicts(checked):
    checked.clear_counts()
    run(checked, torch.randn(1, 256, 8), torch.randn(1024, 8), "l2")
    source = (build.ROOT / "csrc/cuda/vq_nearest.cuh").read_text().splitlines()
    (place,) = (i for i, line in enumerate(source, 1) if "load_shared_16(codes" in line)
    (line,) = (x for x in checked.shared_counts() if x.line == f"vq_nearest.cuh:{place}")
    assert line.wavefronts == line.ideal > 0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dim", 129, "dim is 129, expected 0 to 128"),
        ("num_codes", -1, "num_codes is -1"),
        ("num_codes", 0, "codebook: there are no codes"),
        ("num_vectors", -1, "num_vectors is -1"),
        ("inner", 0, "inner is 0"),
        ("workspace", 8, "workspace: not aligned"),
    ],
)
def test_bad_calls_are_named(checked, field, value, message):
    call = checked.VqNearest()
    call.num_vectors, call.inner, call.num_codes, call.dim = 3, 3, 5, 4
    setattr(call, field, value)
    with pytest.raises(ValueError, match=message):
        checked.vq_nearest(call)
