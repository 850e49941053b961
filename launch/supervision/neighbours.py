"""Copies of a host's replica on its neighbour: agent k carries the parts of its ranks to agent k + 1 (the last one to
the first), keeps those of agent k - 1, and gives them back to an agent that starts again with nothing.

Agents find each other through RUN_DIR/agents on the shared storage: an address each, and the run's token, which every
request must carry. HTTP of the standard library; every file travels with its SHA-256. Whoever can read the run
directory can read the token: this keeps strangers on the network out, and is no encryption.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
import http.server
import json
import os
import re
import secrets
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

NEIGHBOURS_VARIABLE, CARRIED_FILE = "ERNIE5_NEIGHBOURS", ".carried"  # as in ernie5/train/neighbours.py
MANIFEST = "manifest.json"
STEP = re.compile(r"step-\d{8,}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
PIECE_BYTES = 1 << 20
KEPT_STEPS = 2
POLL_SECONDS, PEER_SECONDS = 0.1, 10.0
BEYOND = "192.0.2.1"  # an address that belongs to nobody (RFC 5737): whatever route leads there is the way out


class Neighbours:
    """This agent's part in the ring of `nodes` hosts. folder: the replica of its own ranks; copies: of the host before
    it."""

    def __init__(self, run_dir: Path, *, folder: Path, copies: Path, node_rank: int, nodes: int, address: str) -> None:
        self._places, self._folder, self._copies = run_dir / "agents", folder, copies
        self._own, self._next = node_rank, (node_rank + 1) % nodes
        self._token = _shared_token(self._places / "token")
        self._server = _Server((address, 0), _Handler)
        self._server.copies, self._server.token = copies, self._token
        self._stop = threading.Event()
        works = (self._server.serve_forever, self._carry)
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]

    def start(self, *, restore: bool) -> None:
        """Listen, say where, bring back what the neighbour keeps of this host if `restore`, and begin to carry."""
        shutil.rmtree(self._copies, ignore_errors=True)
        host, port = self._server.server_address[:2]
        _replace(self._places / f"node-{self._own}.json", json.dumps({"host": host, "port": port}))
        if restore:
            self._restore()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Take no more requests, and forget the copies."""
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()
        for thread in self._threads:
            thread.join(timeout=PEER_SECONDS)
        shutil.rmtree(self._copies, ignore_errors=True)

    def _restore(self) -> None:
        try:
            with self._peer() as peer:
                for step in peer.listing(f"/node-{self._own}"):
                    peer.fetch(f"/node-{self._own}/{step}", into=self._folder / step)
                    _say(f"{step} of this host came back from node {self._next}")
        except (OSError, http.client.HTTPException, ValueError) as error:
            _say(f"nothing came back from node {self._next}: {error}")

    def _carry(self) -> None:
        """Send every new part; a neighbour that cannot be reached is said once, and holds up nobody."""
        done, complains = "", True
        while not self._stop.wait(POLL_SECONDS):
            newest = _newest_part(self._folder)
            part = "" if newest is None else _part_name(newest)
            if not part or part == done:
                continue
            try:
                with self._peer() as peer:
                    peer.send(newest, to=f"/node-{self._own}/{newest.name}")
                complains = True
            except FileNotFoundError:
                continue  # a newer part took its place
            except (OSError, http.client.HTTPException, ValueError) as error:
                if complains:
                    _say(f"no copy on node {self._next}: {error}")
                complains = False
            done = part
            with contextlib.suppress(OSError):  # the folder went with the end of the run
                _replace(self._folder / CARRIED_FILE, part)

    @contextlib.contextmanager
    def _peer(self) -> Iterator[_Peer]:
        try:
            place = json.loads((self._places / f"node-{self._next}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConnectionError(f"node {self._next} has no agent yet") from None
        peer = _Peer(place["host"], port=place["port"], token=self._token)
        try:
            yield peer
        finally:
            peer.close()


class _Peer:
    """A connection to another agent. All methods raise OSError or HTTPException."""

    def __init__(self, host: str, *, port: int, token: str) -> None:
        self._connection = http.client.HTTPConnection(host, port, timeout=PEER_SECONDS)
        self._headers = {"Authorization": f"Bearer {token}"}

    def close(self) -> None:
        self._connection.close()

    def listing(self, path: str) -> list[str]:
        return [str(name) for name in json.loads(self._ask("GET", path).read())]

    def send(self, step: Path, *, to: str) -> None:
        """All files of a part, the manifest last: with it the copy is complete."""
        manifest = json.loads((step / MANIFEST).read_text(encoding="utf-8"))
        sums = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        for name in (*sorted(sums), MANIFEST):
            with (step / name).open("rb") as file:
                digest = sums.get(name) or hashlib.file_digest(file, "sha256").hexdigest()
                file.seek(0)
                size = os.fstat(file.fileno()).st_size
                headers = {"Content-Length": str(size), "X-SHA256": digest}
                self._ask("PUT", f"{to}/{name}", body=file, headers=headers).read()

    def fetch(self, path: str, *, into: Path) -> None:
        """A part, whole or not at all; the ranks compare its bytes with the manifest's checksums."""
        temporary = into.with_name(f".tmp-{into.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name in self.listing(path):
            if NAME.fullmatch(name) is None:
                raise ValueError(f"{name!r} is no name of a file")
            answer = self._ask("GET", f"{path}/{name}")
            with (temporary / name).open("wb") as file:
                shutil.copyfileobj(answer, file, PIECE_BYTES)
        temporary.rename(into)

    def _ask(self, method: str, path: str, *, body: object = None, headers: dict[str, str] | None = None
             ) -> http.client.HTTPResponse:
        self._connection.request(method, path, body=body, headers={**self._headers, **(headers or {})})
        answer = self._connection.getresponse()
        if answer.status != http.HTTPStatus.OK:
            raise ConnectionError(f"{method} {path}: {answer.status} {answer.read(200).decode(errors='replace')}")
        return answer


class _Server(http.server.ThreadingHTTPServer):
    """A thread per connection. copies: where to keep them; token: what every request must carry."""

    copies: Path
    token: str

    def handle_error(self, request: object, client_address: object) -> None:
        """One line: the other agent was lost in the middle of a request, and says why itself if it lives."""
        _say(f"a request from {client_address} broke off: {sys.exc_info()[1]!r}")


class _Handler(http.server.BaseHTTPRequestHandler):
    """/node-K: steps kept of host K; /node-K/step-N: its files; /node-K/step-N/FILE: one of them."""

    protocol_version = "HTTP/1.1"
    timeout = PEER_SECONDS

    def log_message(self, *_: object) -> None:
        """Silence: the agent's own lines are enough."""

    def do_GET(self) -> None:
        path = self._path()
        if path is None:
            return
        if path.is_file():
            with path.open("rb") as file:
                self._begin(http.HTTPStatus.OK, os.fstat(file.fileno()).st_size)
                shutil.copyfileobj(file, self.wfile, PIECE_BYTES)
            return
        found = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        self._say(http.HTTPStatus.OK, json.dumps([name for name in found if not name.startswith(".")]))

    def do_PUT(self) -> None:
        path = self._path()
        if path is None:
            return
        temporary = path.parent.with_name(f".tmp-{path.parent.name}")
        temporary.mkdir(parents=True, exist_ok=True)
        digest, left = hashlib.sha256(), int(self.headers["Content-Length"])
        with (temporary / path.name).open("wb") as file:
            while left and (piece := self.rfile.read(min(left, PIECE_BYTES))):
                digest.update(piece)
                file.write(piece)
                left -= len(piece)
        if left or digest.hexdigest() != self.headers["X-SHA256"]:
            shutil.rmtree(temporary, ignore_errors=True)
            self._say(http.HTTPStatus.UNPROCESSABLE_ENTITY, "the bytes do not match their checksum")
            return
        if path.name == MANIFEST:
            _complete(temporary, target=path.parent)
        self._say(http.HTTPStatus.OK, "")

    def _path(self) -> Path | None:
        """What the request is about; None once it was refused."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.server.token.encode()):
            return self._refuse(http.HTTPStatus.FORBIDDEN, "not the token of this run")
        parts = self.path.strip("/").split("/")
        rules = (re.compile(r"node-\d+"), STEP, NAME)
        least = 3 if self.command == "PUT" else 1
        if not least <= len(parts) <= 3 or not all(rule.fullmatch(part) for rule, part in zip(rules, parts)):
            return self._refuse(http.HTTPStatus.NOT_FOUND, "no such place")
        return self.server.copies.joinpath(*parts)

    def _refuse(self, status: http.HTTPStatus, text: str) -> None:
        self.close_connection = True  # a body that nobody reads
        self._say(status, text)

    def _say(self, status: http.HTTPStatus, text: str) -> None:
        self._begin(status, len(text.encode()))
        self.wfile.write(text.encode())

    def _begin(self, status: http.HTTPStatus, size: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        self.end_headers()


def _say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


def own_address(head: str) -> str:
    """This host's address as it shows towards `head`, or, where that is itself by a loopback name or has no name yet,
    towards the world; no packet is sent."""
    for target in (head, BEYOND):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            found = str(probe.getsockname()[0])
            if not found.startswith("127."):
                return found
    return "127.0.0.1"


def _complete(temporary: Path, *, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for half in target.parent.glob(".tmp-*"):
        shutil.rmtree(half, ignore_errors=True)
    for old in sorted(target.parent.glob("step-*"), key=lambda path: path.stat().st_ctime_ns)[:-KEPT_STEPS]:
        shutil.rmtree(old, ignore_errors=True)


def _newest_part(folder: Path) -> Path | None:
    """The one written last: a run that went back to an earlier step has parts of later ones still."""
    found = []
    for manifest in folder.glob(f"step-*/{MANIFEST}"):
        with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
            found.append((manifest.stat().st_mtime_ns, manifest.parent))
    return max(found)[1] if found else None


def _part_name(step: Path) -> str:
    try:
        return str(json.loads((step / MANIFEST).read_text(encoding="utf-8")).get("part_of", ""))
    except (OSError, ValueError):
        return ""


def _shared_token(path: Path) -> str:
    """The run's token, made by the first agent that comes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f".token-{os.getpid()}-{socket.gethostname()}")
    descriptor = os.open(own, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    with contextlib.suppress(FileExistsError):
        os.link(own, path)
    own.unlink()
    return path.read_text(encoding="utf-8").strip()


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name.lstrip('.')}-{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
