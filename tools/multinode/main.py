"""A run on several hosts, on one machine: network namespaces with ssh between them and DeepSpeed's own launcher.

    python tools/multinode/main.py --out runs/multinode
    python tools/multinode/main.py --out runs/multinode --cases zero1_ep2 --parts equal cut
    python tools/multinode/main.py --out runs/multinode --cases grid_pp3 --parts equal preflight

equal: the figures of every step are compared with the same ranks on one host. cut: the cable between two hosts is
pulled in the middle of a step; every rank has to end by itself and say who was missing, and the next start has to
reach the same figures. supervised: an agent on every host around torchrun, one rank killed. lost: as that, but a host
loses all its processes and its memory, and comes back. preflight: a sound cluster passes, and a host with a slow cable
is named. Needs root, and Debian's openssh-server, pdsh and iproute2. Ends with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench_peers"))

from arguments import folder
from hosts import Cluster, open_cluster
from runs import (
    Case,
    fresh,
    largest_difference,
    messages_of,
    read_metrics,
    run_here,
    start_agent,
    start_agents,
    start_on_hosts,
    wait_for_step,
)

CASES = (
    Case("zero1_ep2", (1, 1),
         ("engine.kind=deepspeed", "engine.zero_stage=1", "parallel.ep=2", "batch.micro_sequences=2")),
    Case("grid_ep2", (1, 1), ("engine.kind=grid", "parallel.ep=2", "batch.micro_sequences=2")),
    Case("grid_ep2_tp2", (2, 2), ("engine.kind=grid", "parallel.ep=2", "parallel.tp=2", "model.kv_heads=2")),
    Case("grid_uneven_ep4", (3, 1), ("engine.kind=grid", "parallel.ep=4", "data.streams=4", "batch.micro_sequences=1")),
    Case("grid_pp3", (1, 1, 1), ("engine.kind=grid", "parallel.pp=3")),
    # what comes from one node is added up there first, and one host is one node: another order of sums
    Case("grid_nodes_ep4", (2, 1, 1),
         ("engine.kind=grid", "parallel.ep=4", "parallel.dispatcher=hierarchical", "data.streams=4",
          "batch.micro_sequences=1"), tolerance=1e-5),
)
CUT_SETTINGS = ("train.peer_seconds=15", "train.hang_seconds=240", "checkpoint.every_steps=2")
CUT_STEP = 3
SLOW_MEGABITS = 20


def equal(cluster: Cluster, *, case: Case, out: Path) -> dict:
    """The case on one host and on several: largest difference of any figure of any step."""
    folder = fresh(out / case.name)
    run_here(case, run_dir=folder / "one_host")
    started = time.monotonic()
    code = start_on_hosts(cluster, case=case, run_dir=folder / "hosts").wait()
    if code:
        raise RuntimeError(f"{case.name} ended with {code}; see {folder}/hosts.launcher.log")
    difference = largest_difference(folder / "hosts", whole=folder / "one_host")
    return {"part": "equal", "case": case.name, "slots": case.slots, "largest_difference": difference,
            "seconds": round(time.monotonic() - started), "passed": difference <= case.tolerance}


def cut(cluster: Cluster, *, case: Case, out: Path) -> dict:
    """Pull node1's cable in the middle of a step; mend it, start again, compare with the uninterrupted run."""
    run_dir = out / case.name / "cut"
    launcher = start_on_hosts(cluster, case=case, run_dir=run_dir, settings=CUT_SETTINGS)
    wait_for_step(run_dir, step=CUT_STEP, launcher=launcher)
    cluster.cut(cluster.hosts[1])
    started = time.monotonic()
    while ranks_alive(run_dir):
        time.sleep(0.2)
    ranks_seconds = time.monotonic() - started
    launcher.wait()
    launcher_seconds = time.monotonic() - started
    messages = messages_of(run_dir)
    record = json.loads((run_dir / "exit.json").read_text("utf-8"))
    cluster.mend(cluster.hosts[1])
    again = start_on_hosts(cluster, case=case, run_dir=run_dir, settings=CUT_SETTINGS).wait()
    difference = largest_difference(run_dir, whole=out / case.name / "one_host")
    named = all(any("unreachable" in line or "does not answer" in line for line in messages.get(f"rank{rank}", ()))
                for rank in range(sum(case.slots)))
    return {"part": "cut", "case": case.name, "slots": case.slots, "ranks_ended_after_seconds": round(ranks_seconds, 1),
            "launcher_ended_after_seconds": round(launcher_seconds, 1), "messages": messages,
            "exit_code": record["exit_code"], "restart": again, "largest_difference": difference,
            "passed": named and record["exit_code"] == 5 and again == 0 and difference <= case.tolerance}


def supervised(cluster: Cluster, *, case: Case, out: Path) -> dict:
    """An agent on every host around torchrun; a rank of node1 is killed, the agents bring the whole run back."""
    run_dir = out / case.name / "supervised"
    agents = start_agents(cluster, case=case, run_dir=run_dir, settings=CUT_SETTINGS[-1:])
    wait_for_step(run_dir, step=CUT_STEP, launcher=agents[0])
    victim = max(ranks_alive(run_dir).items())[1]
    os.kill(victim, signal.SIGKILL)
    codes = [agent.wait() for agent in agents]
    difference = largest_difference(run_dir, whole=out / case.name / "one_host")
    journals = {path.name: [json.loads(line)["reason"] for line in path.read_text("utf-8").splitlines()]
                for path in sorted(run_dir.glob("supervise*.jsonl"))}
    return {"part": "supervised", "case": case.name, "slots": case.slots, "codes": codes, "journals": journals,
            "largest_difference": difference, "passed": codes == [0] * len(agents) and difference <= case.tolerance}


def lost(cluster: Cluster, *, case: Case, out: Path) -> dict:
    """An agent on every host, no checkpoint on disk; all processes of node1 are killed and its memory is emptied. Its
    new agent has to bring the run back from what node0 kept of it."""
    run_dir, settings = out / case.name / "lost", ("checkpoint.every_steps=0",)
    agents = start_agents(cluster, case=case, run_dir=run_dir, settings=settings)
    wait_for_step(run_dir, step=CUT_STEP, launcher=agents[0])
    for process in cluster.hosts[1].processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    agents[1].wait()
    subprocess.run(cluster.hosts[1].command(["sh", "-c", "rm -rf /dev/shm/*"]), check=True)
    reached, started = read_metrics(run_dir)[-1]["step"], time.monotonic()
    agents[1] = start_agent(cluster, index=1, case=case, run_dir=run_dir, settings=settings)
    codes = [agent.wait() for agent in agents]
    lines = (run_dir / "log.txt").read_text("utf-8").splitlines()
    resumed = [line.partition("INFO ")[2] for line in lines if "resumed from" in line]
    difference = largest_difference(run_dir, whole=out / case.name / "one_host")
    is_from_memory = len(resumed) == 1 and "resumed from /dev/shm/" in resumed[0]
    return {"part": "lost", "case": case.name, "slots": case.slots, "codes": codes, "step_when_lost": reached,
            "resumed": resumed, "seconds_to_the_end": round(time.monotonic() - started, 1),
            "largest_difference": difference,
            "passed": codes == [0] * len(agents) and difference <= case.tolerance and is_from_memory}


def ranks_alive(run_dir: Path) -> dict[int, int]:
    """Process id by rank, of the run's ranks on all hosts, seen from this machine."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            variables = (entry / "environ").read_bytes().split(b"\0") if words else []
        except OSError:
            continue
        script = words[2:3] if words[1:2] == [b"-u"] else words[1:2]
        if script and script[0].endswith(b"pretrain.py") and f"train.run_dir={run_dir}".encode() in words:
            rank = next(value for value in variables if value.startswith(b"RANK="))
            found[int(rank.removeprefix(b"RANK="))] = int(entry.name)
    return found


def preflight(cluster: Cluster, *, case: Case, out: Path) -> dict:
    """launch/preflight.py on a sound cluster, then with a brake on node1's cable."""
    run_dir = fresh(out / case.name / "preflight") / "run"
    codes, reports = [], []
    for megabits in (0, SLOW_MEGABITS):
        if megabits:
            cluster.slow_down(cluster.hosts[1], megabits=megabits)
        codes.append(start_on_hosts(cluster, case=case, run_dir=run_dir, script="preflight.py").wait())
        logs = sorted((run_dir / "ranks").glob("*_rank0.log"), key=os.path.getmtime)
        reports.append(logs[-1].read_text("utf-8").splitlines())
    cluster.speed_up(cluster.hosts[1])
    return {"part": "preflight", "case": case.name, "slots": case.slots, "sound": reports[0], "slow": reports[1],
            "passed": codes == [0, 0]}


PARTS = {"equal": equal, "cut": cut, "supervised": supervised, "lost": lost, "preflight": preflight}


def main() -> int:
    """Build the hosts, run the parts of each case, print and keep the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=folder, required=True, help="folder for all runs and multinode.json")
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS),
                        help="all but equal of the first case alone; cut, supervised and lost need what equal has left")
    options = parser.parse_args()
    out = options.out.resolve()
    first = out / next(case.name for case in CASES if case.name in options.cases) / "one_host"
    if {*options.parts} & {"cut", "supervised", "lost"} and "equal" not in options.parts and not first.is_dir():
        parser.error(f"--parts {' '.join(options.parts)}: there is no {first} to compare with; add equal before them")
    out.mkdir(parents=True, exist_ok=True)
    cases = [case for case in CASES if case.name in options.cases]
    results = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the hosts are taken away then, too
    try:
        with open_cluster(max(len(case.slots) for case in cases)) as cluster:
            for case in cases:
                for part in options.parts:
                    if part == "equal" or case is cases[0]:
                        results.append(PARTS[part](cluster, case=case, out=out))
                        print(json.dumps(results[-1], indent=1), flush=True)
    except (RuntimeError, subprocess.CalledProcessError) as problem:
        print(f"multinode: {problem}", file=sys.stderr)
        return 3
    (out / "multinode.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(not all(result["passed"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
