"""A small Hub, for the real `huggingface_hub` client over HTTP: repositories, LFS uploads, commits, downloads.

Everything is in memory. A commit is all or nothing, LFS objects are kept by their hash across pushes, and faults can be
planned: `server.faults.append(Fault(...))` makes the next matching requests fail. With `server.chaos = Chaos(...)`, any
request may.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from time import sleep, time
from urllib.parse import unquote, urlsplit


TOKEN = "hf_test_token"


PORTAL = b"<!DOCTYPE html><html><body>Please accept the terms of this network.</body></html>"
WRONG_ANSWERS: list[bytes | dict | list] = [PORTAL, {}, []]
# The Hub's own wording, which the package must recognize.
LOST_UPLOAD = "Your push was rejected because an LFS pointer pointed to a file that does not exist."


@dataclass
class Fault:
    """Makes the next `times` requests that match fail: with a status or, without one, by dropping the connection.

    Args:
        content: the body of the answer.
        headers: of the answer.
        silence: seconds without an answer, before that.
    """

    method: str
    path: str
    status: int | None = None
    times: int = 1
    content: bytes | dict | list = field(default_factory=lambda: {"error": "planned by the test"})
    headers: dict[str, str] = field(default_factory=dict)
    silence: float = 0


@dataclass
class Chaos:
    """Make requests fail at random, with probability `rate`.

    Faults are errors of the server, too many requests, lost requests and answers, uploads and downloads that are cut,
    wrong content with status 200, delays, and `silence` seconds without an answer.
    """

    rate: float
    random: Random
    silence: float = 10
    counts: Counter = field(default_factory=Counter)

    def draw(self) -> str | None:
        if self.random.random() >= self.rate:
            return None
        kinds = ("500", "503", "429", "lost request", "lost answer", "cut request", "cut answer", "wrong", "delay")
        kind = self.random.choice([*kinds, "silence"])
        self.counts[kind] += 1
        return kind


class Conflict(Exception):
    """The parent of a commit is not the newest state."""


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # all files at each commit, oldest first
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{message}".encode()).hexdigest()
        self.commits[oid] = files
        self.messages.append(message)
        return oid

    def change(self, added: dict[str, bytes], deleted: list[str], message: str, parent: str | None) -> str:
        """Commit changes of the newest state, and return the new one.

        Raises:
            Conflict: if `parent` is given and not the newest state.
        """
        if parent not in (None, self.head):
            raise Conflict("A commit has happened since. Please refresh and try again.")
        files = self.commits[self.head] | added
        for name in deleted:
            del files[name]
        return self.commit(files, message)

    @property
    def head(self) -> str:
        return next(reversed(self.commits))

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.head if revision == "main" else revision)


def blob(name: str, content: bytes) -> dict:
    """What the Hub says of a file beside its name."""
    fields: dict = {"size": len(content), "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
    if name.endswith(".safetensors"):
        fields["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return fields


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS, by sha256
        self.faults: list[Fault] = []
        self.chaos = Chaos(0, Random())
        self.clock_ahead = 0.0  # seconds
        self.requests: list[tuple[str, str]] = []

    def handle_error(self, request, client_address) -> None:
        """Say nothing of clients that were killed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def hub_server() -> Iterator[HubServer]:
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer
    loses_answer = cuts_answer = False

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string((timestamp or time()) + self.server.clock_ahead)

    def log_message(self, *args) -> None:
        pass

    def reply(self, status: int, content: bytes | dict | list = b"", **headers: str) -> None:
        if self.loses_answer:
            return self.hang_up()
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.cuts_answer else body)
        if self.cuts_answer:
            self.hang_up()

    def fail(self, status: int, code: str, message: str) -> None:
        self.reply(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            chaos = self.server.chaos
            fault = chaos.draw()
        length = int(self.headers.get("Content-Length", 0))
        if fault == "cut request":
            self.rfile.read(length // 2)
            return self.hang_up()
        body = self.rfile.read(length)
        if len(body) < length:  # the client was killed
            return self.hang_up()
        if fault == "delay":
            sleep(chaos.random.uniform(0, 1))
        elif fault == "silence":
            sleep(chaos.silence)
            return self.hang_up()
        elif fault == "lost request":
            return self.hang_up()
        elif fault == "429":
            return self.reply(429, {"error": "too many requests"}, Retry_After="1")
        elif fault in ("500", "503"):
            return self.fail(int(fault), "Fault", "chaos")
        elif fault == "wrong":
            return self.reply(200, chaos.random.choice(WRONG_ANSWERS))
        with self.server.lock:
            self.server.requests.append((self.command, path))
            planned = next((f for f in self.server.faults if self.matches(f, path)), None)
            if planned is None:
                self.loses_answer, self.cuts_answer = fault == "lost answer", fault == "cut answer"
                return self.route(path, body)
            planned.times -= 1
        sleep(planned.silence)
        if planned.status is None:
            self.hang_up()
        else:
            self.reply(planned.status, planned.content, **planned.headers)

    def matches(self, fault: Fault, path: str) -> bool:
        return bool(fault.times and fault.method == self.command and re.search(fault.path, path))

    def hang_up(self) -> None:
        self.connection.close()
        self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def route(self, path: str, body: bytes) -> None:
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.command in ("POST", "PUT") and not path.startswith(("/lfs/", "/api/validate")) and not authorized:
            return self.fail(401, "Unauthorized", "Invalid username or password.")
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create_repository(json.loads(body))
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            if hashlib.sha256(body).hexdigest() != match[1]:
                return self.fail(400, "BadObject", "The content does not have this hash.")
            self.server.objects[match[1]] = body
            return self.reply(200)
        patterns = {
            r"/api/models/([^/]+/[^/]+)/preupload/(.+)": self.preupload,
            r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch": self.lfs_batch,
            r"/api/models/([^/]+/[^/]+)/commit/(.+)": self.commit,
            r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?": self.model_info,
            r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?": self.tree,
            r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self.resolve,
        }
        for pattern, action in patterns.items():
            if match := re.fullmatch(pattern, path):
                repository = self.server.repositories.get(match[1])
                if repository is None or (repository.private and not authorized):
                    return self.fail(404, "RepoNotFound", "Repository not found")
                return action(match, repository, body)
        return self.fail(404, "EntryNotFound", f"No such path: {path}")

    def create_repository(self, request: dict) -> None:
        name = f"{request['organization'] or 'user'}/{request['name']}"
        url = f"{self.server.url}/{name}"
        if name in self.server.repositories:
            return self.reply(409, {"error": "You already created this model repo", "url": url})
        repository = Repository(private=request.get("visibility") == "private" or bool(request.get("private")))
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.server.repositories[name] = repository
        return self.reply(200, {"url": url, "name": name, "id": name})

    def preupload(self, match: re.Match, repository: Repository, body: bytes) -> None:
        if repository.files(match[2]) is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {match[2]}")
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        return self.reply(200, {"files": files})

    def lfs_batch(self, match: re.Match, repository: Repository, body: bytes) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            if item["oid"] not in self.server.objects:  # no upload of objects that the server has
                item["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{item['oid']}"}}
            objects.append(item)
        return self.reply(200, {"transfer": "basic", "objects": objects})

    def commit(self, match: re.Match, repository: Repository, body: bytes) -> None:
        header, *operations = [json.loads(line) for line in body.splitlines()]
        added, deleted = {}, []
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    return self.fail(400, "BadObject", LOST_UPLOAD)
                added[value["path"]] = self.server.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                deleted.append(value["path"])
        try:
            oid = repository.change(added, deleted, header["value"]["summary"], header["value"].get("parentCommit"))
        except Conflict as error:
            return self.fail(412, "Conflict", str(error))
        return self.reply(200, {"commitUrl": f"{self.server.url}/{match[1]}/commit/{oid}", "commitOid": oid})

    def model_info(self, match: re.Match, repository: Repository, body: bytes) -> None:
        revision = match[2] or "main"
        files = repository.files(revision)
        if files is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha = repository.head if revision == "main" else revision
        siblings: list[dict] = [{"rfilename": name} for name in sorted(files)]
        if "blobs=" in self.path:
            for sibling in siblings:
                sibling |= blob(sibling["rfilename"], files[sibling["rfilename"]])
        return self.reply(
            200, {"id": match[1], "modelId": match[1], "sha": sha, "private": repository.private, "siblings": siblings}
        )

    def tree(self, match: re.Match, repository: Repository, body: bytes) -> None:
        files = repository.files(match[2])
        if files is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {match[2]}")
        folder = f"{match[3]}/" if match[3] else ""
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in sorted(files.items())
            if name.startswith(folder)
        ]
        if folder and not entries:
            return self.fail(404, "EntryNotFound", "Entry not found")
        return self.reply(200, entries)

    def resolve(self, match: re.Match, repository: Repository, body: bytes) -> None:
        files = repository.files(match[2])
        if files is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {match[2]}")
        sha = repository.head if match[2] == "main" else match[2]
        if match[3] not in files:
            return self.reply(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        data = files[match[3]]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2]), len(data) - 1)
            span = f"bytes {first}-{last}/{len(data)}"
            return self.reply(206, data[first : last + 1], ETag=etag, X_Repo_Commit=sha, Content_Range=span)
        return self.reply(200, data, ETag=etag, X_Repo_Commit=sha, Accept_Ranges="bytes")
