"""Make `.venv` (once) and `.venv/constraints.txt`: `python3 .ci/venv.py`, called by the Makefile.

A PyTorch in range that the calling Python already has is kept: the folder it lies in is put on the new environment's
path, and what lies there is not pinned, so that pip replaces only what the project's version ranges rule out.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
TORCH_RANGE = (2, 11), (2, 14)  # as in pyproject.toml: at least, below
FOREIGN = "preinstalled_torch.pth"


def main() -> None:
    """Create the environment if it is not there, then write its constraints."""
    if not (VENV / "bin" / "python").exists():
        torch_home = preinstalled_torch()
        print(f"making .venv with {sys.executable}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        if torch_home is not None:
            (site_packages() / FOREIGN).write_text(f"{torch_home}\n")
            print(f"keeping the PyTorch in {torch_home}", flush=True)
    write_constraints()


def preinstalled_torch() -> Path | None:
    """Find the folder that holds an importable PyTorch in range, if this Python has one."""
    try:
        import torch
    except Exception:  # absent or broken: either way not one to keep
        return None
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return Path(torch.__file__).resolve().parent.parent if TORCH_RANGE[0] <= version < TORCH_RANGE[1] else None


def site_packages() -> Path:
    """Return the package folder of `.venv`."""
    return next((VENV / "lib").glob("python3*/site-packages"))


def write_constraints() -> None:
    """Write `constraints.txt` without the packages that the kept PyTorch's folder brings."""
    foreign = site_packages() / FOREIGN
    kept = (
        {normal(d.metadata["Name"]) for d in distributions(path=[foreign.read_text().strip()])}
        if foreign.exists()
        else set()
    )
    lines = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    (VENV / "constraints.txt").write_text("".join(line for line in lines if normal(line.split("==")[0]) not in kept))


def normal(name: str) -> str:
    """Normalise a distribution's name as pip does."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
