"""A server on loopback: a Hub that huggingface_hub's own client talks to, and a plain web server, with faults.

Large files of the Hub are redirected to another origin with a signed address, as the Hub does it, and uploaded to one
(git-lfs's protocol; not Xet, which `conftest.py` switches off). What was committed is served from then on. Every
request is recorded, and every byte of a body that was sent is counted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

SIGNATURE = "X-Amz-Signature=s1gnature"
"""What the addresses of large files are signed with; it must not stand anywhere."""

LARGE = (".safetensors", ".bin")
"""Endings of files that the Hub keeps elsewhere."""


@dataclass
class Repo:
    """A repository: its commits with the folders of their files, what its branches and tags mean, and what was said."""

    commits: dict[str, Path]
    refs: dict[str, str]
    private: bool = False
    gated: bool = False
    messages: list[str] = field(default_factory=list)


@dataclass
class Account:
    """Whom a token is of, which organisations that user is in, and what the token may do."""

    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"


@dataclass
class Request:
    """What one request asked for."""

    method: str
    path: str
    range: str | None
    authorization: str | None
    origin: str


@dataclass
class Fault:
    """Something that goes wrong with responses to some requests, so many ``times``, after others.

    Attributes:
        path: Part of the requested path with its query; with ``$``, the end of it without.
        times: How often.
        status: Answer with this status instead.
        headers: Headers to change, or to leave out when ``None``.
        cut: Close the connection after this many bytes, of what is uploaded where something is.
        stall: Send this many bytes and then nothing, until the server ends.
        body: Send this instead, with a length to fit.
        as_status: Send it with this status.
        skip: How many responses go well before.
        methods: Which requests are meant.
    """

    path: str
    times: int = 1
    status: int | None = None
    headers: dict[str, str | None] = field(default_factory=dict)
    cut: int | None = None
    stall: int | None = None
    body: bytes | None = None
    as_status: int | None = None
    skip: int = 0
    methods: tuple[str, ...] = ("GET",)


class Server:
    """A Hub and a web server, on two ports; ``url`` is the first's address.

    Attributes:
        repos: What the Hub has.
        tokens: Token → repositories that it may read, private or gated.
        accounts: Token → whom it is of; others may not write.
        folders: First part of a path → the folder that is served under it.
        users: First part of a path → ``user:password`` that it wants.
        ranges: Whether parts are served.
        etags: Whether files have an ETag and a date.
        faults: What goes wrong.
        requests: What was asked for.
        sent: Path → bytes of bodies that were sent.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, set[str]] = {}
        self.accounts: dict[str, Account] = {}
        self.store = Path(tempfile.mkdtemp(prefix="speculators-hub-"))
        self.folders: dict[str, Path] = {}
        self.users: dict[str, str] = {}
        self.ranges = True
        self.etags = True
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.sent: Counter[str] = Counter()
        self.blobs: dict[str, Path] = {}
        self.ended = Event()
        handler = type("Handler", (_Handler,), {"served": self})
        self.hub, self.storage = (ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2))
        for each in (self.hub, self.storage):
            each.daemon_threads = True
            Thread(target=each.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.hub.server_address[1]}"

    @property
    def storage_url(self) -> str:
        return f"http://127.0.0.1:{self.storage.server_address[1]}"

    def close(self) -> None:
        self.ended.set()
        for each in (self.hub, self.storage):
            each.shutdown()
            each.server_close()
        shutil.rmtree(self.store, ignore_errors=True)

    def add(self, name: str, folder: Path, revision: str = "main", **more: Any) -> str:
        """Commit the files of a folder to a repository and return the commit."""
        content = sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file())
        listing = "\n".join(f"{path.relative_to(folder)} {hashlib.sha256(data).hexdigest()}" for path, data in content)
        commit = hashlib.sha1(f"{name} {listing}".encode()).hexdigest()
        repo = self.repos.setdefault(name, Repo({}, {}, **more))
        repo.commits[commit] = folder
        repo.refs[revision] = commit
        return commit

    def login(self, token: str, name: str, *orgs: str, role: str = "write") -> None:
        """Make a token of a user."""
        self.accounts[token] = Account(name, orgs, role)
        self.tokens.setdefault(token, set())

    def files(self, name: str) -> dict[str, bytes]:
        """Return the files of a repository."""
        repo = self.repos[name]
        return {path.name: path.read_bytes() for path in repo.commits[repo.refs["main"]].iterdir()}

    def place(self) -> Path:
        """Make a folder for what is uploaded."""
        return Path(tempfile.mkdtemp(dir=self.store))

    def total(self) -> int:
        """Return how many bytes of bodies were sent."""
        return sum(self.sent.values())

    def asked(self, part: str, method: str = "GET") -> list[Request]:
        """Return the requests whose path contains ``part``."""
        return [request for request in self.requests if part in request.path and request.method == method]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Server

    def log_message(self, *arguments: Any) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.receive()

    def do_PUT(self) -> None:
        self.receive()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        origin = "hub" if self.server is self.served.hub else "storage"
        said = self.headers.get("Authorization")
        self.served.requests.append(Request(self.command, self.path, self.headers.get("Range"), said, origin))
        if origin == "storage":
            return self.send_blob(path)
        if path == "/api/whoami-v2":
            return self.send_account()
        if found := re.fullmatch(r"/api/models/(.+?)/tree/main", path):
            return self.send_tree(found[1])
        if found := re.fullmatch(r"/api/models/(.+?)(/revision/(.+)|/refs)?", path):
            return self.send_info(found[1], found[3], refs=found[2] == "/refs")
        if found := re.fullmatch(r"/([^/]+/[^/]+|[^/]+)/resolve/([^/]+|refs/pr/\d+)/(.+)", path):
            return self.send_file(found[1], found[2], found[3])
        return self.send_plain(path)

    def receive(self) -> None:
        """Take what is uploaded, unless something goes wrong with it."""
        path = unquote(urlsplit(self.path).path)
        origin = "hub" if self.server is self.served.hub else "storage"
        said = self.headers.get("Authorization")
        self.served.requests.append(Request(self.command, self.path, None, said, origin))
        fault = self.fault()
        if fault.cut is not None:
            self.rfile.read(min(fault.cut, int(self.headers.get("Content-Length") or fault.cut)))
            self.close_connection = True
            return None
        body = self.body()
        if fault.status is not None:
            return self.send_all(fault.status, {}, fault.body or b"broken")
        if origin == "storage":
            return self.store_blob(path, body)
        account = self.served.accounts.get((said or "").removeprefix("Bearer "))
        if account is None:
            return self.refuse(401, "", "Invalid username or password.")
        return self.take(account, path, body)

    def take(self, account: Account, path: str, body: bytes) -> None:
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(account, json.loads(body))
        found = re.fullmatch(
            r"/api/models/(.+?)/(preupload|commit)/main|/(.+?)\.git/info/lfs/(objects/batch|verify)", path
        )
        assert found, path
        name = found[1] or found[3]
        if name not in self.served.repos:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if not self.may_write(account, name):
            return self.refuse(403, "", "Forbidden: you must use a token with write access")
        step = {"preupload": self.preupload, "commit": self.write, "objects/batch": self.batch, "verify": self.verify}
        return step[found[2] or found[4]](name, body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    @staticmethod
    def may_write(account: Account, name: str) -> bool:
        return account.role != "read" and name.partition("/")[0] in (account.name, *account.orgs)

    def send_account(self) -> None:
        account = self.served.accounts.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        if account is None:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        token = {"displayName": "test", "role": account.role}
        orgs = [{"name": each} for each in account.orgs]
        return self.send_json({"type": "user", "name": account.name, "orgs": orgs, "auth": {"accessToken": token}})

    def send_tree(self, name: str) -> None:
        if self.repo(name, content=True):
            files = [path for path in self.head(name).iterdir() if path.is_file()]
            self.send_json(
                [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": oid(file)}
                    for file in sorted(files)
                ]
            )

    def create(self, account: Account, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or account.name}/{asked['name']}"
        url = {"url": f"{self.served.url}/{name}"}
        if not self.may_write(account, name):
            return self.refuse(403, "", "You don't have the rights to create a model under this namespace")
        if name in self.served.repos:
            return self.send_all(409, {}, json.dumps({"error": "You already created this model repo", **url}).encode())
        place = self.served.place()
        (place / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        private = asked.get("private") or asked.get("visibility") == "private"
        self.served.add(name, place, private=bool(private))
        for token, each in self.served.accounts.items():
            if self.may_write(each, name):
                self.served.tokens[token].add(name)
        return self.send_json(url)

    def head(self, name: str) -> Path:
        repo = self.served.repos[name]
        return repo.commits[repo.refs["main"]]

    def preupload(self, name: str, body: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": oid(self.head(name) / file["path"]),
            }
            for file in json.loads(body)["files"]
        ]
        self.send_json({"files": files})

    def batch(self, name: str, body: bytes) -> None:
        asked = json.loads(body)["objects"]
        for each in asked:
            if not (self.served.store / each["oid"]).exists():
                verify = f"{self.served.url}/{name}.git/info/lfs/verify"
                upload = f"{self.served.storage_url}/upload/{each['oid']}?{SIGNATURE}"
                each["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        self.send_json({"transfer": "basic", "objects": asked})

    def store_blob(self, path: str, body: bytes) -> None:
        assert SIGNATURE in self.path
        name = path.removeprefix("/upload/")
        assert hashlib.sha256(body).hexdigest() == name
        (self.served.store / name).write_bytes(body)
        self.send_all(200, {}, b"")

    def verify(self, name: str, body: bytes) -> None:
        asked = json.loads(body)
        assert (self.served.store / asked["oid"]).stat().st_size == asked["size"]
        self.send_json({})

    def write(self, name: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines.pop(0)["value"]
        repo, place = self.served.repos[name], self.served.place()
        if header.get("parentCommit", repo.refs["main"]) != repo.refs["main"]:
            return self.refuse(412, "", "A commit has happened since. Please refresh and try again.")
        shutil.copytree(self.head(name), place, dirs_exist_ok=True)
        for line in lines:
            value = line["value"]
            file = place / value["path"]
            if line["key"] == "deletedFile":
                file.unlink()
            elif line["key"] == "lfsFile":
                shutil.copyfile(self.served.store / value["oid"], file)
            else:
                file.write_bytes(b64decode(value["content"]))
        commit = self.served.add(name, place)
        repo.messages.append(header["summary"])
        return self.send_json(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.served.url}/{name}/commit/{commit}"}
        )

    def repo(self, name: str, *, content: bool) -> Repo | None:
        """Return a repository that the request may see, or send the Hub's refusal."""
        said = self.headers.get("Authorization") or ""
        token = said.removeprefix("Bearer ") if said.startswith("Bearer ") else ""
        if token and token not in self.served.tokens:
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return None
        repo = self.served.repos.get(name)
        allowed = name in self.served.tokens.get(token, ())
        if repo is None or (repo.private and not allowed):
            self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            return None
        if repo.gated and content and not allowed:
            self.refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted.")
            return None
        return repo

    def send_info(self, name: str, revision: str | None, *, refs: bool) -> None:
        repo = self.repo(name, content=False)
        if repo is None:
            return
        if refs:
            branches = [
                {"name": each, "ref": f"refs/heads/{each}", "targetCommit": to} for each, to in repo.refs.items()
            ]
            return self.send_json({"branches": branches, "tags": [], "converts": []})
        commit = self.commit(repo, revision or "main")
        if commit is None:
            return
        folder = repo.commits[commit]
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        self.send_json(
            {
                "_id": commit[:24],
                "id": name,
                "modelId": name,
                "sha": commit,
                "private": repo.private,
                "gated": "manual" if repo.gated else False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": each} for each in names],
            }
        )

    def commit(self, repo: Repo, revision: str) -> str | None:
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return commit

    def send_file(self, name: str, revision: str, inside: str) -> None:
        repo = self.repo(name, content=True)
        commit = self.commit(repo, revision) if repo else None
        if repo is None or commit is None:
            return
        path = repo.commits[commit] / inside
        if not path.is_file():
            return self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit}
        if not inside.endswith(LARGE):
            return self.send_part(path, {**headers, "ETag": f'"{oid(path)}"'})
        digest = sha256(path, path.stat().st_mtime_ns)
        self.served.blobs[digest] = path
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(path.stat().st_size)}
        headers |= {"Location": f"{self.served.storage_url}/{digest}/{path.name}?{SIGNATURE}"}
        return self.send_all(302, headers, b"")

    def send_blob(self, path: str) -> None:
        assert SIGNATURE in self.path
        self.send_part(self.served.blobs[path.split("/")[1]], {"ETag": f'"{path.split("/")[1]}"'})

    def send_plain(self, path: str) -> None:
        first, _, inside = path.strip("/").partition("/")
        user = self.served.users.get(first)
        if user and self.headers.get("Authorization") != f"Basic {b64encode(user.encode()).decode()}":
            return self.send_all(401, {"WWW-Authenticate": "Basic"}, b"no")
        folder = self.served.folders.get(first)
        if folder and "list-type=2" in urlsplit(self.path).query:
            return self.send_bucket(folder)
        file = folder / inside if folder else None
        if file is None or not file.is_file():
            return self.send_all(404, {}, b"nothing here")
        stamp = f'"{file.stat().st_mtime_ns:x}-{file.stat().st_size:x}"'
        return self.send_part(file, {"ETag": stamp} if self.served.etags else {})

    def send_bucket(self, folder: Path) -> None:
        """List all files of a folder as S3 does it, which drivers ask for."""
        prefix = parse_qs(urlsplit(self.path).query).get("prefix", [""])[0]
        files = [(path.relative_to(folder).as_posix(), path) for path in sorted(folder.rglob("*")) if path.is_file()]
        rows = "".join(
            f"<Contents><Key>{name}</Key><Size>{path.stat().st_size}</Size>"
            f'<ETag>"{path.stat().st_size:x}"</ETag><LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>'
            for name, path in files
            if name.startswith(prefix)
        )
        self.send_all(200, {"Content-Type": "application/xml"}, f"<ListBucketResult>{rows}</ListBucketResult>".encode())

    def send_part(self, path: Path, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        size = path.stat().st_size
        if asked is None or not self.served.ranges:
            return self.send_all(200, headers, path.read_bytes())
        start, stop = int(asked[1]), int(asked[2]) + 1 if asked[2] else size
        if start >= size:
            return self.send_all(416, {**headers, "Content-Range": f"bytes */{size}"}, b"")
        with path.open("rb") as file:
            file.seek(start)
            part = file.read(min(stop, size) - start)
        headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{size}"
        return self.send_all(206, {**headers, "Accept-Ranges": "bytes"}, part)

    def send_json(self, content: object) -> None:
        self.send_all(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def refuse(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        codes = {"X-Error-Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self.send_all(status, {**codes, "X-Error-Message": message, **(headers or {})}, body)

    def send_all(self, status: int, headers: dict[str, str], body: bytes) -> None:
        fault = self.fault() if self.command in ("GET", "HEAD") else Fault("")
        if fault.status is not None:
            status, body, headers = fault.status, b"broken", {}
        if fault.body is not None:
            status, body = fault.as_status or status, fault.body
        sent: dict[str, str | None] = {"Content-Length": str(len(body)), **headers, **fault.headers}
        self.send_response(status)
        for name, value in sent.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = next((each for each in (fault.cut, fault.stall) if each is not None), len(body))
        try:
            for start in range(0, min(limit, len(body)), 1 << 16):
                part = body[start : min(start + (1 << 16), limit)]
                self.wfile.write(part)
                self.served.sent[urlsplit(self.path).path] += len(part)
        except OSError:  # the client wanted no more
            self.close_connection = True
            return
        if fault.stall is not None:
            self.served.ended.wait(30)
        if limit < len(body) or sent["Content-Length"] is None:
            self.close_connection = True

    def fault(self) -> Fault:
        for fault in self.served.faults:
            end = fault.path.removesuffix("$")
            meant = urlsplit(self.path).path.endswith(end) if end != fault.path else end in self.path
            if meant and fault.times and self.command in fault.methods:
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return Fault("")


def oid(path: Path) -> str | None:
    """Return what the Hub calls the content of a file."""
    if not path.is_file():
        return None
    if path.name.endswith(LARGE):
        return sha256(path, path.stat().st_mtime_ns)
    return hashlib.sha1(f"blob {path.stat().st_size}\0".encode() + path.read_bytes()).hexdigest()


class Proxy:
    """A proxy on loopback to which every host is one web server, over TLS with the certificate of a context."""

    def __init__(self, served: Server, context: ssl.SSLContext) -> None:
        handler = type("Handler", (_Handler,), {"served": served})

        class Tunnel(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None:
                """Print nothing."""

            def do_CONNECT(self) -> None:
                self.send_response(200)
                self.end_headers()
                with context.wrap_socket(self.connection, server_side=True) as secured:
                    handler(secured, self.client_address, served.hub)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Tunnel)
        self._server.daemon_threads = True
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@cache
def sha256(path: Path, changed: int) -> str:
    """Return the checksum of a file that was changed last at some time."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("it did not become so")
        time.sleep(0.02)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that is the Hub, to which nobody is logged in."""
    running = Server()
    monkeypatch.setenv("HF_ENDPOINT", running.url)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    try:
        yield running
    finally:
        running.close()


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(server: Server, tmp_path: Path) -> Iterator[Start]:
    """Start the command with its output as text; whatever still runs at the end is killed."""
    running: list[subprocess.Popen[str]] = []

    def begin(*arguments: object, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "speculators", *map(str, arguments)]
        environment = {**os.environ, **variables}
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # ignored where tests run in the background, as of a shell
        running.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True))
        return running[-1]

    yield begin
    for each in running:
        each.kill()
        each.communicate()
