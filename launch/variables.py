"""The one place where the environment variables of launchers become those that ernie5 and torch read.

| ours | deepspeed, torchrun | srun (Slurm) | mpirun (Open MPI) | mpiexec (Hydra: MPICH, Intel MPI) |
| --- | --- | --- | --- | --- |
| RANK | RANK | SLURM_PROCID | OMPI_COMM_WORLD_RANK | PMI_RANK |
| WORLD_SIZE | WORLD_SIZE | SLURM_NTASKS | OMPI_COMM_WORLD_SIZE | PMI_SIZE |
| LOCAL_RANK | LOCAL_RANK, --local_rank | SLURM_LOCALID | OMPI_COMM_WORLD_LOCAL_RANK | MPI_LOCALRANKID |
| LOCAL_WORLD_SIZE | LOCAL_SIZE | SLURM_STEP_TASKS_PER_NODE | OMPI_COMM_WORLD_LOCAL_SIZE | MPI_LOCALNRANKS |
| MASTER_ADDR | MASTER_ADDR | first of SLURM_STEP_NODELIST | set it yourself | set it yourself |
| MASTER_PORT | MASTER_PORT | 20000 + SLURM_JOB_ID % 10000 | 29500 | 29500 |

What is set already wins. A Kubernetes pod starts torchrun, whose variables are in the first column.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SOURCES = {
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID",
             "SLURM_STEP_NODELIST", "SLURM_JOB_ID"),
    "mpirun": tuple(f"OMPI_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
# Whose rank it is. One of MPI has Slurm's as well inside a job: of its script, or of the step that started MPI there.
MARKS = (("OMPI_COMM_WORLD_RANK", "mpirun"), ("MPI_LOCALRANKID", "mpiexec"), ("SLURM_STEP_ID", "srun"),
         ("PMI_RANK", "mpiexec"))


def adopt_launcher(arguments: list[str]) -> list[str]:
    """Set this process's variables from those of its launcher; returns the arguments less `--local_rank`, which some
    launchers add to them. Ends with code 2 where a variable is missing or cannot be true."""
    kept, told = without_local_rank(arguments)
    if told:
        os.environ.setdefault("LOCAL_RANK", told)
    try:
        os.environ.update(variables_of(os.environ))
        return kept
    except KeyError as missing:
        problem = f"the launcher did not set {missing.args[0]}. Set it to where rank 0 runs, or see launch/variables.py"
    except ValueError as error:
        problem = str(error)
    print(f"LayoutError: {problem}", file=sys.stderr)
    sys.exit(2)


def variables_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Ours, as `environment` gives them; empty without a launcher. Raises KeyError or ValueError naming variables."""
    if "RANK" in environment:
        local = environment.get("LOCAL_SIZE")
        return {"LOCAL_WORLD_SIZE": local} if local and "LOCAL_WORLD_SIZE" not in environment else {}
    launcher = next((name for variable, name in MARKS if variable in environment), None)
    if launcher is None:
        return {}  # by hand
    told = {name: environment[name] for name in SOURCES[launcher]}
    found, address, port = dict(zip(NAMES, told.values())), environment.get("MASTER_ADDR"), 29500
    try:
        if launcher == "srun":
            found["LOCAL_WORLD_SIZE"] = tasks_of_node(told["SLURM_STEP_TASKS_PER_NODE"], node=int(told["SLURM_NODEID"]))
            address = address or first_host(told["SLURM_STEP_NODELIST"])
            port = 20000 + int(told["SLURM_JOB_ID"]) % 10000
        elif found["LOCAL_WORLD_SIZE"] == found["WORLD_SIZE"]:
            address = "127.0.0.1"
        rank, size, local_rank, local_size = (int(found[name]) for name in NAMES)
        is_possible = 0 <= rank < size and 0 <= local_rank < local_size
    except (AttributeError, IndexError, ValueError):
        is_possible = False
    if not is_possible:
        said = ", ".join(f"{name}={value}" for name, value in told.items())
        raise ValueError(f"what {launcher} says cannot all be true: {said}. Unset what was set by hand")
    found["MASTER_ADDR"] = address or environment["MASTER_ADDR"]
    return {**found, "MASTER_PORT": environment.get("MASTER_PORT", str(port))}


def first_host(nodes: str) -> str:
    """The first name of a Slurm list: `gpu[007-010,12],login1` -> gpu007."""
    first = re.match(r"[^,\[]+(\[[^\]]+\][^,\[]*)*", nodes).group()
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def tasks_of_node(counts: str, *, node: int) -> str:
    """Tasks on one node out of a Slurm list: `4(x2),1` -> 4, 4, 1."""
    expanded = [tasks for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))]
    return expanded[node]


def without_local_rank(arguments: list[str]) -> tuple[list[str], str]:
    """The arguments less `--local_rank=N` and its variants, and that N ("" for none)."""
    kept, told, words = [], "", iter(arguments)
    for word in words:
        name, _, value = word.partition("=")
        if name in ("--local_rank", "--local-rank"):
            told = value or next(words, "0")
        else:
            kept.append(word)
    return kept, told
