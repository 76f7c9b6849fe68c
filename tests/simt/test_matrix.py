"""csrc/simt's matrix instructions and conversions, against the PTX manual's formulas and torch."""

import numpy as np
import pytest
import torch
from test_simt import address, buffer

# "Matrix fragments for mma.m16n8k16 with floating point type" (PTX ISA, 9.7.15): which element of a
# matrix the i-th of a lane is. groupID = lane >> 2, threadID_in_group = lane % 4.


def a_element(lane, i):
    group, thread = lane >> 2, lane % 4
    row = group if i < 2 or 4 <= i < 6 else group + 8
    column = thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8
    return row, column


def b_element(lane, i):
    group, thread = lane >> 2, lane % 4
    row = thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8
    return row, group


def c_element(lane, i):
    group, thread = lane >> 2, lane % 4
    return group if i < 2 else group + 8, thread * 2 + (i & 1)


def fragments(matrix, element, count):
    """[32, count]: what each lane holds."""
    return np.array([[matrix[element(lane, i)] for i in range(count)] for lane in range(32)])


def bits(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mma(planted, dtype):
    g = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(shape, generator=g) for shape in [(16, 16), (16, 8), (16, 8)])
    a, b = a.to(dtype), b.to(dtype)
    # Two elements a register, the first in the lower half.
    a_lanes = np.ascontiguousarray(fragments(bits(a), a_element, 8)).view(np.uint32)
    b_lanes = np.ascontiguousarray(fragments(bits(b), b_element, 4)).view(np.uint32)
    c_lanes = fragments(c.numpy(), c_element, 4)
    lanes = {"a": a_lanes, "b": b_lanes, "c": c_lanes, "d": np.zeros((32, 4), np.float32)}
    arrays = [buffer(planted, x, name) for name, x in lanes.items()]
    planted.configure()
    planted.run_mma(dtype == torch.bfloat16, *map(address, arrays))
    exact = a.double().numpy() @ b.double().numpy() + c.double().numpy()
    np.testing.assert_allclose(arrays[3], fragments(exact, c_element, 4), atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(planted, transposed):
    """Lane 8 m + i has the address of row i of matrix m; lane l gets, of each, row l / 4, columns
    2 (l % 4) and the next; .trans: of the transposed matrix."""
    rows = buffer(planted, np.arange(256, dtype=np.uint16).reshape(32, 8), "rows")
    to = buffer(planted, np.zeros((32, 4), np.uint32), "to")
    planted.configure()
    planted.run_ldmatrix(transposed, address(rows), address(to))
    for lane in range(32):
        for m in range(4):
            matrix = rows[8 * m : 8 * m + 8]
            matrix = matrix.T if transposed else matrix
            low, high = matrix[lane // 4, 2 * (lane % 4)], matrix[lane // 4, 2 * (lane % 4) + 1]
            assert to[lane, m] == int(low) | int(high) << 16


def wgmma_element(thread, i):
    """Of D of wgmma.m64nNk16: each warp has 16 rows."""
    group, thread_in_group = thread % 32 >> 2, thread % 4
    row = 16 * (thread // 32) + group + 8 * (i // 2 % 2)
    return row, 8 * (i // 4) + 2 * thread_in_group + i % 2


@pytest.mark.parametrize("a_in_registers", [False, True], ids=["shared", "registers"])
@pytest.mark.parametrize("transposed", [False, True], ids=["k_major", "mn_major"])
@pytest.mark.parametrize("dtype, n", [(torch.float16, 64), (torch.bfloat16, 128)], ids=str)
def test_wgmma(planted, dtype, n, transposed, a_in_registers):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=g).to(dtype) for shape in [(64, 64), (64, n)])
    arrays = [buffer(planted, bits(a), "a"),
              buffer(planted, bits(b if transposed else b.T.contiguous()), "b"),
              buffer(planted, np.zeros((128, n // 2), np.float32), "d")]  # fmt: skip
    planted.configure()
    bf16 = dtype == torch.bfloat16
    planted.run_wgmma(bf16, transposed, a_in_registers, *map(address, arrays))
    exact = a.double().numpy() @ b.double().numpy()
    expected = [[exact[wgmma_element(t, i)] for i in range(n // 2)] for t in range(128)]
    np.testing.assert_allclose(arrays[2], expected, atol=1e-4)


def run_numbers(planted, name, x: np.ndarray) -> np.ndarray:
    x, out = (
        buffer(planted, x.view(np.uint32), "in"),
        buffer(planted, np.zeros(x.size, np.uint32), "out"),
    )
    planted.configure()
    planted.run_numbers(name, address(x), address(out), x.size)
    return out.copy()


def test_ex2(planted):
    x = np.random.default_rng(0).uniform(-126, 127, 2000).astype(np.float32)
    exact = np.exp2(x.astype(np.float64))
    error = np.abs(run_numbers(planted, "ex2", x).view(np.float32) / exact - 1)
    assert 0.9 * 2**-22 < error.max() <= 2**-22
    x = np.array([-np.inf, -200, -126.5, -1, 0, 1, 127, 128, np.inf, np.nan], np.float32)
    expected = np.array([0, 0, 0, 0.5, 1, 2, 2.0**127, np.inf, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(run_numbers(planted, "ex2", x).view(np.float32), expected)


def test_reciprocal(planted):
    x = (10 ** np.random.default_rng(0).uniform(-30, 30, 2000)).astype(np.float32)
    error = np.abs(
        run_numbers(planted, "reciprocal", x).view(np.float32) * x.astype(np.float64) - 1
    )
    assert 0.9 * 2**-23 < error.max() <= 2**-23
    x = np.array([0, -0.0, 1e-40, np.inf, -np.inf, 4, 2.0**127, np.nan], np.float32)
    expected = np.array([np.inf, -np.inf, np.inf, 0, -0.0, 0.25, 0, np.nan], np.float32)
    np.testing.assert_array_equal(run_numbers(planted, "reciprocal", x).view(np.float32), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding(planted, dtype):
    name = "fp16" if dtype == torch.float16 else "bf16"
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    every = every[~every.isnan()]
    # Every number, halfway to the next, and a little beside both.
    zero, infinity = torch.tensor(0.0), torch.tensor(torch.inf)
    x = every.float()
    halfway = (x.double() + x.roll(-1).double()).div(2).float()
    beside = [torch.nextafter(x, infinity), torch.nextafter(halfway, zero)]
    ends = torch.tensor([1e-45, 65519.996, 65520.0, 3.4e38, torch.inf])
    x = torch.cat([x, halfway, *beside, ends])
    x = x[~x.isnan()]
    packed = run_numbers(planted, f"pack_{name}", x.numpy())
    np.testing.assert_array_equal((packed & 0xFFFF).astype(np.uint16), bits(x.to(dtype)))
    np.testing.assert_array_equal((packed >> 16).astype(np.uint16), bits((-x).to(dtype)))
    two = bits(every).astype(np.uint32) | bits(every.flip(0)).astype(np.uint32) << 16
    for half, expected in [("low", every), ("high", every.flip(0))]:
        result = run_numbers(planted, f"{half}_{name}", two).view(np.float32)
        np.testing.assert_array_equal(result, expected.float().numpy())
    nan = run_numbers(planted, f"pack_{name}", np.array([np.nan], np.float32))
    assert torch.tensor(nan.view(np.int16)).view(dtype).isnan().all()
