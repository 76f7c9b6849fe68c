"""What a machine with a GPU is asked for, in one command: `make gpu-check`.

Runs the operators' tests there, then measures them beside their peers, and writes
results/gpu-DEVICE-DATE.json and .md. With --dry-run, for machines without a GPU, the kernels are
interpreted on tiny problems and nothing is written.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from t2i_kernels import KVCache, decode_attention, flash_attention, triton_backend, vq_nearest

ROOT = Path(__file__).parents[1]
ROUNDS = 20


@dataclass
class Problem:
    """``contenders``: name -> a function that makes the call, or raises ImportError or
    NotImplementedError with the reason why it cannot take part. The first one is ours as users get
    it, the second is what the others are held to."""

    name: str
    contenders: dict[str, Callable[[], Callable[[], torch.Tensor]]]
    flops: float = 0.0
    bytes: float = 0.0
    tolerance: float = 2e-2


# ---- Problems -----------------------------------------------------------------------------------

BACKENDS = ("cuda", "triton")


def ours(make: Callable[..., Callable[[], torch.Tensor]]) -> dict:
    """A contender for each of our backends; ``make`` takes ``backend``."""
    return {f"t2i, {name}": lambda name=name: make(backend=name) for name in BACKENDS}


def attention(device, batch, heads, length, dim, causal, backward, dtype) -> Problem:
    shape = batch, length, heads, dim
    q, k, v = (torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(3))
    dout = torch.randn_like(q)

    def heads_first(function):
        return lambda q, k, v: function(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def call(function):
        def run():
            if not backward:
                with torch.no_grad():
                    return function(q, k, v)
            out = function(q, k, v)
            return torch.cat([x.flatten() for x in torch.autograd.grad(out, (q, k, v), dout)])

        return run

    def eager(q, k, v):
        scores = (q @ k.mT) * dim**-0.5
        if causal:
            seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
            scores = scores.masked_fill(~seen, -torch.inf)
        return scores.softmax(-1) @ v

    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        seen = (lambda b, h, i, j: i >= j) if causal else None
        mask = create_block_mask(seen, None, None, length, length, device) if causal else None
        run = torch.compile(flex_attention, dynamic=False)
        return call(heads_first(lambda *x: run(*x, block_mask=mask)))

    def varlen():
        from torch.nn.attention.varlen import varlen_attn

        ends = torch.arange(0, batch + 1, device=device, dtype=torch.int32) * length
        window = (-1, 0) if causal else (-1, -1)

        def run(*x):
            q, k, v = (t.flatten(0, 1) for t in x)
            out = varlen_attn(q, k, v, ends, ends, length, length, window_size=window)
            return out.view(shape)

        return call(run)

    def flash_attn():
        from flash_attn import flash_attn_func

        return call(lambda q, k, v: flash_attn_func(q, k, v, causal=causal))

    def flashinfer():
        from flashinfer import single_prefill_with_kv_cache

        if backward or batch > 1:
            raise NotImplementedError("single_prefill_with_kv_cache is forward, of one sequence")
        return call(lambda q, k, v: single_prefill_with_kv_cache(*(x[0] for x in (q, k, v)),
                                                                 causal=causal)[None])  # fmt: skip

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def mine(**options):
        return call(lambda q, k, v: flash_attention(q, k, v, causal=causal, **options))

    products = 4 * batch * heads * length * length * dim * (0.5 if causal else 1)
    kind = f"{'causal' if causal else 'full'}, {'forward + backward' if backward else 'forward'}"
    return Problem(
        f"flash_attention {batch}×{heads}×{length}×{dim}, {kind}, {str(dtype)[6:]}",
        {
            "t2i": mine,
            "torch SDPA": lambda: call(heads_first(sdpa)),
            **ours(mine),
            "torch varlen_attn": varlen,
            "torch flex, compiled": flex,
            "torch eager, compiled": lambda: call(heads_first(torch.compile(eager, dynamic=False))),
            "flash-attn": flash_attn,
            "FlashInfer": flashinfer,
        },
        flops=products * (3.5 if backward else 1),
    )


def nearest(device, vectors, codes, dim) -> Problem:
    codebook = F.normalize(torch.randn(codes, dim, device=device), dim=-1)
    z = codebook[torch.randint(codes, (vectors,), device=device)]
    z = F.normalize(z + 0.1 * torch.randn_like(z), dim=-1)

    def distances(z, codebook):
        return (codebook.square().sum(1) - 2 * z @ codebook.T).argmin(1)

    def mine(**options):
        return lambda: vq_nearest(z, codebook, "l2", **options)

    def compiled():
        run = torch.compile(distances, dynamic=False)
        return lambda: run(z, codebook)

    return Problem(
        f"vq_nearest {vectors} in {codes} codes, d {dim}",
        {
            "t2i": mine,
            "torch.cdist": lambda: lambda: torch.cdist(z, codebook).argmin(1),
            **ours(mine),
            "torch, expanded": lambda: lambda: distances(z, codebook),
            "torch, expanded, compiled": compiled,
        },
        flops=2 * vectors * codes * dim,
        tolerance=1e-2,  # the share of indices that may differ: the peers round
    )


def decoding(device, batch, heads, kv_heads, slots, dim, dtype) -> Problem:
    q = torch.randn(batch, 1, heads, dim, device=device, dtype=dtype)
    k, v = (torch.randn(batch, 1, kv_heads, dim, device=device, dtype=dtype) for _ in range(2))
    cache = KVCache.allocate(batch, slots + 1, kv_heads, dim, dtype=dtype, device=device)
    cache.k.normal_(), cache.v.normal_()
    cache.seqlens.fill_(slots)
    keys, values = cache.k.transpose(1, 2).clone(), cache.v.transpose(1, 2).clone()
    keys[:, :, -1], values[:, :, -1] = k[:, 0], v[:, 0]

    def mine(**options):
        return lambda: decode_attention(q, k, v, cache, **options)

    def sdpa():
        out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=True)
        return out.transpose(1, 2)

    def flash_attn():
        from flash_attn import flash_attn_with_kvcache

        if dtype == torch.float32:
            raise NotImplementedError("flash-attn has no fp32")
        kc, vc = cache.k.clone(), cache.v.clone()
        return lambda: flash_attn_with_kvcache(q, kc, vc, k, v, cache_seqlens=cache.seqlens)

    return Problem(
        f"decode_attention {batch}×{slots}, heads {heads}/{kv_heads}, d {dim}, {str(dtype)[6:]}",
        {
            "t2i": mine,
            "torch SDPA": lambda: sdpa,
            **ours(mine),
            "flash-attn": flash_attn,
        },
        bytes=2 * batch * (slots + 1) * kv_heads * dim * q.element_size(),
    )


def problems(device: str, small: bool) -> list[Problem]:
    if small:
        return [
            attention(device, 1, 2, 40, 16, True, False, torch.float16),
            attention(device, 1, 2, 40, 16, True, True, torch.float16),
            nearest(device, 70, 130, 4),
            decoding(device, 2, 4, 2, 40, 16, torch.float16),
        ]
    half = torch.bfloat16
    found = [attention(device, b, h, t, d, causal, backward, half)
             for b, h, t, d in [(1, 16, 1152, 64), (2, 16, 1152, 128), (4, 16, 4096, 64),
                                (4, 16, 4096, 128), (8, 8, 256, 64)]
             for causal in (True, False) for backward in (False, True)]  # fmt: skip
    found += [nearest(device, n, k, d) for n in (1024, 65536)
              for k, d in [(16384, 4), (16384, 8), (8192, 32), (16384, 256)]]  # fmt: skip
    found += [decoding(device, b, h, g, s, d, half) for b in (1, 2, 8)
              for h, g, s, d in [(9, 3, 320, 64), (16, 16, 1152, 128), (32, 8, 4096, 128)]
              ]  # fmt: skip
    return found


# ---- Measuring ----------------------------------------------------------------------------------


def seconds(run: Callable[[], torch.Tensor], device: str) -> float:
    """Of one call, by the device's own clock; the caches are emptied by what is written before."""
    if device == "cpu":
        run()
        return float("nan")
    spoil = torch.empty(256 << 20, dtype=torch.int8, device=device)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    spoil.zero_()
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


def race(problem: Problem, device: str) -> dict:
    """Everyone checked, then in turns."""
    rows, calls = {}, {}
    for name, make in problem.contenders.items():
        torch._dynamo.reset()
        try:
            calls[name] = make()
            calls[name]()
        except Exception as reason:  # compilers have theirs
            if name == "t2i":
                raise
            calls.pop(name, None)
            rows[name] = {"skipped": f"{type(reason).__name__}: {reason}".splitlines()[0][:200]}
    expected = calls[list(problem.contenders)[1]]()
    for name in list(calls):
        found = calls[name]()
        if expected.is_floating_point():
            off = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
        else:
            off = (found != expected).float().mean()
        if not off <= problem.tolerance:
            assert name != "t2i", f"{problem.name}: off by {off:.2e}"
            rows[name] = {"skipped": f"wrong: off by {off:.2e}"}
            del calls[name]
    samples = {name: [] for name in calls}
    for _ in range(ROUNDS if device != "cpu" else 1):
        for name, run in calls.items():
            samples[name].append(seconds(run, device))
    for name, times in samples.items():
        median = statistics.median(times)
        rows[name] = {
            "seconds": median, "spread": (max(times) - min(times)) / median,
            "tflops": problem.flops / median / 1e12, "gbytes": problem.bytes / median / 1e9,
        }  # fmt: skip
    return {"problem": problem.name, "rows": rows}


def suite(device: str) -> dict:
    """The operators' tests, on the device."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels", "-k", "triton or cuda"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"T2I_TEST_DEVICE": device},
                          capture_output=True, text=True)  # fmt: skip
    print(done.stdout[-4000:])
    return {"passed": done.returncode == 0, "summary": done.stdout.strip().splitlines()[-1]}


def page(record: dict) -> str:
    lines = [f"# {record['device']}, {record['date']}\n",
             f"Made by `make gpu-check`. {record['versions']}\n",
             f"Tests: {record['tests']['summary']}\n",
             "Medians of calls in turns; a ratio above 1 is how many times as long a peer takes.\n",
             "| problem | | times ours | µs | spread | TFLOP/s | GB/s |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for result in record["results"]:
        ours = result["rows"]["t2i"]["seconds"]
        for name, row in sorted(result["rows"].items(), key=lambda x: x[1].get("seconds", 1e9)):
            if "skipped" in row:
                cells = [row["skipped"], "", "", "", ""]
            else:
                cells = [
                    f"{row['seconds'] / ours:.2f}×",
                    f"{row['seconds'] * 1e6:.1f}",
                    f"{row['spread']:.0%}",
                    f"{row['tflops']:.1f}",
                    f"{row['gbytes']:.0f}",
                ]
            lines.append(f"| {' | '.join([result['problem'], name, *cells])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if options.dry_run:
        if not triton_backend.INTERPRETED:
            sys.exit("--dry-run needs TRITON_INTERPRET=1 in the environment")
        torch.compiler.set_stance("force_eager")
    elif not torch.cuda.is_available():
        sys.exit("no GPU that torch can use; --dry-run does what can be done without one")
    device = "cpu" if options.dry_run else "cuda"
    record = {
        "device": "no GPU" if options.dry_run else torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "versions": ", ".join(
            f"{d.metadata['Name']} {d.version}" for d in importlib.metadata.distributions()
            if d.metadata["Name"] in ("torch", "triton", "flash-attn", "flashinfer-python")
        ),
        "tests": {"summary": "not run"} if options.dry_run else suite(device),
        "results": [],
    }  # fmt: skip
    for problem in problems(device, options.dry_run):
        result = race(problem, device)
        record["results"].append(result)
        times = {name: row.get("seconds", row) for name, row in result["rows"].items()}
        print(problem.name, times, flush=True)
    if options.dry_run:
        return
    name = f"gpu-{record['device'].replace(' ', '-')}-{record['date']}"
    file = ROOT / "benchmarks/results" / f"{name}.json"
    file.write_text(json.dumps(record, indent=1) + "\n")
    file.with_suffix(".md").write_text(page(record))
    print(file.with_suffix(".md"))
    sys.exit(not record["tests"]["passed"])


if __name__ == "__main__":
    main()
