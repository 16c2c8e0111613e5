"""A hub on this machine: serves folders as repositories, after as many failures as a test asks."""

import json
import threading
from collections import Counter
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40
REFUSALS = {401: "GatedRepo", 403: "GatedRepo", 404: "RepoNotFound"}
BROKEN = 0  # instead of a status: the connection is closed without an answer


class HubServer(ThreadingHTTPServer):
    """failing: (repository, method, status, times), the first answers to requests for a model's
    weights or a data set's rows; `times` of them. asked: how often each path was asked for."""

    daemon_threads = True

    def __init__(self, repositories, failing=()):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.left = {(name, method): [status, times] for name, method, status, times in failing}
        self.asked = Counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(with_body=True)

    def answer(self, with_body):
        path = self.path.split("?")[0].strip("/")
        self.server.asked[self.command, path] += 1
        name = next((name for name in self.server.repositories if f"{name}/" in f"{path}/"), None)
        for method in (self.command, "*"):
            plan = self.server.left.get((name, method))
            if plan and plan[1] and (method == "*" or "/resolve/" in f"/{path}"):
                plan[1] -= 1
                return self.fail(plan[0])
        if name is None:
            return self.fail(404)
        folder = Path(self.server.repositories[name])
        rest = path.split(f"{name}", 1)[1].strip("/").split("/")
        if path.startswith("api/"):
            return self.send(200, self.api(folder, name, rest), with_body, "application/json")
        file = folder / "/".join(rest[2:])
        if rest[:1] != ["resolve"] or not file.is_file():
            return self.fail(404, "EntryNotFound")
        return self.send(200, file.read_bytes(), with_body, "application/octet-stream")

    def api(self, folder, name, rest):
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = [file.relative_to(folder).as_posix() for file in files]
        if rest[:1] in (["tree"], ["paths-info"]):
            found = [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": "1"}
                for n, f in zip(names, files)
            ]
        else:
            found = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": n} for n in names]}
            found |= {"private": False, "tags": [], "downloads": 0, "likes": 0}
        return json.dumps(found).encode()

    def fail(self, status, code=None):
        if status == BROKEN:
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(status)
        self.send_header("X-Error-Code", code or REFUSALS.get(status, ""))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, status, body, with_body, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)
