"""A hub on loopback: as much of the Hugging Face API as an upload and its check use."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class FakeHub:
    """Keeps what is pushed in ``files`` (by repository and path) and every request in ``requests``."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.private: dict[str, bool] = {}
        self.cards: list[str] = []
        self.requests: list[tuple[str, str, str]] = []
        self.refuse = 0  # an HTTP status for every commit
        self.damage = False  # flip a byte of every object
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def _answer(self, method: str) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                if "chunked" in self.headers.get("Transfer-Encoding", ""):
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(length)
                path = urlsplit(self.path).path
                hub.requests.append((method, path, self.headers.get("Authorization", "")))
                status, content = hub.respond(method, path, body)
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self._answer("GET")

            def do_POST(self) -> None:
                self._answer("POST")

            def do_PUT(self) -> None:
                self._answer("PUT")

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def respond(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            self.files.setdefault(name, {})
            self.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
            return 200, {"url": f"{self.endpoint}/{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            self.cards.append(json.loads(body)["content"])
            return 200, {"errors": [], "warnings": []}
        if path.endswith("/objects/batch"):
            made = []
            for item in json.loads(body)["objects"]:
                upload = {"href": f"{self.endpoint}/objects/{item['oid']}", "header": {}}
                made.append({**item, "authenticated": True, "actions": {"upload": upload}})
            return 200, {"transfer": "basic", "objects": made}
        if method == "PUT" and path.startswith("/objects/"):
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            large = (".safetensors", ".data", ".gguf")
            return 200, {
                "files": [
                    {
                        "path": item["path"],
                        "uploadMode": "lfs" if item["path"].endswith(large) else "regular",
                        "shouldIgnore": False,
                    }
                    for item in asked
                ]
            }
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if "/commit/" in path:
            if self.refuse:
                return self.refuse, {"error": "You have no write access"}
            return self._commit(name, body)
        if "/paths-info/" in path:
            return 200, [self._info(name, item) for item in self._paths(body) if item in self.files[name]]
        if path.startswith("/api/models/"):
            return 200, {"id": name, "sha": "0" * 40, "siblings": [], "private": self.private.get(name, False)}
        return 404, {"error": f"{method} {path}"}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.files[name][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                data = self.objects[value["oid"]]
                if self.damage:
                    data = bytes([data[0] ^ 1]) + data[1:]
                self.files[name][value["path"]] = data
        oid = "a" * 40
        return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/{oid}", "commitOid": oid, "success": True}

    @staticmethod
    def _paths(body: bytes) -> list[str]:
        try:
            asked: list[str] = json.loads(body)["paths"]
            return asked
        except ValueError:
            from urllib.parse import parse_qs

            return parse_qs(body.decode())["paths"]

    def _info(self, name: str, path: str) -> dict[str, Any]:
        data = self.files[name][path]
        info: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        if path.endswith((".safetensors", ".data", ".gguf")):
            info["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return info
