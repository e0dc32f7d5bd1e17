"""Make the environment of one host's adapter test: `python3 .ci/adapters.py verl`, called by `make test-adapters`.

The hosts pin transformers and others, each to its own version, so each gets an environment. PyTorch and pytest are
those of `.venv`, whose packages are put behind the host's on the path of the new environment.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Host:
    """What is installed for a host."""

    package: str
    beside: list[str] = field(default_factory=list)
    """Packages that it imports beside those that it declares, or, without `declared`, in their place."""
    declared: bool = True
    """Whether to install what it declares. OpenRLHF declares flash-attn and bitsandbytes, which need CUDA."""


HOSTS = {
    "verl": Host("verl==0.9.1", ["cachetools>=5"]),
    "skyrl": Host(
        "skyrl==0.3.0",
        [
            "ray==2.56.0",
            "skyrl-gym==0.4.0",
            "loguru",
            "jaxtyping",
            "omegaconf",
            "hydra-core",
            "tensordict",
            "torchdata",
        ],
    ),
    "openrlhf": Host(
        "openrlhf==0.11.2", ["transformers==5.15.0", "ray==2.55.0", "peft", "optree", "pylatexenc", "torchdata"], False
    ),
}


def main(name: str) -> None:
    """Create `.venv-NAME` and install the host and atpo_kernels into it."""
    host, folder = HOSTS[name], ROOT / f".venv-{name}"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    site_packages = next((folder / "lib").glob("python3*/site-packages"))
    (site_packages / "shared.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")) + "\n")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if not host.declared:
        subprocess.run([*pip, "--no-deps", host.package], check=True)
    subprocess.run([*pip, *host.beside, *([host.package] if host.declared else [])], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", str(ROOT / "kernels")], check=True)


if __name__ == "__main__":
    main(sys.argv[1])
