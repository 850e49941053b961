"""Two agents that keep each other's last step: the carrying by itself, and a run that loses a host and its memory."""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PATIENCE_SECONDS = 240


@pytest.fixture(scope="session")
def neighbours(repository: Path) -> types.ModuleType:
    """launch/supervision/neighbours.py, which is not installed."""
    path = repository / "launch" / "supervision" / "neighbours.py"
    spec = importlib.util.spec_from_file_location("neighbours", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def agent(neighbours: types.ModuleType, tmp_path: Path) -> Iterator[Callable]:
    """agent(k): the neighbours' part of agent k of two, with its memory in tmp_path/k."""
    started = []

    def start(number: int, *, restore: bool = False) -> types.SimpleNamespace:
        memory = tmp_path / str(number)
        found = neighbours.Neighbours(
            tmp_path / "run", folder=memory / "own", copies=memory / "copies", node_rank=number, nodes=2,
            address="127.0.0.1",
        )
        found.start(restore=restore)
        started.append(found)
        return found

    yield start
    for found in started:
        found.stop()


def write_part(folder: Path, *, step: int, part: str, text: str = "weights") -> Path:
    """A host's part as ranks publish it."""
    target = folder / f"step-{step:08d}"
    target.mkdir(parents=True)
    content = text.encode() * 1000
    (target / "model.safetensors").write_bytes(content)
    files = {"model.safetensors": {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    (target / "manifest.json").write_text(json.dumps({"part_of": part, "files": files}))
    return target


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def carried(tmp_path: Path, number: int) -> str:
    path = tmp_path / str(number) / "own" / ".carried"
    return path.read_text() if path.exists() else ""


def test_parts_are_carried_to_the_next_agent_which_keeps_two_and_gives_them_back(
    agent: Callable, tmp_path: Path
) -> None:
    zero, _ = agent(0), agent(1)
    own, copies = tmp_path / "0" / "own", tmp_path / "1" / "copies" / "node-0"
    for step in (1, 2, 3):
        write_part(own, step=step, part=f"{step}-a", text=f"weights {step}")
        wait_for(lambda: carried(tmp_path, 0) == f"{step}-a")
    assert sorted(path.name for path in copies.iterdir()) == ["step-00000002", "step-00000003"]
    write_part(own.parent / "new", step=2, part="2-b").rename(own / "gone-back")  # the run went back to step 1
    shutil.rmtree(own / "step-00000002")
    (own / "gone-back").rename(own / "step-00000002")
    os.utime(own / "step-00000002" / "manifest.json")
    wait_for(lambda: carried(tmp_path, 0) == "2-b")
    zero.stop()
    shutil.rmtree(tmp_path / "0")
    agent(0, restore=True)
    back = {path.name: json.loads((path / "manifest.json").read_text())["part_of"] for path in own.glob("step-*")}
    assert back == {"step-00000002": "2-b", "step-00000003": "3-a"}
    assert (own / "step-00000003" / "model.safetensors").read_bytes() == b"weights 3" * 1000


def test_bytes_that_do_not_match_are_not_kept(agent: Callable, tmp_path: Path) -> None:
    agent(0), agent(1)
    part = write_part(tmp_path / "0" / "half", step=1, part="1-a")
    (part / "model.safetensors").write_bytes(b"other")
    (tmp_path / "0" / "own").mkdir()
    part.rename(tmp_path / "0" / "own" / part.name)
    wait_for(lambda: carried(tmp_path, 0) == "1-a")  # the run is not held up
    assert not list((tmp_path / "1").rglob("step-*"))


def test_a_neighbour_that_is_not_there_holds_up_nobody(
    agent: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agent(0, restore=True)
    for step in (1, 2):
        write_part(tmp_path / "0" / "own", step=step, part=f"{step}-a")
        wait_for(lambda: carried(tmp_path, 0) == f"{step}-a")
    said = capsys.readouterr().err
    assert said.count("no copy on node 1: node 1 has no agent yet") == 1 and "nothing came back from node 1" in said


@pytest.mark.parametrize(
    ("token", "path", "status"),
    [
        ("wrong", "/node-0", 403), ("", "/node-0/step-00000001/manifest.json", 403), (None, "/node-0", 200),
        (None, "/node-0/../../../run/agents/token", 404), (None, "/node-0/step-00000001/..%2ftoken", 404),
        (None, "/node-0/step-00000001/.part-00000.json", 404), (None, "/", 404),
    ],
)
def test_strangers_and_strange_paths_are_refused(
    token: str | None, path: str, status: int, agent: Callable, tmp_path: Path
) -> None:
    agent(1)
    folder = tmp_path / "run" / "agents"
    assert (folder / "token").stat().st_mode & 0o777 == 0o600
    place = json.loads((folder / "node-1.json").read_text())
    given = (folder / "token").read_text() if token is None else token
    for method in ("GET", "PUT") if status != 200 else ("GET",):
        connection = http.client.HTTPConnection(place["host"], place["port"], timeout=10)
        connection.request(method, path, body=b"x" * 10, headers={"Authorization": f"Bearer {given}"})
        assert connection.getresponse().status == status
        connection.close()
    assert not (tmp_path / "1" / "copies").exists()


def test_an_agents_address_is_one_that_others_can_reach(
    neighbours: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where HEAD is this host by a loopback name, as Debian's /etc/hosts has it, or has no name yet."""
    routes = {"10.1.2.3": "10.1.2.9", "127.0.1.1": "127.0.0.1", neighbours.BEYOND: "10.1.2.9"}

    class Probe:
        def __init__(self, *_: object) -> None: ...

        def __enter__(self) -> Probe:
            return self

        def __exit__(self, *_: object) -> None: ...

        def connect(self, target: tuple[str, int]) -> None:
            if target[0] not in routes:
                raise socket.gaierror("Name or service not known")
            self._own = routes[target[0]]

        def getsockname(self) -> tuple[str, int]:
            return self._own, 1

    monkeypatch.setattr(neighbours.socket, "socket", Probe)
    assert [neighbours.own_address(head) for head in ("10.1.2.3", "127.0.1.1", "not-yet")] == ["10.1.2.9"] * 3
    del routes[neighbours.BEYOND]
    assert neighbours.own_address("127.0.1.1") == "127.0.0.1"


def processes_of(run: Path, *, node: int) -> list[int]:
    """Whatever runs on a host: agent, launcher and rank, by their environment."""
    wanted, found = {f"TRIED_RUN={run}".encode(), f"NODE_RANK={node}".encode()}, []
    for entry in Path("/proc").iterdir():
        try:
            variables = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if wanted <= set(variables):
            found.append(int(entry.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("settings", [("engine.precision=bf16",), ("engine.kind=grid", "parallel.ep=2")])
def test_a_host_that_is_lost_with_its_memory_goes_on_from_its_neighbours_copy(
    settings: tuple[str, ...], repository: Path, tmp_path: Path
) -> None:
    """Two agents on one machine, a memory each; one loses agent, launcher, rank and memory. No checkpoint on disk."""
    run, every = tmp_path / "run", ("train.steps=40", "data.streams=2", "batch.global_sequences=2", *settings)
    if "engine.kind=grid" in settings:
        every = (*every, "engine.zero_stage=0")
    config = str(repository / "tools" / "chaos" / "chaos.yaml")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def host(node: int) -> subprocess.Popen:
        variables = {"NODES": "2", "NODE_RANK": str(node), "HEAD": "127.0.0.1", "PORT": str(port), "PROCESSES": "1",
                     "PYTHON": sys.executable, "TRIED_RUN": str(run), "OMP_NUM_THREADS": "1"}
        (tmp_path / str(node)).mkdir(exist_ok=True)
        with (tmp_path / f"agent-{node}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, str(repository / "launch" / "supervise.py"), "--run-dir", str(run), "--delay", "0.1",
                 "--memory", str(tmp_path / str(node)), "--", "bash", str(repository / "launch" / "torchrun.sh"),
                 config, f"train.run_dir={run}", "checkpoint.every_steps=0", *every],
                env={**os.environ, **variables}, stdout=log, stderr=log,
            )

    agents = [host(0), host(1)]
    metrics = run / "metrics.jsonl"
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (metrics.exists() and metrics.read_text().count("\n") >= 6) and time.monotonic() < deadline:
            time.sleep(0.02)
        for number in processes_of(run, node=1):
            os.kill(number, signal.SIGKILL)
        agents[1].wait()
        shutil.rmtree(tmp_path / "1")
        agents[1] = host(1)
        codes = [agent.wait(timeout=PATIENCE_SECONDS) for agent in agents]
    finally:
        for node in (0, 1):
            for number in processes_of(run, node=node):
                os.kill(number, signal.SIGKILL)
    said = "".join((tmp_path / f"agent-{node}.log").read_text() for node in (0, 1))
    assert codes == [0, 0], said[-8000:]
    resumed = [line for line in (run / "log.txt").read_text().splitlines() if "resumed from" in line]
    assert len(resumed) == 1 and f"{tmp_path}/0/ernie5-" in resumed[0] and int(resumed[0].rsplit(" ", 1)[1]) >= 1, said
    assert "of this host came back from node 0" in said
    whole = tmp_path / "whole"
    subprocess.run([sys.executable, str(repository / "launch" / "spawn.py"), "2", config, f"train.run_dir={whole}",
                    "checkpoint.every_steps=0", *every], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    figures = [[(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, path.read_text().splitlines())]
               for path in (metrics, whole / "metrics.jsonl")]
    assert figures[0] == figures[1] and len(figures[0]) == 40
    assert not list(tmp_path.glob("[01]/ernie5-*"))
