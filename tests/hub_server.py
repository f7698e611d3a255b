"""A stand-in of the Hugging Face hub's HTTP interface, as far as pushing needs it: repositories in memory, git-lfs
uploads, commits. Faults are given by the request that they befall."""

import base64
import hashlib
import json
import socket
import struct
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USER, TOKEN = "someone", "hf_of_the_tests"


class HubServer:
    """`repositories`: {name: {"private", "commits": [(message, {file: bytes})]}}. `faults`: {words of a request's
    method and path: what befalls each in turn: a status, "cut" (the connection, after half of what it brings) or
    seconds to wait, or None for nothing}. `requests`: method and path of all that came."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict] = {}
        self.stored: dict[str, bytes] = {}  # of git-lfs, by SHA-256
        self.faults: dict[str, deque] = {}
        self.requests: list[str] = []
        self.role, self.lock = "write", threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments) -> None:
                pass

            def handle_any(self) -> None:
                hub.answer(self)

            do_GET = do_POST = do_PUT = do_HEAD = handle_any

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, address) -> None:
                pass  # a client that has gone

        self.server = Server(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, name: str) -> dict[str, bytes]:
        """What the newest commit of a repository holds."""
        return self.repositories[f"{USER}/{name}"]["commits"][-1][1]

    def messages(self, name: str) -> list[str]:
        return [message for message, _ in self.repositories[f"{USER}/{name}"]["commits"][1:]]

    # ---- requests ----

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        what = f"{request.command} {path}"
        with self.lock:
            self.requests.append(what)
            fault = next((faults.popleft() for words, faults in self.faults.items() if words in what and faults), None)
        length = int(request.headers.get("Content-Length") or 0)
        if fault == "cut":
            request.rfile.read(length // 2)
            # a reset, as of a machine that has gone
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()
            request.close_connection = True
            return
        body = request.rfile.read(length) if length else self.read_chunks(request)
        if isinstance(fault, float):
            time.sleep(fault)
        if isinstance(fault, int):
            return self.reply(request, fault, {"error": "a fault of the test"})
        if request.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/store/"):
            return self.reply(request, 401, {"error": "Invalid credentials in Authorization header"})
        with self.lock:
            status, reply = self.act(request.command, path, body)
        self.reply(request, status, reply)

    @staticmethod
    def read_chunks(request: BaseHTTPRequestHandler) -> bytes:
        body = b""
        if request.headers.get("Transfer-Encoding") == "chunked":
            while size := int(request.rfile.readline(), 16):
                body += request.rfile.read(size)
                request.rfile.readline()
            request.rfile.readline()
        return body

    @staticmethod
    def reply(request: BaseHTTPRequestHandler, status: int, value) -> None:
        text = json.dumps(value).encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(len(text)))
        request.end_headers()
        request.wfile.write(text)

    def act(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": USER, "auth": {"accessToken": {"role": self.role}}, "orgs": []}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            given = json.loads(body)
            name = f"{given.get('organization') or USER}/{given['name']}"
            address = {"url": f"{self.address}/{name}", "name": name, "id": name}
            if name in self.repositories:
                return 409, address
            private = given.get("private", given.get("visibility") == "private")
            self.repositories[name] = {"private": private, "commits": [("initial commit", {})]}
            return 200, address
        if parts[0] == "store":
            if hashlib.sha256(body).hexdigest() != parts[1]:
                return 400, {"error": "other bytes than announced"}
            self.stored[parts[1]] = body
            return 200, {}
        name = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2]).removesuffix(".git")
        repository = self.repositories.get(name)
        if repository is None:
            return 404, {"error": "Repository not found"}
        files = repository["commits"][-1][1]
        if parts[-1] == "batch":
            return 200, {"transfer": "basic", "objects": [self.upload(item) for item in json.loads(body)["objects"]]}
        if parts[4] == "tree":
            return 200, [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
        if parts[4] == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": modes}
        if parts[4] == "commit":
            return self.commit(repository, [json.loads(line) for line in body.splitlines()])
        sha = f"{len(repository['commits']):040x}"
        siblings = [{"rfilename": name} for name in files]
        return 200, {"id": name, "modelId": name, "sha": sha, "private": True, "siblings": siblings}

    def upload(self, item: dict) -> dict:
        """The answer of git-lfs for one file: where to send it, or nothing where it is here."""
        known = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] in self.stored:
            return known
        return {**known, "actions": {"upload": {"href": f"{self.address}/store/{item['oid']}"}}}

    def commit(self, repository: dict, lines: list[dict]) -> tuple[int, object]:
        message, files = "", dict(repository["commits"][-1][1])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repository["commits"].append((message, files))
        sha = f"{len(repository['commits']):040x}"
        return 200, {
            "success": True,
            "commitOid": sha,
            "commitUrl": f"{self.address}/x/y/commit/{sha}",
            "hookOutput": "",
        }
