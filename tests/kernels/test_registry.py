"""Which backend runs a call, who decides, and what is said about it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import t2i_kernels
from t2i_kernels import (
    BackendError,
    KVCache,
    cuda_backend,
    decode_attention,
    explain,
    flash_attention,
    registry,
    use_backend,
    vq_nearest,
)  # fmt: skip
from t2i_kernels.decode_step import LayerWeights, NormWeights, PackedDecoder
from t2i_kernels.linear import PackedWeight
from t2i_kernels.registry import Backend

ROOT = Path(__file__).resolve().parents[2]
CPU_CALL = SimpleNamespace(is_cuda=False)
GPU_CALL = SimpleNamespace(is_cuda=True)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    """Whatever T2I_BACKEND and T2I_STRICT are for this run."""
    monkeypatch.setattr(registry, "_asked", None)
    monkeypatch.setattr(registry, "_strict", False)
    monkeypatch.setattr(registry, "_warned", set())


@pytest.fixture
def op(monkeypatch):
    """An operator "op" of one argument, and a function that gives it a backend."""
    monkeypatch.setattr(registry, "_ops", {})
    registry.register_op("op", lambda x: (x,))

    def add(name, missing=None, unsupported=None):
        backend = Backend(name, lambda: missing, lambda x: unsupported, lambda x: name)
        registry.register("op", backend)

    return add


def chosen(call=CPU_CALL, asked=None):
    return registry.select("op", asked, call).run(call)


# ---- The order ----------------------------------------------------------------------------------


def test_the_first_that_can_is_chosen(op):
    for name in ("reference", "cpu", "cuda", "triton"):  # registered in any order
        op(name)
    assert registry.backends("op") == registry.ORDER
    assert chosen() == "cuda"


def test_what_is_missing_or_unsupported_is_passed_over(op):
    op("reference")
    op("cpu")
    op("triton", unsupported="head_dim is above 256")
    op("cuda", missing="the package was built without CUDA")
    assert chosen() == "cpu"


def test_availability_is_asked_once(op):
    asked = []
    for name in ("reference", "cpu"):
        registry.register(
            "op", Backend(name, lambda: asked.append(1), lambda x: None, lambda x: None)
        )
    for _ in range(3):
        chosen()
    assert len(asked) == 2


def test_nothing_can_run_it(op):
    op("cpu", unsupported="float64 is for the reference only")
    with pytest.raises(BackendError, match="(?s)no backend supports.*cpu +float64 is for the ref"):
        chosen()


def test_backend_names_are_known(op):
    with pytest.raises(ValueError, match="backend name 'metal': expected one of cuda, triton"):
        op("metal")


# ---- Asked for by name --------------------------------------------------------------------------


def test_asked_for_by_argument_or_block(op):
    op("reference")
    op("cpu")
    assert chosen(asked="reference") == "reference"
    with use_backend("reference"):
        assert chosen() == "reference"
        assert chosen(asked="cpu") == "cpu"
        with use_backend("cpu"):
            assert chosen() == "cpu"
        assert chosen() == "reference"
    assert chosen() == "cpu"


def test_a_block_ends_with_an_error_too(op):
    op("reference")
    op("cpu")
    with pytest.raises(KeyError):
        with use_backend("reference"):
            raise KeyError
    assert chosen() == "cpu"


def test_asked_for_in_vain_is_an_error_with_the_reason(op):
    op("reference")
    op("triton", missing="triton is not installed")
    op("cpu", unsupported="q is on cuda:0")
    for name, reason in [
        ("triton", "triton is not installed"),
        ("cpu", "q is on cuda:0"),
        ("cuda", "this version has no cuda implementation"),
    ]:
        with pytest.raises(BackendError, match=f"op: backend '{name}' was asked for, but {reason}"):
            chosen(asked=name)
        with use_backend(name), pytest.raises(BackendError, match=reason):
            chosen()


def test_an_unknown_name_is_an_error():
    for ask in (
        lambda: use_backend("fast").__enter__(),
        lambda: explain("vq_nearest", backend="f"),
    ):
        with pytest.raises(ValueError, match="'f.*': expected one of cuda, triton, cpu, reference"):
            ask()


# ---- Falling back -------------------------------------------------------------------------------


def test_falling_back_on_a_gpu_warns_once_with_every_reason(op):
    op("reference")
    op("cpu", unsupported="q is on cuda:0")
    op("triton", missing="triton is not installed")
    with pytest.warns(UserWarning) as caught:
        for _ in range(3):
            assert chosen(GPU_CALL) == "reference"
    (warning,) = caught
    assert str(warning.message) == (
        "op runs on the slow reference: cuda: this version has no cuda implementation of it; "
        "triton: triton is not installed; cpu: q is on cuda:0"
    )


def test_each_new_reason_warns(op):
    op("reference")
    op("cpu", unsupported="q is on cuda:0")
    with pytest.warns(UserWarning, match="q is on cuda"):
        chosen(GPU_CALL)
    op("cpu", unsupported="head_dim is above 256")
    with pytest.warns(UserWarning, match="head_dim"):
        chosen(GPU_CALL)


def test_falling_back_warns_from_a_compiled_function_too(op):
    op("reference")

    def model(x):
        return x + 1 if registry.select("op", None, GPU_CALL).name == "reference" else x

    with pytest.warns(UserWarning, match="op runs on the slow reference"):
        assert torch.compile(model, fullgraph=True, backend="eager")(torch.zeros(1)) == 1


def test_registered_again_it_may_be_there(op):
    op("reference")
    op("cpu", missing="not built")
    assert chosen() == "reference"
    op("cpu")
    assert chosen() == "cpu"


def test_no_warning_on_the_cpu_or_where_it_was_asked_for(op):
    op("reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(CPU_CALL) == "reference"
        assert chosen(GPU_CALL, asked="reference") == "reference"
        with use_backend("reference"):
            assert chosen(GPU_CALL) == "reference"


def test_strict_forbids_the_fallback(op, monkeypatch):
    op("reference")
    op("cpu", unsupported="q is on cuda:0")
    monkeypatch.setattr(registry, "_strict", True)
    for call in (CPU_CALL, GPU_CALL):
        with pytest.raises(BackendError, match="op: T2I_STRICT=1 forbids .*cpu: q is on cuda:0"):
            chosen(call)
        assert chosen(call, asked="reference") == "reference"
    assert explain("op", CPU_CALL).chosen is None
    op("cpu")
    assert chosen() == "cpu" and explain("op", CPU_CALL).chosen == "cpu"


# ---- explain ------------------------------------------------------------------------------------


def test_explain_says_which_and_why(op):
    op("reference")
    op("cpu")
    op("triton", missing="triton is not installed")
    table = explain("op")
    assert [(row.backend, row.available, row.chosen, row.reason) for row in table] == [
        ("cuda", False, False, "this version has no cuda implementation of it"),
        ("triton", False, False, "triton is not installed"),
        ("cpu", True, True, None),
        ("reference", True, False, None),
    ]
    assert table.chosen == "cpu"
    assert (
        str(table)
        == repr(table)
        == (
            "op\n"
            "    cuda       this version has no cuda implementation of it\n"
            "    triton     triton is not installed\n"
            "  > cpu        available\n"
            "    reference  available"
        )
    )
    assert explain("op", backend="reference").chosen == "reference"
    assert explain("op", backend="triton").chosen is None
    with use_backend("reference"):
        assert explain("op").chosen == "reference"


def test_explain_is_about_the_call_where_there_is_one(op):
    op("reference")
    op("cpu", unsupported="q is on cuda:0")
    assert explain("op").chosen == "cpu"
    assert explain("op", CPU_CALL).chosen == "reference"


def test_explain_takes_the_arguments_of_the_public_functions():
    q, cache = torch.zeros(1, 1, 2, 8), KVCache.allocate(1, 4, 2, 8)
    weight = PackedWeight.pack(torch.zeros(5, 4), "int8")
    norm, square = NormWeights(torch.ones(8)), torch.zeros(8, 8)
    layer = LayerWeights(norm, torch.zeros(24, 8), square, norm, torch.zeros(16, 8), square)
    decoder = PackedDecoder.pack([layer], norm, square, heads=2, kv_heads=2, weight_type="fp32")
    index = torch.zeros(3, dtype=torch.int64)
    calls = {
        "vq_nearest": ((torch.zeros(3, 4), torch.zeros(5, 4), "l2"), dict(return_counts=True)),
        "flash_attention": ((q, q, q), dict(causal=True, return_lse=True)),
        "decode_attention": ((q, q, q, cache), dict(window=3)),
        "linear": ((torch.zeros(3, 4), weight), {}),
        "decode_step": (
            (torch.zeros(2, 3, 8), decoder, decoder.allocate_cache(2, 4)),
            dict(last=2),
        ),
        "draw": ((torch.zeros(3, 1, 5), index, index), dict(top_k=2)),
        "draw_tokens": (
            (index, square, decoder, decoder.allocate_cache(3, 4)),
            dict(count=2, seeds=index, positions=index),
        ),
        "rms_norm": ((square, square[0], 1e-6), {}),
        "swiglu": ((square, square), {}),
        "rotary": ((q, square[:, :4], square[:, :4]), dict(interleaved=True)),
        "linear_cross_entropy": ((square[:3], square, index), dict(return_lse=True)),
    }
    assert set(calls) == set(registry.ops())
    for name, (args, kwargs) in calls.items():
        assert explain(name, *args, **kwargs, backend="reference").chosen == "reference"
        with pytest.raises(TypeError):
            explain(name, *args, unheard_of=1)
        with pytest.raises((TypeError, ValueError)):
            explain(name, *(a.int() if isinstance(a, torch.Tensor) else a for a in args))
    assert not cache.k.any()  # nothing ran


def test_explain_names_the_operators():
    with pytest.raises(ValueError, match="op 'attention': expected one of .*vq_nearest"):
        explain("attention")


def test_fp64_is_for_the_reference():
    z = torch.zeros(3, 4, dtype=torch.float64)
    assert explain("vq_nearest", z, z, "l2").chosen == "reference"


# ---- Under torch.compile ------------------------------------------------------------------------


def operators_of(function, *args):
    """The operators of ours in the graph that ``function`` compiles to."""
    graphs = []

    def backend(module, inputs):
        graphs.append([str(n.target) for n in module.graph.nodes if "t2i" in str(n.target)])
        return module

    torch.compile(function, fullgraph=True, backend=backend)(*args)
    (targets,) = graphs
    return targets


def test_a_compiled_graph_names_the_path_it_took():
    q = torch.zeros(1, 2, 2, 4)

    def model(q, z):
        return flash_attention(q, q, q), vq_nearest(z, z, "l2")

    z = torch.zeros(3, 4)
    nearest = explain("vq_nearest", z, z, "l2").chosen
    attention = explain("flash_attention", q, q, q).chosen
    assert operators_of(model, q, z) == [
        f"t2i.flash_attention.{attention}",
        f"t2i.vq_nearest.{nearest}",
    ]


def test_use_backend_reaches_a_compiled_function():
    """Also one that was compiled before the block."""
    z, targets = torch.zeros(3, 4), []

    def backend(module, inputs):
        targets.extend(str(n.target) for n in module.graph.nodes if "t2i" in str(n.target))
        return module

    compiled = torch.compile(lambda z: vq_nearest(z, z, "l2"), fullgraph=True, backend=backend)
    compiled(z)
    with use_backend("reference"):
        compiled(z)
        compiled(z)
    first = explain("vq_nearest", z, z, "l2").chosen
    expected = [f"t2i.vq_nearest.{first}", "t2i.vq_nearest.reference"]
    assert targets == (expected if first != "reference" else expected[:1])


def test_tensors_without_data_are_enough():
    """The choice and the shapes come from metadata: on a machine without a GPU, for one with."""
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(2, 5, 4, 8, device="cuda", dtype=torch.bfloat16)
        with pytest.warns(UserWarning, match="flash_attention runs on the slow reference: cuda: "):
            out, lse = flash_attention(q, q, q, return_lse=True)
        assert out.device.type == lse.device.type == "cuda" and out.dtype == torch.bfloat16
        assert lse.shape == (2, 4, 5) and lse.dtype == torch.float32
        cache = KVCache.allocate(2, 9, 4, 8, dtype=torch.int8, device="cuda")
        with pytest.warns(UserWarning, match="decode_attention runs on the slow reference"):
            assert decode_attention(q, q, q, cache).shape == q.shape
        z = torch.empty(3, 4, device="cuda")
        with pytest.warns(UserWarning, match="vq_nearest .*cpu: z is on cuda:0"):
            assert vq_nearest(z, z, "l2").device.type == "cuda"


# ---- From outside -------------------------------------------------------------------------------


def python(program, **environment):
    """Run a program with the package on its path; (what it printed, its last line of errors)."""
    path = os.pathsep.join([str(Path(t2i_kernels.__file__).parents[1]), str(ROOT)])
    environment = {"T2I_BACKEND": "", "T2I_STRICT": "", **environment, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True,
        text=True,
    )  # fmt: skip
    return done.stdout.strip(), (done.stderr.strip().splitlines() or [""])[-1]


CALL = """
import torch, t2i_kernels
z = torch.zeros(3, 4)
print(t2i_kernels.explain("vq_nearest", z, z, "l2").chosen)
t2i_kernels.flash_attention(*[torch.zeros(1, 2, 2, 4).double()] * 3)  # for the reference alone
"""


# Of a machine that has them, too: the call is in float64.
NO_CUDA = cuda_backend.reason() or "CUDA kernels are for bfloat16 and float16"


def test_t2i_backend():
    assert python(CALL, T2I_BACKEND="reference") == ("reference", "")
    output, error = python(CALL, T2I_BACKEND="cuda")
    assert output == "None" and f"backend 'cuda' was asked for, but {NO_CUDA}" in error
    output, error = python(CALL, T2I_BACKEND="fast")
    assert "ValueError: T2I_BACKEND 'fast': expected one of cuda, triton, cpu, reference" in error


def test_t2i_strict():
    _, error = python(CALL, T2I_STRICT="1")
    assert f"flash_attention: T2I_STRICT=1 forbids the reference; cuda: {NO_CUDA}" in error
    assert python(CALL, T2I_STRICT="0")[1] == ""
    assert python(CALL, T2I_STRICT="1", T2I_BACKEND="reference") == ("reference", "")


def test_a_new_backend_is_one_registration():
    """From outside the package, with nothing in it changed."""
    program = """
import torch
from t2i_kernels import explain, registry, rms_norm
from t2i_kernels.rms_norm import api

def norm(x, weight, eps):
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)

def norm_backward(dout, x, weight, eps):
    with torch.enable_grad():
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        return torch.autograd.grad(norm(x, weight, eps), (x, weight), dout)

api.add_backend("cuda", lambda: None, lambda x, *rest: None if x.dim() == 2 else "x is not 2-D")
registry.LIBRARY.impl("rms_norm.cuda", norm, "CPU")
registry.LIBRARY.impl("rms_norm_backward.cuda", norm_backward, "CPU")
x, weight = torch.full((5, 3), 2.0), torch.ones(3)
print(explain("rms_norm", x, weight, 0.0).chosen, rms_norm(x, weight, 0.0).unique().tolist())
print(explain("rms_norm", x[0], weight, 0.0)[0].reason)
call = torch.randn(5, 3, requires_grad=True), weight, 1e-5
torch.library.opcheck(torch.ops.t2i.rms_norm.cuda, call)
"""
    assert python(program) == ("cuda [1.0]\nx is not 2-D", "")


def test_import_is_light():
    """Nothing but torch; neither compilers nor the Hugging Face package called ``kernels``."""
    program = """
import sys, torch
before = set(sys.modules)
import t2i_kernels
print(sorted({name.split(".")[0] for name in set(sys.modules) - before}))
print([name for name in ("triton", "transformers", "kernels") if name in sys.modules])
print(torch.cuda.is_initialized())
"""
    loaded, heavy, initialized = python(program)[0].splitlines()
    assert heavy == "[]" and initialized == "False"
    assert set(eval(loaded)) - set(sys.stdlib_module_names) <= {"t2i_kernels", "torch"}


def test_the_source_folder_is_no_package():
    """``transformers`` imports a package called ``kernels``: a folder of that name with an
    ``__init__.py``, first on the path, would be taken for it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_public_names():
    assert {"vq_nearest", "flash_attention", "decode_attention", "KVCache", "VectorQuantizer",
            "use_backend", "explain"} <= set(t2i_kernels.__all__)  # fmt: skip
    assert all(hasattr(t2i_kernels, name) for name in t2i_kernels.__all__)
