"""Counts visits in memory and on disk; gunicorn imports `app`."""

import socket
from pathlib import Path

from flask import Flask

COUNT_FILE = Path("/var/lib/flask-hello/count")

app = Flask(__name__)
memory_count = 0


@app.get("/")
def count():
    global memory_count
    memory_count += 1
    disk_count = int(COUNT_FILE.read_text()) + 1 if COUNT_FILE.exists() else 1
    COUNT_FILE.parent.mkdir(parents=True, exist_ok=True)
    COUNT_FILE.write_text(str(disk_count))
    return {"memory": memory_count, "disk": disk_count, "hostname": socket.gethostname()}
