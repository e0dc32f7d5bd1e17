"""Dense retrieval: unit vectors of an encoder in a FAISS index, compared by inner product, which is their cosine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from atpo_fast.common.files import replacing
from atpo_fast.config.retrieval import DenseSettings
from atpo_fast.retrieval.documents import Documents
from atpo_fast.retrieval.index import Report

if TYPE_CHECKING:
    from atpo_fast.retrieval.encoder import Encoder  # imports PyTorch and transformers: only where they are needed

_BLOCK = 4096  # passages encoded between two notes of how far the build is
_ADD_BLOCK = 65536  # vectors given to FAISS at once
_POINTS_PER_LIST = 39  # FAISS asks for as many vectors for each list it is to find
_PROBES = 64
_HNSW_LINKS = 32
_HNSW_SEARCH = 128


class DenseIndex:
    """A FAISS index and the encoder of its queries."""

    def __init__(self, index: Any, encoder: Encoder, query_prefix: str) -> None:
        self._index = index
        self._encoder = encoder
        self._query_prefix = query_prefix

    def __len__(self) -> int:
        """Return the number of passages."""
        return int(self._index.ntotal)

    def search(self, queries: Sequence[str], k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return (Q, k) numbers of the best passages and (Q, k) cosines, best first; -1 and 0 pad missing hits."""
        if not queries or not k:
            return np.zeros((len(queries), k), np.int64), np.zeros((len(queries), k), np.float32)
        scores, numbers = self._index.search(self._encoder.encode([self._query_prefix + query for query in queries]), k)
        return numbers, np.where(numbers >= 0, scores, np.float32(0))


def build(folder: Path, documents: Documents, settings: DenseSettings, report: Report) -> None:
    """Encode all documents, or those that are missing, and build the FAISS index that is asked for.

    Memory holds one block of texts and vectors at a time, then the FAISS index, which FAISS builds in memory.

    Raises:
        ImportError: FAISS is not installed.
        DataError: a document cannot be read or has no text; names file and document.
        FileNotFoundError: the encoder does not exist.
    """
    import faiss  # noqa: F401  fails before hours of encoding, not after

    target = folder / f"{settings.faiss}.faiss"
    if not target.exists():
        _write_faiss(_encode(folder, documents, settings, report), target, settings, report)
    (folder / "faiss.kind").write_text(settings.faiss)


def open_dense(folder: Path, identity: dict[str, Any]) -> DenseIndex:
    """Open the index that `build` has written to `folder`; `identity` is that of its settings.

    Raises:
        ImportError: FAISS is not installed.
        FileNotFoundError: the encoder is gone.
    """
    import faiss

    from atpo_fast.retrieval.encoder import Encoder

    index = faiss.read_index(str(folder / f"{(folder / 'faiss.kind').read_text()}.faiss"))
    encoder = Encoder(identity["encoder"], max_tokens=identity["max_tokens"])
    return DenseIndex(index, encoder, identity["query_prefix"])


def _encode(
    folder: Path, documents: Documents, settings: DenseSettings, report: Report
) -> NDArray[Any]:  # (documents, d), memory-mapped
    """Encode all documents into a file, block by block; a note beside it says how many vectors are complete."""
    from atpo_fast.retrieval.encoder import Encoder

    encoder = Encoder(settings.encoder, max_tokens=settings.max_tokens, batch_texts=settings.batch_texts)
    path, note = folder / "vectors.bin", folder / "vectors.rows"
    done = int(note.read_text()) if note.exists() else 0
    shape = (len(documents), encoder.width)
    vectors = np.memmap(path, dtype=settings.vector_dtype, mode="r+" if done else "w+", shape=shape)
    for start in range(done, len(documents), _BLOCK):
        report("encoding passages", start, len(documents))
        stop = min(start + _BLOCK, len(documents))
        texts = [settings.passage_prefix + documents.contents(number) for number in range(start, stop)]
        vectors[start:stop] = encoder.encode(texts)
        vectors.flush()
        with replacing(note) as partial:
            partial.write_text(str(stop))
    report("encoding passages", len(documents), len(documents))
    return vectors


def _write_faiss(vectors: NDArray[Any], target: Path, settings: DenseSettings, report: Report) -> None:
    """Build a FAISS index of (n, d) vectors and write it atomically."""
    import faiss

    index = _new_faiss(vectors, settings)
    for start in range(0, len(vectors), _ADD_BLOCK):
        report("building the FAISS index", start, len(vectors))
        index.add(np.ascontiguousarray(vectors[start : start + _ADD_BLOCK], dtype=np.float32))
    report("building the FAISS index", len(vectors), len(vectors))
    with replacing(target) as partial:
        faiss.write_index(index, str(partial))


def _new_faiss(vectors: NDArray[Any], settings: DenseSettings) -> Any:
    """Create a FAISS index without vectors, trained on a sample of `vectors` where its kind needs training."""
    import faiss

    codes = "SQfp16" if settings.vector_dtype == "float16" else "Flat"
    lists = max(1, min(int(4 * math.sqrt(len(vectors))), len(vectors) // _POINTS_PER_LIST))
    names = {"flat": codes, "ivf": f"IVF{lists},{codes}", "hnsw": f"HNSW{_HNSW_LINKS},{codes}"}
    index: Any = faiss.index_factory(vectors.shape[1], names[settings.faiss], faiss.METRIC_INNER_PRODUCT)
    if settings.faiss == "ivf":
        index.nprobe = min(lists, _PROBES)
    if settings.faiss == "hnsw":
        index.hnsw.efSearch = _HNSW_SEARCH
    sample = np.arange(len(vectors))
    if not index.is_trained and len(vectors) > 256 * lists:
        sample = np.sort(np.random.default_rng(0).choice(len(vectors), 256 * lists, replace=False))
    index.train(np.ascontiguousarray(vectors[sample], dtype=np.float32))
    return index
