"""How long waiting threads spin: bounded, unless the user has decided."""

from __future__ import annotations

import pytest

from atpo_fast.common.threads import SPINNING, bound_spinning


def test_spinning_is_bounded() -> None:
    """Fails if a runtime is left out, or other variables are touched."""
    environment = {"OMP_NUM_THREADS": "2"}
    bound_spinning(environment)
    assert environment == {"OMP_NUM_THREADS": "2", **SPINNING}


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY"])
def test_the_user_decides(name: str) -> None:
    """Fails if a value of the user's is replaced, or another one is put beside it."""
    environment = {name: "user"}
    bound_spinning(environment)
    assert environment == {name: "user"}
