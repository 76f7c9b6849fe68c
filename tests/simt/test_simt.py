"""csrc/simt: planted bugs are found and named; what is right passes, with the known results."""

import re
import shlex
import subprocess

import numpy as np
import pytest

import build

HERE = build.ROOT / "tests/simt"
ORDERS = [  # order, seed, preempt
    ("forward", 1, 0), ("forward", 1, 5), ("reverse", 1, 0), ("reverse", 1, 3),
    ("random", 1, 0), ("random", 2, 0), ("random", 3, 0), ("random", 7, 2),
]  # fmt: skip

# What the message begins with.
PLANTED = {
    "global_read": "out of bounds: 4-byte read .* 0 bytes behind the end of in of 256 bytes",
    "global_write": "out of bounds: 4-byte write .* 4 bytes before out of 512 bytes",
    "wild_read": "out of bounds: 4-byte read .* which no buffer is near",
    "shared_write": "out of bounds: .* 0 bytes behind the end of shared array 0 of 256 bytes",
    "too_much_shared": "shared memory: the kernel takes 516 bytes, the launch gave 512",
    "misaligned_read": "misaligned: 16 bytes",
    "misaligned_write": "misaligned: 4 bytes",
    "misaligned_ldmatrix": "misaligned: lane 0's byte 8 of shared array 0 in ldmatrix",
    "write_read": "race on byte .* of shared array 0",
    "read_write": "race on byte .* of shared array 0",
    "all_read_one_writes": "race on byte 0 of shared array 0",
    "write_write": "race on byte 0 of shared array 0: write .* the write by",
    "lanes_of_a_warp": "race on byte .* of shared array 0",
    "half_a_warp": "race on byte .* of shared array 0",
    "uninitialised": "uninitialised: read .* byte 160 of shared array 0",
    "atomic_and_plain": "race on byte 0 of shared array 0",
    "divergent_barrier": "divergent barrier",
    "divergent_shuffle": "divergent warp: __shfl_xor_sync",
    "shuffle_from_outside": "lane 0 reads lane 16, which is not among 0000ffff",
    "not_in_own_mask": "__any_sync .* is not in its own mask 0000ffff",
    "exit_before_ldmatrix": "divergent warp: only lanes 7fffffff",
    "exit_before_barrier": "deadlock: 32 of 64 threads have ended; waiting: 32 in barrier 1",
    "named_barrier": "deadlock: 32 of 64 threads have ended; waiting: 32 in barrier 2",
    "arrive_is_no_wait": "race on byte .* of shared array 0",
    "copy_not_waited": "not waited for: read .* a copy is on its way",
    "copy_too_few_groups": "not waited for: read",
    "copy_of_others": "race on|not waited for: read",
    "copy_never_waited": "1 cp.async were never waited for",
    "two_blocks_write": "race on byte .* of out: write .* the write by .* of another block",
    "last_block_no_counter": "race on .* of another block",
    "last_block_no_release": "race on .* thread 32 of another block",
    "last_block_no_acquire": "race on .* thread 32 of another block",
    "last_block_no_barrier": "race on",
    "bulk_few_bytes": "not waited for: read",
    "bulk_odd_bytes": "deadlock: .* the mbarrier .* lacks 0 of 1 arrivals and -32 bytes",
    "bulk_many_bytes": "deadlock: .* the mbarrier .* lacks 0 of 1 arrivals and 16 bytes",
    "bulk_no_wait": "not waited for: read|uninitialised: read",
    "bulk_no_init_barrier": "race on .* use as an mbarrier|uninitialised: use as an mbarrier",
    "bulk_no_arrival": "deadlock: .* the mbarrier .* lacks 1 of 63 arrivals and 0 bytes",
    "bulk_two_arrivals": "mbarrier in byte 0 of shared array 1: more than 1 arrivals in a phase",
    "bulk_not_empty": "race on .* of shared array 0|not waited for: read",
    "bulk_never_waited": "2 cp.async.bulk were never waited for",
    "wgmma_no_fence": "no wgmma.fence since registers were last waited for in wgmma",
    "wgmma_overwritten": "not waited for: byte 0 of shared array 0 changed while .* wgmma at",
    "wgmma_too_few_groups": "not waited for: byte 0 of shared array 0 changed",
}  # fmt: skip


def marked(name: str) -> set[str]:
    """Lines of planted.cu that the message has to name."""
    found = set()
    for number, line in enumerate((HERE / "planted.cu").read_text().splitlines(), 1):
        for mark in re.findall(r"\[(\w+)\]", line.partition("//")[2]):
            if name == mark or (mark == "last_block" and name.startswith(mark)):
                found.add(f"planted.cu:{number}")
    return found


def buffer(module, values: np.ndarray, name: str) -> np.ndarray:
    """A copy in guarded memory."""
    memory = module.Memory(values.nbytes, name)
    array = np.frombuffer(memory, values.dtype).reshape(values.shape)
    array[...] = values
    return array


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def run_planted(module, name, bug, order, seed, preempt):
    # Names are kept as they are: the buffers live until the call is over.
    arrays = [buffer(module, np.arange(64, dtype=np.float32), "in"),
              buffer(module, np.zeros(128, np.float32), "out"),
              buffer(module, np.zeros(1, np.uint32), "counter")]  # fmt: skip
    module.configure(getattr(module.Order, order), seed, preempt)
    module.run_planted(name, bug, *map(address, arrays))
    return arrays[1].copy()


def test_every_planted_bug_is_listed(planted):
    assert planted.planted_names() == list(PLANTED)


@pytest.mark.parametrize("name", PLANTED)
def test_planted(planted, name):
    results = [run_planted(planted, name, False, *order) for order in ORDERS]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])
    for order in ORDERS:
        with pytest.raises(planted.Error) as caught:
            run_planted(planted, name, True, *order)
        message = str(caught.value)
        assert re.match(PLANTED[name], message), (order, message)
        missing = marked(name) - set(re.findall(r"planted\.cu:\d+", message))
        assert not missing, (order, message)
        if name != "too_much_shared":
            assert marked(name), "no line is marked"
    # What was wrong leaves nothing behind.
    np.testing.assert_array_equal(run_planted(planted, name, False, *ORDERS[0]), results[0])


def run_feature(module, name, data, out, order=("forward", 1, 0)):
    data, out = buffer(module, data, "in"), buffer(module, out, "out")
    module.configure(getattr(module.Order, order[0]), *order[1:])
    module.run_feature(name, address(data), address(out))
    return out.copy()


X = np.random.default_rng(0).integers(0, 1000, 1024, dtype=np.uint32)


def expect_shuffles():
    x, lane = X[:32], np.arange(32)
    return np.stack([
        np.full(32, x[5]), x[(lane + 33) % 32], x[lane ^ 6],
        np.where(lane >= 3, x[lane - 3], x), np.where(lane < 28, x[(lane + 4) % 32], x),
    ])  # fmt: skip


def expect_votes():
    x = X[:32]
    odd = np.where(np.arange(32) % 2, x[1::2].sum(), 0)
    ballot = sum(1 << int(lane) for lane in np.flatnonzero(x % 3 == 0))
    same = [ballot, 1, 0, 1, x.sum(), x.min(), x.max()]
    return np.stack([*(np.full(32, value) for value in same), odd])


def expect_atomics():
    x = X[:64]
    return np.array([3 * x.sum(), x.min(), x.max(), 1, 1, 3 * x[::2].sum(), 3 * x[1::2].sum()])


def expect_indices():
    bz, by, bx, z, y, x = np.indices((2, 3, 2, 5, 3, 4))
    return (x + 10 * (y + 10 * (z + 10 * (bx + 10 * (by + 10 * bz))))).reshape(-1)


def expect_partial_warp():
    lanes = np.arange(48) < 32
    return np.stack(
        [np.where(lanes, X[:32].sum(), X[32:48].sum()), np.where(lanes, 2**32 - 1, 0xFFFF)]
    )


def expect_early_exit():
    out = np.zeros(64)
    out[:20], out[32:52] = X[:20].sum(), X[32:52].sum()
    return out


def expect_thousand():
    return np.stack([np.full(1024, X.sum()), np.full(1024, X.sum() + 1024)])


def expect_ping_pong():
    return X[:32][::-1] + np.arange(6)[:, None]


EXPECTED = {name.removeprefix("expect_"): function() for name, function in list(globals().items())
            if name.startswith("expect_")}  # fmt: skip


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("name", EXPECTED)
def test_features(planted, name, order):
    expected = EXPECTED[name].astype(np.uint32)
    out = np.zeros_like(expected)
    if name == "atomics":
        out[1] = 2**32 - 1
    np.testing.assert_array_equal(run_feature(planted, name, X, out, order), expected)


def test_bank_conflicts(planted):
    lines = (HERE / "features.cu").read_text().splitlines()
    marks = {}
    for number, line in enumerate(lines, 1):
        if found := re.search(r"// \[(.*)\]", line):
            marks[f"features.cu:{number}"] = found[1]
    planted.clear_counts()
    run_feature(planted, "bank_conflicts", X, np.zeros(32, np.uint32))
    counts = {marks[c.line]: (c.accesses, c.wavefronts, c.ideal) for c in planted.shared_counts()}
    assert counts == {
        "write": (32, 32, 32),
        "stride 1": (1, 1, 1),
        "stride 2": (1, 2, 1),
        "stride 32": (1, 32, 1),
        "stride 33": (1, 1, 1),
        "same": (1, 1, 1),
        "8 bytes": (1, 2, 2),
        "8 of 16 bytes": (1, 4, 2),
        "16 bytes": (1, 4, 4),
        "16 of 32 bytes": (1, 8, 4),
        "some lanes": (1, 1, 1),
        "ldmatrix rows": (1, 32, 4),
        "ldmatrix swizzled": (1, 4, 4),
    }
    planted.clear_counts()
    assert planted.shared_counts() == []


def test_example(tmp_path):
    """README's example prints what README says."""
    readme = (build.ROOT / "csrc/simt/README.md").read_text()
    source, commands, output = re.findall(r"```\w*\n(.*?)```", readme, re.S)
    (tmp_path / "add_left.cu").write_text(source)
    (tmp_path / "csrc").symlink_to(build.ROOT / "csrc")
    shell = commands.replace("g++", shlex.join(build.COMPILER)).replace("-O2", "-O0")
    done = subprocess.run(["sh", "-ec", shell], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == output, done.stderr
