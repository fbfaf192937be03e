#!/usr/bin/python3
"""Answers the same requests as container-static/app.c, and does what it is told: a shell's script as a child process, or a piece of Python in
the main process itself."""

import ctypes
import errno
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROLES = "/latest/meta-data/iam/security-credentials/"
libc = ctypes.CDLL(None, use_errno=True)


def outcome(result: int) -> str:
    return "done" if result == 0 else errno.errorcode[ctypes.get_errno()]


def kib(path: str) -> int:
    found = os.statvfs(path)
    return found.f_blocks * found.f_frsize // 1024


def facts() -> dict:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    # What the process was given: Python adds to `os.environ`.
    given = Path("/proc/self/environ").read_text().rstrip("\0").split("\0")
    return {
        "pid": os.getpid(),
        "arguments": " ".join(sys.argv[1:]),
        **{f"env.{name}": value for name, value in (variable.split("=", 1) for variable in given)},
        "user": " ".join(map(str, [os.getuid(), os.getgid(), *os.getgroups()])),
        "host": socket.gethostname(),
        "directory": os.getcwd(),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "bounding": status["CapBnd"].strip(),
        "seccomp": status["Seccomp"].strip(),
        "cgroup": Path("/proc/self/cgroup").read_text().strip(),
        "mount": outcome(libc.mount(b"none", b"/", b"tmpfs", 0, None)),
        "rename": outcome(libc.sethostname(b"renamed", 7)),
        "generation": Path("/dev/hearth/generation").read_text().strip(),
        "shm": kib("/dev/shm"),
        "disk": kib("/"),
        "processors": os.cpu_count(),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE") // 1024,
    }


def metadata() -> dict:
    def ask(method: str, path: str, headers: dict) -> tuple[int, str]:
        connection = http.client.HTTPConnection("169.254.169.254", timeout=30)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode().replace("\n", " ")

    token = {"X-aws-ec2-metadata-token": ask("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})[1]}
    answers = {"unasked": (ask("GET", ROLES, {})[0],), "role": ask("GET", ROLES, token), "credentials": ask("GET", ROLES + "execution_role", token)}
    return {name: " ".join(map(str, answer)) for name, answer in answers.items()}


def orphan() -> dict:
    """A process whose parent ends before it."""
    child = os.fork()
    if not child:
        if os.fork():
            os._exit(0)
        while os.getppid() != 1:
            time.sleep(0.001)
        os._exit(3)
    os.waitpid(child, 0)
    _, status = os.wait()
    zombies = sum(") Z " in path.read_text() for path in Path("/proc").glob("[0-9]*/stat"))
    return {"code": os.waitstatus_to_exitcode(status), "zombies": zombies}


def write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        said = {"/facts": facts, "/metadata": metadata, "/orphan": orphan}[self.path]()
        self.answer("".join(f"{name} {value}\n" for name, value in said.items()).encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path in ("/stdout", "/stderr"):
            write(1 if self.path == "/stdout" else 2, body)
            self.answer(b"")
        elif self.path == "/exit":
            os._exit(int(body))
        elif self.path == "/main":
            threading.Thread(target=exec, args=(body.decode(), globals())).start()
            self.answer(b"{}")
        else:
            done = subprocess.run(["sh", "-euc", body.decode()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            self.answer(json.dumps({"code": done.returncode, "output": done.stdout}).encode())

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def stop(number, _frame):
    write(1, f"signal {number}\n".encode())
    os._exit(0)


signal.signal(signal.SIGUSR1, stop)
ThreadingHTTPServer(("127.0.0.1", 5000), Handler).serve_forever()
