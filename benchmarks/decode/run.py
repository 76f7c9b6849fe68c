"""Decodes the same random weights with every engine, in turns: results/decode.json.

    python benchmarks/decode/run.py --shapes 135m 1b --threads 2 1 --batches 1 2 8

Every engine gets an environment of its own under .venv-decode, models are converted once under
data/decode. What cannot be installed, converted or run is in the result with its reason. An
interrupted run goes on where it stopped; what another machine measured stays beside this one's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from engines import ALL, ENGINES, PICTURES, SLICED  # noqa: E402
from shapes import SHAPES, make_model, step_bytes  # noqa: E402
from turns import common, compared, fewest  # noqa: E402

RESULT = ROOT / "benchmarks/results/decode.json"
PRECISIONS = ("fp32", "bf16", "int8", "int4")
CHECKED = 16  # tokens that have to be transformers', in fp32
ROOM = int(0.7 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))

# What each engine's environment takes; ours and transformers' are this one.
TORCH = "torch==2.13.0"
PACKAGES = {
    "llama.cpp": ["llama-cpp-python==0.3.36", "gguf", "safetensors", "numpy"],
    "ik_llama.cpp": ["ik-llama-cpp-python==0.1.5", "numpy"],
    "onnxruntime-genai": [TORCH, "onnxruntime-genai==0.18.0", "onnx", "onnx-ir", "transformers"],
    "openvino-genai": [TORCH, "openvino-genai==2026.4.1.0", "optimum-intel", "nncf"],
    "ctranslate2": [TORCH, "ctranslate2==4.8.5", "transformers"],
}
# The source distribution of this package lacks a file that its build runs.
IK_LLAMA = "ik-llama-cpp-python"
IK_LLAMA_BUILD_INFO = """file(WRITE "${CMAKE_CURRENT_LIST_DIR}/../build-info.cpp"
    "int LLAMA_BUILD_NUMBER = 0; char const *LLAMA_COMMIT = \\"\\";
     char const *LLAMA_COMPILER = \\"\\"; char const *LLAMA_BUILD_TARGET = \\"\\";\\n")
"""


def main() -> None:
    from t2i_kernels import native

    options = arguments()
    record = json.loads(RESULT.read_text()) if RESULT.exists() else {"runs": []}
    pythons = {name: environment(name) for name in ALL}
    for shape in options.shapes:
        folder = ROOT / "data/decode" / shape
        make_model(shape, folder)
        for threads in options.threads:
            for batch in options.batches:
                for precision in options.precisions:
                    if SHAPES[shape].ours and batch != 2:
                        continue  # a picture and its unconditional half
                    case = {"machine": processor(), "shape": shape,
                            "instruction_set": native.cpu_capability(),
                            "threads": threads, "batch": batch, "precision": precision,
                            "tokens": SHAPES[shape].tokens,
                            "prompt": SHAPES[shape].prompt}  # fmt: skip
                    if any(run["case"] == case for run in record["runs"]) and not options.again:
                        continue
                    record["runs"] = [run for run in record["runs"] if run["case"] != case]
                    record["runs"].append(race(case, folder, pythons, options.rounds))
                    write(record)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 8])
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS))
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="turns of each engine with memory at one speed; twice as many are "
        "tried, then all of them count that have a speed in common",
    )
    parser.add_argument("--again", action="store_true", help="measure what is there already")
    return parser.parse_args()


def environment(name: str) -> str | None:
    """The interpreter of an engine's environment, made where it is missing; None where it cannot be
    made, which log.txt in it explains."""
    if name not in PACKAGES:
        return sys.executable
    folder = ROOT / ".venv-decode" / name
    python = folder / "bin/python"
    if (folder / "done").exists():
        return str(python)
    print(f"{name}: making its environment", flush=True)
    venv.create(folder, with_pip=True)
    # Engines that are compiled use what this machine has, but for AMX: llama.cpp's kernels for it
    # (llama-cpp-python 0.3.36) end with a segmentation fault on the smaller shape.
    flags = " ".join(f"-DCMAKE_{x}_FLAGS=-mno-amx-int8" for x in ("C", "CXX"))
    amx = "amx_int8" in Path("/proc/cpuinfo").read_text()
    cmake = f"-DGGML_NATIVE=ON -DCMAKE_INSTALL_RPATH=$ORIGIN {flags if amx else ''}"
    variables = os.environ | {"CMAKE_ARGS": cmake}
    with open(folder / "log.txt", "a") as log:

        def pip(*arguments: str | Path) -> None:
            command = [python, "-m", "pip", *arguments]
            subprocess.run(command, check=True, stdout=log, stderr=log, env=variables)

        try:
            for package in PACKAGES[name]:  # torch first: the others take the one that is there
                if package.startswith(IK_LLAMA):  # its wheel is for any machine: without AVX-512
                    pip("download", "--no-deps", "--no-binary", IK_LLAMA, "-d", folder, package)
                    package = unpack_ik_llama(folder)
                pip("install", "--no-cache-dir", package)
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"{name}: {error}, see {log.name}", flush=True)
            return None
    (folder / "done").touch()
    return str(python)


def unpack_ik_llama(folder: Path) -> Path:
    """Its source distribution, with what is missing there."""
    (archive,) = folder.glob("ik_llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as sources:
        sources.extractall(folder / "source", filter="data")
    (unpacked,) = (folder / "source").iterdir()
    script = unpacked / "vendor/ik_llama.cpp/common/cmake/build-info-gen-cpp.cmake"
    script.parent.mkdir(exist_ok=True)
    script.write_text(IK_LLAMA_BUILD_INFO)
    return unpacked


class Worker:
    """An engine in a process of its own."""

    def __init__(self, name: str, python: str, folder: Path, case: dict[str, Any]):
        threads = str(case["threads"])
        variables = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        command = [python, str(HERE / "engines.py")]
        arguments = [name, str(folder), case["precision"]]
        self.log = tempfile.TemporaryFile("w+")
        self.pipes = {"stderr": self.log, "env": variables, "text": True}
        self.process = None
        done = subprocess.run([*command, "convert", *arguments], stdout=self.log, **self.pipes)
        if done.returncode:
            raise RuntimeError(self.last_words())
        self.command = [*command, "serve", *arguments, str(case["batch"]), threads]
        self.about = self.start()

    def start(self) -> dict[str, Any]:
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **self.pipes
        )
        return self.answer()

    @property
    def memory(self) -> int:
        """Bytes that are resident."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) << 10

    def run(self, count: int) -> dict[str, Any]:
        print(count, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.last_words())
        return json.loads(line)

    def last_words(self) -> str:
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "it ended without a word"

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def race(case: dict, folder: Path, pythons: dict, rounds: int) -> dict[str, Any]:
    """All engines on one problem: checked first, then in turns."""
    from t2i_kernels import native

    rows: dict[str, dict[str, Any]] = {}
    workers: dict[str, Worker] = {}
    needed: list[int] = []  # bytes of memory
    expected = None
    tokens = case["tokens"]
    engines = ENGINES | (PICTURES if SHAPES[case["shape"]].ours else SLICED)
    checks = "transformers" if case["precision"] == "fp32" else "t2i"  # the others
    for name in sorted(engines, key=lambda name: name != checks):
        engine = engines[name]
        if case["precision"] not in engine.precisions:
            continue
        if pythons[name] is None:
            rows[name] = {"skipped": "its environment could not be made"}
            continue
        try:
            worker = Worker(name, pythons[name], folder, case)
            first = worker.run(CHECKED)
        except (RuntimeError, OSError) as reason:
            rows[name] = {"skipped": str(reason)}
            continue
        if expected is None:
            expected = first["tokens"]
        same = sum(a == b for x, y in zip(first["tokens"], expected, strict=name in ENGINES)
                   for a, b in zip(x, y, strict=name in ENGINES))  # fmt: skip
        same /= CHECKED * case["batch"]
        if name not in ENGINES:
            same = None
        elif case["precision"] == "fp32" and same < 1:
            assert name != "t2i", f"{1 - same:.0%} of the tokens are not those of transformers"
            rows[name] = {"skipped": f"{1 - same:.0%} of its tokens are not those of transformers"}
            worker.stop()
            continue
        turns = {"prefill": [], "decode": [], "bandwidth": []}
        rows[name] = {**worker.about, "same_tokens": same, **turns}
        workers[name] = worker
        needed.append(worker.memory)
        if sum(needed) > ROOM:
            worker.stop()
    together = sum(needed) <= ROOM
    if not together:  # one at a time, started again for each of its turns
        for worker in workers.values():
            worker.stop()
    size = round(step_bytes(case, rows["t2i"]))  # a last-level cache helps the limit, too
    names = list(workers)
    for turn in range(2 * rounds):
        if fewest(common(rows)) >= rounds:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            worker = workers[name]
            if "skipped" in rows[name]:
                continue
            try:
                if not together:
                    worker.start()
                    worker.run(CHECKED)  # memory is touched, threads are there
                before = native.read_bandwidth(case["threads"], size)
                result = worker.run(tokens)
            except (RuntimeError, OSError) as reason:  # its other turns are not compared either
                rows[name] = {"skipped": f"in turn {turn + 1}: {reason}"}
                worker.stop()
                continue
            after = native.read_bandwidth(case["threads"], size)
            if not together:
                worker.stop()
            print(f"  turn {turn + 1}, {name}: {result['decode']:.3g} s", flush=True)
            rows[name]["bandwidth"].append((before + after) / 2)
            rows[name]["prefill"].append(result["prefill"])
            rows[name]["decode"].append(result["decode"])
            if "passes" in result:
                rows[name]["passes"] = result["passes"]
    for worker in workers.values():
        worker.stop()
    run = {"case": case, "rows": rows}
    counted = compared(run)["rows"]
    limit = statistics.median(x for row in counted.values() for x in row.get("bandwidth", []))
    turns = fewest(common(rows)) or "no"
    print(json.dumps(case), f"{turns} turns at {limit / 1e9:.1f} GB/s", flush=True)
    for name, row in counted.items():
        print(
            f"  {name:18s}",
            row.get("skipped")
            or f"{row['tokens_per_second']:8.1f} tokens/s "
            + ("" if row["same_tokens"] is None else f"{row['same_tokens']:.0%} the same tokens, ")
            + f"{row['spread']:.0%} spread",
            flush=True,
        )
    return run


def processor() -> str:
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return names[0] if names else platform.machine()


def write(record: dict[str, Any]) -> None:
    RESULT.parent.mkdir(exist_ok=True)
    part = RESULT.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, RESULT)


if __name__ == "__main__":
    main()
