"""A recallnb server for tests of the QQ client: the calls that the client makes, answered as a test wants."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class FakeRecallnb:
    """`answers` gives for a path what to send: a function of the request that returns status, headers and body (bytes, or an iterable
    of bytes that is streamed). What came in is in `requests`: method, path, query, headers, body."""

    def __init__(self, answers):
        self.answers, self.requests = answers, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_all(self):
                parts = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.requests.append((self.command, parts.path, parse_qs(parts.query), dict(self.headers), body))
                status, headers, out = outer.answers[parts.path](body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if isinstance(out, bytes):
                    self.send_header("Content-Length", str(len(out)))
                    self.end_headers()
                    return self.wfile.write(out)
                self.send_header("Connection", "close")
                self.end_headers()
                try:
                    for part in out:
                        self.wfile.write(part)
                        self.wfile.flush()
                except OSError:
                    pass
                self.close_connection = True

            do_GET = do_POST = do_DELETE = handle_all

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()


def reply(found, status=200, **headers):
    "An answer in JSON."
    return lambda body: (status, {"Content-Type": "application/json", **headers}, json.dumps(found, ensure_ascii=False).encode())


def events(*found):
    "An answer as server-sent events: pairs of name and data, or bytes as they are."
    def parts():
        for one in found:
            yield one if isinstance(one, bytes) else f"event: {one[0]}\ndata: {json.dumps(one[1], ensure_ascii=False)}\n\n".encode()
    return lambda body: (200, {"Content-Type": "text/event-stream; charset=utf-8"}, parts())
