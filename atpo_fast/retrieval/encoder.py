"""A Hugging Face encoder that turns texts into vectors as E5 does: prefix, mean over tokens, length 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModel, AutoTokenizer


class Encoder:
    """An encoder of texts: the mean over the tokens' last hidden states, divided by its Euclidean length.

    It runs in float16 on a GPU where there is one, else in float32 on the CPU.

    Args:
        path: folder of a Hugging Face encoder, or its name on the hub.
        max_tokens: number of tokens to which a text is cut.
        batch_texts: number of texts of one forward.

    Raises:
        FileNotFoundError: the encoder does not exist.
    """

    def __init__(self, path: str, *, max_tokens: int = 256, batch_texts: int = 64) -> None:
        self.max_tokens = max_tokens
        self.batch_texts = batch_texts
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path)
            self._model = AutoModel.from_pretrained(path, dtype=dtype).to(self.device).eval()
        except (OSError, ValueError) as error:
            where = "the folder" if Path(path).is_dir() else "no such folder, and as a name on the Hugging Face hub"
            raise FileNotFoundError(f"encoder {path!r} cannot be loaded ({where}): {error}") from error

    @property
    def width(self) -> int:
        """Number of entries of a vector (d)."""
        return int(self._model.config.hidden_size)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode texts to unit vectors, (len(texts), d). Texts of similar length share a forward."""
        vectors = np.empty((len(texts), self.width), dtype=np.float32)
        order = np.argsort([len(text) for text in texts], kind="stable")
        for start in range(0, len(order), self.batch_texts):
            rows = order[start : start + self.batch_texts]
            vectors[rows] = self._encode_batch([texts[row] for row in rows]).cpu().numpy()
        return vectors

    def _encode_batch(self, texts: list[str]) -> Tensor:
        """Encode one batch of texts to unit vectors, (B, d) in float32."""
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        tokens = tokens.to(self.device)
        hidden = self._model(**tokens).last_hidden_state.float()  # (B, L, d)
        mask = tokens["attention_mask"].unsqueeze(-1)  # (B, L, 1)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return torch.nn.functional.normalize(mean, dim=-1)
