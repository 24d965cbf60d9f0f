"""A Hub on loopback: the part of its HTTP protocol that pushing and loading models use.

Repositories live in memory. Two host names point to the same port: `127.0.0.1` is the Hub, `localhost` the store of
large files, which must never be sent a token.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from loopback_xet import XetStore

LFS_SUFFIXES = (".safetensors", ".bin")


class Answer(Exception):
    """Ends a request with a status, headers and a body."""

    def __init__(self, status: int, body: Any = b"", **headers: str) -> None:
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        if not isinstance(body, bytes):
            self.headers.setdefault("Content-Type", "application/json")


def refusal(status: int, code: str, message: str, **headers: str) -> Answer:
    return Answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message, **headers)


@dataclass(frozen=True)
class File:
    """A file of a commit: `oid` is git's hash of it (or of its LFS pointer), `sha256` that of a large file."""

    oid: str
    size: int
    sha256: str | None = None


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, File]
    parent: str | None = None
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()))


@dataclass
class Repository:
    id: str
    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit:
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in self.refs:
                return self.commits[self.refs[name]]
        if revision in self.commits:
            return self.commits[revision]
        raise refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def add(self, ref: str, title: str, files: dict[str, File]) -> Commit:
        parent = self.refs.get(ref)
        oid = hashlib.sha1(f"{self.id} {ref} {title} {len(self.commits)} {time.time_ns()}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, files, parent)
        self.refs[ref] = oid
        return self.commits[oid]

    def history(self, commit: Commit | None) -> list[Commit]:
        found = []
        while commit is not None:
            found.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return found


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class LoopbackHub:
    """The server and what it knows. `tokens` maps a token to a user and a role, `"write"` or `"read"`."""

    def __init__(self, port: int = 0) -> None:
        self.tokens = {"hf_alice": ("alice", "write"), "hf_bob": ("bob", "write"), "hf_reader": ("alice", "read")}
        self.xet = True
        self.part_size = 16 * 1024  # of uploads in parts; the real one's is larger than our test models
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.store = XetStore()
        self.log: list[str] = []
        self.leaks: list[str] = []
        self.failure: Callable[[str, str], bool] | None = None
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url, self.content_url = f"http://127.0.0.1:{self.port}", f"http://localhost:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reset(self) -> None:
        """Forgets repositories and plain large files. Xorbs stay: the client remembers which it has sent."""
        self.repositories.clear()
        self.objects.clear()
        self.parts.clear()
        self.log.clear()
        self.leaks.clear()
        self.failure = None
        self.xet = True

    def create(self, repo_id: str, private: bool = False, gated: bool = False) -> Repository:
        repository = self.repositories[repo_id] = Repository(repo_id, private, gated)
        content = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        repository.add("refs/heads/main", "initial commit", {".gitattributes": self.keep(content)})
        return repository

    def publish(self, repo_id: str, directory: Path, **kind: bool) -> None:
        """A repository with the files of a directory, as if somebody had pushed it."""
        repository = self.create(repo_id, **kind)
        files = {path.name: self.keep(path.read_bytes()) for path in directory.iterdir() if path.is_file()}
        repository.add("refs/heads/main", "files", files)

    def keep(self, content: bytes) -> File:
        file = File(git_oid(content), len(content))
        self.blobs[file.oid] = content
        return file

    def files(self, repo_id: str, revision: str = "main") -> set[str]:
        return set(self.repositories[repo_id].resolve(revision).files) - {".gitattributes"}

    def text(self, repo_id: str, path: str, revision: str = "main") -> str:
        return self.blobs[self.repositories[repo_id].resolve(revision).files[path].oid].decode()

    def has(self, sha256: str) -> bool:
        return sha256 in self.objects or sha256 in self.store.by_sha256


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def _respond(self) -> None:
        body = self._body()
        parts = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        self.path_only = parts.path
        with self.hub.lock:
            self.hub.log.append(f"{self.command} {self.path}")
            failure = self.hub.failure
            try:
                if failure is not None and failure(self.command, self.path):
                    raise Answer(403, {"error": "interrupted"}, X_Error_Message="interrupted")
                answer = self._dispatch(body)
            except Answer as found:
                answer = found
        self.send_response(answer.status)
        answer.headers.setdefault("Content-Length", str(len(answer.body)))
        answer.headers.setdefault("Date", formatdate(usegmt=True))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _respond

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _dispatch(self, body: bytes) -> Answer:
        if self.headers.get("Host", "").startswith("localhost"):
            if "Authorization" in self.headers and not self.path.startswith("/cas/v"):
                self.hub.leaks.append(self.path)
            return self._content(body)
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, self.path_only)
            if match and self.command in method:
                arguments = [None if part is None else unquote(part) for part in match.groups()]
                return action(self, body, *arguments)
        raise Answer(404, {"error": f"no such route: {self.command} {self.path}"})

    # --- who asks, and what they may do

    def _user(self) -> tuple[str, str] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in self.hub.tokens:
            message = "Invalid credentials in Authorization header"
            raise Answer(401, {"error": message}, X_Error_Message=message)
        return self.hub.tokens[token]

    def _repository(self, repo_id: str, write: bool = False, content: bool = False) -> Repository:
        user = self._user()
        repository = self.hub.repositories.get(repo_id)
        owner = user is not None and user[0] == repo_id.partition("/")[0]
        if repository is None or (repository.private and not owner):
            raise refusal(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if write and user is None:
            raise Answer(401, {"error": "Unauthorized"}, X_Error_Message="Unauthorized")
        if write and user is not None and (user[1] != "write" or not (owner or "create_pr" in self.query)):
            raise Answer(403, {"error": "Forbidden"}, X_Error_Message="you have no right to write here")
        if content and repository.gated and not owner:
            message = f"Access to model {repo_id} is restricted. Ask for access on its page."
            raise refusal(401 if user is None else 403, "GatedRepo", message)
        return repository

    def whoami(self, body: bytes) -> Answer:
        user = self._user()
        if user is None:
            raise Answer(401, {"error": "Unauthorized"})
        access = {"accessToken": {"role": user[1], "displayName": "test"}}
        return Answer(200, {"type": "user", "name": user[0], "fullname": user[0], "orgs": [], "auth": access})

    # --- repositories

    def create(self, body: bytes) -> Answer:
        user = self._user()
        wanted = json.loads(body)
        if user is None:
            raise Answer(401, {"error": "Unauthorized"}, X_Error_Message="Unauthorized")
        repo_id = f"{wanted.get('organization') or user[0]}/{wanted['name']}"
        if user[1] != "write" or repo_id.partition("/")[0] != user[0]:
            raise Answer(403, {"error": "Forbidden"}, X_Error_Message="you have no right to create this repository")
        url = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        if repo_id in self.hub.repositories:
            raise Answer(409, url | {"error": "You already created this model repo"})
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.create(repo_id, private=bool(private))
        return Answer(200, url)

    def validate(self, body: bytes) -> Answer:
        return Answer(200, {"errors": [], "warnings": []})

    def info(self, body: bytes, repo_id: str, revision: str | None = None) -> Answer:
        repository = self._repository(repo_id)
        commit = repository.resolve(revision or "main")
        card = commit.files.get("README.md")
        return Answer(
            200,
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": commit.oid,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "tags": [],
                "siblings": [self._sibling(path, file) for path, file in sorted(commit.files.items())],
                "cardData": _front_matter(self.hub.blobs[card.oid].decode()) if card else {},
            },
        )

    def _sibling(self, path: str, file: File) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": path}
        if "blobs" in self.query:
            entry |= {"size": file.size, "blobId": file.oid}
            if file.sha256:
                entry["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 130}
        return entry

    def _entry(self, path: str, file: File) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
        if file.sha256:
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
            if file.sha256 in self.hub.store.by_sha256:
                entry["xetHash"] = self.hub.store.by_sha256[file.sha256]
        return entry

    def tree(self, body: bytes, repo_id: str, revision: str, folder: str | None = None) -> Answer:
        commit = self._repository(repo_id).resolve(revision)
        prefix = f"{folder}/" if folder else ""
        entries = [self._entry(path, file) for path, file in commit.files.items() if path.startswith(prefix)]
        if folder and not entries:
            raise refusal(404, "EntryNotFound", f"{folder} does not exist", X_Repo_Commit=commit.oid)
        if "recursive" not in self.query or self.query["recursive"].lower() == "false":
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
        return Answer(200, entries)

    def paths_info(self, body: bytes, repo_id: str, revision: str) -> Answer:
        commit = self._repository(repo_id).resolve(revision)
        wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
        return Answer(200, [self._entry(path, commit.files[path]) for path in wanted if path in commit.files])

    def refs(self, body: bytes, repo_id: str) -> Answer:
        repository = self._repository(repo_id)

        def listed(prefix: str) -> list[dict[str, str]]:
            return [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                for ref, oid in repository.refs.items()
                if ref.startswith(prefix)
            ]

        pulls = listed("refs/pr/") if "include_prs" in self.query else []
        branches, tags = listed("refs/heads/"), listed("refs/tags/")
        return Answer(200, {"branches": branches, "converts": [], "tags": tags, "pullRequests": pulls})

    def commits(self, body: bytes, repo_id: str, revision: str) -> Answer:
        repository = self._repository(repo_id)
        return Answer(
            200,
            [
                {"id": c.oid, "title": c.title, "message": "", "authors": [{"user": "alice"}], "date": c.date}
                for c in repository.history(repository.resolve(revision))
            ],
        )

    def branch(self, body: bytes, repo_id: str, name: str) -> Answer:
        repository = self._repository(repo_id, write=True)
        if f"refs/heads/{name}" in repository.refs:
            raise Answer(409, {"error": f"Reference already exists: refs/heads/{name}"})
        start = json.loads(body or b"{}").get("startingPoint") or "main"
        repository.refs[f"refs/heads/{name}"] = repository.resolve(start).oid
        return Answer(200, {})

    def tag(self, body: bytes, repo_id: str, revision: str) -> Answer:
        repository = self._repository(repo_id, write=True)
        repository.refs[f"refs/tags/{json.loads(body)['tag']}"] = repository.resolve(revision).oid
        return Answer(200, {})

    # --- uploads

    def preupload(self, body: bytes, repo_id: str, revision: str) -> Answer:
        commit = self._repository(repo_id, write=True).resolve(revision)
        files = []
        for wanted in json.loads(body)["files"]:
            mode = "lfs" if wanted["path"].endswith(LFS_SUFFIXES) or wanted["size"] > 10 * 2**20 else "regular"
            entry = {"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False}
            if known := commit.files.get(wanted["path"]):
                entry["oid"] = known.sha256 or known.oid
            files.append(entry)
        return Answer(200, {"files": files})

    def batch(self, body: bytes, repo_id: str) -> Answer:
        # A pull request's upload names no request for one: who may read may offer content.
        self._repository(repo_id)
        request = json.loads(body)
        if self.hub.xet and "xet" in request["transfers"]:
            objects = [{"oid": item["oid"], "size": item["size"]} for item in request["objects"]]
            return Answer(200, {"transfer": "xet", "objects": objects})
        objects, multipart = [], False
        for item in request["objects"]:
            oid, size = item["oid"], item["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                upload: dict[str, Any] = {"href": f"{self.hub.content_url}/objects/{oid}"}
                if size > 2 * self.hub.part_size:
                    multipart = True
                    count = -(-size // self.hub.part_size)
                    urls = {f"{part:05d}": f"{upload['href']}?part={part}" for part in range(1, count + 1)}
                    upload = {
                        "href": f"{self.hub.url}/complete/{oid}",
                        "header": {"chunk_size": str(self.hub.part_size)} | urls,
                    }
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify/{oid}"}}
            objects.append(entry)
        return Answer(200, {"transfer": "multipart" if multipart else "basic", "objects": objects})

    def complete(self, body: bytes, oid: str) -> Answer:
        parts = self.hub.parts.pop(oid)
        expected = [{"partNumber": n, "etag": f'"{hashlib.md5(parts[n]).hexdigest()}"'} for n in sorted(parts)]
        if json.loads(body)["parts"] != expected:
            raise Answer(400, {"error": "the parts are not those that were uploaded"})
        self._store(oid, b"".join(parts[n] for n in sorted(parts)))
        return Answer(200, {})

    def verify(self, body: bytes, oid: str) -> Answer:
        wanted = json.loads(body)
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise Answer(404, {"error": "no such object"})
        return Answer(200, {})

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Answer(400, {"error": "the content does not have the promised sha256"})
        self.hub.objects[oid] = content

    def commit(self, body: bytes, repo_id: str, revision: str) -> Answer:
        repository = self._repository(repo_id, write=True)
        base = repository.resolve(revision)
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, base.oid):
            raise Answer(412, {"error": "the branch has moved"}, X_Error_Message="A commit has happened since.")
        files = dict(base.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = self.hub.keep(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if not self.hub.has(value["oid"]):
                    raise Answer(400, {"error": f"LFS object {value['oid']} was never uploaded"})
                files[value["path"]] = File(git_oid(value["oid"].encode()), value["size"], value["oid"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        if "create_pr" in self.query:
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
            ref = f"refs/pr/{number}"
            repository.refs[ref] = base.oid
            extra = {"pullRequestUrl": f"{self.hub.url}/{repo_id}/discussions/{number}"}
        else:
            ref = revision if revision in repository.refs else f"refs/heads/{revision}"
            extra = {}
        commit = repository.add(ref, header["summary"], files)
        url = f"{self.hub.url}/{repo_id}/commit/{commit.oid}"
        return Answer(200, {"success": True, "commitUrl": url, "commitOid": commit.oid} | extra)

    # --- downloads

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> Answer:
        repository = self._repository(repo_id, content=True)
        commit = repository.resolve(revision)
        if path not in commit.files:
            raise refusal(404, "EntryNotFound", f"{path} does not exist", X_Repo_Commit=commit.oid)
        file = commit.files[path]
        if file.sha256 is None:
            return self._ranged(self.hub.blobs[file.oid], X_Repo_Commit=commit.oid, ETag=f'"{file.oid}"')
        headers = {
            "X_Repo_Commit": commit.oid,
            "X_Linked_ETag": f'"{file.sha256}"',
            "X_Linked_Size": str(file.size),
            "Location": f"{self.hub.content_url}/objects/{file.sha256}",
        }
        if xet_hash := self.hub.store.by_sha256.get(file.sha256):
            token = f"{self.hub.url}/api/models/{repo_id}/xet-read-token/{commit.oid}"
            headers |= {"X_Xet_Hash": xet_hash, "Link": f'<{token}>; rel="xet-auth"'}
        return Answer(302, b"", **headers)

    def _ranged(self, content: bytes, **headers: str) -> Answer:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers |= {"Accept_Ranges": "bytes"}
        if not found:
            return Answer(200, content, **headers)
        first, last = int(found[1]), min(int(found[2] or len(content) - 1), len(content) - 1)
        if first > last:
            return Answer(416, b"", Content_Range=f"bytes */{len(content)}")
        part = content[first : last + 1]
        return Answer(206, part, Content_Range=f"bytes {first}-{last}/{len(content)}", **headers)

    # --- large files

    def _content(self, body: bytes) -> Answer:
        if match := re.fullmatch(r"/objects/(\w+)", self.path_only):
            oid = match[1]
            if self.command == "PUT" and "part" in self.query:
                self.hub.parts.setdefault(oid, {})[int(self.query["part"])] = body
                return Answer(200, b"", ETag=f'"{hashlib.md5(body).hexdigest()}"')
            if self.command == "PUT":
                self._store(oid, body)
                return Answer(200, b"")
            if oid in self.hub.objects:
                return self._ranged(self.hub.objects[oid], ETag=f'"{oid}"')
        store = self.hub.store
        if match := re.fullmatch(r"/cas/v1/xorbs/default/(\w+)", self.path_only):
            return Answer(200, {"was_inserted": store.add_xorb(match[1], body)})
        if self.path_only == "/cas/v1/shards":
            store.add_shard(body)
            return Answer(200, {"result": 1})
        if match := re.fullmatch(r"/cas/v1/reconstructions/(\w+)", self.path_only):
            span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "bytes=0-"))
            first, last = int(span[1]), int(span[2]) if span[2] else None
            found = store.reconstruction(match[1], first, last, f"{self.hub.content_url}/xorbs")
            return Answer(200, found) if found else Answer(416, b"")
        if match := re.fullmatch(r"/xorbs/(\w+)", self.path_only):
            return self._ranged(store.xorbs[match[1]])
        raise Answer(404, {"error": f"no such content: {self.path}"})

    def xet_token(self, body: bytes, repo_id: str, kind: str, revision: str) -> Answer:
        self._repository(repo_id, content=kind == "read")
        url, expires = f"{self.hub.content_url}/cas", int(time.time()) + 3600
        return Answer(
            200,
            {"accessToken": "xet", "exp": expires, "casUrl": url},
            X_Xet_Cas_Url=url,
            X_Xet_Access_Token="xet",
            X_Xet_Token_Expiration=str(expires),
        )


def _front_matter(text: str) -> dict[str, Any]:
    import yaml

    found = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    return yaml.safe_load(found[1]) or {} if found else {}


_ID = r"([\w.-]+(?:/[\w.-]+)?)"
_R = rf"/api/models/{_ID}"
ROUTES = [
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), r"/api/repos/create", _Handler.create),
    (("POST",), r"/api/validate-yaml", _Handler.validate),
    (("GET",), _R, _Handler.info),
    (("GET",), rf"{_R}/revision/([^/]+)", _Handler.info),
    (("GET",), rf"{_R}/tree/([^/]+)(?:/(.*))?", _Handler.tree),
    (("POST",), rf"{_R}/paths-info/([^/]+)", _Handler.paths_info),
    (("GET",), rf"{_R}/refs", _Handler.refs),
    (("GET",), rf"{_R}/commits/([^/]+)", _Handler.commits),
    (("POST",), rf"{_R}/branch/([^/]+)", _Handler.branch),
    (("POST",), rf"{_R}/tag/([^/]+)", _Handler.tag),
    (("POST",), rf"{_R}/preupload/([^/]+)", _Handler.preupload),
    (("POST",), rf"{_R}/commit/([^/]+)", _Handler.commit),
    (("GET",), rf"{_R}/xet-(read|write)-token/([^/]+)", _Handler.xet_token),
    (("POST",), rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.batch),
    (("POST",), r"/complete/(\w+)", _Handler.complete),
    (("POST",), r"/verify/(\w+)", _Handler.verify),
    (("GET", "HEAD"), rf"/{_ID}/resolve/([^/]+)/(.*)", _Handler.resolve),
]
