"""`hearth trust`, on a host of its own: a mount namespace whose system store and home directory are copies that end with it."""

import os
import subprocess
import textwrap

import pytest

import support
from support import HEARTH

# What a Debian has changed by update-ca-certificates is in these two directories.
SETTING = """
set -eu
mount --make-rprivate /
for dir in /etc/ssl/certs /usr/local/share/ca-certificates; do
    mkdir -p "$SCRATCH/upper$dir" "$SCRATCH/work$dir"
    mount -t overlay overlay -o "lowerdir=$dir,upperdir=$SCRATCH/upper$dir,workdir=$SCRATCH/work$dir" $dir
done
export HOME=$SCRATCH/home
unset SUDO_USER CURL_CA_BUNDLE SSL_CERT_FILE
trust() { "$HEARTH" trust --data-dir "$DATA" "$@"; }
"""

PYTHON = """
import ssl, socket, sys
host, port, name = sys.argv[1:]
with ssl.create_default_context().wrap_socket(socket.create_connection((host, int(port)), 20), server_hostname=name):
    print("python is content")
"""

NODE = """
const [host, port, servername] = process.argv.slice(2);
const socket = require('tls').connect({host, port, servername}, () => { console.log('node is content'); socket.end(); });
socket.on('error', error => console.log(error.code));
"""


@pytest.fixture
def host(server):
    """Runs scripts in the namespace, with the running server's directory and an endpoint's name at hand."""
    with support.scratch() as directory:
        # An overlay's upper directory cannot be on another overlay.
        scratch = directory / "scratch"
        scratch.mkdir()
        address, port = server.endpoint_address()
        name = "0d2b7a54-5f0a-4f1c-9a53-0a3f3f6f2a11.lambda-microvm.us-east-1.localhost"
        (directory / "client.py").write_text(PYTHON)
        (directory / "client.js").write_text(NODE)
        env = {
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
            "SCRATCH": str(scratch),
            "HEARTH": str(HEARTH),
            "DATA": str(server.data_dir),
            "CURL": f"curl -sS --connect-to ::{address}:{port} https://{name}/",
            "PYTHON": f"/usr/bin/python3 {directory}/client.py {address} {port} {name}",
            "NODE": f"node {directory}/client.js {address} {port} {name}",
        }

        def run(script: str) -> subprocess.CompletedProcess:
            text = 'mount -t tmpfs tmpfs "$SCRATCH"\nmkdir "$SCRATCH/home"\n' + SETTING + textwrap.dedent(script)
            command = ["unshare", "--mount", "bash", "-c", text]
            return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, env=env)

        yield run


class TestSystemStore:
    def test_curl_python_and_node_trust_endpoints_until_it_is_undone(self, host):
        done = host("""
            if $CURL 2>/dev/null; then exit 9; fi
            trust > "$SCRATCH/said"
            grep -q "^added to the system's store" "$SCRATCH/said"
            $CURL; echo
            $PYTHON
            $NODE
            # What it says to set for Node works as it stands.
            eval "$(grep ^export "$SCRATCH/said")"
            $NODE
            unset NODE_EXTRA_CA_CERTS REQUESTS_CA_BUNDLE AWS_CA_BUNDLE SSL_CERT_FILE
            trust | grep "^nothing to do in the system's store" | cut -d: -f1
            trust --undo | grep "^removed from the system's store" | cut -d: -f1
            trust --undo | grep "^nothing to do in the system's store" | cut -d: -f1
            if $CURL 2>&1; then exit 9; fi
        """)
        assert done.returncode == 0, (done.stdout, done.stderr)
        lines = done.stdout.splitlines()
        assert lines[:2] == ["Request missing authentication", "python is content"]
        # Most builds of Node bring their own authorities; Debian's asks the system's store.
        refusals = ("SELF_SIGNED_CERT_IN_CHAIN", "UNABLE_TO_VERIFY_LEAF_SIGNATURE", "UNABLE_TO_GET_ISSUER_CERT_LOCALLY")
        assert lines[2] in ("node is content", *refusals)
        assert lines[3] == "node is content"
        assert lines[4:7] == [f"{outcome} the system's store" for outcome in ("nothing to do in", "removed from", "nothing to do in")]
        assert "certificate" in lines[7]

    def test_the_machine_s_own_store_is_as_it_was(self):
        names = os.listdir("/usr/local/share/ca-certificates") + os.listdir("/etc/ssl/certs")
        assert not [name for name in names if name.startswith("hearth-")]


class TestBrowsers:
    def test_every_database_of_the_user_is_served_and_stays_the_user_s(self, host):
        done = host("""
            for dir in .pki/nssdb .mozilla/firefox/abc.default; do
                mkdir -p "$HOME/$dir"
                certutil -N -d "sql:$HOME/$dir" --empty-password
            done
            chown -R nobody:nogroup "$HOME"
            chmod 755 "$SCRATCH" "$HOME"
            trust > "$SCRATCH/said"; trust > "$SCRATCH/again"
            grep -c "^added to $HOME" "$SCRATCH/said"
            grep -c "^nothing to do in $HOME" "$SCRATCH/again"
            for dir in .pki/nssdb .mozilla/firefox/abc.default; do certutil -L -d "sql:$HOME/$dir" | grep Hearth; done
            find "$HOME" ! -user nobody
            trust --undo | grep -c "^removed from $HOME"
            for dir in .pki/nssdb .mozilla/firefox/abc.default; do certutil -L -d "sql:$HOME/$dir"; done | grep -c Hearth || true
        """)
        assert done.returncode == 0, (done.stdout, done.stderr)
        lines = done.stdout.splitlines()
        assert lines[:2] == ["2", "2"]
        assert all(line.startswith("Hearth local CA ") and line.split()[-1] == "C,," for line in lines[2:4]), lines
        assert lines[4:] == ["2", "0"]


class TestRefusals:
    def test_others_than_root_are_told_what_to_do(self, server, host):
        done = host('setpriv --reuid=65534 --regid=65534 --clear-groups "$HEARTH" trust --data-dir "$DATA"')
        assert done.returncode == 1
        assert "run this with sudo" in done.stderr

    def test_without_an_authority_it_says_where_one_comes_from(self, host):
        done = host('DATA=$SCRATCH/none; trust')
        assert done.returncode == 1
        assert "hearth serve" in done.stderr
