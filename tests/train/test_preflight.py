"""The preflight on three ranks: sound, and made wrong on one of them in every way that it looks for."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ernie5.parallel.probe import Link
from ernie5.train.preflight import judge_links

SIZE = 3


@pytest.fixture(scope="module")
def results(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each rank of preflight_rank.py found, by case."""
    folder = tmp_path_factory.mktemp("preflight")
    for name in ("shared", *(f"own{rank}" for rank in range(SIZE))):
        (folder / name).mkdir()
    older = folder / "older" / "ernie5-0.0.9.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: ernie5\nVersion: 0.0.9\n", encoding="utf-8")
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    ports = " ".join(str(one.getsockname()[1]) for one in sockets)
    for one in sockets:
        one.close()
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "PORTS": ports, "FOLDER": str(folder), "OMP_NUM_THREADS": "1",
              "CONFIG": str(repository / "configs" / "pretrain" / "debug.yaml")}
    command = [sys.executable, str(Path(__file__).with_name("preflight_rank.py"))]
    ranks = [subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
             for rank in range(SIZE)]
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * SIZE, said
    return [json.loads((folder / f"rank{rank}.json").read_text("utf-8")) for rank in range(SIZE)]


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT), ids=lambda number: number.name)
def test_a_signal_ends_a_rank_that_waits_for_the_others(
    repository: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C was seen when two minutes were over."""
    settings = ("engine.kind=grid", f"train.run_dir={tmp_path / 'run'}", "batch.micro_sequences=1")
    command = [sys.executable, "-m", "ernie5", "train", "--preflight", "configs/pretrain/debug.yaml", *settings]
    with socket.create_server(("127.0.0.1", 0)) as server:  # which says nothing
        told = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
                "MASTER_PORT": str(server.getsockname()[1])}
        with subprocess.Popen(command, env={**os.environ, **told}, cwd=repository) as child:
            try:
                server.settimeout(120)
                server.accept()[0].recv(1)
                child.send_signal(number)
                assert child.wait(timeout=60) == -number
            finally:
                child.kill()


def test_ranks_that_do_not_come_are_named_beside_those_that_did(results: list[dict]) -> None:
    for found in results:
        assert found["missing"].startswith("PeerError 5: rank 3, 4 did not come within 6 s")
        assert "rank 0 on node0, 1 on node1, 2 on node2" in found["missing"]


def test_a_rank_that_comes_twice_and_another_number_of_processes_are_named(results: list[dict]) -> None:
    for found in results:
        assert found["twice"].startswith("LayoutError 2: rank 1 came twice, from node")
        assert "rank 0 on node0 was told WORLD_SIZE=3, and node1 (rank 1): 4" in found["told"]


def test_a_sound_cluster_passes_with_a_line_for_every_check(results: list[dict]) -> None:
    assert [found["sound"][0] for found in results] == [""] * SIZE
    lines = results[0]["sound"][1]
    for part in ("3 ranks on 3 hosts (node0: rank 0; node1: rank 1; node2: rank 2)", "python", "storage", "clocks",
                 "all-to-all over dp = dp_cp", "= ep", "host to host", "passed"):
        assert any(part in line for line in lines), (part, lines)
    assert [found["sound"][1] for found in results[1:]] == [[], []]


@pytest.mark.parametrize(("case", "message"), [
    ("settings", "ConfigError 2: the settings differ between hosts in train.seed"),
    ("clock", "EnvironmentFault 3: preflight: clocks differ: node1 (rank 1): its clock is 90.0 s ahead"),
    ("elsewhere", "is not shared storage: node1 (rank 1): the others' files are not there"),
    ("unwritable", "is not shared storage: node2 (rank 2): File too large"),
    ("version", "versions differ: node1 (rank 1): ernie5 0.0.9, the others 0.1.0"),
])
def test_the_host_that_is_wrong_is_named_on_every_rank(results: list[dict], case: str, message: str) -> None:
    for found in results:
        assert message in found[case][0], found[case]
    assert not any("passed" in line for line in results[0][case][1])


def test_a_layout_that_does_not_fit_is_refused_before_anything_is_asked(results: list[dict]) -> None:
    for found in results:
        assert found["layout"].startswith("LayoutError 2: parallel.tp = 2")


def test_the_host_behind_a_slow_link_is_named_and_its_neighbours_are_not() -> None:
    hosts = ["a", "a", "b", "c"]
    fast, slow = 1e9, 2e6
    links = [Link(0, 2, fast), Link(2, 0, slow), Link(2, 3, slow), Link(3, 2, fast), Link(3, 0, fast), Link(0, 3, fast)]
    assert judge_links(links, hosts=hosts) == [
        "host to host: 1000 MB/s in the middle",
        "warning: b sends at 2.0 MB/s at best, the others at 1000. Look at its network",
    ]
    assert judge_links(links[2:4], hosts=hosts)[1].startswith("warning: b sends at 2.0 MB/s")
    assert len(judge_links([links[0], Link(2, 0, 0.5 * fast)], hosts=hosts)) == 1
