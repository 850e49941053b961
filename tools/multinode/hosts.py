"""Hosts out of Linux namespaces: each has its own network, host name, processes, /dev/shm and ssh daemon; the disk is
shared, as a cluster's storage is. A bridge in one more namespace is the switch, so the machine's own network stays as
it is. Needs root, iproute2, openssh-server and pdsh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

NETWORK = "10.77.0"
PROGRAMS = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "pdsh": "pdsh",
            "nsenter": "util-linux"}
READY_SECONDS = 20.0
CLIENT = """Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  GSSAPIAuthentication no
  AddressFamily inet
  ServerAliveInterval 5
  ServerAliveCountMax 3
"""
SERVER = """Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
UseDNS no
PidFile none
PermitRootLogin prohibit-password
MaxStartups 100
"""
BOOT = """set -e
hostname {name}
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
mount -t tmpfs tmpfs /dev/shm
mkdir -p /run/sshd
exec {sshd} -D -e -f {folder}/sshd_config
"""


@dataclasses.dataclass(frozen=True)
class Host:
    """One host: name, address, network namespace, and the first process inside, seen from outside."""

    name: str
    address: str
    namespace: str
    process: int

    def command(self, words: Sequence[str], *, folder: Path = Path("/")) -> list[str]:
        """`words` as a command that runs on this host, in `folder`."""
        return ["nsenter", "--target", str(self.process), "--all", f"--wdns={folder}", *words]

    def processes(self) -> list[int]:
        """Ids, seen from outside, of all processes on this host but the first one."""
        own, found = os.readlink(f"/proc/{self.process}/ns/pid"), []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):  # ended meanwhile
                if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") == own:
                    found.append(int(entry.name))
        return [process for process in found if process != self.process]


class Cluster:
    """Hosts node0, node1, ... behind one switch, and the cables between, which can be cut and slowed down."""

    def __init__(self, hosts: tuple[Host, ...], *, switch: str) -> None:
        self.hosts, self._switch = hosts, switch

    def cut(self, host: Host) -> None:
        """Pull the host's cable out of the switch."""
        self._on_switch("link", "set", f"to-{host.name}", "down")

    def mend(self, host: Host) -> None:
        """Plug it in again."""
        self._on_switch("link", "set", f"to-{host.name}", "up")

    def slow_down(self, host: Host, *, megabits: int) -> None:
        """Let no more than `megabits` per second leave the host."""
        shape = ["root", "tbf", "rate", f"{megabits}mbit", "burst", "64kb", "latency", "400ms"]
        run("ip", "netns", "exec", host.namespace, "tc", "qdisc", "replace", "dev", "eth0", *shape)

    def speed_up(self, host: Host) -> None:
        """Take the brake off."""
        run("ip", "netns", "exec", host.namespace, "tc", "qdisc", "del", "dev", "eth0", "root")

    def _on_switch(self, *words: str) -> None:
        run("ip", "-n", self._switch, *words)


@contextlib.contextmanager
def open_cluster(num_hosts: int) -> Iterator[Cluster]:
    """Build the hosts, wait until ssh answers, and take all of it away at the end. Raises RuntimeError naming what this
    machine lacks."""
    check_machine()
    mark, folder = f"e5-{os.getpid()}", Path(tempfile.mkdtemp(prefix="ernie5-hosts-"))
    switch, daemons, namespaces = f"{mark}-switch", [], []
    try:
        _write_files(folder, num_hosts=num_hosts)
        namespaces.append(switch)
        run("ip", "netns", "add", switch)
        run("ip", "-n", switch, "link", "add", "bridge0", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "bridge0", "up")
        hosts = []
        for index in range(num_hosts):
            name = f"node{index}"
            namespaces.append(f"{mark}-{name}")
            address = _plug_in(name, index=index, namespace=f"{mark}-{name}", switch=switch)
            daemons.append(_boot(name, namespace=f"{mark}-{name}", folder=folder))
            hosts.append(Host(name, address, f"{mark}-{name}", _first_process(daemons[-1])))
        for host in hosts:
            _wait_for_ssh(hosts[0], to=host, daemon=daemons[0])
        yield Cluster(tuple(hosts), switch=switch)
    finally:
        for daemon in daemons:
            daemon.kill()  # unshare --kill-child: the first process of the namespace goes too, and all others with it
            daemon.wait()
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "del", namespace], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(folder, ignore_errors=True)


def check_machine() -> None:
    """Raises RuntimeError naming every missing program with its Debian package, or the missing privilege."""
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [f"{name} (apt install {package})" for name, package in PROGRAMS.items()
               if shutil.which(name, path=search) is None]
    if missing:
        raise RuntimeError(f"this needs {', '.join(missing)}")
    tried = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount", "true"], capture_output=True, text=True)
    if tried.returncode:
        raise RuntimeError(f"namespaces cannot be made here: {tried.stderr.strip()}. Run it as root, on Linux")


def run(*words: str) -> None:
    """Run a command; raises RuntimeError with what it said."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(words)}` ended with {done.returncode}: {done.stderr.strip()}")


def _write_files(folder: Path, *, num_hosts: int) -> None:
    for key in ("key", "host_key"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    lines = ["127.0.0.1 localhost", *(f"{NETWORK}.{index + 1} node{index}" for index in range(num_hosts))]
    (folder / "hosts").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "ssh_config").write_text(CLIENT.format(folder=folder), encoding="utf-8")
    (folder / "sshd_config").write_text(SERVER.format(folder=folder), encoding="utf-8")


def _plug_in(name: str, *, index: int, namespace: str, switch: str) -> str:
    """A network namespace with eth0 and an address, cabled to the switch; returns the address."""
    address = f"{NETWORK}.{index + 1}"
    run("ip", "netns", "add", namespace)
    run("ip", "-n", switch, "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", namespace)
    run("ip", "-n", switch, "link", "set", f"to-{name}", "master", "bridge0", "up")
    run("ip", "-n", namespace, "link", "set", "lo", "up")
    run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
    run("ip", "-n", namespace, "link", "set", "eth0", "up")
    return address


def _boot(name: str, *, namespace: str, folder: Path) -> subprocess.Popen:
    """The host's first process: an ssh daemon in namespaces of its own."""
    sshd = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    script = BOOT.format(name=name, folder=folder, sshd=sshd)
    own = ["--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child"]
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", namespace, "unshare", *own, "sh", "-c", script], stdout=log, stderr=log,
            stdin=subprocess.DEVNULL,
        )


def _first_process(daemon: subprocess.Popen) -> int:
    """The child of `unshare`, which `ip netns exec` has become."""
    path = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children")
    deadline = time.monotonic() + READY_SECONDS
    while not (children := path.read_text(encoding="utf-8").split()):
        if time.monotonic() > deadline or daemon.poll() is not None:
            raise RuntimeError("a host did not start")
        time.sleep(0.02)
    return int(children[0])


def _wait_for_ssh(host: Host, *, to: Host, daemon: subprocess.Popen) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        tried = subprocess.run(host.command(["ssh", to.name, "hostname"]), capture_output=True, text=True)
        if tried.stdout.strip() == to.name:
            return
        if time.monotonic() > deadline or daemon.poll() is not None:
            raise RuntimeError(f"ssh from {host.name} to {to.name} does not answer: {tried.stderr.strip()}")
        time.sleep(0.1)
