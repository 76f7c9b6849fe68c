"""One decoder-only transformer over text and image tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2i_kernels import (
    KVCache,
    decode_attention,
    flash_attention,
    linear_cross_entropy,
    rms_norm,
    rotary,
    swiglu,
)
from t2i_kernels.registry import has_kernel

from .config import LMConfig


def rotary_tables(config: LMConfig) -> tuple[Tensor, Tensor] | None:
    """Cosines and sines of every position, fp32 [max_positions, head_dim / 2]; None where nothing
    is rotated.

    Source: RoFormer (arXiv 2104.09864). Computed in fp32, as the published weights were trained: an
    exact table differs by up to 5e-4 rad at position 8,000.
    """
    if config.rotary in ("none", "head"):
        return None
    if config.image_grid is not None:
        return _rotary_tables_2d(config)
    frequencies = _frequencies(config.head_dim, config.rotary_theta)
    angles = torch.outer(torch.arange(config.max_positions).float(), frequencies)
    return angles.cos(), angles.sin()


def _rotary_tables_2d(config: LMConfig) -> tuple[Tensor, Tensor]:
    """Prefix, then the image in raster order; half the pairs turn by row, the rest by column."""
    (height, width), prefix = config.image_grid, config.prefix_length
    origin = prefix if config.prefix_rotary == "diagonal" else 0
    before = torch.arange(prefix)
    image = origin + torch.cartesian_prod(torch.arange(height), torch.arange(width))
    rows_and_columns = torch.cat([torch.stack([before, before], dim=-1), image]).float()
    frequencies = _frequencies(config.head_dim // 2, config.rotary_theta)
    angles = (rows_and_columns[..., None] * frequencies).flatten(1)
    cos, sin = angles.cos(), angles.sin()
    if config.prefix_rotary == "zero":  # not the angle 0: both numbers are 0, which erases q and k
        cos[:prefix] = 0.0
        sin[:prefix] = 0.0
    return cos, sin


def _frequencies(channels: int, theta: float) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, channels, 2).float() / channels)


def fused(op: str, *call) -> bool:
    """Whether to call an operator that saves passes over memory: GPUs may have a kernel for it.
    ``call``: as its schema says."""
    return call[0].is_cuda and has_kernel(op, *call)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Turn each pair of channels of x [..., L, H, D] by its angle; cos, sin fp32 [..., L, D/2]."""
    # In 2-D tables row i is for position i of every sequence.
    if cos.dim() == 2 and fused("rotary", x, cos, sin, None, interleaved, False):
        return rotary(x, cos, sin, interleaved=interleaved)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    if interleaved:
        a, b = _wide(x).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).type_as(x)
    a, b = _wide(x).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


def _wide(x: Tensor) -> Tensor:
    """x in fp32, or fp64 where it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class TransformerLM(nn.Module):
    """Causal language model over text tokens and, behind them, image tokens.

    Starts with random weights from torch's global generator; ``build_lm`` also loads trained ones.
    """

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.prefix_embedding = _prefix_embedding(config)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = _norm(config, config.dim)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tied:
            self.output.weight = self.tok_embeddings.weight
        self.rotary_tables = rotary_tables(config)
        self.reset_parameters()

    def forward(
        self,
        tokens: Tensor | None,
        *,
        prefix: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Sequence[KVCache] | None = None,
        logits: slice | None = None,
    ) -> Tensor:
        """Logits of the token that follows each position.

        Args:
            tokens: int64 [B, L]; None for a prefix alone.
            prefix: conditioning of a model with a prefix: int64 [B] classes or [B, P, prefix_dim]
                caption features. It takes the first P positions of the sequence.
            cu_seqlens: int32 [documents + 1], where each document starts in a packed batch of one
                row (B = 1); the last entry is L. Documents do not see each other and each starts at
                position 0.
            cache: one KVCache a layer (``allocate_cache``): the tokens continue what it holds, and
                it holds them afterwards. Without gradients.
            logits: rows of the vocabulary to score, all by default; ``config.image_tokens`` while
                an image is drawn.

        Returns:
            fp32 [B, P + L, rows], P being 0 without a prefix.

        Raises:
            ValueError: a wrong shape, or more positions than ``config.max_positions``.
        """
        return self.head(
            self.features(tokens, prefix=prefix, cu_seqlens=cu_seqlens, cache=cache), logits
        )

    def features(
        self,
        tokens: Tensor | None,
        *,
        prefix: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Sequence[KVCache] | None = None,
    ) -> Tensor:
        """The normalised last hidden states [B, P + L, dim]; arguments as in ``forward``."""
        x = self.dropout(self.embed(tokens, prefix, continues=cache is not None))
        rows, length = x.shape[:2]
        if cu_seqlens is not None and (cache is not None or rows != 1):
            raise ValueError(f"cu_seqlens packs one row, without a cache; got {rows} rows")
        longest = length
        if cu_seqlens is not None:
            longest = 0
            if len(cu_seqlens) > 1 and not torch.compiler.is_compiling():  # a look at values
                longest = int(cu_seqlens.diff().max())
        if longest > self.config.max_positions:
            limit = self.config.max_positions
            raise ValueError(f"a sequence of {longest} positions exceeds max_positions={limit}")
        rope, tables = self._positions(x, cu_seqlens, cache)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, tables, cu_seqlens, None if cache is None else cache[i])
        if cache is not None:
            cache[0].advance(length)
        return self.norm(x)

    def head(self, features: Tensor, logits: slice | None = None) -> Tensor:
        """fp32 logits [..., rows] of features [..., dim], multiplying only the rows asked for."""
        weight = self.output.weight if logits is None else self.output.weight[logits]
        return _wide(F.linear(features, weight))

    def cross_entropy(
        self, features: Tensor, targets: Tensor, label_smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """(smoothed, plain) cross entropy in nats of features [N, dim] and int64 targets [N], fp32
        [N]. Smoothed is towards the uniform distribution (arXiv 1512.00567, section 7)."""
        device, weight = features.device.type, self.output.weight
        autocast = torch.is_autocast_enabled(device)
        x = features.to(torch.get_autocast_dtype(device)) if autocast else features
        if fused("linear_cross_entropy", x, weight, targets, -100):
            # Logits, the largest tensor of a training step, are never whole.
            nll, lse = linear_cross_entropy(x, weight.to(x.dtype), targets, return_lse=True)
            if label_smoothing:
                mean = (_wide(x) * _wide(weight).mean(dim=0)).sum(dim=-1)
        else:
            logits = self.head(features)
            nll = F.cross_entropy(logits, targets, reduction="none")
            if label_smoothing:
                lse, mean = logits.logsumexp(dim=-1), logits.mean(dim=-1)
        if not label_smoothing:
            return nll, nll
        return (1 - label_smoothing) * nll + label_smoothing * (lse - mean), nll

    def allocate_cache(
        self,
        batch: int,
        max_seqlen: int,
        *,
        start: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[KVCache]:
        """An empty cache for ``batch`` rows of up to ``max_seqlen`` tokens, one KVCache a layer.

        ``start`` int32 [batch] counts the slots of left padding in front of each row: never
        attended to, and a row's position 0 is its first slot behind them. The layers share their
        ``seqlens`` and ``start``: lower ``cache[0].seqlens`` in place to forget tokens. ``dtype``:
        by default the model's.
        """
        config, weight = self.config, self.output.weight
        cache = [
            KVCache.allocate(
                batch,
                max_seqlen,
                config.num_kv_heads,
                config.head_dim,
                dtype=dtype or weight.dtype,
                device=weight.device,
            )
            for _ in self.layers
        ]
        for layer_cache in cache[1:]:
            layer_cache.seqlens, layer_cache.start = cache[0].seqlens, cache[0].start
        if start is not None:
            cache[0].start.copy_(start)
        return cache

    @torch.no_grad()
    def extend_vocabulary(
        self, image_vocab: int, init: str = "random", *, text_vocab: int | None = None
    ) -> None:
        """Append ``image_vocab`` rows for image codes at both ends; a tied model stays tied.

        In place, with new parameters: make the optimizer afterwards.

        Args:
            image_vocab: number of codes of the image tokenizer.
            init: "random": as the model's own embedding and output start; "mean": every new row is
                the mean of the text rows (Hewitt 2021, "Initializing new word embeddings"), so that
                no old token loses probability to one odd new one.
            text_vocab: rows that the text tokenizer needs. Where it has more tokens than the model
                has rows (separators added to a pre-trained tokenizer), text rows are appended
                first; spare rows are kept.

        Raises:
            ValueError: the model has image rows already, or an argument is out of range.
        """
        config = self.config
        if config.image_vocab_size:
            raise ValueError(f"the model has {config.image_vocab_size} image tokens already")
        if image_vocab < 1:
            raise ValueError(f"image_vocab={image_vocab}: expected at least 1")
        if init not in ("random", "mean"):
            raise ValueError(f"init={init!r}: choose 'random' or 'mean'")
        new_text = max(0, (text_vocab or 0) - config.text_vocab_size)
        grown = config.replace(
            text_vocab_size=config.text_vocab_size + new_text, image_vocab_size=image_vocab
        )

        def grow(weight: Tensor) -> nn.Parameter:
            rows = weight.new_empty(new_text + image_vocab, config.dim)
            rows.copy_(weight.mean(dim=0)) if init == "mean" else _init_rows(rows, config)
            return nn.Parameter(torch.cat([weight, rows]), requires_grad=weight.requires_grad)

        self.tok_embeddings.weight = grow(self.tok_embeddings.weight)
        self.output.weight = self.tok_embeddings.weight if config.tied else grow(self.output.weight)
        self.tok_embeddings.num_embeddings = self.output.out_features = grown.vocab_size
        self.config = grown

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random weights as ``LMConfig.init`` says; see there."""
        config = self.config
        _init_rows(self.output.weight, config)
        _init_rows(self.tok_embeddings.weight, config)
        if config.zero_init_output and not config.tied:
            self.output.weight.zero_()
        for depth, layer in enumerate(self.layers):
            layer.reset_parameters(depth)
        if self.prefix_embedding is not None:
            self.prefix_embedding.reset_parameters(config)

    def num_parameters(self) -> int:
        """Trainable numbers; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def embed(
        self, tokens: Tensor | None, prefix: Tensor | None = None, *, continues: bool = False
    ) -> Tensor:
        """What the first layer reads of ``forward``'s arguments, [B, P + L, dim]. ``continues``:
        a sequence whose prefix, where the model has one, was read before."""
        parts = []
        if prefix is None and self.prefix_embedding is not None and not continues:
            raise ValueError(f"prefix: expected the {self.config.prefix} of each row, got None")
        if prefix is not None:
            if self.prefix_embedding is None:
                raise ValueError("prefix is given, but this model has none (config.prefix='none')")
            parts.append(self.prefix_embedding(prefix))
        if tokens is not None:
            if tokens.dim() != 2 or tokens.dtype != torch.int64:
                raise ValueError(
                    f"tokens: expected int64 [B, L], got {tokens.dtype} {tuple(tokens.shape)}"
                )
            parts.append(self.tok_embeddings(tokens))
        if not parts:
            raise ValueError("tokens and prefix are both None: nothing to read")
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _positions(
        self, x: Tensor, cu_seqlens: Tensor | None, cache: Sequence[KVCache] | None
    ) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
        """(angles of these positions, None) to rotate here, or (None, tables of all positions) for
        ``decode_attention`` to rotate by; (None, None) without positions."""
        if self.rotary_tables is None:
            return None, None
        cos, sin = self.rotary_tables
        length = x.shape[1]
        if cache is not None:
            if self.config.image_grid is None:
                # The op counts positions from each row's first token.
                return None, self.rotary_tables
            # The image starts at a fixed slot, however much of the prefix is padding.
            slots = cache[0].seqlens[:, None] + torch.arange(length, device=x.device)
            return (cos[slots], sin[slots]), None
        if cu_seqlens is not None:
            index = torch.arange(length, device=x.device)
            document = torch.searchsorted(cu_seqlens, index, right=True) - 1
            index = index - cu_seqlens[document]
            return (cos[index], sin[index]), None
        return (cos[:length], sin[:length]), None

    def _apply(self, fn, recurse=True):
        # The tables stay fp32 when the weights are cast: only a device is followed.
        super()._apply(fn, recurse)
        if self.rotary_tables is not None:
            device = self.output.weight.device
            self.rotary_tables = tuple(table.to(device) for table in rotary_tables(self.config))
        return self


class Block(nn.Module):
    def __init__(self, config: LMConfig):
        super().__init__()
        self.attention_norm = _norm(config, config.dim)
        self.attention = Attention(config)
        self.ffn_norm = _norm(config, config.dim)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope, tables, cu_seqlens, cache) -> Tensor:
        x = x + self.dropout(
            self.attention(self.attention_norm(x), rope, tables, cu_seqlens, cache)
        )
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))

    def reset_parameters(self, depth: int) -> None:
        self.attention.reset_parameters(depth)
        self.feed_forward.reset_parameters(depth)


class Attention(nn.Module):
    """Causal self-attention with grouped heads; q, k and v leave one projection, in that order."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.qkv = nn.Linear(config.dim, (heads + 2 * kv_heads) * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, config.dim, bias=False)
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = _norm(config, heads * head_dim if full else head_dim)
            self.k_norm = _norm(config, kv_heads * head_dim if full else head_dim)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        tables: tuple[Tensor, Tensor] | None,
        cu_seqlens: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        """x [B, L, dim] -> [B, L, dim]. ``rope`` are the angles of these positions, rotated here;
        ``tables`` those of all positions, rotated inside ``decode_attention``; at most one is
        given."""
        config = self.config
        qkv = self.qkv(x).unflatten(-1, (-1, config.head_dim))
        q, k, v = qkv.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=-2)
        if config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        elif config.qk_norm == "full":
            q, k = (
                norm(t.flatten(-2)).unflatten(-1, (-1, config.head_dim))
                for norm, t in ((self.q_norm, q), (self.k_norm, k))
            )
        interleaved = config.rotary == "interleaved"
        if rope is not None:
            q, k = (rotate(t, *rope, interleaved=interleaved) for t in (q, k))
        if cache is not None:
            cos, sin = tables or (None, None)
            y = decode_attention(
                q, k, v, cache, rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved
            )
        elif cu_seqlens is not None:
            q, k, v = (t.squeeze(0) for t in (q, k, v))
            y = flash_attention(
                q, k, v, causal=True, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens
            ).unsqueeze(0)
        else:
            y = flash_attention(q, k, v, causal=True)
        return self.out(y.flatten(-2))

    def reset_parameters(self, depth: int) -> None:
        _init_linear(self.qkv.weight, self.config)
        _init_linear(self.out.weight, self.config, depth)


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) · up(x)), gate and up in one projection."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.config = config
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(swiglu(gate, up) if fused("swiglu", gate, up) else F.silu(gate) * up)

    def reset_parameters(self, depth: int) -> None:
        _init_linear(self.gate_up.weight, self.config)
        _init_linear(self.down.weight, self.config, depth)


class ClassPrefix(nn.Module):
    """One embedding a class, and one more, the last, for "no class"."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.num_classes = config.prefix_dim
        self.table = nn.Embedding(config.prefix_dim + 1, config.dim)

    def forward(self, classes: Tensor) -> Tensor:
        """int64 [B] -> [B, 1, dim]."""
        if classes.dim() != 1 or classes.dtype != torch.int64:
            raise ValueError(
                f"prefix: expected int64 [B] classes, got {classes.dtype} {tuple(classes.shape)}"
            )
        return self.table(classes).unsqueeze(1)

    def unconditional(self, batch: int) -> Tensor:
        """The prefix of nothing in particular, for guidance: int64 [batch]."""
        return torch.full((batch,), self.num_classes, device=self.table.weight.device)

    def reset_parameters(self, config: LMConfig) -> None:
        _init_rows(self.table.weight, config)


class CaptionPrefix(nn.Module):
    """Caption features through an MLP; ``uncond_embedding`` stands for the features of a dropped
    caption."""

    def __init__(self, config: LMConfig):
        super().__init__()
        self.shape = (config.prefix_length, config.prefix_dim)
        self.fc1 = nn.Linear(config.prefix_dim, config.dim, bias=False)
        self.fc2 = nn.Linear(config.dim, config.dim, bias=False)
        # Random and fixed: LlamaGen does not train it.
        self.register_buffer("uncond_embedding", torch.zeros(self.shape))

    def forward(self, features: Tensor) -> Tensor:
        """[B, P, prefix_dim] -> [B, P, dim]."""
        if features.dim() != 3 or tuple(features.shape[1:]) != self.shape:
            expected = f"[B, {self.shape[0]}, {self.shape[1]}]"
            raise ValueError(f"prefix: expected features {expected}, got {tuple(features.shape)}")
        return self.fc2(F.gelu(self.fc1(features), approximate="tanh"))

    def unconditional(self, batch: int) -> Tensor:
        """The features of a dropped caption [batch, P, prefix_dim]."""
        return self.uncond_embedding.expand(batch, -1, -1)

    def reset_parameters(self, config: LMConfig) -> None:
        _init_linear(self.fc1.weight, config)
        _init_linear(self.fc2.weight, config)
        self.uncond_embedding.normal_(std=config.prefix_dim**-0.5)


def _prefix_embedding(config: LMConfig) -> ClassPrefix | CaptionPrefix | None:
    if config.prefix == "none":
        return None
    return ClassPrefix(config) if config.prefix == "class" else CaptionPrefix(config)


def _norm(config: LMConfig, channels: int) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(channels, eps=config.norm_eps, bias=config.norm_bias)
    return RMSNorm(channels, eps=config.norm_eps)


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        call = x, self.weight, self.eps
        return rms_norm(*call) if fused("rms_norm", *call) else super().forward(x)


def _init_rows(weight: Tensor, config: LMConfig) -> None:
    """Rows of an embedding or an output layer [rows, dim]."""
    std = config.dim**-0.5 if config.init == "fan_in" else config.init_std
    _normal(weight, std, cut=config.init == "fan_in")


def _init_linear(weight: Tensor, config: LMConfig, depth: int | None = None) -> None:
    """A projection [out, in]; ``depth`` is the layer's index where its result is added to the
    residual stream."""
    if config.init == "normal":
        return _normal(weight, config.init_std, cut=False)
    std = weight.shape[1] ** -0.5
    _normal(weight, std if depth is None else std / math.sqrt(2 * (depth + 1)), cut=True)


def _normal(weight: Tensor, std: float, *, cut: bool) -> None:
    if cut:
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
    else:
        nn.init.normal_(weight, std=std)
