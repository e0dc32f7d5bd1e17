"""Retrieval: corpora with random access, BM25 and dense indices of them, and the server in front."""

from atpo_fast.config.retrieval import BM25Settings, DenseSettings
from atpo_fast.retrieval.bm25 import BM25Index
from atpo_fast.retrieval.build import build_index, open_index
from atpo_fast.retrieval.contents import document_contents
from atpo_fast.retrieval.documents import Documents
from atpo_fast.retrieval.index import Hit, Index, Retriever
from atpo_fast.retrieval.manifest import IndexMismatchError

__all__ = [
    "BM25Index",
    "BM25Settings",
    "DenseSettings",
    "Documents",
    "Hit",
    "Index",
    "IndexMismatchError",
    "Retriever",
    "build_index",
    "document_contents",
    "open_index",
]
