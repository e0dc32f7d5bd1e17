"""Dense retrieval with a tiny random BERT: pooling, prefixes, the FAISS indices, builds that were killed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from atpo_fast.config import ToolsConfig
from atpo_fast.config.retrieval import Faiss, VectorDtype
from atpo_fast.environment import ToolCall, make_toolbox
from atpo_fast.retrieval import DenseSettings, IndexMismatchError, build_index, dense, open_index
from atpo_fast.retrieval.encoder import Encoder
from tests.helpers.retrieval_cases import random_rows, write_corpus

ROWS = random_rows(60)


@pytest.fixture(scope="module")
def encoder_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT of 2 layers with random weights and a vocabulary of the corpus."""
    folder = tmp_path_factory.mktemp("encoder")
    words = ["query", "passage", "title", ":", '"', "the", "zoë", "и", "x", "-", "y"]
    words += [f"w{i}" for i in range(60)] + [str(i) for i in range(50)]
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), strip_accents=False)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.5,  # so that vectors of different texts differ
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


def plain_vectors(path: str, texts: list[str], max_tokens: int = 256) -> np.ndarray:
    """(len(texts), d) vectors, one text at a time: no padding, no batch."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    vectors = []
    for text in texts:
        with torch.no_grad():
            ids = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
            mean = model(**ids).last_hidden_state[0].mean(0)
        vectors.append((mean / mean.norm()).numpy())
    return np.stack(vectors)


def test_encoding_in_batches_is_encoding_alone(encoder_path: str) -> None:
    """Fails if padding enters the mean, if vectors come back in another order, or if they are not of length 1."""
    texts = [row["contents"] for row in ROWS[:20]] + [""]
    vectors = Encoder(encoder_path, max_tokens=24, batch_texts=8).encode(texts)
    np.testing.assert_allclose(vectors, plain_vectors(encoder_path, texts, 24), atol=2e-6)
    assert len({tuple(vector) for vector in vectors.round(3).tolist()}) > 15


QUERIES = ["w1 w2 title 3", "zoë", "w40 w40"]


@pytest.fixture(scope="module")
def cosines(encoder_path: str) -> np.ndarray:
    """Every query against every passage, with their prefixes, for all kinds of indexes."""
    passages = plain_vectors(encoder_path, ["passage : " + row["contents"] for row in ROWS])
    return plain_vectors(encoder_path, ["query: " + query for query in QUERIES]) @ passages.T


@pytest.mark.parametrize("faiss_kind", ["flat", "ivf", "hnsw"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_search_is_brute_force(
    tmp_path: Path, encoder_path: str, cosines: np.ndarray, faiss_kind: Faiss, dtype: VectorDtype
) -> None:
    """Fails if a prefix is left out, swapped or doubled, if FAISS compares by distance, or if numbers are shifted.

    All lists of so small an IVF index are probed, and its graph of neighbours is nearly whole: both are exact here.
    """
    corpus = write_corpus(tmp_path / "c.jsonl", ROWS)
    settings = DenseSettings(encoder=encoder_path, faiss=faiss_kind, vector_dtype=dtype, passage_prefix="passage : ")
    build_index(tmp_path / "i", [corpus], settings)
    numbers, scores = open_index(tmp_path / "i").index.search(QUERIES, 5)
    tolerance = 2e-3 if dtype == "float16" else 1e-5
    np.testing.assert_allclose(scores, -np.sort(-cosines)[:, :5], atol=tolerance)
    np.testing.assert_allclose(np.take_along_axis(cosines, numbers, axis=1), scores, atol=tolerance)


def test_more_hits_than_passages(tmp_path: Path, encoder_path: str) -> None:
    """Fails if FAISS's -1 reaches the documents."""
    build_index(tmp_path / "i", [write_corpus(tmp_path / "c.jsonl", ROWS[:3])], DenseSettings(encoder=encoder_path))
    retriever = open_index(tmp_path / "i")
    assert sorted(hit.number for hit in retriever.hits(["w1"], 10)[0]) == [0, 1, 2]
    assert retriever.hits([], 3) == []


def test_a_killed_build_goes_on(tmp_path: Path, encoder_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if blocks are encoded again, or if vectors of the first half are lost or shifted."""
    corpus = write_corpus(tmp_path / "c.jsonl", ROWS)
    settings = DenseSettings(encoder=encoder_path, vector_dtype="float32")
    build_index(tmp_path / "whole", [corpus], settings)
    monkeypatch.setattr(dense, "_BLOCK", 16)
    encode = Encoder.encode
    encoded: list[int] = []

    def stop(self: Encoder, texts: Sequence[str]) -> np.ndarray:
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(len(texts))
        return encode(self, texts)

    monkeypatch.setattr(Encoder, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        build_index(tmp_path / "i", [corpus], settings)
    monkeypatch.setattr(Encoder, "encode", lambda self, texts: encoded.append(len(texts)) or encode(self, texts))
    build_index(tmp_path / "i", [corpus], settings)
    assert encoded == [16, 16, 16, 12]
    vectors = [np.fromfile(tmp_path / name / "vectors.bin", np.float32) for name in ("whole", "i")]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=2e-6)


def test_another_faiss_index_uses_the_vectors_again(
    tmp_path: Path, encoder_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if hours of encoding are repeated for another FAISS index, or if another prefix is not noticed."""
    corpus = write_corpus(tmp_path / "c.jsonl", ROWS)
    build_index(tmp_path / "i", [corpus], DenseSettings(encoder=encoder_path))
    with pytest.raises(IndexMismatchError, match="query_prefix"):
        build_index(tmp_path / "i", [corpus], DenseSettings(encoder=encoder_path, query_prefix=""))
    monkeypatch.setattr(Encoder, "encode", lambda self, texts: pytest.fail("encoded again"))
    build_index(tmp_path / "i", [corpus], DenseSettings(encoder=encoder_path, faiss="hnsw"))
    assert (tmp_path / "i" / "faiss.kind").read_text() == "hnsw"
    build_index(tmp_path / "i", [corpus], DenseSettings(encoder=encoder_path))
    assert (tmp_path / "i" / "faiss.kind").read_text() == "flat"


def test_the_search_tool_searches_vectors_in_process(tmp_path: Path, encoder_path: str) -> None:
    build_index(tmp_path / "i", [write_corpus(tmp_path / "c.jsonl", ROWS)], DenseSettings(encoder=encoder_path))
    toolbox = make_toolbox(ToolsConfig(search_backend="dense", index_dir=str(tmp_path / "i"), top_k=2), [])
    assert toolbox.run([ToolCall("search", "w1")])[0].text.count("Page ") == 2


def test_an_encoder_that_is_not_there(tmp_path: Path) -> None:
    """Fails if a wrong path ends in a traceback of the hub's client."""
    with pytest.raises(FileNotFoundError, match="cannot be loaded"):
        Encoder(str(tmp_path / "none"))
