"""A server of one file that does as told: it knows ranges and versions, and misbehaves request by request."""

import http.server
import re
import socket
import struct
import threading
from dataclasses import dataclass, field


@dataclass
class Act:
    """How one request is answered, where not as it should be.

    status: an error and no content. headers: more of them, or others; None leaves one out. content: other bytes.
    cut: bytes of the body after which the connection ends; reset: by a reset. stall: seconds of silence there, or
    before the answer where nothing is cut. ranges: whether they are known. if_range: whether it is obeyed.
    """

    status: int | None = None
    headers: dict = field(default_factory=dict)
    content: bytes | None = None
    cut: int | None = None
    reset: bool = False
    stall: float = 0.0
    ranges: bool = True
    if_range: bool = True


class Server(http.server.ThreadingHTTPServer):
    """acts: for the next requests, in order; then `rest` for all. asked: (path, Range, If-Range) of each request."""

    daemon_threads = True

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.etag = content, '"one"'
        self.acts, self.rest, self.asked, self.sent = [], Act(), [], 0
        self.halted = threading.Event()  # ends every stall
        self.turn = threading.Lock()
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.url = self.address + "/model.pt"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # of clients that were killed or gave up

    def stop(self):
        self.halted.set()
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        with server.turn:
            server.asked.append((self.path, self.headers["Range"], self.headers["If-Range"]))
            act = server.acts.pop(0) if server.acts else server.rest
        if act.stall and act.cut is None:
            server.halted.wait(act.stall)
        content = server.content if act.content is None else act.content
        status, body, headers = 200, content, {"ETag": server.etag}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        same = self.headers["If-Range"] in (None, server.etag, act.headers.get("Last-Modified")) or not act.if_range
        if asked and act.ranges and same:
            start = int(asked[1])
            status, body = 206, content[start:]
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if start >= len(content):
                status, body, headers["Content-Range"] = 416, b"", f"bytes */{len(content)}"
        if act.status:
            status, body = act.status, b""
        headers |= {"Content-Length": str(len(body))} | act.headers
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        body = body[: act.cut]
        self.wfile.write(body)
        with server.turn:
            server.sent += len(body)
        if act.cut is not None:
            server.halted.wait(act.stall)
        if act.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *args):
        pass
