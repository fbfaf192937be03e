"""What a MicroVM can reach: the world, and neither its host nor its neighbours."""

import ipaddress
import subprocess
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote
from urllib.request import urlopen

import pytest

import support
from support import HOST_SIDE, WORLD_SIDE, ip


@pytest.fixture(scope="module")
def host_port():
    """A web server on every address of the host."""

    class Hello(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello from the host")

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("0.0.0.0", 0), Hello)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def fetch(microvm, url: str) -> support.Answer:
    return microvm.http(f"/fetch?url={quote(url, safe='')}", timeout=60)


def reaches(microvm, url: str) -> bool:
    answer = fetch(microvm, url)
    return answer.status == 200


def test_the_world_is_reachable_and_sees_the_host_s_address(run, world):
    microvm = run()
    answer = fetch(microvm, world)
    assert answer.status == 200, answer.body
    assert answer.text == f"hello from the world to {HOST_SIDE}"


def test_the_world_is_reachable_after_a_resume(run, world):
    microvm = run()
    assert reaches(microvm, world)
    microvm.client.suspend_microvm(microvmIdentifier=microvm.id)
    microvm.wait("SUSPENDED")
    microvm.client.resume_microvm(microvmIdentifier=microvm.id)
    microvm.wait("RUNNING")
    assert reaches(microvm, world)


def reached(microvm, urls: list[str]) -> list[str]:
    """Those that answer. All at once, because what is dropped is waited for."""
    with ThreadPoolExecutor(len(urls)) as pool:
        return [url for url, answers in zip(urls, pool.map(lambda url: reaches(microvm, url), urls)) if answers]


def addresses_of_host() -> list[str]:
    text = subprocess.run(["ip", "-4", "-o", "addr"], capture_output=True, text=True, check=True, timeout=20).stdout
    addresses = [line.split()[3].split("/")[0] for line in text.splitlines()]
    return [address for address in addresses if not address.startswith("127.")]


def test_the_host_is_out_of_reach(run, world, host_port):
    """By an address of the host's own, of the slots' links, of the link to the world, and by the gateway's."""
    microvm = run()
    assert reaches(microvm, world), "the network works at all"
    addresses = addresses_of_host()
    assert HOST_SIDE in addresses and len(addresses) > 1
    for address in addresses:
        assert urlopen(f"http://{address}:{host_port}/", timeout=10).status == 200, "the host itself gets an answer"
    assert reached(microvm, [f"http://{address}:{host_port}/" for address in [*addresses[:5], HOST_SIDE, "10.0.2.2"]]) == []


def test_the_host_s_link_local_metadata_is_out_of_reach(run, host_port):
    microvm = run()
    ip("addr", "add", "169.254.169.254/32", "dev", "lo")
    try:
        assert not reaches(microvm, f"http://169.254.169.254:{host_port}/")
    finally:
        ip("addr", "del", "169.254.169.254/32", "dev", "lo")


def test_a_neighbour_is_out_of_reach(run):
    """The neighbour listens on every address of its guest; it is asked for on each address that its slot could have."""
    microvm, _neighbour = run(), run()
    links = [address for address in addresses_of_host() if address.startswith("10.201.")]
    assert len(links) >= 2, "each running MicroVM has a link"
    slots = [str(ipaddress.ip_address(address) + 1) for address in links[:7]]
    assert reached(microvm, [f"http://{slot}:{support.FLASK_PORT}/" for slot in slots]) == []


@pytest.fixture
def connector(server):
    """Makes network connectors whose tags say what MicroVMs may reach."""
    client = server.client("lambda-core")
    made = []

    def make(**rules: str) -> str:
        vpc = {"SubnetIds": ["subnet-1"], "NetworkProtocol": "IPv4", "AssociatedComputeResourceTypes": ["MicroVm"]}
        connector = client.create_network_connector(
            Name=f"network-test-{len(made)}",
            OperatorRole="arn:aws:iam::000000000000:role/connectors",
            Configuration={"VpcEgressConfiguration": vpc},
            Tags={f"hearth:{kind}": text for kind, text in rules.items()},
            ClientToken=str(uuid.uuid4()),
        )
        made.append(connector["Arn"])
        return connector["Arn"]

    yield make
    for arn in made:
        support.eventually(lambda arn=arn: deleted(client, arn), f"{arn} to be free for deletion")


def deleted(client, arn: str) -> bool:
    try:
        client.delete_network_connector(Identifier=arn)
    except client.exceptions.ResourceConflictException:
        return False
    return True


def test_a_connector_says_what_a_microvm_reaches(connector, run, world):
    open_door = run(egressNetworkConnectors=[connector(allow=f"{WORLD_SIDE}:8000")], idlePolicy=support.idle_policy())
    other_port = run(egressNetworkConnectors=[connector(allow=f"{WORLD_SIDE}:8001")])
    denied = run(egressNetworkConnectors=[connector(allow="0.0.0.0/0", deny="198.51.100.0/24")])
    assert reaches(open_door, world)
    assert not reaches(other_port, world)
    assert not reaches(denied, world)
    assert not reaches(open_door, "http://not-allowed.example.com/")
    open_door.client.suspend_microvm(microvmIdentifier=open_door.id)
    open_door.wait("SUSPENDED")
    assert reaches(open_door, world), "the policy is there again after a resume"


def test_without_egress_nothing_is_reached_and_the_app_is_told_at_once(run, world):
    nowhere = "arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:NO_EGRESS"
    microvm = run(egressNetworkConnectors=[nowhere])
    answer = fetch(microvm, world)
    assert answer.status == 502 and "refused" in answer.text.lower(), answer.text
    assert microvm.http("/").status == 200, "the endpoint does not need the MicroVM's network"
