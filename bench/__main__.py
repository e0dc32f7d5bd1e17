"""`python -m bench`: the command line of the benches.

    python -m bench [--quick] [--list] [--cases ...]   measure cases, a record each in bench/results/
    python -m bench report               write bench/results/RESULTS.md and its plots from the records
    python -m bench resources            compile every kernel, write bench/kernels/RESOURCES.md
    python -m bench quickstart-seeds     train a quickstart with several seeds
    python -m bench streaming            compare the schedules of rollouts
    python -m bench retrieval            measure retrieval on the real data in $ATPO_DATA
    python -m bench threads              measure how long waiting threads should spin
    python -m bench real-model           compare engine and update with Hugging Face on a model of real size
    python -m bench memory               what `atpo-fast plan` tells beside what was held
    python -m bench hybrid               the update of models with recurrent layers: trees against flat rows
    python -m bench host-batches         batches of other trainers, flat and with common prompts merged
    python -m bench training-run RUN     record a training with a real model, its curve and its evaluations
    python -m bench soak                 train under faults drawn from a seed, about an hour of two busy cores
    python -m bench kills                kill a training at ten random moments, compare it with an unbroken one
    python -m bench.methods              compare the methods, about an hour (`make compare`)
    python -m bench.gpu_day              the first quarter of an hour on a GPU: docs/gpu_day.md

Each takes --help. `pytest bench --benchmark-only` times the same cases with pytest-benchmark.

On a machine with nothing but torch, triton and transformers, cases run from the root of the repository without an
installation: `PYTHONPATH=kernels python -m bench`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

COMMANDS = {
    "run": "bench.run",
    "report": "bench.report",
    "resources": "bench.kernels.resources",
    "quickstart-seeds": "bench.systems.quickstart_seeds",
    "streaming": "bench.systems.streaming",
    "retrieval": "bench.systems.retrieval",
    "threads": "bench.systems.threads",
    "real-model": "bench.systems.real_model",
    "hybrid": "bench.systems.hybrid",
    "memory": "bench.systems.memory",
    "host-batches": "bench.packing.host_batches",
    "training-run": "bench.systems.training_run",
    "soak": "bench.soak.soak",
    "kills": "bench.soak.kills",
}


def main(arguments: list[str]) -> None:
    """Run the command that the first argument names; without one, measure cases."""
    if find_spec("atpo_kernels") is None:
        sys.exit("bench: atpo_kernels is not installed; run `pip install ./kernels`, or set PYTHONPATH=kernels")
    named = bool(arguments) and arguments[0] in COMMANDS
    command = arguments[0] if named else "run"
    import_module(COMMANDS[command]).main(arguments[1:] if named else arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
