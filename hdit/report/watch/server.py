"""The page over http, to this machine alone: it draws a run while the run goes on."""

from __future__ import annotations

import errno
import gzip
import hashlib
import re
import sys
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from hdit.errors import UserError
from hdit.report.watch.grids import png
from hdit.report.watch.page import in_script, live, render
from hdit.runs.history import History, Values

HOST = "127.0.0.1"
EVERY = 5.0  # seconds between two looks of a page
STALE = 30.0  # seconds after which a run that wrote nothing is looked at again: it may have ended
GRID = re.compile(r"/grid/([0-9]{1,4})/([0-9]{1,18})\.png")
NAMES = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?")
"""What a browser may call this server: another name is one that leads here from elsewhere."""


class Watched:
    """Runs that are read again as they grow, for all requests together."""

    def __init__(self, folders: Sequence[Path]):
        self.histories = [History(folder) for folder in folders]
        self.lock = threading.Lock()
        self.told: Values = {}
        self.read = -STALE

    def now(self) -> Values:
        """What the page draws now."""
        with self.lock:
            news = [history.update() for history in self.histories]
            counts = [len(history.grids()) for history in self.histories]
            grids = [len(run["grids"]) for run in self.told.get("runs", [])]
            if any(news) or counts != grids or time.monotonic() - self.read > STALE:
                self.told = live(self.histories, time.time(), EVERY)
                self.read = time.monotonic()
            return self.told

    def grid(self, run: int, images: int) -> bytes:
        """The PNG file of a grid; nothing where there is none, or it is a link out of the run."""
        if run >= len(self.histories):
            return b""
        history = self.histories[run]
        path = history.grids().get(images)
        if path is None or not path.resolve().is_relative_to(history.path.resolve()):
            return b""
        return png(path)


class Handler(BaseHTTPRequestHandler):
    """Answers for the page, its data and its grids, and for nothing else."""

    server: Server

    def do_GET(self) -> None:
        """Answers a request by its path."""
        if not NAMES.fullmatch(self.headers.get("Host", "")):
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        path, watched = self.path.partition("?")[0], self.server.watched
        if path in ("/", "/index.html"):
            self._send(render(watched.now()).encode(), "text/html; charset=utf-8")
        elif path == "/data.json":
            self._send(in_script(watched.now()).encode(), "application/json")
        elif match := GRID.fullmatch(path):
            self._send(watched.grid(int(match[1]), int(match[2])), "image/png")
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    do_HEAD = do_GET

    def _send(self, body: bytes, kind: str) -> None:
        """Answers with a body, or with 304 where the browser has the same; with 404 for none."""
        if not body:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        same = self.headers.get("If-None-Match") == tag
        self.send_response(HTTPStatus.NOT_MODIFIED if same else HTTPStatus.OK)
        packs = kind != "image/png" and "gzip" in self.headers.get("Accept-Encoding", "")
        if packs and not same:
            body = gzip.compress(body, compresslevel=5)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("ETag", tag)
        self.send_header("Cache-Control", "no-cache")
        self.send_header("X-Content-Type-Options", "nosniff")
        if not same:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not same and self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing of requests: they come every few seconds."""


class Server(ThreadingHTTPServer):
    """Serves runs at HOST. Raises UserError where the port cannot be had."""

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], port: int):
        self.watched = Watched(folders)
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = "another program has it" if taken else error.strerror
            raise UserError(
                f"--port: {port} cannot be had: {reason}; name another, or 0 for any that is free"
            ) from None

    @property
    def address(self) -> str:
        """What to open in a browser."""
        return f"http://{HOST}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Passes over a browser that went away in the middle of an answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
