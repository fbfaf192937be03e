"""Who is turned away at an endpoint, and with which words (SPEC 10.3)."""

import socket
import ssl

import pytest

import support
from support import FLASK_PORT, error_of


@pytest.fixture(scope="module")
def pair(server, image):
    """Two MicroVMs of one image."""
    microvms = [support.run_microvm(server, image.arn) for _ in range(2)]
    for microvm in microvms:
        microvm.wait("RUNNING")
    yield microvms
    for microvm in microvms:
        microvm.terminate()
    for microvm in microvms:
        microvm.wait("TERMINATED")


def test_without_a_token(pair):
    answer = pair[0].http("/", token=None)
    assert (answer.status, answer.text) == (403, "Request missing authentication")
    assert answer.headers["Content-Type"].startswith("text/plain")


@pytest.mark.parametrize("token", ["", "nonsense", "a.b.c.d", "Bearer x"])
def test_with_something_that_is_no_token(pair, token):
    answer = pair[0].http("/", token=token)
    assert (answer.status, answer.text) == (403, "Request missing authentication")


def test_with_another_microvm_s_token(pair):
    first, second = pair
    answer = first.http("/", token=second.token())
    assert (answer.status, answer.text) == (403, "Token authentication failed")
    assert second.http("/").status == 200, "it is good where it belongs"


def test_with_a_token_that_was_changed(pair):
    token = pair[0].token()
    place = len(token) - 10
    changed = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
    answer = pair[0].http("/", token=changed)
    assert (answer.status, answer.text) == (403, "Token authentication failed")


def test_at_a_name_that_nobody_has(server, pair):
    stranger = type(pair[0])(server, {"microvmId": "microvm-none", "endpoint": "0" * 8 + pair[0].endpoint[8:]})
    answer = stranger.http("/", token=pair[0].token())
    assert (answer.status, answer.text) == (403, "Token authentication failed")


@pytest.mark.parametrize(
    ("allowed", "port", "status"),
    [
        ([{"port": FLASK_PORT}], FLASK_PORT, 200),
        ([{"port": FLASK_PORT}], 22, 403),
        ([{"port": 9000}], None, 403),
        ([{"port": 8080}], None, 502),
        ([{"range": {"startPort": 4000, "endPort": 5000}}], FLASK_PORT, 200),
        ([{"range": {"startPort": 4000, "endPort": 4999}}], FLASK_PORT, 403),
        ([{"port": 1}, {"allPorts": {}}], FLASK_PORT, 200),
        ([{"allPorts": {}}], 4999, 502),
    ],
)
def test_the_port_must_be_inside_the_token_s_scope(pair, allowed, port, status):
    answer = pair[0].http("/", token=pair[0].token(*allowed), port=port)
    assert answer.status == status
    if status == 403:
        assert answer.text == "Access to port denied"
    if status == 502:
        assert answer.body == b"", "nothing listens there"


@pytest.mark.parametrize("port", ["http", "0", "65536", "-1", "5000,5001"])
def test_a_port_that_is_none(pair, port):
    assert pair[0].http("/", port=port).status == 400


def test_the_certificate_is_for_the_endpoint_s_name_only(server, pair):
    context = server.tls()
    with pytest.raises(ssl.SSLError), socket.create_connection(server.endpoint_address(), 10) as plain:
        context.wrap_socket(plain, server_hostname="example.org")


def test_there_is_no_plaintext(server, pair):
    with socket.create_connection(server.endpoint_address(), 10) as plain:
        plain.settimeout(30)
        plain.sendall(f"GET / HTTP/1.1\r\nHost: {pair[0].endpoint}\r\n\r\n".encode())
        answer = b""
        try:
            while received := plain.recv(4096):
                answer += received
        except ConnectionResetError:
            pass
    assert b" 200 " not in answer


def test_a_token_lives_an_hour_at_most(pair):
    message = "ExpirationMinutes 61 exceeded max allowed of 60."
    assert error_of(pair[0].token, minutes=61) == ("ValidationException", message, 400)
