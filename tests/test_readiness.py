"""When a snapshot is taken without a `/ready` hook (SPEC 6.2): when the app listens and has come to rest, or rests without listening."""

import pytest

import support
from support import BASE_IMAGE, Microvm

ALL_INGRESS = "arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:ALL_INGRESS"
PORT = 5000

# As in tests/apps/hooks-python, whose layer is in the cache.
FLASK = f"""\
FROM {BASE_IMAGE}

RUN apt-get update \\
    && apt-get install --yes --no-install-recommends gunicorn python3-flask \\
    && rm -rf /var/lib/apt/lists/*

"""

# Loads for some seconds after gunicorn has begun to listen. Every load leaves a line.
SLOW_TO_LOAD = """\
import os, secrets, time
from flask import Flask

with open("/var/lib/loads", "a") as loads:
    loads.write("loaded\\n")
began = time.process_time()
while time.process_time() - began < 3:
    pass
load = secrets.token_hex(8)

app = Flask(__name__)

@app.get("/")
def tell():
    with open("/var/lib/loads") as loads:
        return {"load": load, "loads": len(loads.readlines())}
"""

# A pre-fork server whose processes all wake ten times a second, and which therefore never rests altogether.
TICKING = f"""\
use IO::Socket;
$server = IO::Socket::INET->new(LocalPort => {PORT}, Listen => 9, ReuseAddr => 1) or die "listen: $!";
$server->blocking(0);
for (1 .. 3) {{ last unless fork }}
while (1) {{
    select undef, undef, undef, 0.1;
    open(T, ">", "/dev/shm/tick-$$"); print T time; close T;
    $client = $server->accept or next;
    $client->blocking(1);
    while (<$client>) {{ last if /^\\r?$/ }}
    print $client "HTTP/1.0 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok"; close $client;
}}
"""

SERVER = """\
use IO::Socket;
sleep %d;
$server = IO::Socket::INET->new(LocalPort => %d, Listen => 9, ReuseAddr => 1) or die "listen: $!";
%s
while ($client = $server->accept) {
    while (<$client>) { last if /^\\r?$/ }
    print $client "HTTP/1.0 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok"; close $client;
}
"""
# Takes all of a processor for ever.
BUSY = "while :; do :; done"
UDP = 'use IO::Socket; $s = IO::Socket::INET->new(LocalPort => 53, Proto => "udp") or die; $s->recv($x, 9) while 1'


@pytest.fixture(scope="module")
def impatient():
    """A server that gives an app little time."""
    with support.serving("ready_timeout_seconds = 8\n") as server:
        yield server


def build(server, name: str, files: dict[str, str], wanted: str = "CREATED") -> tuple[str, str]:
    """Builds an image. Returns its ARN and the build's log."""
    arn = support.create_image(server, name, support.upload(server, f"{name}.zip", support.zip_of(files)))["imageArn"]
    support.wait_image(server, arn, wanted)
    return arn, server.hearth("logs", name).stdout


def perl(program: str, *lines: str) -> dict[str, str]:
    dockerfile = "\n".join([f"FROM {BASE_IMAGE}", "COPY app.pl /app.pl", *lines, 'CMD ["perl", "/app.pl"]', ""])
    return {"Dockerfile": dockerfile, "app.pl": program}


def command(*argv: str) -> dict[str, str]:
    quoted = ", ".join(f'"{word}"' for word in argv)
    return {"Dockerfile": f"FROM {BASE_IMAGE}\nCMD [{quoted}]\n"}


def running(server, arn: str, **options) -> Microvm:
    microvm = support.run_microvm(server, arn, **options)
    microvm.wait("RUNNING")
    return microvm


def answers(server, arn: str, port: int = PORT) -> list:
    """What two clones answer."""
    found = []
    for _ in range(2):
        microvm = running(server, arn)
        found.append(microvm.http("/", port=port, token=microvm.token({"port": port})))
        microvm.terminate()
    return found


@pytest.mark.compat("hook.without-ready")
def test_app_that_loads_after_its_server_listens_is_captured_loaded(server):
    dockerfile = FLASK + 'COPY app.py /app/\nWORKDIR /app\nEXPOSE 5000\nCMD ["gunicorn", "--bind", "0.0.0.0:5000", "app:app"]\n'
    arn, log = build(server, "listens-first", {"Dockerfile": dockerfile, "app.py": SLOW_TO_LOAD})
    assert log.index("listens on port 5000") < log.index("at rest"), log
    one, two = (answer.json() for answer in answers(server, arn))
    assert one == two and one["loads"] == 1, "clones have what was loaded once, and do not load again"


@pytest.mark.compat("hook.without-ready")
@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("sleeper", ("sleep", "infinity")),
        ("worker", ("sh", "-c", "while :; do date >> /var/log/ticks; sleep 1; done")),
        ("datagrams", ("perl", "-e", UDP.replace('"', '\\"'))),
    ],
)
def test_app_that_does_not_listen_is_captured_at_rest(server, name, argv):
    arn, log = build(server, f"{name}-rests", command(*argv))
    assert "listens on no port" in log and "/ready hook" in log, log
    microvm = running(server, arn, ingressNetworkConnectors=[ALL_INGRESS])
    seen = server.hearth("exec", microvm.id, "--", "sh", "-c", "cat /proc/1/comm; cat /var/log/ticks 2>&1 | wc -l")
    comm, ticks = seen.stdout.split()
    assert comm == argv[0]
    assert (int(ticks) >= 3) == (name == "worker")
    microvm.terminate()


def test_app_that_listens_on_another_port_than_exposed_is_captured_at_rest(server):
    arn, log = build(server, "elsewhere", perl(SERVER % (0, 8080, ""), "EXPOSE 5000"))
    assert "listens on port 8080, which the image does not EXPOSE" in log, log
    assert [answer.status for answer in answers(server, arn, 8080)] == [200, 200]


def test_app_that_sleeps_before_it_listens_is_waited_for_if_it_exposes_a_port(server):
    arn, log = build(server, "sleeps-first", perl(SERVER % (10, PORT, ""), f"EXPOSE {PORT}"))
    assert f"listens on port {PORT}." in log, log
    assert [answer.status for answer in answers(server, arn)] == [200, 200]


def test_app_whose_processes_tick_is_captured(server):
    arn, log = build(server, "ticks", perl(TICKING, f"EXPOSE {PORT}"))
    assert f"listens on port {PORT}." in log, log
    assert [answer.status for answer in answers(server, arn)] == [200, 200]


def test_app_that_is_never_at_rest_is_captured_within_the_limit(impatient):
    listens = perl(SERVER % (0, PORT, f"if (!fork) {{ exec '{BUSY}' }}"), f"EXPOSE {PORT}")
    arn, log = build(impatient, "busy-server", listens)
    assert "has not come to rest within PT8S" in log, log
    assert [answer.status for answer in answers(impatient, arn)] == [200, 200]
    _, log = build(impatient, "busy-worker", command("sh", "-c", BUSY))
    assert "has not come to rest within PT8S and listens on no port" in log, log
