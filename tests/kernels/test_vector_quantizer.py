"""VectorQuantizer: gradients by hand, learning against plain loops, state, one process and two."""

from __future__ import annotations

import copy
import math
import os
import types
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from t2i_kernels import VectorQuantizer
from t2i_kernels.vector_quantizer import rotate_onto

CODES, DIM = 12, 4
MODES = {
    f"{metric}-{update}": {"metric": metric, "update": update, "gradient": gradient}
    for metric, update, gradient in (
        ("l2", "ema", "straight_through"),
        ("l2", "gradient", "rotation"),
        ("cosine", "ema", "rotation"),
        ("cosine", "gradient", "straight_through"),
    )
}
every_mode = pytest.mark.parametrize("options", MODES.values(), ids=MODES)


def quantizer(**options) -> VectorQuantizer:
    """With the same codes every time, far enough apart to be told."""
    vq = VectorQuantizer(CODES, DIM, **options)
    with torch.no_grad():
        vq.codebook.copy_(torch.randn(CODES, DIM, generator=torch.Generator().manual_seed(1)))
        if vq.update == "ema":
            vq.ema_sums.copy_(vq.codebook)
    return vq


def batches(count: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(*shape, DIM, generator=generator) for _ in range(count)]


def state(vq: VectorQuantizer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in vq.state_dict().items()}


def assert_same_state(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


# --- What comes out


@every_mode
def test_chooses_the_nearest_code_and_returns_it_exactly(options):
    vq, (z,) = quantizer(**options), batches(1, 3, 5)
    vq.codebook.data *= torch.linspace(0.5, 2, CODES)[:, None]
    codes, vectors = vq.codebook.detach().double(), z.double()
    if vq.metric == "cosine":
        codes, vectors = unit(codes), unit(vectors)
    nearest = (vectors[..., None, :] - codes).square().sum(-1).argmin(-1)
    out = vq.eval()(z)
    assert torch.equal(out.indices, nearest) and len(nearest.unique()) > 4
    assert torch.equal(vq.encode(z), nearest)
    assert torch.equal(out.quantized, vq.lookup(nearest))
    torch.testing.assert_close(out.quantized.double(), codes[nearest])


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_values_are_the_codes_however_far_the_vectors(gradient):
    vq, (z,) = quantizer(gradient=gradient).eval(), batches(1, 7)
    out = vq(1e6 * z)
    assert torch.equal(out.quantized, vq.codebook[out.indices])


@every_mode
def test_bf16_is_quantized_in_fp32(options):
    vq, (z,) = quantizer(**options), batches(1, 50)
    exact = copy.deepcopy(vq)(z.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        out = vq(z.bfloat16())
    assert torch.equal(out.indices, exact.indices) and torch.equal(out.loss, exact.loss)
    assert out.quantized.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    assert torch.equal(out.quantized, exact.quantized.bfloat16())
    assert all(t.dtype != torch.bfloat16 for t in vq.state_dict().values())


# --- Losses and gradients


@pytest.mark.parametrize("legacy_beta", [False, True])
def test_each_term_of_the_loss_pulls_its_side(legacy_beta):
    beta = 0.3
    vq, (z,) = quantizer(update="gradient", beta=beta, legacy_beta=legacy_beta), batches(1, 9)
    z.requires_grad_()
    out = vq(z)
    out.loss.backward()
    apart = z.detach() - vq.codebook.detach()[out.indices]
    on_codes, on_vectors = (beta, 1.0) if legacy_beta else (1.0, beta)
    torch.testing.assert_close(out.loss.detach(), (1 + beta) * apart.square().mean())
    torch.testing.assert_close(z.grad, on_vectors * 2 * apart / apart.numel())
    pull = torch.zeros(CODES, DIM)
    for row, index in zip(apart, out.indices, strict=True):
        pull[index] -= on_codes * 2 * row / apart.numel()
    torch.testing.assert_close(vq.codebook.grad, pull)


def test_an_averaged_codebook_leaves_the_commitment_alone():
    vq, (z,) = quantizer(beta=0.3), batches(1, 9)
    expected = 0.3 * (z - vq.codebook[vq.encode(z)]).square().mean()
    z.requires_grad_()
    torch.testing.assert_close(vq(z).loss.detach(), expected)
    assert not list(vq.parameters())


def test_straight_through_copies_the_gradient():
    vq, (z, upstream) = quantizer(update="gradient"), batches(2, 9)
    z.requires_grad_()
    vq(z).quantized.backward(upstream)
    assert torch.equal(z.grad, upstream) and vq.codebook.grad is None


def test_cosine_differentiates_through_the_length():
    vq, (z, upstream) = quantizer(metric="cosine", update="gradient"), batches(2, 9)
    z.requires_grad_()
    out = vq(z)
    (out.loss + (out.quantized * upstream).sum()).backward()

    leaf, codes = z.detach().clone().requires_grad_(), vq.codebook.detach().clone().requires_grad_()
    vectors, chosen = unit(leaf), unit(codes)[out.indices]
    loss = (chosen - vectors.detach()).square().mean()
    loss = loss + 0.25 * (vectors - chosen.detach()).square().mean()
    (loss + (vectors * upstream).sum()).backward()
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(z.grad, leaf.grad)
    torch.testing.assert_close(vq.codebook.grad, codes.grad)


def test_rotation_turns_and_scales_the_gradient_as_the_vector():
    z, q, upstream = (x.double() for x in batches(3, 20))
    z.requires_grad_()
    out = rotate_onto(z, q)
    out.backward(upstream)
    torch.testing.assert_close(out.detach(), q)
    for i in range(len(z)):
        a, b = unit(z[i].detach()), unit(q[i])
        r = unit(a + b)
        turn = torch.eye(DIM).double() - 2 * torch.outer(r, r) + 2 * torch.outer(b, a)
        torch.testing.assert_close(turn @ turn.T, torch.eye(DIM).double())
        scale = q[i].norm() / z[i].detach().norm()
        torch.testing.assert_close(z.grad[i], scale * turn.T @ upstream[i])


def test_where_there_is_no_rotation_the_gradient_is_copied():
    (z, q, upstream) = batches(3, 4)
    z[0], q[1], q[2] = 0, 0, -3 * z[2]
    z.requires_grad_()
    out = rotate_onto(z, q)
    out.backward(upstream)
    torch.testing.assert_close(out.detach(), q)
    assert torch.equal(z.grad[:3], upstream[:3])
    assert not torch.equal(z.grad[3], upstream[3]) and z.grad.isfinite().all()


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_the_quantizer_uses_the_rotation(update):
    vq, (z, upstream) = quantizer(update=update, gradient="rotation"), batches(2, 9)
    z.requires_grad_()
    codes = vq.codebook.detach().clone()
    out = vq(z)
    out.quantized.backward(upstream)
    expected = z.detach().clone().requires_grad_()
    rotate_onto(expected, codes[out.indices]).backward(upstream)
    torch.testing.assert_close(z.grad, expected.grad)
    assert not torch.allclose(z.grad, upstream)


# --- Learning


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_codes_are_the_running_means_of_their_vectors(metric):
    decay, vq = 0.8, quantizer(metric=metric, ema_decay=0.8)
    codes = [row.double() for row in vq.codebook]
    counts, sums = [1.0] * CODES, [row.clone() for row in codes]
    for z in batches(5, 6, 7):
        vectors = [unit(v) if metric == "cosine" else v for v in z.double().view(-1, DIM)]
        nearest = [unit(c) if metric == "cosine" else c for c in codes]
        chosen = [min(range(CODES), key=lambda k: (v - nearest[k]).norm()) for v in vectors]
        for k in range(CODES):
            mine = [v for v, index in zip(vectors, chosen, strict=True) if index == k]
            counts[k] = decay * counts[k] + (1 - decay) * len(mine)
            sums[k] = decay * sums[k] + (1 - decay) * sum(mine, torch.zeros(DIM).double())
            codes[k] = unit(sums[k]) if metric == "cosine" else sums[k] / counts[k]
        assert vq(z).indices.flatten().tolist() == chosen
    torch.testing.assert_close(vq.codebook.double(), torch.stack(codes))
    torch.testing.assert_close(vq.ema_counts.double(), torch.tensor(counts).double())
    torch.testing.assert_close(vq.ema_sums.double(), torch.stack(sums))


def test_a_code_that_nothing_chooses_stays():
    vq = quantizer(ema_decay=0.5)
    vq.codebook[3] = vq.ema_sums[3] = torch.full((DIM,), 100.0)
    for z in batches(200, 4):
        vq(z)
    assert vq.ema_counts[3] < 1e-38  # beyond where the ratio means anything
    assert torch.equal(vq.codebook[3], torch.full((DIM,), 100.0))
    assert vq.codebook.isfinite().all()


@every_mode
def test_nothing_is_learned_outside_training(options):
    vq, (z,) = quantizer(**options, restart_after=1), batches(1, 9)
    before = state(vq)
    vq.encode(z)
    vq.lookup(torch.arange(CODES))
    vq.eval()(z)
    assert_same_state(state(vq), before)
    vq.train()(z)
    assert vq.usage() > 0


@pytest.mark.parametrize("restart_after", [0, 1])
@every_mode
def test_an_empty_batch_is_legal(options, restart_after):
    vq = quantizer(**options, restart_after=restart_after)
    before = vq.codebook.detach().clone()
    z = torch.zeros(2, 0, DIM, requires_grad=True)
    out = vq(z)
    (out.loss + out.quantized.sum()).backward()
    assert out.quantized.shape == (2, 0, DIM) and out.indices.shape == (2, 0)
    assert out.loss == 0 and z.grad.shape == z.shape
    # There was nothing to start again from: no code has become a zero.
    expected = F.normalize(before) if options == MODES["cosine-ema"] else before
    torch.testing.assert_close(vq.codebook.detach(), expected)


@every_mode
def test_dead_codes_start_again_as_vectors_of_the_batch_with_their_state(options):
    vq, data = quantizer(**options, restart_after=3), [z.abs() for z in batches(3, 300)]
    dead, alive = [5, 7], [k for k in range(CODES) if k not in (5, 7)]
    with torch.no_grad():  # away from all vectors; the second has waited for one batch already
        vq.codebook.copy_(data[0][:CODES])
        vq.codebook[dead] = -1.0
        vq.stale.zero_()
        vq.stale[7] = 1
        if vq.update == "ema":
            vq.ema_sums.copy_(vq.codebook)
            vq.ema_sums[dead] *= 0.01
            vq.ema_counts[dead] = 0.01
    restarted = {2: 7, 3: 5}
    for step, z in enumerate(data, start=1):
        before = vq.codebook.detach().clone()
        assert torch.isin(torch.tensor(alive), vq(z).indices).all()
        for code in dead:
            gone = (vq.codebook[code] > 0).all() and (before[code] < 0).all()
            assert gone == (restarted.get(step) == code)
        if step in restarted:
            code = restarted[step]
            vectors = unit(z) if vq.metric == "cosine" else z
            assert torch.isclose(vectors, vq.codebook[code]).all(dim=1).sum() == 1
            assert vq.stale[code] == 0
            if vq.update == "ema":
                assert vq.ema_counts[code] == 1
                assert torch.equal(vq.ema_sums[code], vq.codebook[code])
        if vq.update == "gradient":
            assert torch.equal(vq.codebook[alive], before[alive])


def test_restarts_follow_torchs_generator():
    results = []
    for seed in (3, 3, 4):
        vq, (z,) = quantizer(restart_after=1), batches(1, 30)
        vq.codebook[1:] = 100.0
        torch.manual_seed(seed)
        vq(z)
        results.append(vq.codebook[1:])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_one_vector_keeps_a_code_alive():
    vq = quantizer(update="gradient", restart_after=2)
    before = vq.codebook.detach().clone()
    for _ in range(5):
        vq(before[:3])
    assert torch.equal(vq.codebook[:3], before[:3])
    assert not torch.isclose(vq.codebook, before).all(dim=1)[3:].any()


def test_zero_never_restarts():
    vq = quantizer(update="gradient", restart_after=0)
    before = vq.codebook.detach().clone()
    for z in batches(20, 1):
        vq(z)
    assert torch.equal(vq.codebook, before)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_restart_leaves_the_backward_pass_whole(metric):
    vq, (z, upstream) = quantizer(metric=metric, update="gradient", restart_after=1), batches(2, 5)
    reference = quantizer(metric=metric, update="gradient")
    gradients = []
    for model in (vq, reference):
        leaf = z.clone().requires_grad_()
        out = model(leaf)
        (out.loss + (out.quantized * upstream).sum()).backward()
        gradients.append((leaf.grad, model.codebook.grad))
    assert not torch.equal(vq.codebook, reference.codebook)
    for ours, expected in zip(*gradients, strict=True):
        assert torch.equal(ours, expected)


def test_restarts_put_a_collapsed_codebook_to_use():
    centres = 100 + 10 * torch.randn(CODES, DIM)  # far from all codes: the nearest wins everything
    usage, error = [], []
    for restart_after in (0, 2):
        vq = VectorQuantizer(CODES, DIM, usage_window=5, restart_after=restart_after)
        for _ in range(40):
            z = centres[torch.randint(CODES, (60,))] + 0.1 * torch.randn(60, DIM)
            vq(z)
        usage.append(vq.usage())
        error.append((vq.eval()(z).quantized - z).square().mean())
    assert usage[0] < 0.2 and usage[1] > 0.8
    assert error[1] < 0.2 * error[0]


# --- Metrics


def test_usage_and_perplexity_look_back_on_a_window():
    window = 3
    vq = quantizer(update="gradient", usage_window=window)
    vq.codebook.data = 10.0 * torch.eye(CODES, DIM) + torch.arange(CODES)[:, None]
    choices = [[0, 0, 1], [2], [3, 4], [5], [1, 1, 1], [6, 0], [7], [7, 8], [9], [9]]
    assert vq.usage() == 0 and vq.perplexity() == 1
    for step, chosen in enumerate(choices, start=1):
        assert vq(vq.codebook.detach()[chosen]).indices.tolist() == chosen
        # Two windows, of which the running one fills up.
        back = step if step <= window else window + (step - 1) % window + 1
        seen = [index for batch in choices[step - back : step] for index in batch]
        shares = [seen.count(k) / len(seen) for k in set(seen)]
        assert vq.usage() == pytest.approx(len(shares) / CODES)
        entropy = -sum(p * math.log(p) for p in shares)
        assert vq.perplexity() == pytest.approx(math.exp(entropy))
        assert min(step, window) <= back <= 2 * window


def test_an_even_use_has_the_perplexity_of_the_codebook():
    vq = quantizer()
    vq(vq.codebook.clone())
    assert vq.usage() == 1 and vq.perplexity() == pytest.approx(CODES)


# --- State


@every_mode
def test_a_saved_quantizer_continues_to_the_bit(options, tmp_path):
    options = {**options, "restart_after": 2, "usage_window": 2}
    vq, data = quantizer(**options), batches(8, 6)
    for z in data[:4]:
        vq(z)
    torch.save((vq.state_dict(), torch.get_rng_state()), tmp_path / "state.pt")
    outputs = [vq(z) for z in data[4:]]

    other = VectorQuantizer(CODES, DIM, **options)
    saved, rng = torch.load(tmp_path / "state.pt")
    other.load_state_dict(saved)
    torch.set_rng_state(rng)
    for z, expected in zip(data[4:], outputs, strict=True):
        for ours, theirs in zip(other(z), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert_same_state(other.state_dict(), vq.state_dict())
    assert other.usage() == vq.usage() and other.perplexity() == vq.perplexity()


@pytest.mark.parametrize("mode", ["l2-ema", "cosine-gradient"])
def test_compiles_whole(mode):
    compiled = quantizer(**MODES[mode], restart_after=2)
    eager = copy.deepcopy(compiled)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for step, z in enumerate(batches(4, 9)):
        results = []
        for model in (run, eager):
            torch.manual_seed(step)
            leaf = z.clone().requires_grad_()
            out = model(leaf)
            (out.loss + out.quantized.square().sum()).backward()
            results.append((out.indices, out.quantized, out.loss, leaf.grad))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)
    for name, tensor in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], tensor)


class LargestTensor(TorchDispatchMode):
    """Counts the elements of the largest tensor that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@every_mode
def test_nothing_grows_with_vectors_times_codes(options):
    vectors, codes = 300, 200
    vq = VectorQuantizer(codes, DIM, **options, restart_after=1)
    z = torch.randn(vectors, DIM, requires_grad=True)
    with LargestTensor() as largest:
        out = vq(z)
        (out.loss + out.quantized.sum()).backward()
    assert 0 < largest.numel <= 2 * max(vectors, codes) * DIM


# --- Errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"metric": "dot"}, "metric: expected l2 or cosine, got 'dot'"),
        ({"update": "adam"}, "update: expected ema or gradient"),
        ({"gradient": "gumbel"}, "gradient: expected straight_through or rotation"),
        ({"num_codes": 0}, "num_codes: expected at least 1, got 0"),
        ({"code_dim": 0}, "code_dim: expected at least 1"),
        ({"beta": -1.0}, "beta: expected at least 0"),
        ({"restart_after": -1}, "restart_after: expected at least 0"),
        ({"usage_window": 0}, "usage_window: expected at least 1"),
        ({"ema_decay": 1.0}, "ema_decay: expected 0 <= ema_decay < 1, got 1.0"),
        ({"legacy_beta": True}, "legacy_beta: with update='ema'"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(**{"num_codes": CODES, "code_dim": DIM, **options})


def test_inputs_that_are_refused():
    vq = quantizer()
    before = state(vq)
    with pytest.raises(ValueError, match=r"z: expected \[\.\.\., 4\].*\(3, 5\)"):
        vq(torch.zeros(3, 5))
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="z"):
            vq(torch.full((3, DIM), value))
    with pytest.raises(IndexError, match="indices: expected 0 to 11, got 0 to 12"):
        vq.lookup(torch.tensor([[0, CODES]]))
    with pytest.raises(IndexError, match="got -1 to 3"):
        vq.lookup(torch.tensor([-1, 3]))
    with pytest.raises(TypeError, match="indices: expected int64, got torch.float32"):
        vq.lookup(torch.zeros(2))
    assert_same_state(state(vq), before)


# --- Two processes


class Encoder(torch.nn.Module):
    """Something with parameters before the quantizer, as in a tokenizer."""

    def __init__(self, vq: VectorQuantizer):
        super().__init__()
        self.linear = torch.nn.Linear(DIM, DIM)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(DIM))
            self.linear.bias.zero_()
        self.vq = vq

    def forward(self, x):
        out = self.vq(self.linear(x))
        return out.loss + out.quantized.square().mean()


def train(model, data) -> dict:
    """State after a few steps of SGD, each with the gradient of the mean over the batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in data:
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def as_one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # ranks draw differently
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    calls = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda tensor: (calls.append(tensor.numel()), all_reduce(tensor))
    results = {}
    for mode, options in MODES.items():
        model = torch.nn.parallel.DistributedDataParallel(Encoder(quantizer(**options)))
        halves = [x.chunk(2)[rank] for x in batches(4, 20)]
        calls.clear()
        results[mode] = train(model, halves)
        assert len(calls) == len(halves)

        vq = quantizer(**options, restart_after=2)
        for x in batches(6, 8):
            vq(x.chunk(2)[rank])
        results[f"{mode}, restarts"] = state(vq)

    vq = quantizer(restart_after=1)
    vq.codebook.zero_()
    vq.ema_sums.zero_()
    vq(torch.full((5, DIM), 1.0 + rank))
    results["seeds"] = state(vq)
    vq.stale.fill_(9)
    vq(torch.full((0 if rank == 0 else 5, DIM), 8.0))
    results["rank 0 has nothing"] = state(vq)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
    # DistributedDataParallel keeps gloo's threads, and one that lets go of its last message while
    # the interpreter ends aborts the process (pytorch/pytorch#190489): end without the interpreter.
    os._exit(0)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> types.SimpleNamespace:
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(as_one_of_two, args=(str(folder),), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    return types.SimpleNamespace(first=first, second=second)


def test_two_processes_hold_one_codebook(two_processes):
    for name in two_processes.first:
        assert_same_state(two_processes.first[name], two_processes.second[name])


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_learn_what_one_learns_from_both_batches(two_processes, mode):
    alone = train(Encoder(quantizer(**MODES[mode])), batches(4, 20))
    for name, tensor in alone.items():
        torch.testing.assert_close(two_processes.first[mode][f"module.{name}"], tensor)
    start = quantizer(**MODES[mode]).codebook
    assert not torch.allclose(alone["vq.codebook"], start, atol=1e-3)


def test_two_processes_restart_from_the_vectors_of_both(two_processes):
    # All codes were at 0: the one that was chosen moved to the mean, the others started again.
    codes = two_processes.first["seeds"]["codebook"]
    values = codes[1:, 0].tolist()
    assert (codes == codes[:, :1]).all() and set(values) == {1.0, 2.0}
    moved = two_processes.first["rank 0 has nothing"]["codebook"][:, 0]
    assert (moved == 8).sum() >= (CODES - 2) // 2 and not (moved == 0).any()
