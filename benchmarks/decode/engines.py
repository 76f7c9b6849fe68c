"""Engines that decode, each in a process and an environment of its own.

    python engines.py convert ENGINE FOLDER PRECISION
    python engines.py serve ENGINE FOLDER PRECISION BATCH THREADS

``serve`` answers lines on its standard input: a number of tokens, which it decodes greedily behind
the prompts, with ``{"prefill": seconds, "decode": seconds, "tokens": [[...]]}``.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shapes import CODES, SHAPES

Generate = Callable[[int], dict[str, Any]]  # tokens to decode -> what serve prints


# Of keys and values: llama.cpp keeps 16 bits by itself, OpenVINO 8.
CACHES = {"fp32": "fp32", "bf16": "bf16", "int8": "bf16", "int4": "bf16"}


class T2I:
    """This project's step, on the same weights, with the whole head or with that of codes alone."""

    precisions = ("fp32", "bf16", "int8", "int4")
    packages = ("t2i", "torch")

    def __init__(self, sliced: bool = False):
        self.sliced = sliced

    def file(self, folder: Path, precision: str) -> Path:
        return folder / f"t2i-{precision}.pt"

    def convert(self, folder: Path, precision: str) -> None:
        """Keeps integer weights: the search for the best int4 takes minutes where there are 10⁹."""
        import torch

        target = self.file(folder, precision)
        if precision in ("int8", "int4") and not target.exists():
            part = target.with_suffix(".part")
            torch.save(self.pack(folder, precision), part)
            os.replace(part, target)

    def pack(self, folder: Path, precision: str) -> tuple[Any, Any]:
        """(decoder, embedding)"""
        from t2i.lm import build_lm
        from t2i.lm.decoding import pack

        lm = build_lm(None, folder).requires_grad_(False)
        return pack(lm, precision, rows=slice(None)), lm.tok_embeddings.weight.data

    def load(self, folder: Path, precision: str, batch: int, threads: int) -> Generate:
        import torch

        from t2i_kernels import decode_step, draw, draw_tokens
        from t2i_kernels.memory import allocate_large

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        file = self.file(folder, precision)
        if file.exists():
            decoder, embedding = torch.load(file, mmap=True, weights_only=False)
            decoder.weights = allocate_large(decoder.weights.numel()).copy_(decoder.weights)
        else:
            decoder, embedding = self.pack(folder, precision)
        shape = SHAPES[folder.name]
        prompt = torch.tensor(shape.prompts(batch))
        drawn = embedding  # of what can be drawn
        if self.sliced:
            keep_codes(decoder)
            drawn = embedding[-CODES:]
        self.bytes = decoder.weights.numel()
        kept = {"fp32": torch.float32, "bf16": torch.bfloat16}[CACHES[precision]]
        slot = decoder.layers * decoder.kv_heads * decoder.head_dim
        self.slot_bytes = 2 * slot * kept.itemsize

        seeds = positions = torch.zeros(batch, dtype=torch.int64)  # nothing is left to chance

        def read(count: int) -> tuple[Any, Any]:
            """A cache for so many tokens, with the prompts in it, and the first of them."""
            cache = decoder.allocate_cache(batch, shape.prompt + count, dtype=kept)
            logits = decode_step(embedding[prompt], decoder, cache)
            return cache, draw(logits, seeds, positions, temperature=0)

        def follow(cache: Any, tokens: Any, count: int) -> Any:
            """The others."""
            return draw_tokens(
                tokens[:, 0], drawn, decoder, cache, count=count - 1, seeds=seeds,
                positions=positions, temperature=0,
            )  # fmt: skip

        def generate(count: int) -> dict[str, Any]:
            began = time.perf_counter()
            cache, tokens = read(count)
            first = time.perf_counter()
            if count > 1:
                tokens = torch.cat([tokens, follow(cache, tokens, count)], dim=1)
            done = time.perf_counter()
            return {"prefill": first - began, "decode": done - first, "tokens": tokens.tolist()}

        self.read, self.follow = read, follow
        return generate


class Transformers:
    precisions = ("fp32", "bf16")
    packages = ("transformers", "torch")

    def convert(self, folder: Path, precision: str) -> None:
        pass

    def load(self, folder: Path, precision: str, batch: int, threads: int) -> Generate:
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        prompt = torch.tensor(SHAPES[folder.name].prompts(batch))
        mask = torch.ones_like(prompt)
        self.bytes = sum(p.numel() * p.element_size() for p in model.parameters())

        def run(count: int) -> Any:
            return model.generate(
                prompt, attention_mask=mask, do_sample=False, pad_token_id=1,
                min_new_tokens=count, max_new_tokens=count,
            )[:, prompt.shape[1] :]  # fmt: skip

        return difference(run, lambda out: out.tolist())


class LlamaCpp:
    """Through the plain C functions of llama-cpp-python, or of its fork ik_llama.cpp."""

    def __init__(self, fork: bool):
        self.precisions = ("int8", "int4") if fork else ("fp32", "bf16", "int8", "int4")
        self.packages = ("ik-llama-cpp-python",) if fork else ("llama-cpp-python",)
        self.fork = fork

    TYPES = {"fp32": "F32", "bf16": "F16", "int8": "Q8_0", "int4": "Q4_0"}

    @property
    def library(self) -> Any:
        if self.fork:
            import ik_llama_cpp._ctypes_api as library
        else:
            import llama_cpp as library
        return library

    def file(self, folder: Path, precision: str) -> Path:
        return folder / f"{self.TYPES[precision]}.gguf"

    def convert(self, folder: Path, precision: str) -> None:
        full, target = self.file(folder, "fp32"), self.file(folder, precision)
        if not full.exists():
            write_gguf(folder, full)
        if target.exists():
            return
        import llama_cpp

        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{self.TYPES[precision]}")
        options.pure = True  # the head, too, which keeps 6 or 8 bits by itself
        part = target.with_suffix(".part")
        status = llama_cpp.llama_model_quantize(
            str(full).encode(), str(part).encode(), ctypes.byref(options)
        )
        if status:
            raise RuntimeError(f"llama_model_quantize failed with {status}")
        os.replace(part, target)

    def load(self, folder: Path, precision: str, batch: int, threads: int) -> Generate:
        import numpy as np

        llama, file = self.library, self.file(folder, precision)
        llama.llama_backend_init()
        options = llama.llama_model_default_params()
        options.use_mmap = False
        if self.fork:
            options.repack_tensors = True  # interleaved rows, which are faster
        name = "llama_model_load_from_file"
        model = getattr(llama, name, None) or llama.llama_load_model_from_file
        model = model(str(file).encode(), options)
        options = llama.llama_context_default_params()
        shape = SHAPES[folder.name]
        options.n_ctx = batch * (shape.prompt + shape.tokens + 64)
        options.n_batch = options.n_ubatch = max(512, batch * shape.prompt)
        options.n_seq_max = batch
        options.n_threads = options.n_threads_batch = threads
        if self.fork:
            options.flash_attn = batch == 1  # an assertion fails in it with several sequences
        if precision == "fp32":  # by itself it draws other tokens where scores are close
            options.type_k = options.type_v = 0  # GGML_TYPE_F32
            options.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
        new = getattr(llama, "llama_init_from_model", None) or llama.llama_new_context_with_model
        context = new(model, options)
        self.bytes = file.stat().st_size
        vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        work, prompt = llama.llama_batch_init(options.n_batch, 0, 1), shape.prompts(batch)

        def put(rows: list[tuple[int, int, int, bool]]) -> None:
            work.n_tokens = len(rows)
            for i, (token, position, sequence, wanted) in enumerate(rows):
                work.token[i], work.pos[i], work.n_seq_id[i] = token, position, 1
                work.seq_id[i][0], work.logits[i] = sequence, wanted
            if llama.llama_decode(context, work):
                raise RuntimeError("llama_decode failed")

        def best(i: int) -> int:
            logits = llama.llama_get_logits_ith(context, i)
            return int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())

        def clear() -> None:
            if hasattr(llama, "llama_memory_clear"):
                llama.llama_memory_clear(llama.llama_get_memory(context), True)
            else:
                llama.llama_kv_cache_clear(context)

        def generate(count: int) -> dict[str, Any]:
            clear()
            began = time.perf_counter()
            put([(token, i, b, i == shape.prompt - 1)
                 for b, row in enumerate(prompt) for i, token in enumerate(row)])  # fmt: skip
            last = [best(b * shape.prompt + shape.prompt - 1) for b in range(batch)]
            tokens = [last]
            read = time.perf_counter()
            for step in range(count - 1):
                put([(token, shape.prompt + step, b, True) for b, token in enumerate(last)])
                last = [best(b) for b in range(batch)]
                tokens.append(last)
            done = time.perf_counter()
            return {"prefill": read - began, "decode": done - read,
                    "tokens": list(map(list, zip(*tokens, strict=True)))}  # fmt: skip

        return generate


class OnnxRuntime:
    precisions = ("fp32", "int8", "int4")
    packages = ("onnxruntime-genai", "onnxruntime")

    def convert(self, folder: Path, precision: str) -> None:
        target = folder / f"onnx-{precision}"
        if target.exists():
            return
        part = folder / f"onnx-{precision}.part"
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        subprocess.run(
            [*builder, "-m", str(folder), "-o", str(part), "-p", precision, "-e", "cpu",
             "-c", str(folder / "builder")],
            check=True,
        )  # fmt: skip
        os.replace(part, target)

    def load(self, folder: Path, precision: str, batch: int, threads: int) -> Generate:
        import numpy as np
        import onnxruntime_genai as og

        target = folder / f"onnx-{precision}"
        config = og.Config(str(target))
        session = {"session_options": {"intra_op_num_threads": threads}}
        config.overlay(json.dumps({"model": {"decoder": session}}))
        model = og.Model(config)
        prompt = np.array(SHAPES[folder.name].prompts(batch), dtype=np.int32)
        self.bytes = sum(file.stat().st_size for file in target.glob("*.data"))

        def generate(count: int) -> dict[str, Any]:
            options = og.GeneratorParams(model)
            length = prompt.shape[1] + count
            options.set_search_options(
                max_length=length, min_length=length, do_sample=False, batch_size=batch,
                past_present_share_buffer=True,
            )  # fmt: skip
            generator = og.Generator(model, options)
            began = time.perf_counter()
            generator.append_tokens(prompt)
            generator.generate_next_token()
            read = time.perf_counter()
            for _ in range(count - 1):
                generator.generate_next_token()
            done = time.perf_counter()
            rows = [generator.get_sequence(b)[prompt.shape[1] :] for b in range(batch)]
            return {"prefill": read - began, "decode": done - read,
                    "tokens": [[int(t) for t in row] for row in rows]}  # fmt: skip

        return generate


class OpenVino:
    """It keeps keys and values of prompts: the time of one that it had before is not of reading."""

    precisions = ("fp32", "bf16", "int8", "int4")
    packages = ("openvino", "openvino-genai")

    def convert(self, folder: Path, precision: str) -> None:
        precision = "fp32" if precision == "bf16" else precision  # it is converted while loading
        target = folder / f"openvino-{precision}"
        if target.exists():
            return
        part = folder / f"openvino-{precision}.part"
        options = ["--group-size", "32", "--ratio", "1.0", "--all-layers"]  # the head, too
        options = options if precision == "int4" else []
        command = Path(sys.executable).with_name("optimum-cli")
        subprocess.run(
            [str(command), "export", "openvino", "--model", str(folder), "--task",
             "text-generation-with-past", "--weight-format", precision, *options, str(part)],
            check=True,
        )  # fmt: skip
        os.replace(part, target)

    def load(self, folder: Path, precision: str, batch: int, threads: int) -> Generate:
        import numpy as np
        import openvino as ov
        import openvino_genai as genai

        target = folder / f"openvino-{'fp32' if precision == 'bf16' else precision}"
        # By itself it computes in bf16 where the processor can, and keeps the cache in int8.
        exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        pipeline = genai.LLMPipeline(
            str(target), "CPU", INFERENCE_NUM_THREADS=threads, PERFORMANCE_HINT="LATENCY",
            NUM_STREAMS=1, **(exact if precision == "fp32" else {}),
        )  # fmt: skip
        prompt = np.array(SHAPES[folder.name].prompts(batch), dtype=np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(prompt), ov.Tensor(np.ones_like(prompt)))
        self.bytes = (target / "openvino_model.bin").stat().st_size
        if precision == "bf16":
            self.bytes //= 2

        def run(count: int) -> Any:
            config = genai.GenerationConfig()
            config.max_new_tokens = config.min_new_tokens = count
            config.ignore_eos, config.do_sample, config.eos_token_id = True, False, 1
            return pipeline.generate(inputs, config).tokens

        return difference(run, lambda tokens: [list(map(int, row)) for row in tokens])


class CTranslate2:
    precisions = ("fp32", "int8")
    packages = ("ctranslate2",)

    def convert(self, folder: Path, precision: str) -> None:
        target = folder / "ctranslate2"
        if not target.exists():
            from ctranslate2.converters import TransformersConverter

            TransformersConverter(str(folder)).convert(str(target) + ".part", force=True)
            os.replace(str(target) + ".part", target)

    def load(self, folder: Path, precision: str, batch: int, threads: int) -> Generate:
        import ctranslate2

        target = folder / "ctranslate2"
        generator = ctranslate2.Generator(
            str(target), device="cpu", intra_threads=threads, inter_threads=1,
            compute_type={"fp32": "float32", "int8": "int8"}[precision],
        )  # fmt: skip
        vocabulary = json.loads((target / "vocabulary.json").read_text())
        prompt = [
            [vocabulary[token] for token in row] for row in SHAPES[folder.name].prompts(batch)
        ]
        weights = (target / "model.bin").stat().st_size
        self.bytes = weights if precision == "fp32" else weights // 4

        def run(count: int) -> Any:
            return generator.generate_batch(
                prompt, max_length=count, min_length=count, sampling_topk=1, beam_size=1,
                include_prompt_in_result=False, end_token=[],
            )  # fmt: skip

        return difference(run, lambda results: [list(r.sequences_ids[0]) for r in results])


class Pictures:
    """This project's sampling of the tokens of pictures: guidance, noise and draw behind every
    step, for half as many pictures as the other engines decode rows. ``ahead``: with guesses of
    int8 weights, whose number right means something with trained weights alone."""

    packages = ("t2i", "torch")

    def __init__(self, ahead: bool):
        self.ahead = ahead
        self.precisions = ("fp32", "bf16") if ahead else ("fp32", "bf16", "int8", "int4")

    def convert(self, folder: Path, precision: str) -> None:
        if self.ahead and not SHAPES[folder.name].trained:
            raise RuntimeError("random weights: whether guesses are right says nothing")

    def load(self, folder: Path, precision: str, batch: int, threads: int) -> Generate:
        import torch

        from t2i.lm import LM_CONFIGS, TransformerLM
        from t2i.pipeline import T2I
        from t2i.sampling import sample_codes

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        shape = SHAPES[folder.name]
        side, images = int(shape.tokens**0.5), batch // 2
        if shape.trained:
            model = T2I.from_pretrained(device="cpu")
            lm, unconditional = model.lm, model.text.prompt(None)
            prompts = [model.text.prompt("red apple, twemoji style")] * images
        else:
            config = LM_CONFIGS[shape.ours].replace(
                image_grid=(side, side), max_positions=1 + shape.tokens, zero_init_output=False
            )
            lm = TransformerLM(config)
            prompts, unconditional = torch.arange(images), None

        def draw(**options: Any) -> Any:
            options = {"draft": "int8"} | options if self.ahead else {"speculate": 0} | options
            return sample_codes(
                lm, prompts, seeds=range(images), grid=(side, side), cfg=3.0,
                unconditional=unconditional, **options,
            )  # fmt: skip

        types = {"weights": precision, "cache": CACHES[precision]}
        codes, numbers = draw(**types)
        if precision == "fp32":
            plain = draw(backend="reference", speculate=0, draft=None).codes
            assert torch.equal(codes, plain), "the fused path drew another picture"
        self.bytes = numbers.bytes_read // (numbers.passes + numbers.drafts)

        def generate(count: int) -> dict[str, Any]:
            codes, numbers = draw(**types)
            return {"prefill": numbers.prefill_seconds, "decode": numbers.decode_seconds,
                    "tokens": codes.flatten(1).tolist(),
                    "passes": [numbers.passes, numbers.drafts]}  # fmt: skip

        return generate


class GuidedTransformers(Transformers):
    """``generate`` with guidance and sampling."""

    precisions = ("fp32",)

    def load(self, folder: Path, precision: str, batch: int, threads: int) -> Generate:
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        prompt = torch.tensor(SHAPES[folder.name].prompts(batch // 2))
        self.bytes = 0

        def run(count: int) -> Any:
            return model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0,
                guidance_scale=3.0, negative_prompt_ids=prompt[:, -1:], pad_token_id=1,
                min_new_tokens=count, max_new_tokens=count,
            )[:, prompt.shape[1] :]  # fmt: skip

        return difference(run, lambda out: out.tolist())


ENGINES = {
    "transformers": Transformers(),
    "t2i": T2I(),
    "llama.cpp": LlamaCpp(fork=False),
    "ik_llama.cpp": LlamaCpp(fork=True),
    "onnxruntime-genai": OnnxRuntime(),
    "openvino-genai": OpenVino(),
    "ctranslate2": CTranslate2(),
}
# Other tokens, since it chooses among codes alone.
SLICED = {"t2i, sliced head": T2I(sliced=True)}
# They draw pictures: other tokens than those of greedy decoding.
PICTURES = {
    "t2i, guided": Pictures(ahead=False),
    "t2i, guided, ahead": Pictures(ahead=True),
    "transformers, guided": GuidedTransformers(),
}
ALL = ENGINES | SLICED | PICTURES


def keep_codes(decoder: Any) -> None:
    """Of the head, keep the rows of CODES, its last."""
    from t2i_kernels.linear.packed import packed_bytes
    from t2i_kernels.memory import allocate_large

    head, kept = (
        packed_bytes(n, decoder.dim, decoder.weight_type) for n in (decoder.outputs, CODES)
    )
    whole, layers = decoder.weights, decoder.weights.numel() - head
    decoder.weights = allocate_large(layers + kept)
    decoder.weights[:layers] = whole[:layers]
    decoder.weights[layers:] = whole[-kept:]
    decoder.outputs = CODES


def difference(run: Callable[[int], Any], tokens: Callable[[Any], list[list[int]]]) -> Generate:
    """For engines that give the time of all tokens alone: a first token is what a prompt takes."""

    def generate(count: int) -> dict[str, Any]:
        began = time.perf_counter()
        run(1)
        read = time.perf_counter()
        out = run(count)
        done = time.perf_counter()
        return {"prefill": read - began, "decode": (done - read) - (read - began),
                "tokens": tokens(out)}  # fmt: skip

    return generate


def write_gguf(folder: Path, target: Path) -> None:
    """A Llama of transformers as GGUF, whose q and k pair channels (2i, 2i + 1)."""
    import gguf
    import numpy as np
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    part = target.with_suffix(".part")
    out = gguf.GGUFWriter(str(part), "llama")
    out.add_context_length(2048)
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    out.add_rope_dimension_count(config["hidden_size"] // heads)
    out.add_vocab_size(config["vocab_size"])
    out.add_file_type(0)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    out.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    out.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)

    def interleaved(w: Any, count: int) -> Any:
        halves = w.reshape(count, 2, len(w) // count // 2, -1)
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(w.shape)

    out.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    out.add_tensor("output_norm.weight", weights["model.norm.weight"])
    if not config["tie_word_embeddings"]:
        out.add_tensor("output.weight", weights["lm_head.weight"])
    names = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        for theirs, ours in names.items():
            w = weights[f"model.layers.{i}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                w = interleaved(w, heads if theirs == "attn_q" else kv_heads)
            out.add_tensor(f"blk.{i}.{theirs}.weight", w)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    os.replace(part, target)


def serve(name: str, folder: Path, precision: str, batch: int, threads: int) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is not for the reader of answers

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=out, flush=True)

    engine = ALL[name]
    generate = engine.load(folder, precision, batch, threads)
    versions = {package: importlib.metadata.version(package) for package in engine.packages}
    say(bytes=engine.bytes, slot_bytes=getattr(engine, "slot_bytes", None), versions=versions)
    for line in sys.stdin:
        say(**generate(int(line)))


if __name__ == "__main__":
    command, name, folder, *rest = sys.argv[1:]
    if command == "convert":
        ALL[name].convert(Path(folder), *rest)
    else:
        serve(name, Path(folder), rest[0], int(rest[1]), int(rest[2]))
