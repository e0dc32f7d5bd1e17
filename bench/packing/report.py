"""Goals of the host's preparation, and its record in the report."""

from __future__ import annotations

from bench.core.tables import Section
from bench.core.verdicts import Goals, Record, Records, Verdict, at_most, implementation, p50
from bench.update.goals import update_record

_HOST = "host_preparation"


def _title(record: Record) -> str:
    tokens = record["tokens"]
    return f"64 trees × 22 leaves × 3,000 tokens, {tokens['unique']:,} unique of {tokens['flat']:,} flat tokens"


def _host(found: Records) -> Verdict:
    return at_most(p50(implementation(found.find(_HOST), "ours")), 150, "ms")


def _host_share(found: Records) -> Verdict:
    """Compare with an update of the same 64 trees, at the time for each token that the published forest takes."""
    host, update = found.find(_HOST), update_record(found, "qwen3-4b")
    a_token = p50(implementation(update, "ours")) / update["tokens"]["unique"]
    share = p50(implementation(host, "ours")) / (a_token * host["tokens"]["unique"])
    return Verdict(f"{100 * share:.2f} %", share < 0.01)


_LIMIT = "host preparation of 64 trees × 22 leaves (3,000 tokens each) at most 150 ms"
GPU: Goals = {_LIMIT: _host, "host preparation less than 1 % of the update at 4B": _host_share}
CPU: Goals = {_LIMIT: _host}
SECTION = Section(bench=_HOST, title=_title, order=lambda _: 0)
