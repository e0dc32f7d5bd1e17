"""`atpo-fast retriever`: build an index where there is none, with a progress bar, and serve it."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import sys
from pathlib import Path
from typing import get_args

from atpo_fast.commands.verb import Verb
from atpo_fast.common.errors import BAD_INPUT, INTERRUPTED, ConfigError
from atpo_fast.config.retrieval import MAX_HITS, BM25Settings, DenseSettings, Faiss, ServerLimits, VectorDtype

_LOG = logging.getLogger(__name__)


_LIMITS = {
    "body_bytes": "bytes of a request",
    "held_bytes": "bytes of all requests that wait",
    "queries": "queries of a request",
    "query_chars": "characters of a query",
    "hits": "hits of a request, its queries times topk",
    "connections": "open connections",
    "read_seconds": "seconds in which a request must have come",
    "answer_seconds": "seconds in which an answer must have been read",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the corpus, the index and the server's settings."""
    settings = BM25Settings()
    parser.add_argument(
        "--corpus",
        nargs="+",
        metavar="FILE",
        help='passages: .jsonl or .jsonl.gz with contents (wiki-18: "\\"Title\\"\\ntext"), or text and title; or a '
        "question file with paragraphs. Not needed for an index that is there",
    )
    parser.add_argument("--index", choices=("bm25", "dense"), default="bm25", help="kind of index (default: bm25)")
    parser.add_argument(
        "--index-dir", metavar="DIR", help="index folder (default: runs/indexes/CORPUS-KIND); kept, and used again"
    )
    parser.add_argument("--rebuild", action="store_true", help="replace an index of another corpus or other settings")
    parser.add_argument("--build-only", action="store_true", help="build the index, serve nothing")
    serving = parser.add_argument_group("server")
    serving.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1; 0.0.0.0: all)")
    serving.add_argument("--port", type=int, default=8000, help="port (default: 8000; 0: any free one)")
    serving.add_argument("--topk", type=_positive, default=3, help="hits where a request does not say (default: 3)")
    serving.add_argument(
        "--batch-wait-ms", type=float, default=2.0, help="how long a query waits for company (default: 2)"
    )
    serving.add_argument("--max-batch", type=_positive, default=256, help="queries of one search (default: 256)")
    serving.add_argument("--cache-mb", type=_not_negative, default=256, help="answers cached (default: 256; 0: none)")
    serving.add_argument(
        "--token-variable",
        metavar="NAME",
        help="environment variable with a token, which requests then have to name (tools.search_token_variable)",
    )
    _add_limits(parser.add_argument_group("limits of the server"))
    bm25 = parser.add_argument_group("bm25")
    bm25.add_argument("--k1", type=float, default=settings.k1, help=f"BM25's k1 (default: {settings.k1})")
    bm25.add_argument("--b", type=float, default=settings.b, help=f"BM25's b (default: {settings.b})")
    bm25.add_argument(
        "--shard-passages",
        type=_positive,
        default=settings.shard_passages,
        help=f"passages indexed at a time: bounds memory (default: {settings.shard_passages})",
    )
    dense = parser.add_argument_group("dense")
    vectors = DenseSettings(encoder="")
    dense.add_argument("--encoder", metavar="PATH", help="Hugging Face encoder, for example intfloat/e5-base-v2")
    dense.add_argument(
        "--faiss", choices=get_args(Faiss), default=vectors.faiss, help="flat: exact; ivf, hnsw: faster (default: flat)"
    )
    dense.add_argument(
        "--vector-dtype", choices=get_args(VectorDtype), default=vectors.vector_dtype, help="default: float16"
    )
    dense.add_argument("--query-prefix", default=vectors.query_prefix, help='before a query (default: "query: ")')
    dense.add_argument(
        "--passage-prefix", default=vectors.passage_prefix, help='before a passage (default: "passage: ")'
    )
    dense.add_argument(
        "--max-tokens",
        type=_positive,
        default=vectors.max_tokens,
        help=f"longer texts are cut there (default: {vectors.max_tokens})",
    )
    dense.add_argument(
        "--encoder-batch",
        type=_positive,
        default=vectors.batch_texts,
        help=f"texts of one forward (default: {vectors.batch_texts})",
    )


def _add_limits(group: argparse._ArgumentGroup) -> None:
    """Add an option for each of the server's limits."""
    limits = ServerLimits()
    for name, text in _LIMITS.items():
        default = getattr(limits, name)
        group.add_argument(
            f"--max-{name.replace('_', '-')}",
            dest=name,
            metavar="N",
            type=_positive if isinstance(default, int) else _positive_seconds,
            default=default,
            help=f"{text} (default: {default:g})" if isinstance(default, float) else f"{text} (default: {default})",
        )


def retriever(options: argparse.Namespace) -> int:
    """Build or open the index, serve it; returns the exit code.

    Raises:
        ConfigError: options that do not go together.
        DataError: a corpus file that cannot be used.
        FileNotFoundError, FileExistsError: a missing file; an index folder that holds something else.
    """
    _check(options)
    token = _token(options)
    folder = Path(options.index_dir or _default_folder(options))
    try:
        if options.build_only:
            _build(options, folder)
            print(f"index in {folder}")
            return 0
        return _serve(options, folder, token)
    except ImportError as error:  # before anything is built
        print(f"error: {error}: pip install 'atpo-fast[retrieval]'", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("retriever stopped", file=sys.stderr)
        return INTERRUPTED


def _serve(options: argparse.Namespace, folder: Path, token: str | None) -> int:
    """Serve until a signal comes. The address is bound before the build, so that an occupied port fails at once."""
    from atpo_fast.retrieval import open_index
    from atpo_fast.retrieval.server import listen, make_app, serve

    try:
        bound = listen(options.host, options.port)
    except (OSError, OverflowError) as error:
        return _occupied(options, error)
    with bound:
        if options.corpus:
            _build(options, folder)
        index = open_index(folder)
        limits = ServerLimits(**{name: getattr(options, name) for name in _LIMITS})
        host, port = bound.getsockname()[:2]
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"

        def tell() -> None:
            what = f"{index.kind}, {len(index.index):,} passages, top {options.topk}"
            print(f"retriever ready: {where}/retrieve ({what}); health: {where}/health; Ctrl-C ends it", flush=True)

        app = make_app(
            index,
            topk=options.topk,
            wait_seconds=options.batch_wait_ms / 1000,
            max_batch=options.max_batch,
            cache_bytes=options.cache_mb << 20,
            limits=limits,
            token=token,
        )
        try:
            serve(app, bound, tell, limits)
        except OSError as error:  # somebody began to listen during the build
            return _occupied(options, error)
    return 0


def _build(options: argparse.Namespace, folder: Path) -> None:
    from atpo_fast.retrieval import build_index
    from atpo_fast.telemetry import Progress

    with Progress() as progress:
        phase = ""

        def report(name: str, done: int, total: int | None) -> None:
            nonlocal phase
            if name != phase:
                progress.start_phase(name, total)
                phase = name
            progress.advance(done)

        build_index(folder, options.corpus, _settings(options), rebuild=options.rebuild, report=report)


def _settings(options: argparse.Namespace) -> BM25Settings | DenseSettings:
    if options.index == "bm25":
        return BM25Settings(options.k1, options.b, options.shard_passages)
    return DenseSettings(
        encoder=options.encoder,
        faiss=options.faiss,
        vector_dtype=options.vector_dtype,
        query_prefix=options.query_prefix,
        passage_prefix=options.passage_prefix,
        max_tokens=options.max_tokens,
        batch_texts=options.encoder_batch,
    )


def _check(options: argparse.Namespace) -> None:
    """Raise ConfigError for options that do not go together."""
    if not options.corpus and (options.build_only or options.rebuild or options.index_dir is None):
        raise ConfigError("the retriever needs --corpus FILE, or --index-dir DIR with a finished index")
    if options.corpus and options.index == "dense" and not options.encoder:
        raise ConfigError("--index dense needs --encoder PATH, for example intfloat/e5-base-v2")
    if options.topk > MAX_HITS:
        raise ConfigError(f"--topk {options.topk}: at most {MAX_HITS}")


def _token(options: argparse.Namespace) -> str | None:
    """Return the server's token. Warn where anybody who reaches it may search."""
    if options.token_variable is not None:
        token = os.environ.get(options.token_variable)
        if not token:
            raise ConfigError(f"--token-variable {options.token_variable}: the environment variable is empty; set it")
        return token
    if not options.build_only and not _is_loopback(options.host):
        _LOG.warning(
            "--host %s without --token-variable: everybody who reaches this machine can search, and read the corpus",
            options.host,
        )
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _default_folder(options: argparse.Namespace) -> str:
    return f"runs/indexes/{Path(options.corpus[0]).name.split('.')[0]}-{options.index}"


def _occupied(options: argparse.Namespace, error: Exception) -> int:
    reason = getattr(error, "strerror", None) or error
    print(f"error: cannot listen at {options.host}:{options.port} ({reason}); choose another --port", file=sys.stderr)
    return BAD_INPUT


def _positive(text: str) -> int:
    """Parse a command-line argument that is a whole number above 0."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _not_negative(text: str) -> int:
    """Parse a command-line argument that is a whole number of 0 or more."""
    return _positive(text) if int(text) else 0


def _positive_seconds(text: str) -> float:
    """Parse a command-line argument that is a time above 0."""
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError(text)
    return seconds


RETRIEVER = Verb(
    name="retriever",
    summary="a search server over a corpus: POST /retrieve, as published with AT2PO and Search-R1",
    detail="Builds the index first (BM25, or dense vectors in FAISS), or continues one that was interrupted; an "
    "index that is there is used again. Point tools.search_url at the printed address, or tools.index_dir at the "
    "index.",
    example="atpo-fast retriever --corpus wiki-18.jsonl --index bm25 --index-dir indexes/wiki18 --port 8000",
    run=retriever,
    add_arguments=add_arguments,
)
