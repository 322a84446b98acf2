"""A file server on loopback that fails as it is told to, by itself or in front of another server."""

import hashlib
import re
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

MAX_REQUESTS = 20_000  # of one server; more is a loop that does not end
HOP_HEADERS = ("connection", "transfer-encoding", "content-length", "server", "date")


@dataclass(frozen=True)
class Fault:
    """How one request is answered wrongly; each field that is set changes the true answer."""

    status: int | None = None  # an error, without the content
    headers: dict[str, str] = field(default_factory=dict)  # in place of the true ones
    delay: float = 0.0  # seconds before the first byte of the content
    keep: int | None = None  # bytes of the content that are sent before the connection is closed
    length: int | None = None  # Content-Length, whatever is sent
    body: bytes | None = None  # in place of the content


@dataclass(frozen=True)
class Request:
    """What the server did for one request."""

    method: str
    path: str
    range: str | None
    status: int
    sent: int  # bytes of the body


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


class FaultServer:
    """Serves `files` (by path, from "/"), or what the server at `upstream` (host:port) answers.

    Faults are kept by path, and by method where one is named: each is used for one request, in order.
    """

    def __init__(self, files: dict[str, bytes] | None = None, upstream: str | None = None) -> None:
        self.files, self.upstream = files or {}, upstream
        self.etags = {path: f'"{hashlib.md5(content).hexdigest()}"' for path, content in self.files.items()}
        self.log: list[Request] = []
        self.most_at_once: dict[str, int] = defaultdict(int)  # GETs of a path
        self._now: dict[str, int] = defaultdict(int)
        self._faults: dict[tuple[str, str], deque[Fault]] = defaultdict(deque)
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.address = ""

    def url(self, path: str) -> str:
        return f"http://{self.address}{path}"

    def fail(self, path: str, *faults: Fault, method: str = "GET") -> None:
        with self.lock:
            self._faults[method, path].extend(faults)

    def asked(self, path: str, method: str = "GET") -> list[Request]:
        with self.lock:
            return [request for request in self.log if (request.method, request.path) == (method, path)]

    def sent(self, path: str) -> int:
        """Bytes of the file that left the server."""
        return sum(request.sent for request in self.asked(path))

    def answer(self, method: str, target: str, headers: HTTPMessage, body: bytes) -> tuple[Fault, Answer]:
        path = unquote(urlsplit(target).path)
        with self.lock:
            assert len(self.log) < MAX_REQUESTS, "a client that does not end"
            waiting = self._faults[method, path]
            fault = waiting.popleft() if waiting else Fault()
        if fault.status is not None:
            return fault, Answer(fault.status, {}, b"" if method == "HEAD" else b"no")
        if self.upstream is not None:
            return fault, forward(self.upstream, method, target, headers, body)
        return fault, self._file(path, headers)

    def _file(self, path: str, headers: HTTPMessage) -> Answer:
        if path not in self.files:
            return self._index(path)
        content = self.files[path]
        etag = self.etags[path]
        facts = {"ETag": etag, "Accept-Ranges": "bytes"}
        if headers.get("If-Match", etag) != etag:
            return Answer(412, {}, b"")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range", ""))
        if wanted is None:
            return Answer(200, facts, content)
        first = int(wanted[1])
        if first >= len(content):
            return Answer(416, {}, b"")
        part = content[first : int(wanted[2] or len(content)) + 1]
        return Answer(206, {**facts, "Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(content)}"}, part)

    def _index(self, path: str) -> Answer:
        folder = path.rstrip("/") + "/"
        names = [name.removeprefix(folder) for name in sorted(self.files) if name.startswith(folder)]
        if not names:
            return Answer(404, {}, b"")
        page = "".join(f'<a href="{name}">{name}</a>\n' for name in names)
        return Answer(200, {"Content-Type": "text/html"}, page.encode())

    @contextmanager
    def counted(self, path: str) -> Iterator[None]:
        with self.lock:
            self._now[path] += 1
            self.most_at_once[path] = max(self.most_at_once[path], self._now[path])
        try:
            yield
        finally:
            with self.lock:
                self._now[path] -= 1


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30.0
    faults: FaultServer

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.command == "GET":
            with self.faults.counted(path):
                self._serve(path)
        else:
            self._serve(path)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _serve(self, path: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault, answer = self.faults.answer(self.command, self.path, self.headers, body)
        content = answer.body if fault.body is None else fault.body
        length = len(content)
        if self.command == "HEAD" and "Content-Length" in answer.headers:
            length = int(answer.headers["Content-Length"])
        headers = {**answer.headers, "Content-Length": str(length if fault.length is None else fault.length)}
        sent = b"" if self.command == "HEAD" else content[: fault.keep]
        with self.faults.lock:
            self.faults.log.append(Request(self.command, path, self.headers.get("Range"), answer.status, len(sent)))
        self.send_response(answer.status)
        for name, value in {**headers, **fault.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.faults.closing.wait(fault.delay)
        self.wfile.write(sent)
        self.close_connection = self.close_connection or fault.keep is not None or fault.length is not None

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that give up are what is tested."""


def forward(upstream: str, method: str, target: str, headers: HTTPMessage, body: bytes) -> Answer:
    connection = HTTPConnection(upstream, timeout=30)
    try:
        connection.request(method, target, body, dict(headers.items()))
        response = connection.getresponse()
        kept = {k: v for k, v in response.getheaders() if k.lower() not in HOP_HEADERS}
        if method == "HEAD":
            kept["Content-Length"] = response.getheader("Content-Length", "0")
        return Answer(response.status, kept, response.read())
    finally:
        connection.close()


@contextmanager
def serving(files: dict[str, bytes] | None = None, upstream: str | None = None) -> Iterator[FaultServer]:
    """A server that ends with the block."""
    faults = FaultServer(files, upstream)
    handler = type("BoundHandler", (Handler,), {"faults": faults})
    server = Server(("127.0.0.1", 0), handler)
    faults.address = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield faults
    finally:
        faults.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
