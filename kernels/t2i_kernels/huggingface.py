"""flash_attention inside the models of Hugging Face's transformers: ``attn_implementation="t2i"``.

Importing this module registers it::

    import t2i_kernels.huggingface
    AutoModelForCausalLM.from_pretrained(path, attn_implementation="t2i")

transformers describes what a query sees by a function of indices, from which other implementations
make a mask. Here the mask becomes a few sequences, each causal or not, with one window: padding on
either side, caches, sliding windows and packed sequences are that. A mask that is not, is an error:
nothing is approximated. Rows that see nothing (padding) come out as 0.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .flash_attention import flash_attention

if "q_length" not in inspect.signature(sdpa_mask).parameters:
    raise ImportError(
        f"t2i_kernels.huggingface needs a newer transformers than {transformers.__version__}: one "
        "whose mask functions take q_length and q_offset"
    )

NAME = "t2i"
SEQUENCES = "_t2i_sequences"  # attribute of a mask: what was found out about it


@dataclass(frozen=True)
class Sequences:
    """A mask as ``flash_attention`` takes it: every query sees the keys of its sequence, up to its
    own position if causal, at most ``window`` of them.

    Where all rows of the batch are one sequence each with the same keys, ``keys`` is their slice.
    Otherwise rows are packed: ``q_rows`` and ``k_rows`` are those of the flattened batch that
    belong to a sequence, None where all do in their order, ``k_length`` is that of one row of the
    batch, and ``cu_seqlens_*`` are where sequences start.
    """

    causal: bool
    window: int | None = None
    keys: slice | None = None
    k_length: int = 0
    q_rows: Tensor | None = None
    k_rows: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None

    @classmethod
    def of_mask(cls, mask: Tensor) -> Sequences:
        """Of what each query sees, bool [B, Lq, Lk].

        Raises:
            ValueError: the mask is no such thing.
        """
        batch, q_length, k_length = mask.shape
        seen = mask.sum(dim=-1)
        first = mask.byte().argmax(dim=-1)
        end = first + seen
        reach = k_length - mask.flip(-1).byte().argmax(dim=-1)
        sees = seen > 0
        if (sees & (reach != end)).any():
            raise ValueError(_UNSUPPORTED.format("a query sees keys with gaps between them"))

        # A sequence goes on while, from query to query, the keys seen are the same (not causal), or
        # end one further and begin at most one further (causal). A query that sees one key may
        # always begin another.
        def starts(goes_on: Tensor) -> Tensor:
            start = sees.clone()
            start[:, 1:] &= ~(goes_on & sees[:, :-1])
            return start

        further, ends_further = first.diff(dim=1), end.diff(dim=1)
        causal = starts((ends_further == 1) & (further >= 0) & (further <= 1) & (seen[:, 1:] > 1))
        full = starts((ends_further == 0) & (further == 0))
        is_causal = bool(causal.sum() <= full.sum())
        start = causal if is_causal else full

        # Over all queries that see something, in the order of the flattened batch:
        order = start[sees].cumsum(0) - 1  # the sequence of each
        first_key, last_query = first[start], (start.roll(-1, dims=1) | ~sees.roll(-1, dims=1))
        last_query[:, -1] = True
        end_key = end[sees & last_query]
        cut = first[sees] > first_key[order]
        window = None
        if cut.any():
            window = int(seen[sees].max())
            if (seen[sees][cut] != window).any():
                raise ValueError(_UNSUPPORTED.format("windows differ in width"))

        rows = torch.arange(batch, device=mask.device)
        if start[:, 0].all() and int(start.sum()) == batch and sees.all():
            if (first_key == first_key[0]).all() and (end_key == end_key[0]).all():
                return cls(is_causal, window, keys=slice(int(first_key[0]), int(end_key[0])))
        if (end_key - first_key).sum() > 4 * batch * k_length:
            raise ValueError(_UNSUPPORTED.format("many queries share keys in no such way"))
        base = (rows[:, None] * k_length).expand(batch, q_length)[start]
        k_rows = torch.cat(
            [
                torch.arange(a, b, device=mask.device)
                for a, b in zip((base + first_key).tolist(), (base + end_key).tolist(), strict=True)
            ]
            or [base]
        )
        zero = torch.zeros(1, dtype=torch.int64, device=mask.device)
        every_key = torch.arange(batch * k_length, device=mask.device)
        return cls(
            is_causal,
            window,
            k_length=k_length,
            q_rows=None if sees.all() else sees.flatten().nonzero().flatten(),
            k_rows=None if torch.equal(k_rows, every_key) else k_rows,
            cu_seqlens_q=torch.cat([zero, order.bincount().cumsum(0)]).int(),
            cu_seqlens_k=torch.cat([zero, (end_key - first_key).cumsum(0)]).int(),
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """[B, Lq, H, D], [B, Lk, Hkv, D], [B, Lk, Hkv, Dv] -> [B, Lq, H, Dv]."""
        options["causal"] = self.causal
        if self.window is not None:
            options["window"] = (self.window - 1, -1)
        if self.keys is not None:
            return flash_attention(q, k[:, self.keys], v[:, self.keys], **options)
        if k.shape[1] != self.k_length:
            raise ValueError(f"{k.shape[1]} keys, but the mask is of {self.k_length}")
        rows, heads = q.shape[:2], q.shape[2]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        if self.q_rows is not None:
            q = q[self.q_rows]
        if self.k_rows is not None:
            k, v = k[self.k_rows], v[self.k_rows]
        out = flash_attention(
            q, k, v, cu_seqlens_q=self.cu_seqlens_q, cu_seqlens_k=self.cu_seqlens_k, **options
        )
        if self.q_rows is not None:
            everything = out.new_zeros(rows.numel(), heads, out.shape[-1])
            out = everything.index_copy(0, self.q_rows, out)
        return out.unflatten(0, rows)


_UNSUPPORTED = (
    "attn_implementation='t2i' knows causal and full attention with padding, one sliding window "
    "and packed sequences; in this mask {}. Choose 'sdpa' or 'eager' for this model"
)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Sequences | Tensor:
    """The mask of a forward pass; arguments as of ``transformers.masking_utils.sdpa_mask``.

    A tensor, bool [B, 1, Lq, Lk], that knows its ``Sequences``. Of the plain causal mask, which
    needs none, these alone; but for a cache of fixed size, whose masks transformers makes ahead and
    takes for a user's, which are tensors, and for models that ask for one.
    """
    own = None if attention_mask is None else attention_mask[:, kv_offset : kv_offset + kv_length]
    padded = own is not None and (own.shape[1] < kv_length or not own.all())
    plain = mask_function is causal_mask_function and not padded and isinstance(q_offset, int)
    if plain and allow_is_causal_skip:
        if q_offset + q_length == kv_offset + kv_length:
            return Sequences(causal=True, keys=slice(None))
    made = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=device,
    ).expand(batch_size, -1, -1, -1)
    setattr(made, SEQUENCES, Sequences.of_mask(made[:, 0]))
    return made


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Sequences | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[B, H, Lq, D], [B, Hkv, Lk, D], [B, Hkv, Lk, Dv] -> ([B, Lq, H, Dv], None).

    Raises:
        ValueError: dropout, attention sinks or a position bias, or a mask that is no ``Sequences``.
    """
    if dropout:
        raise ValueError(f"dropout={dropout}: attn_implementation='t2i' has none; set it to 0")
    if s_aux is not None or kwargs.get("position_bias") is not None:
        raise ValueError(
            "attn_implementation='t2i' has no attention sinks (s_aux) and no position_bias; choose "
            "'eager' for this model"
        )
    sequences = attention_mask
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if sliding_window is not None and not causal:
            raise ValueError(f"sliding_window={sliding_window} of full attention without a mask")
        sequences = Sequences(causal, sliding_window, keys=slice(None))
    elif isinstance(attention_mask, Tensor):
        sequences = getattr(attention_mask, SEQUENCES, None)
        shape = len(query), 1, query.shape[2], key.shape[2]
        if sequences is None or attention_mask.shape != shape:
            sequences = Sequences.of_mask(_seen(attention_mask, query, key))
    out = sequences.attend(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        scale=scaling,
        softcap=softcap or 0.0,
    )
    return out, None


def _seen(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """What each query sees, bool [B, Lq, Lk], of a mask [B or 1, 1, Lq or 1, Lk or more]: bool, or
    added to the scores."""
    batch, q_length, k_length = len(query), query.shape[2], key.shape[2]
    fits = (
        mask.dim() == 4
        and mask.shape[0] in (1, batch)
        and mask.shape[1] == 1
        and mask.shape[2] in (1, q_length)
        and mask.shape[3] >= k_length
    )
    if not fits:
        raise ValueError(
            f"attention_mask {tuple(mask.shape)}: expected {(batch, 1, q_length, k_length)}"
        )
    mask = mask[:, 0, :, :k_length].expand(batch, q_length, -1)
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    if (~seen & (mask > torch.finfo(mask.dtype).min / 2)).any():
        raise ValueError(_UNSUPPORTED.format("scores are biased"))
    return seen


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
