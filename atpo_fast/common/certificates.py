"""The certificates that servers are checked with, read once."""

from __future__ import annotations

import ssl
from functools import lru_cache

import httpx


@lru_cache(maxsize=2)
def certificates(*, trust_env: bool) -> ssl.SSLContext:
    """Return what the clients of this process check servers with; reading it takes longer than many a request.

    Args:
        trust_env: whether SSL_CERT_FILE and SSL_CERT_DIR say where the certificates are.
    """
    return httpx.create_ssl_context(trust_env=trust_env)
