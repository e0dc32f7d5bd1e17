"""Retrieval: recall of E5's hits by BM25, queries a second through HTTP, and what building an index takes.

    ATPO_DATA=data python -m bench retrieval

Real wiki-18 passages and real queries with the hits of E5 over all of wiki-18, from the folder that ATPO_DATA names
(`corpus/wiki18_passages_sample.jsonl.gz`, `cache/wiki18_e5_top3_cache.jsonl.gz`).
Writes `bench/results/cpu/retrieval.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from atpo_fast.data.records import read_records
from atpo_fast.environment import HTTPSearch
from atpo_fast.retrieval import open_index
from bench.core.records import RESULTS, device_name, environment, package_version, write_record

CORPUS = "corpus/wiki18_passages_sample.jsonl.gz"
CACHE = "cache/wiki18_e5_top3_cache.jsonl.gz"
RECALL_QUERIES = 1000
CONCURRENCY = 32
WIKI18_PASSAGES = 21_015_324
PACKAGES = ("bm25s", "numpy", "fastapi", "uvicorn", "uvloop", "httptools")


def main(arguments: list[str] | None = None) -> None:
    """Measure everything and write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m bench retrieval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("ATPO_DATA"), help="default: $ATPO_DATA")
    parser.add_argument("--sizes", default="125000,250000,500000,1000000", help="passages of the scaling measurement")
    parser.add_argument("--shard-passages", type=int, default=250_000)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    options = parser.parse_args(arguments)
    if options.data is None:
        parser.error("set ATPO_DATA, or give --data, to the folder with the real data sets")
    cached = [record.value for record in read_records(options.data / CACHE)]
    queries = list(dict.fromkeys(row["query"] for row in cached))
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder, "index")
        retriever("--corpus", str(options.data / CORPUS), "--index-dir", str(index), "--build-only")
        record: dict[str, Any] = {
            "device": device_name("cpu"),
            **environment(),
            "packages": {name: package_version(name) for name in PACKAGES},
            "passages": len(open_index(index).documents),
            "recall": recall(index, cached[:: len(cached) // RECALL_QUERIES][:RECALL_QUERIES]),
            "http": http(index, queries),
        }
        sizes = [int(size) for size in options.sizes.split(",") if size]
        record["build"] = build(options.data / CORPUS, sizes, options.shard_passages, Path(folder))
    print(json.dumps(record, indent=1))
    write_record("retrieval", "retrieval", "cpu", options.results, **record)


# --- recall ------------------------------------------------------------------------------------------------------


def recall(index: Path, cached: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Measure the share of E5's three hits that are among BM25's first k, as the mean over queries.

    E5 searched all of wiki-18, BM25 only the sample, which is made of E5's hits: over all of wiki-18 it would be less.
    """
    retriever = open_index(index)
    ids = [retriever.documents[number]["id"] for number in range(len(retriever.documents))]
    found = [[ids[hit.number] for hit in hits] for hits in retriever.hits([row["query"] for row in cached], 10)]
    result: dict[str, Any] = {"queries": len(cached)}
    for k in (3, 10):
        shares = [
            len(set(row["ids"]) & set(hits[:k])) / len(row["ids"]) for row, hits in zip(cached, found, strict=True)
        ]
        result[f"recall_at_{k}"] = round(sum(shares) / len(shares), 4)
        result[f"any_at_{k}"] = round(sum(share > 0 for share in shares) / len(shares), 4)
    return result


# --- queries a second --------------------------------------------------------------------------------------------


def http(index: Path, queries: Sequence[str]) -> dict[str, Any]:
    """Measure queries a second and latency at 32 requests at once, one query a request as published.

    Server and client share the cores. `searched`: no cache, so every query is searched. `remembered`: all answers come
    from the cache. `new_connections`: our client, which opens a connection for every query, as the published one does.
    """
    result: dict[str, Any] = {"concurrency": CONCURRENCY, "topk": 3}
    with running(index, "--cache-mb", "0") as url:
        load(url, queries[:500])  # first use of everything
        result["searched"] = load(url, queries)
        result["new_connections"] = load_by_threads(url, queries)
    with running(index) as url:
        load(url, queries)
        result["remembered"] = load(url, queries)
    return result


@contextmanager
def running(index: Path, *options: str) -> Iterator[str]:
    """Run a server in a process of its own and yield its address."""
    command = [sys.executable, "-m", "atpo_fast", "retriever", "--index-dir", str(index), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout
        line = next((line for line in process.stdout if "ready" in line), None)
        if line is None:
            raise RuntimeError("the retriever did not start")
        yield line.split()[2]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def load(url: str, queries: Sequence[str]) -> dict[str, float]:
    """Send all queries once, over connections that are kept."""
    waiting, seconds = list(reversed(queries)), []

    async def connection() -> None:
        host, port = url.split("/")[2].split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        while waiting:
            body = json.dumps({"queries": [waiting.pop()], "topk": 3, "return_scores": True}).encode()
            start = time.perf_counter()
            head = f"POST /retrieve HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"the retriever answered {answer!r}")
            length = int(answer.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            hits = json.loads(await reader.readexactly(length))["result"]
            seconds.append(time.perf_counter() - start)
            assert len(hits) == 1
        writer.close()

    async def everything() -> None:
        await asyncio.gather(*(connection() for _ in range(CONCURRENCY)))

    start = time.perf_counter()
    asyncio.run(everything())
    return summary(seconds, time.perf_counter() - start)


def load_by_threads(url: str, queries: Sequence[str]) -> dict[str, float]:
    """Send all queries once, by the search tool in 32 threads."""
    waiting, seconds, search = list(reversed(queries)), [], HTTPSearch(url)

    def work() -> None:
        while True:
            try:
                query = waiting.pop()
            except IndexError:
                return
            start = time.perf_counter()
            search(query)
            seconds.append(time.perf_counter() - start)

    threads = [threading.Thread(target=work) for _ in range(CONCURRENCY)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return summary(seconds, time.perf_counter() - start)


def summary(seconds: Sequence[float], wall: float) -> dict[str, float]:
    """Return the queries a second and percentiles of the latency."""
    p50, p99 = np.percentile(seconds, [50, 99])
    return {
        "queries": len(seconds),
        "queries_per_s": round(len(seconds) / wall, 1),
        "p50_ms": round(1000 * p50, 2),
        "p99_ms": round(1000 * p99, 2),
    }


# --- building ----------------------------------------------------------------------------------------------------


def build(corpus: Path, sizes: Sequence[int], shard_passages: int, folder: Path) -> dict[str, Any]:
    """Measure seconds, peak resident memory and bytes on disk by number of passages.

    Passages are the sample over and over, with new ids.
    The line through the last two sizes is drawn on to wiki-18. Repeated passages bring no new words: in a corpus of
    other passages the words (16 bytes each, in memory while shards are added up) grow more.
    """
    measured = [build_one(corpus, size, shard_passages, folder) for size in sizes]
    result: dict[str, Any] = {"shard_passages": shard_passages, "measured": measured}
    if len(measured) > 1:
        a, b = measured[-2:]
        for name in ("seconds", "index_mb"):
            slope = (b[name] - a[name]) / (b["passages"] - a["passages"])
            result[f"wiki18_{name}"] = round(b[name] + slope * (WIKI18_PASSAGES - b["passages"]))
    return result


def build_one(corpus: Path, size: int, shard_passages: int, folder: Path) -> dict[str, Any]:
    """Measure one build in a process of its own."""
    many, index = folder / "many.jsonl", folder / f"index_{size}"
    with gzip.open(corpus) as file:
        documents = [json.loads(line) for line in file]
    with many.open("w") as file:
        for number in range(size):
            row = documents[number % len(documents)] | {"id": str(number)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    options = ["--corpus", str(many), "--index-dir", str(index), "--shard-passages", str(shard_passages)]
    start = time.perf_counter()
    used = retriever(*options, "--build-only")
    shards = sorted((index / "shards").glob("*.scores"))
    measured = {
        "passages": size,
        "shards": len(shards),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_memory_mb": round(used.ru_maxrss / 1000),
        "corpus_mb": round(many.stat().st_size / 1e6, 1),
        "index_mb": round(sum(path.stat().st_size for path in index.rglob("*") if path.is_file()) / 1e6, 1),
        "search_ms": search_ms(index),
    }
    print(measured, flush=True)
    return measured


def search_ms(index: Path) -> float:
    """Return the milliseconds a query takes, in process, 64 in a batch."""
    retriever = open_index(index)
    queries = [retriever.documents[31 * number]["contents"].split("\n")[0] for number in range(64)]
    find = partial(retriever.hits, queries, 3)
    find()
    start = time.process_time()
    find()
    return round(1000 * (time.process_time() - start) / len(queries), 3)


def retriever(*options: str) -> Any:
    """Run the verb `retriever` and return what it used."""
    process = subprocess.Popen([sys.executable, "-m", "atpo_fast", "retriever", *options], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"atpo-fast retriever {' '.join(options)} failed")
    return used
