"""A counter in memory, a counter on disk, and a few routes to poke a MicroVM with."""

import os
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from flask import Flask, Response, request, stream_with_context

COUNT_FILE = Path("/var/lib/flask-hello/count")

app = Flask(__name__)
lock = threading.Lock()
memory_count = 0


@app.get("/")
def count():
    """Counts this visit, in memory and on disk."""
    global memory_count
    with lock:
        memory_count += 1
        disk_count = int(COUNT_FILE.read_text()) + 1 if COUNT_FILE.exists() else 1
        COUNT_FILE.parent.mkdir(parents=True, exist_ok=True)
        COUNT_FILE.write_text(str(disk_count))
        return {"memory": memory_count, "disk": disk_count, "hostname": socket.gethostname()}


@app.get("/health")
def health():
    return {"status": "ok"}


@app.get("/headers")
def headers():
    """The request's headers, as they arrived here."""
    return dict(request.headers)


@app.get("/stream")
def stream():
    """`?chunks=` lines (5 by default), `?interval=` seconds apart (0.2 by default)."""
    chunks, interval = int(request.args.get("chunks", 5)), float(request.args.get("interval", 0.2))

    def lines():
        for number in range(chunks):
            if number:
                time.sleep(interval)
            yield f"chunk {number}\n"

    return Response(lines(), mimetype="text/plain")


@app.route("/echo", methods=["POST", "PUT"])
def echo():
    """Sends the request's body back while it arrives."""
    body = iter(lambda: request.stream.read(64 * 1024), b"")
    return Response(stream_with_context(body), mimetype=request.mimetype or "application/octet-stream")


@app.get("/fetch")
def fetch():
    """What `?url=` answers, to see whom this MicroVM can reach."""
    try:
        with urllib.request.urlopen(request.args["url"], timeout=5) as answer:
            return Response(answer.read(), answer.status, mimetype="text/plain")
    except urllib.error.HTTPError as error:
        return Response(error.read(), error.code, mimetype="text/plain")
    except (OSError, ValueError) as error:
        return Response(f"{error}\n", 502, mimetype="text/plain")


@app.get("/say")
def say():
    """Writes `?words=` to the output."""
    print(request.args["words"], flush=True)
    return {}


@app.get("/sleep")
def sleep():
    """Answers after `?seconds=`."""
    seconds = float(request.args.get("seconds", 1))
    time.sleep(seconds)
    return {"slept": seconds}


@app.get("/exit")
def leave():
    """Ends the worker with `?code=`. 3 tells gunicorn to end with it, after any other it starts a new worker."""
    os._exit(int(request.args.get("code", 3)))
