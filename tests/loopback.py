"""A web server of a folder on this machine that can misbehave: `with serve(folder) as server: server.url`.

Not a test file: helpers that test files import with `from loopback import ...`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Server:
    """`trouble` holds what befalls the next requests, one each: "fail", "truncate", "stall" or "garble"."""

    url: str
    trouble: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # paths asked for
    sent: int = 0  # bytes of bodies


@contextmanager
def serve(folder: Path, stall_s: float = 30.0) -> Iterator[Server]:
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            server.requests.append(self.path)
            path = folder / self.path.lstrip("/")
            trouble = server.trouble.pop(0) if server.trouble and body else ""
            if trouble == "fail":
                self.send_error(503)
                return
            if not path.is_file():
                self.send_error(404)
                return
            data = path.read_bytes()
            asked = self.headers.get("Range", "")
            if asked.startswith("bytes="):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start = int(first) if first else len(data) - int(last)
                stop_at = min(int(last), len(data) - 1) + 1 if first and last else len(data)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{stop_at - 1}/{len(data)}")
                data = data[start:stop_at]
            else:
                self.send_response(200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if not body:
                return
            if trouble == "garble":
                data = bytes(len(data))
            half = len(data) // 2
            self._send(data[:half])
            if trouble == "truncate":
                self.close_connection = True
                return
            if trouble == "stall":
                stop.wait(stall_s)
            self._send(data[half:])

        def _send(self, data: bytes) -> None:
            try:
                server.sent += len(data)  # before the client can know of them
                self.wfile.write(data)
            except OSError:
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    class Patient(ThreadingHTTPServer):
        request_queue_size = 128  # of 5, a busy machine turns connections away

    http = Patient(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_address[1]}")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        stop.set()
        http.shutdown()
        http.server_close()
