#!/usr/bin/python3
"""Does what it is told: a shell's script as a child process, or a piece of Python in the main process itself."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        told = self.rfile.read(int(self.headers["content-length"])).decode()
        if self.path == "/main":
            threading.Thread(target=exec, args=(told, {"os": os, "sys": sys})).start()
            said = {}
        else:
            done = subprocess.run(["sh", "-euc", told], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            said = {"code": done.returncode, "output": done.stdout}
        body = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", 5000), Handler).serve_forever()
