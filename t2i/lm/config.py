"""Shapes of the language models, by name."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

_CHOICES = {
    "norm": ("rmsnorm", "layernorm"),
    "rotary": ("half", "interleaved", "head", "none"),
    "qk_norm": ("none", "head", "full"),
    "init": ("fan_in", "normal"),
    "prefix": ("none", "class", "caption"),
    "prefix_rotary": ("diagonal", "zero"),
}


@dataclass(frozen=True)
class LMConfig:
    """One decoder-only transformer: pre-norm, SwiGLU, no biases in the linear layers.

    Vocabulary. Rows [0, text_vocab_size) are text, the ``image_vocab_size`` rows after them are
    image codes: the token of code c is ``text_vocab_size + c`` at both the embedding and the output
    end.

    Positions. ``rotary`` names how head channels pair up: "half" (i with i + D/2: GPT-NeoX, Llama,
    open_lm), "interleaved" (2i with 2i + 1: LlamaGen), "none", or "head": angles by the index of
    the *head*, as the released open_lm-1b was trained. There q and k of a head turn by the same
    angle, which cancels in q·k, so "head" computes what "none" does and says where the weights come
    from. With ``image_grid`` = (h, w) the angles are two-dimensional: the first half of the pairs
    turns by the row, the second by the column of the image token.

    Prefix. LlamaGen conditions on embeddings instead of text tokens: "class" looks up one of
    ``prefix_dim`` classes, "caption" passes ``prefix_length`` feature vectors of width
    ``prefix_dim`` through an MLP. ``prefix_rotary`` says what two-dimensional angles these
    positions get: "diagonal" gives position p the coordinates (p, p) and lets the image start at
    (P, P), the convention of Qwen2-VL (arXiv 2409.12191); "zero" copies LlamaGen's all-zero table,
    which multiplies q and k by 0, so that every query attends to the prefix uniformly. Right for
    its weights, for nothing else.

    Initialisation. "fan_in" is open_lm's: normal with std 1/sqrt(fan_in) cut at three std, the
    attention-out and FFN-down projections of layer l (from 0) divided by sqrt(2(l + 1)), embedding
    and output std 1/sqrt(dim). "normal" is N(0, ``init_std``²) throughout (Llama, LlamaGen);
    ``zero_init_output`` starts from uniform predictions (LlamaGen).

    Raises:
        ValueError: a field is outside its choices or contradicts another.
    """

    dim: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    text_vocab_size: int
    image_vocab_size: int = 0
    num_kv_heads: int = 0  # 0: as many as num_heads
    head_dim: int = 0  # 0: dim // num_heads
    max_positions: int = 2048
    tied: bool = False
    dropout: float = 0.0  # on the embedding and on both residual branches
    norm: str = "rmsnorm"
    norm_bias: bool = False
    norm_eps: float = 1e-5
    qk_norm: str = "none"  # over the channels of each "head", or of all at once: "full" (open_lm)
    rotary: str = "half"
    rotary_theta: float = 10000.0
    image_grid: tuple[int, int] | None = None
    prefix: str = "none"
    prefix_dim: int = 0
    prefix_length: int = 0
    prefix_rotary: str = "diagonal"
    init: str = "fan_in"
    init_std: float = 0.02
    zero_init_output: bool = False

    def __post_init__(self) -> None:
        for field in ("dim", "num_layers", "num_heads", "ffn_dim", "max_positions"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)}: expected at least 1")
        if not self.num_kv_heads:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if not self.head_dim:
            if self.dim % self.num_heads:
                raise ValueError(
                    f"dim={self.dim} is not a multiple of num_heads={self.num_heads}: give head_dim"
                )
            object.__setattr__(self, "head_dim", self.dim // self.num_heads)
        if self.image_grid is not None:  # JSON has no tuples
            object.__setattr__(self, "image_grid", tuple(self.image_grid))
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"{field}={getattr(self, field)!r}: choose one of {', '.join(choices)}"
                )
        heads, kv_heads = self.num_heads, self.num_kv_heads
        if heads % kv_heads:
            raise ValueError(f"num_heads={heads} is not a multiple of num_kv_heads={kv_heads}")
        if self.rotary == "head" and kv_heads != heads:
            raise ValueError(f"rotary='head' needs num_kv_heads = num_heads, not {kv_heads}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout}: expected 0 <= dropout < 1")
        pairs = 2 if self.image_grid is None else 4
        if self.rotary != "none" and self.head_dim % pairs:
            raise ValueError(
                f"head_dim={self.head_dim}: rotary positions need a multiple of {pairs}"
            )
        prefix = (self.prefix != "none", self.prefix_dim > 0, self.prefix_length > 0)
        if any(prefix) != all(prefix):
            raise ValueError("prefix, prefix_dim and prefix_length: give all three or none")
        if self.prefix == "class" and self.prefix_length != 1:
            raise ValueError(f"prefix_length={self.prefix_length}: a class takes one position")
        if self.image_grid is not None and self.rotary not in ("half", "interleaved"):
            raise ValueError(f"rotary={self.rotary!r}: image_grid needs 'half' or 'interleaved'")
        if self.image_grid is not None and self.prefix == "none":
            raise ValueError(
                "image_grid needs a prefix: behind a text of any length the first "
                "position of the image is not known"
            )

        if self.image_grid is not None:  # nothing has a position behind the image
            positions = self.prefix_length + self.image_grid[0] * self.image_grid[1]
            object.__setattr__(self, "max_positions", min(self.max_positions, positions))

    @property
    def vocab_size(self) -> int:
        return self.text_vocab_size + self.image_vocab_size

    @property
    def image_tokens(self) -> slice:
        """Rows of the vocabulary that are image codes, for
        ``TransformerLM.forward(logits=...)``."""
        return slice(self.text_vocab_size, self.vocab_size)

    def replace(self, **changes: Any) -> LMConfig:
        """A copy with other fields; heads that followed from ``num_heads`` and ``dim`` still do."""
        if self.num_kv_heads == self.num_heads:
            changes.setdefault("num_kv_heads", 0)
        if self.head_dim * self.num_heads == self.dim:
            changes.setdefault("head_dim", 0)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LMConfig:
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(
                f"unknown fields of a language model's configuration: {', '.join(unknown)}"
            )
        return cls(**fields)


def _open_lm(dim: int, num_layers: int, num_heads: int, **changes: Any) -> LMConfig:
    """LayerNorm with bias, GPT-NeoX vocabulary padded to 50,432 rows, FFN 8/3 dim in steps of
    256."""
    return LMConfig(
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        ffn_dim=256 * -(-int(8 * dim / 3) // 256),
        text_vocab_size=50432,
        norm="layernorm",
        norm_bias=True,
        **changes,
    )


def _llamagen(dim: int, num_layers: int, num_heads: int, side: int = 16) -> LMConfig:
    """Class-conditional with VQ-16: one class position, then side × side image tokens, 16 for 256
    pixels and 24 for 384."""
    return LMConfig(
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        ffn_dim=256 * -(-int(8 * dim / 3) // 256),
        text_vocab_size=0,
        image_vocab_size=16384,
        max_positions=1 + side * side,
        rotary="interleaved",
        image_grid=(side, side),
        prefix="class",
        prefix_dim=1000,
        prefix_length=1,
        init="normal",
        zero_init_output=True,
    )


_LLAMAGEN_SIZES = {
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "xl": (1280, 36, 20),
    "xxl": (1536, 48, 24),
    "3b": (3200, 24, 32),
}


def _smollm2(dim: int, num_layers: int, num_heads: int, **changes: Any) -> LMConfig:
    fields = {"rotary_theta": 100000.0, **changes}
    return LMConfig(
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        text_vocab_size=49152,
        max_positions=8192,
        tied=True,
        init="normal",
        **fields,
    )


def with_caption_prefix(
    config: LMConfig, grid: tuple[int, int], *, length: int = 120, dim: int = 2048
) -> LMConfig:
    """A LlamaGen configuration's text-conditional sibling: ``length`` T5 features of width
    ``dim``."""
    positions = length + grid[0] * grid[1]
    return config.replace(
        prefix="caption",
        prefix_dim=dim,
        prefix_length=length,
        image_grid=grid,
        max_positions=positions,
    )


LM_CONFIGS: dict[str, LMConfig] = {
    # The default model: captions of the emoji set, 16-bit weights small enough to ship.
    "emoji": LMConfig(
        dim=320,
        num_layers=8,
        num_heads=5,
        ffn_dim=864,
        text_vocab_size=2048,
        image_vocab_size=4096,
        max_positions=512,
    ),
    "open_lm_11m": _open_lm(96, 12, 12),
    "open_lm_25m": _open_lm(192, 12, 12),
    "open_lm_41m": _open_lm(288, 12, 12),
    "open_lm_79m_v2": _open_lm(512, 8, 4),
    "open_lm_160m": _open_lm(768, 12, 12),
    "open_lm_410m": _open_lm(1024, 24, 16),
    "open_lm_1b": _open_lm(2048, 24, 16),
    "open_lm_1b_old": _open_lm(2048, 24, 16, rotary="head"),  # as the released weights
    "smollm2-135m": _smollm2(576, 30, 9, num_kv_heads=3, ffn_dim=1536, init_std=1 / 24),
    "smollm2-360m": _smollm2(960, 32, 15, num_kv_heads=5, ffn_dim=2560),
    "smollm2-1.7b": _smollm2(2048, 24, 32, ffn_dim=8192, rotary_theta=130000.0),
    **{f"llamagen-{name}": _llamagen(*sizes) for name, sizes in _LLAMAGEN_SIZES.items()},
    # The published XL, XXL and 3B are for 384 pixels; B and L are there for both.
    **{f"llamagen-{name}-384": _llamagen(*sizes, 24) for name, sizes in _LLAMAGEN_SIZES.items()},
    "llamagen-xl-t2i": with_caption_prefix(_llamagen(1280, 36, 20), (16, 16)),
    "llamagen-xl-t2i-512": with_caption_prefix(_llamagen(1280, 36, 20), (32, 32)),
}
