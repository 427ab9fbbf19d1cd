"""Metrics are read from whatever listens on a port."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from updraft_cli.local.scrape import scrape


@pytest.mark.parametrize("body", ["<html>hello</html>", '{"status": "ok"}', "ok"])
def test_another_program_on_a_default_port_has_no_metrics(body: str) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert scrape(f"http://127.0.0.1:{server.server_port}/metrics") is None
