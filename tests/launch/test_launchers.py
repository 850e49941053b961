"""What each launcher tells a rank, and the files that start runs under Slurm and Kubernetes."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

SLURM = {  # of the second task on the second node, as `srun --ntasks 5` on three nodes sets them
    "SLURM_PROCID": "3", "SLURM_NTASKS": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "gpu[007-008,11]", "SLURM_JOB_ID": "1234567",
}


@pytest.fixture(scope="session")
def variables(repository: Path) -> types.ModuleType:
    """launch/variables.py, which is not installed."""
    spec = importlib.util.spec_from_file_location("launch_variables", repository / "launch" / "variables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_srun_tells_rank_host_and_port(variables: types.ModuleType) -> None:
    assert variables.variables_of(SLURM) == {
        "RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu007",
        "MASTER_PORT": "24567",
    }
    assert variables.variables_of({**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1"})["MASTER_ADDR"] == "10.0.0.1"
    job = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}
    assert variables.variables_of(job) == {}  # the batch script itself is no rank


def test_mpi_launchers_tell_the_rank_and_need_an_address_for_several_hosts(variables: types.ModuleType) -> None:
    openmpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
               "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert variables.variables_of(openmpi)["MASTER_ADDR"] == "127.0.0.1"
    hydra = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    with pytest.raises(KeyError, match="MASTER_ADDR"):
        variables.variables_of(hydra)
    found = variables.variables_of({**hydra, "MASTER_ADDR": "node0"})
    assert (found["RANK"], found["MASTER_ADDR"], found["MASTER_PORT"]) == ("1", "node0", "29500")


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "1"}], ids=["the script's host", "other hosts"])
def test_ranks_of_mpi_inside_a_slurm_job_are_those_of_mpi(variables: types.ModuleType, step: dict[str, str]) -> None:
    """Every one of them trained alone, or took the place of the process that started MPI on its host."""
    job = {**{name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"}, **step, "MASTER_ADDR": "node0"}
    for names in (variables.SOURCES["mpirun"], variables.SOURCES["mpiexec"]):
        found = variables.variables_of({**job, **dict(zip(names, ("1", "4", "0", "2"), strict=True))})
        assert [found[name] for name in variables.NAMES] == ["1", "4", "0", "2"]
    if step:  # srun may speak PMI itself
        assert variables.variables_of({**job, "PMI_RANK": "1", "PMI_SIZE": "4"})["RANK"] == SLURM["SLURM_PROCID"]


def test_what_deepspeed_and_torchrun_set_is_kept_and_no_launcher_sets_nothing(variables: types.ModuleType) -> None:
    assert variables.variables_of({"RANK": "0", "LOCAL_SIZE": "2"}) == {"LOCAL_WORLD_SIZE": "2"}
    assert variables.variables_of({"RANK": "0", "LOCAL_WORLD_SIZE": "2", **SLURM}) == {}
    assert variables.variables_of({"HOME": "/root"}) == {}
    assert variables.without_local_rank(["a", "--local_rank=3", "b"]) == (["a", "b"], "3")
    assert variables.without_local_rank(["--local-rank", "2", "c"]) == (["c"], "2")


@pytest.mark.parametrize(("nodes", "first"), [
    ("gpu[007-010,12],login1", "gpu007"), ("a1,a2", "a1"), ("host", "host"), ("r[1-2]n[03,05]-ib", "r1n03-ib"),
])
def test_the_first_host_of_a_slurm_list(variables: types.ModuleType, nodes: str, first: str) -> None:
    assert variables.first_host(nodes) == first


def test_a_rank_without_an_address_is_refused_with_its_name(repository: Path) -> None:
    told = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "RANK"))}
    done = subprocess.run([sys.executable, str(repository / "launch" / "pretrain.py"), "x.yaml"], capture_output=True,
                          text=True, env={**clean, **told})
    assert done.returncode == 2 and "did not set MASTER_ADDR" in done.stderr


@pytest.mark.parametrize("wrong", [
    {"SLURM_NODEID": "3"}, {"SLURM_PROCID": "5"}, {"SLURM_LOCALID": "2"}, {"SLURM_STEP_TASKS_PER_NODE": ""},
    {"SLURM_STEP_NODELIST": ""}, {"SLURM_JOB_ID": "mine"}, {"SLURM_NTASKS": "x"}, {"SLURM_PROCID": "-1"},
], ids=lambda wrong: "=".join(*wrong.items()))
def test_what_srun_cannot_have_said_is_refused_with_the_names_of_its_variables(
    repository: Path, wrong: dict[str, str]
) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "RANK", "SLURM"))}
    done = subprocess.run([sys.executable, str(repository / "launch" / "pretrain.py"), "x.yaml"], capture_output=True,
                          text=True, env={**clean, **SLURM, **wrong})
    (name, value), = wrong.items()
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "LayoutError: what srun says cannot all be true: SLURM_PROCID=" in done.stderr
    assert f"{name}={value}" in done.stderr


def test_the_slurm_script_runs_what_it_names_and_asks_for_a_requeue(repository: Path, tmp_path: Path) -> None:
    """bash runs it; `srun` and `scontrol` are programs that write down how they were called."""
    for name, code in (("srun", 75), ("scontrol", 0)):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/called\nexit {code}\n', encoding="utf-8")
        program.chmod(0o755)
    script = repository / "launch" / "slurm.sh"
    told = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(repository),
            "SLURM_JOB_ID": "7"}
    assert subprocess.run(["bash", str(script), "c.yaml", "a.b=c d"], env=told, check=False).returncode == 75
    called = (tmp_path / "called").read_text("utf-8").splitlines()
    assert called[0].endswith(f"{repository}/launch/pretrain.py c.yaml a.b=c d") and "--kill-on-bad-exit=1" in called[0]
    assert called[1:] == ["scontrol requeue 7"]
    subprocess.run(["bash", str(script), "c.yaml"], env={**told, "SLURM_RESTART_COUNT": "10"}, check=False)
    assert len((tmp_path / "called").read_text("utf-8").splitlines()) == 3
    assert all(line.startswith("#SBATCH") for line in script.read_text("utf-8").splitlines() if "SBATCH" in line)


def test_the_manifest_says_the_same_thing_in_all_its_places(repository: Path) -> None:
    service, job = yaml.safe_load_all((repository / "launch" / "kubernetes.yaml").read_text("utf-8"))
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {one["name"]: one["value"] for one in container["env"]}
    assert (service["kind"], job["kind"], job["apiVersion"]) == ("Service", "Job", "batch/v1")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert spec["completionMode"] == "Indexed"  # sets JOB_COMPLETION_INDEX and host names job-index
    assert spec["completions"] == spec["parallelism"] == int(variables["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["PROCESSES"])
    assert pod["subdomain"] == service["metadata"]["name"]
    assert variables["HEAD"] == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert spec["template"]["metadata"]["labels"].items() >= service["spec"]["selector"].items()
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy demands it
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (command,) = container["args"]
    for path in re.findall(r"(?:launch|configs)/\S+", command):
        assert (repository / path).is_file(), path
    assert "NODE_RANK=$JOB_COMPLETION_INDEX" in command and command.count("/runs/mine") == 2


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("script", ["install.sh", "local.sh", "quickstart.sh", "slurm.sh", "spawn.py", "torchrun.sh",
                                    "pretrain.py", "preflight.py", "supervise.py"])
def test_every_script_says_how_it_is_used_and_does_nothing(
    repository: Path, tmp_path: Path, script: str, option: str
) -> None:
    for name in ("dirname", "sed"):  # no program that would install or train
        (tmp_path / name).symlink_to(shutil.which(name))
    is_python = script.endswith(".py")
    done = subprocess.run(
        [sys.executable if is_python else shutil.which("bash"), str(repository / "launch" / script), option],
        capture_output=True, text=True, timeout=60, env=dict(os.environ) if is_python else {"PATH": str(tmp_path)},
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "launch/" in done.stdout or "usage: " in done.stdout


@pytest.mark.parametrize(("script", "given", "said"), [
    ("local.sh", (), "bash launch/local.sh configs/"), ("install.sh", ("tests",), "does not know 'tests'"),
])
def test_a_script_that_cannot_be_meant_so_ends_with_2(
    repository: Path, tmp_path: Path, script: str, given: tuple[str, ...], said: str
) -> None:
    for name in ("dirname", "sed"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = subprocess.run([shutil.which("bash"), str(repository / "launch" / script), *given], capture_output=True,
                          text=True, timeout=60, env={"PATH": str(tmp_path)})
    assert (done.returncode, done.stdout) == (2, "") and said in done.stderr


@pytest.fixture
def quickstart(repository: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    """quickstart(setting) runs a copy of quickstart.sh whose programs do nothing, HOME being tmp_path/home."""
    root = tmp_path / "root"
    for name in ("launch/install.sh", ".venv/bin/ernie5", ".venv/bin/python"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("#!/bin/sh\n")
        (root / name).chmod(0o755)
    shutil.copy(repository / "launch" / "quickstart.sh", root / "launch")
    (tmp_path / "home").mkdir()
    told = {**os.environ, "HOME": str(tmp_path / "home")}

    def run(setting: str) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", str(root / "launch" / "quickstart.sh"), setting], capture_output=True, text=True,
                              env=told, check=False)

    return run


@pytest.mark.parametrize("place", ["", "launch/install.sh", "launch/install.sh/inside"])
def test_the_quickstart_refuses_a_run_directory_that_can_be_none_in_one_line(
    quickstart: Callable[..., subprocess.CompletedProcess], place: str
) -> None:
    done = quickstart(f"train.run_dir={place}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"ConfigError: train.run_dir={place} cannot be a run directory (")


def test_the_quickstart_takes_a_tilde_for_home_as_the_run_does(
    quickstart: Callable[..., subprocess.CompletedProcess], tmp_path: Path
) -> None:
    assert quickstart("train.run_dir=~/mine").returncode == 0
    assert (tmp_path / "home" / "mine" / "timings.jsonl").is_file() and not (tmp_path / "root" / "~").exists()
