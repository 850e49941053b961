"""The agent: what it decides, whom it kills, and a run of two ranks that loses one and ends as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import pytest

PATIENCE_SECONDS = 240


@pytest.fixture(scope="session")
def policy(load_supervision: Callable[[str], types.ModuleType]) -> types.ModuleType:
    """launch/supervision/policy.py."""
    return load_supervision("policy")


@pytest.fixture
def supervise(repository: Path, tmp_path: Path):
    """supervise(command, ...) starts an agent over `command` with the run directory tmp_path/run."""
    started = []

    def start(*command: str, options: tuple[str, ...] = ()) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, str(repository / "launch" / "supervise.py"), "--run-dir", str(tmp_path / "run"),
             "--delay", "0.01", "--memory", str(tmp_path), *options, "--", *command],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
            process.wait(timeout=60)


def script(text: str) -> list[str]:
    """A command that counts its starts in `count`, and runs `text` with `n` (from 1) and `end(code)`."""
    return [sys.executable, "-c", f"""
import json, os, pathlib, signal, subprocess, sys, time
run = pathlib.Path(os.environ["RUN"]); count = run.parent / ("count" + os.environ.get("NODE", ""))  # a host's own
n = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(n))
def end(code):
    (run / "exit.json").write_text(json.dumps({{"exit_code": code, "message": "said"}})); sys.exit(code)
{text}
"""]


@pytest.fixture(autouse=True)
def run_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tells the scripts where the run directory is."""
    monkeypatch.setenv("RUN", str(tmp_path / "run"))


def starts(tmp_path: Path) -> int:
    return int((tmp_path / "count").read_text())


def test_settings_that_are_refused_end_it_also_under_a_launcher_that_blurs_codes(
    supervise: Callable, repository: Path
) -> None:
    start = f"{sys.executable} {repository}/launch/pretrain.py {repository}/configs/pretrain/debug.yaml"
    agent = supervise("sh", "-c", f"{start} engine.kind=grid parallel.ep=3; exit 1")  # as torchrun does
    said = agent.communicate(timeout=PATIENCE_SECONDS)[1]
    assert agent.returncode == 2 and "starting again" not in said, said
    assert "a user's mistake stays one, parallel.ep = 3" in said


@pytest.mark.parametrize(("options", "variables", "said"), [
    (("--nodes", "2", "--node-rank", "5"), {}, "--node-rank is 5, and must be at least 0 and at most 1"),
    (("--nodes", "0"), {}, "--nodes is 0"),
    (("--restarts", "-1"), {}, "--restarts is -1"),
    (("--delay", "nan"), {}, "--delay is nan"),
    (("--run-dir", ""), {}, "the path is empty"),
    (("--run-dir", "file/inside"), {}, "a file stands in its place"),
    ((), {"NODES": "abc"}, "NODES is 'abc' in the environment"),
    ((), {"NODE_RANK": "", "SLURM_NODEID": "x"}, "SLURM_NODEID is 'x'"),
])
def test_what_would_be_waited_for_in_vain_is_refused_in_one_line(
    options: tuple[str, ...], variables: dict[str, str], said: str, supervise: Callable, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    agent = supervise(*script("end(2)"), options=options)
    _, err = agent.communicate(timeout=PATIENCE_SECONDS)
    assert agent.returncode == 2 and said in err and err.count("\n") == 1, err
    assert not (tmp_path / "count").exists() and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("mode", [None, 0o644])
def test_a_command_that_does_not_start_is_a_mistake_and_other_hosts_hear_of_it(
    mode: int | None, supervise: Callable, tmp_path: Path
) -> None:
    if mode is not None:
        (tmp_path / "start.sh").write_text("exit 0")
    agent = supervise(str(tmp_path / "start.sh"))
    _, err = agent.communicate(timeout=PATIENCE_SECONDS)
    assert agent.returncode == 2 and err.startswith("ConfigError: ") and err.count("\n") == 1, err
    assert "start.sh' does not start" in err
    word = json.loads((tmp_path / "run" / "agents" / "ended-node-0.json").read_text())
    assert word["code"] == 2 and "does not start" in word["reason"]


@pytest.mark.parametrize(("code", "restarts"), [(0, 0), (1, 1), (2, 0), (3, 3), (4, 0), (5, 4), (75, 4)])
def test_each_exit_code_has_its_policy(code: int, restarts: int, policy: types.ModuleType) -> None:
    decide = policy.RestartPolicy(policy.Limits(restarts=4), step=0).decide
    outcome = policy.Outcome(code, False, "said", 0)
    decisions = [decide(outcome, stopping=False) for _ in range(restarts + 1)]
    assert [found.restart for found in decisions] == [True] * restarts + [False]
    assert decisions[-1].code == code
    delays = [found.delay_seconds for found in decisions[:-1]]
    assert delays == [(10.0 if code == 3 else 1.0) * 2**index for index in range(restarts)]


def test_progress_clears_the_count_and_the_agents_own_end_restarts_nothing(policy: types.ModuleType) -> None:
    decide = policy.RestartPolicy(policy.Limits(restarts=1), step=3).decide
    for step in (4, 5, 6):
        assert decide(policy.Outcome(5, True, "", step), stopping=False).restart
    assert not decide(policy.Outcome(5, True, "", 6), stopping=False).restart
    ended = policy.RestartPolicy(policy.Limits(), step=0).decide(policy.Outcome(75, False, "", 0), stopping=True)
    assert (ended.restart, ended.code) == (False, 75)


def test_a_run_is_started_until_it_is_done_and_blurred_codes_are_not_believed(supervise, tmp_path: Path) -> None:
    agent = supervise(*script("""
if n == 1: os.kill(os.getpid(), signal.SIGKILL)
if n == 2: sys.exit(1)  # a launcher after a killed child
if n == 3: end(75)
if "--fresh" in sys.argv: end(2)  # a restart must not start over
(run / "exit.json").write_text(json.dumps({"exit_code": 0, "message": "done"})); sys.exit(1)
"""), "--fresh", "--resume", "somewhere")
    _, said = agent.communicate(timeout=PATIENCE_SECONDS)
    assert agent.returncode == 0, said
    assert starts(tmp_path) == 4
    lines = [json.loads(line) for line in (tmp_path / "run" / "supervise.jsonl").read_text().splitlines()]
    assert [(line["code"], line["killed"], line["restart"]) for line in lines] == [
        (5, True, True), (5, True, True), (75, False, True), (0, False, False)]


def test_fresh_and_resume_count_until_a_start_with_them_has_begun(supervise, tmp_path: Path) -> None:
    """A start that ended before (a rank that did not come, a full disk) has cleared nothing: the run of before stands
    there still, and the next start must not go on with that one."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("of the run before")
    agent = supervise(*script("""
told = [word for word in sys.argv if word in ("--fresh", "--resume", "somewhere")]
with (run.parent / "told").open("a") as file: file.write(" ".join(told) + "\\n")
if n == 3: (run / "config.yaml").write_text("of this run")
end(5 if n < 5 else 0)
"""), "--fresh", "--resume", "somewhere")
    _, said = agent.communicate(timeout=PATIENCE_SECONDS)
    assert agent.returncode == 0, said
    assert (tmp_path / "told").read_text().splitlines() == ["--fresh --resume somewhere"] * 3 + ["", ""]


def test_steps_of_the_run_before_are_no_measure_of_a_fresh_one(supervise, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1000}\n')
    agent = supervise(*script("""
(run / "config.yaml").write_text(str(n))
(run / "metrics.jsonl").write_text(json.dumps({"step": n}))
end(5 if n < 5 else 0)
"""), "--fresh", options=("--restarts", "1"))
    _, said = agent.communicate(timeout=PATIENCE_SECONDS)
    assert agent.returncode == 0 and starts(tmp_path) == 5, said


def test_a_refused_command_line_is_never_retried(supervise, tmp_path: Path) -> None:
    agent = supervise(*script("sys.exit(2)"))
    agent.communicate(timeout=PATIENCE_SECONDS)
    assert agent.returncode == 2 and starts(tmp_path) == 1


def test_strays_of_an_earlier_start_are_killed_and_others_are_not(supervise, tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    agent = supervise(*script("""
sleeper = run.parent / "sleeper"
if n == 1:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    sleeper.write_text(str(child.pid))
    os.kill(os.getpid(), signal.SIGKILL)
alive = pathlib.Path(f"/proc/{sleeper.read_text()}/stat")
end(4 if alive.exists() and alive.read_text().rsplit(") ", 1)[1][0] != "Z" else 0)
"""))
    _, said = agent.communicate(timeout=PATIENCE_SECONDS)
    try:
        assert agent.returncode == 0, said
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_second_agent_is_refused_and_a_signal_ends_run_and_agent(supervise, tmp_path: Path) -> None:
    agent = supervise(*script("""
signal.signal(signal.SIGTERM, lambda *_: end(75))
(run / "ready").touch()
time.sleep(600)
"""))
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (tmp_path / "run" / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    second = supervise(*script("end(0)"))
    _, said = second.communicate(timeout=PATIENCE_SECONDS)
    assert second.returncode == 2 and "another agent" in said
    agent.send_signal(signal.SIGTERM)
    agent.communicate(timeout=PATIENCE_SECONDS)
    assert agent.returncode == 75 and starts(tmp_path) == 1


def test_a_signal_between_two_starts_ends_the_agent_too(repository: Path, tmp_path: Path) -> None:
    """It arrives while the agent looks for strays: whatever is started then would never hear of it."""
    program = f"""
import os, pathlib, signal, sys
sys.path.insert(0, {str(repository / "launch")!r})
from supervision import agent

def look_for_strays(mark):
    os.kill(os.getpid(), signal.SIGTERM)
    return []

agent.kill_strays = look_for_strays
(run := pathlib.Path({str(tmp_path / "run")!r})).mkdir()
made = agent.Agent({["sleep", "60"]!r}, run_dir=run, memory=pathlib.Path({str(tmp_path)!r}), host=agent.Host())
sys.exit(made.run(agent.Limits()))
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=30, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 75, ended.stderr


def rank_process(mark: bytes, rank: int) -> int | None:
    """The process of a rank whose environment holds `mark`."""
    for entry in Path("/proc").iterdir():
        try:
            variables = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if mark in variables and f"RANK={rank}".encode() in variables:
            return int(entry.name)
    return None


def test_two_ranks_lose_one_and_go_on_from_memory_to_the_same_losses(
    supervise, repository: Path, tmp_path: Path
) -> None:
    settings = ("train.steps=8", "data.streams=2", "batch.global_sequences=2", "checkpoint.every_steps=0")
    launcher = (sys.executable, str(repository / "launch" / "spawn.py"), "2",
                str(repository / "tools" / "chaos" / "chaos.yaml"), *settings)
    others = {**os.environ, "RUN": "another", "OMP_NUM_THREADS": "1"}
    whole = subprocess.Popen([*launcher, f"train.run_dir={tmp_path / 'whole'}"], env=others, stderr=subprocess.PIPE,
                             text=True)
    agent = supervise(*launcher, f"train.run_dir={tmp_path / 'run'}")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 4):
        time.sleep(0.01)
    os.kill(rank_process(f"RUN={tmp_path / 'run'}".encode(), 1), signal.SIGKILL)
    _, said = agent.communicate(timeout=PATIENCE_SECONDS)
    _, other = whole.communicate(timeout=PATIENCE_SECONDS)
    assert (agent.returncode, whole.returncode) == (0, 0), said + other
    resumed = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if "resumed from" in line]
    assert len(resumed) == 1 and f"{tmp_path}/ernie5-" in resumed[0] and int(resumed[0].rsplit(" ", 1)[1]) >= 3
    figures = [[(row["step"], row["loss"], row["grad_norm"]) for row in map(json.loads, path.read_text().splitlines())]
               for path in (metrics, tmp_path / "whole" / "metrics.jsonl")]
    assert figures[0] == figures[1] and len(figures[0]) == 8
    assert not list(tmp_path.glob("ernie5-*"))  # the agent takes its memory along


def test_two_hosts_restart_together_and_neither_touches_the_other(
    supervise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each agent has its own lock, mark and journal; the host without rank 0 waits for exit.json, and leaves it."""
    share = """
node = int(os.environ["NODE"]); mine = run.parent / f"starts-{node}"
n = int(mine.read_text()) + 1 if mine.exists() else 1
mine.write_text(str(n))
if n == 1 and node == 1: os.kill(os.getpid(), signal.SIGKILL)
if n == 1:
    while not (run.parent / "starts-1").exists(): time.sleep(0.01)
    time.sleep(0.5); end(5)  # rank 0 notices later
if node == 0:
    while not (run.parent / "starts-1").read_text() == "2": time.sleep(0.01)
    time.sleep(1.0); end(0)  # and saves longest
sys.exit(0)
"""
    agents = []
    for node in ("0", "1"):
        monkeypatch.setenv("NODE", node)
        agents.append(supervise(*script(share), options=("--node-rank", node)))
    said = [agent.communicate(timeout=PATIENCE_SECONDS)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert [(tmp_path / f"starts-{node}").read_text() for node in (0, 1)] == ["2", "2"]
    journals = [[json.loads(line)["code"] for line in (tmp_path / "run" / name).read_text().splitlines()]
                for name in ("supervise.jsonl", "supervise-node1.jsonl")]
    assert journals == [[5, 0], [5, 0]]


def test_a_host_that_fails_first_takes_no_record_of_an_earlier_start(
    supervise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node 0, which removes it, is slower: neither that of the run before nor that of the last start decides."""
    share = """
node = int(os.environ["NODE"])
if node == 1 and n == 1: (run.parent / "failed").touch(); sys.exit(1)  # beside the record of the run before
if node == 1 and n == 2: time.sleep(0.5); sys.exit(1)  # beside that of the first start
if node == 0 and n == 1: time.sleep(0.5); end(75)
while int((run.parent / "count1").read_text()) < 3: time.sleep(0.01)
end(0)
"""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exit.json").write_text(json.dumps({"exit_code": 4, "message": "of the run before"}))
    agents = []
    for node in ("1", "0"):
        monkeypatch.setenv("NODE", node)
        agents.append(supervise(*script(share), options=("--node-rank", node)))
        while not (tmp_path / "failed").exists():
            time.sleep(0.05)
        time.sleep(1)  # until node 1 would have decided
        assert agents[0].poll() is None, agents[0].communicate()
    said = [agent.communicate(timeout=PATIENCE_SECONDS)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    journal = [json.loads(line) for line in (tmp_path / "run" / "supervise-node1.jsonl").read_text().splitlines()]
    assert [(line["code"], line["killed"]) for line in journal] == [(75, False), (5, True), (0, False)]


@pytest.mark.parametrize(
    ("gives_up", "code", "waits", "options"),
    [("end(4)", 4, "signal.signal(signal.SIGTERM, signal.SIG_IGN)", ()), ("end(1)", 1, "pass", ("--nodes", "2")),
     ("sys.exit(2)", 2, "pass", ("--nodes", "2"))],
)
def test_an_agent_that_gives_up_ends_those_of_the_other_hosts(
    gives_up: str, code: int, waits: str, options: tuple[str, ...], supervise, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which would wait for its ranks; theirs go, also one that nothing but SIGKILL ends."""
    share = f"""
if os.environ["NODE"] == "0":
    {waits}
    (run.parent / "waits").touch()
    time.sleep(600)
while not (run.parent / "waits").exists(): time.sleep(0.01)
{gives_up}
"""
    agents = []
    for node in ("0", "1"):
        monkeypatch.setenv("NODE", node)
        agents.append(supervise(*script(share), options=("--node-rank", node, "--address", "127.0.0.1", *options)))
    said = [agent.communicate(timeout=30)[1] for agent in reversed(agents)]
    assert [agent.returncode for agent in agents] == [code, code], said
    told = [line for line in said[1].splitlines() if "node 1 (" in line]
    assert len(told) == 1 and f") gave up with exit code {code}: " in told[0] and told[0].endswith("; ending")
    last = json.loads((tmp_path / "run" / "supervise.jsonl").read_text().splitlines()[-1])
    assert (last["code"], last["restart"]) == (code, False) and last["reason"] in told[0]
