"""Answers every hook with 200, after /ready has said "not yet" twice, and shows what it was called with at `/seen`."""

import json
import os
import signal
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

seen = []


class Hooks(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        hook = self.path.rsplit("/", 1)[1]
        calls = sum(call["path"] == self.path for call in seen)
        headers = [[name.lower(), value] for name, value in self.headers.items()]
        seen.append({"path": self.path, "version": self.request_version, "headers": headers, "body": body, "peer": self.client_address[0]})
        if hook == "resume":
            # Long enough for a look at the state meanwhile.
            time.sleep(1)
        print("hook", hook, flush=True)
        self.answer(503 if hook == "ready" and calls < 2 else 200, b"")

    def do_GET(self):
        self.answer(200, json.dumps(seen).encode())

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def stop(number, _frame):
    print("signal", number, flush=True)
    os._exit(0)


signal.signal(signal.SIGTERM, stop)
ThreadingHTTPServer(("127.0.0.1", 9000), Hooks).serve_forever()
