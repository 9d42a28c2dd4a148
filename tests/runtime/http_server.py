"""A server of one file that knows ranges and versions, and misbehaves as a test wants, request by request."""

import http.server
import re
import socket
import struct
import threading
from dataclasses import dataclass, field


@dataclass
class Act:
    """How the server answers one request.

    status: an error without content. headers: changed ones; None leaves one out. content: other bytes. ranges:
    False ignores Range. cut: bytes after which the connection ends, with `reset` by a reset, after `stall` seconds of
    silence; if nothing is cut, they come before the answer.
    """

    status: int | None = None
    headers: dict = field(default_factory=dict)
    content: bytes | None = None
    cut: int | None = None
    reset: bool = False
    stall: float = 0.0
    ranges: bool = True


class Server(http.server.ThreadingHTTPServer):
    """acts: for the next requests, in order; `rest` is for all further ones. asked: (path, Range, If-Range) of each."""

    daemon_threads = True

    def __init__(self, content):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.etag = content, '"one"'
        self.acts, self.rest, self.asked, self.sent = [], Act(), [], 0
        self.unstall = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.url = f"{self.address}/model.pt"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # clients that were killed or gave up

    def stop(self):
        self.unstall.set()
        self.shutdown()
        self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked, condition = self.server, self.headers["Range"], self.headers["If-Range"]
        server.asked.append((self.path, asked, condition))
        act = server.acts.pop(0) if server.acts else server.rest
        if act.cut is None:
            server.unstall.wait(act.stall)
        content = server.content if act.content is None else act.content
        status, body, headers = 200, content, {"ETag": server.etag}
        if asked and act.ranges and condition in (None, server.etag):
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            status, body = (206, content[start:]) if start < len(content) else (416, b"")
            part = f"{start}-{len(content) - 1}" if body else "*"
            headers["Content-Range"] = f"bytes {part}/{len(content)}"
        if act.status:
            status, body = act.status, b""
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))} | act.headers).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        server.sent += len(body[: act.cut])  # before the client has them, or a test might read it too soon
        self.wfile.write(body[: act.cut])
        if act.cut is not None:
            server.unstall.wait(act.stall)
        if act.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *args):
        pass
