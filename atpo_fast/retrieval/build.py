"""Build an index folder, or continue an unfinished one, and open it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from atpo_fast.config.retrieval import BM25Settings, DenseSettings
from atpo_fast.retrieval import bm25, bm25_build, dense
from atpo_fast.retrieval.documents import Documents, open_document_file, store_documents
from atpo_fast.retrieval.index import Report, Retriever, silent
from atpo_fast.retrieval.manifest import (
    IndexMismatchError,
    Manifest,
    differences,
    make_manifest,
    only_builder,
    read_manifest,
)

_OURS = ("manifest.json*", "documents_*", "vectors.*", "*.faiss*", "faiss.kind", ".*.partial")  # and the folder shards


def build_index(
    folder: Path | str,
    corpus: Sequence[Path | str],
    settings: BM25Settings | DenseSettings,
    *,
    rebuild: bool = False,
    report: Report = silent,
) -> None:
    """Build the index of corpus files in `folder`. Parts that a killed build has finished, or a whole index, are kept.

    Args:
        folder: folder that holds nothing but the index; created if it does not exist.
        corpus: .jsonl files of documents (`contents`, or `text` with or without `title`), also .gz; other files are
            read as `data.readers.read_passages` does, whole.
        settings: settings of the kind of index that is wanted.
        rebuild: whether an index of another corpus or with other settings is removed instead of refused.
        report: function that is told the progress.

    Raises:
        FileNotFoundError: a corpus file is missing.
        IndexMismatchError: the folder holds something else, or another process is building in it.
        DataError: a corpus file cannot be used; names file and record.
    """
    folder, paths = Path(folder).resolve(), [Path(path).resolve() for path in corpus]
    wanted = make_manifest(settings.kind, paths, settings.identity())
    if (
        folder.is_dir()
        and not (folder / "manifest.json").exists()
        and {path.name for path in folder.iterdir()} - {"lock"}
    ):
        raise IndexMismatchError(f"{folder} is not an index folder and not empty; name another one")
    folder.mkdir(parents=True, exist_ok=True)
    with only_builder(folder):
        manifest = _continue_or_start(folder, wanted, rebuild)
        _store(folder, manifest, paths, report)
        documents = _open_documents(folder, manifest)
        if isinstance(settings, BM25Settings):
            if not manifest.complete:
                bm25_build.build(folder, documents, settings, report)
        else:  # the vectors may serve another FAISS index
            dense.build(folder, documents, settings, report)
        manifest.complete = True
        manifest.write(folder)


def open_index(folder: Path | str) -> Retriever:
    """Open a finished index, memory-mapped.

    Raises:
        FileNotFoundError: the folder holds no index or an unfinished one, or the corpus is gone.
        IndexMismatchError: another version of this program built the index.
        DataError: the corpus changed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None or not manifest.complete:
        state = "no index" if manifest is None else "an unfinished index"
        raise FileNotFoundError(f"{folder}: {state}; build it with `atpo-fast retriever --corpus FILE --index-dir DIR`")
    documents = _open_documents(folder, manifest)
    if manifest.kind == BM25Settings.kind:
        return Retriever(manifest.kind, bm25.open_bm25(folder), documents)
    return Retriever(manifest.kind, dense.open_dense(folder, manifest.settings), documents)


def _continue_or_start(folder: Path, wanted: Manifest, rebuild: bool) -> Manifest:
    """Return the manifest to continue with; `rebuild` first removes an index that is in the folder."""
    found = None if rebuild else read_manifest(folder)
    if found is None:
        shutil.rmtree(folder / "shards", ignore_errors=True)
        for path in (path for pattern in _OURS for path in folder.glob(pattern)):
            path.unlink()
        wanted.write(folder)
        return wanted
    if difference := differences(found, wanted):
        raise IndexMismatchError(
            f"{folder} holds another index ({difference}): name another --index-dir, or remove it with --rebuild"
        )
    return found


def _store(folder: Path, manifest: Manifest, paths: Sequence[Path], report: Report) -> None:
    """Make the documents of all corpus files accessible by number."""
    if manifest.documents:  # a corpus that was moved keeps its digest
        manifest.documents = [
            str(path) if Path(stored).is_absolute() else stored
            for stored, path in zip(manifest.documents, paths, strict=True)
        ]
        return
    total = sum(path.stat().st_size for path in paths)
    stored, before = [], 0
    for number, path in enumerate(paths):

        def advance(done: int, before: int = before) -> None:
            report("reading bytes of the corpus", before + done, total)

        stored.append(str(store_documents(path, folder, number, advance)))
        before += path.stat().st_size
    manifest.documents = [path.removeprefix(f"{folder}/") for path in stored]
    manifest.write(folder)


def _open_documents(folder: Path, manifest: Manifest) -> Documents:
    return Documents(
        [open_document_file(folder / path, folder, number) for number, path in enumerate(manifest.documents)]
    )
