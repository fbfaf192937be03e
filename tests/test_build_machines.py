"""Image builds in MicroVMs of their own, as they run where the processor runs virtual machines. Here it is emulated, so there are few of them."""

from __future__ import annotations

import platform
import re
import uuid

import pytest

import support
from test_build_attacks import attempts
from test_builds import NO_EGRESS, built, came, fetch, listener, registry, registry_program, shell  # noqa: F401

ALL_INGRESS = "arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:ALL_INGRESS"
CONFIG = 'build_isolation = "microvm"\nbuild_memory_mib = 1024\n'

# What layers can hold and hide: files of others, links, modes, deleted and replaced directories, bind mounts and caches.
CONTENT = f"""FROM {support.BASE_IMAGE} AS made
RUN mkdir -p /tree/kept /tree/gone /tree/replaced && echo 1 >/tree/replaced/old && echo 2 >/tree/gone/file
RUN rm -r /tree/gone /tree/replaced && mkdir /tree/replaced && echo 3 >/tree/replaced/new
FROM {support.BASE_IMAGE}
COPY --from=made /tree /tree
RUN mkdir -p /opt/a/deep /opt/b && echo x >/opt/a/deep/x && echo y >/opt/b/y
RUN rm -r /opt/a && mkdir /opt/a && echo z >/opt/a/z && rm /opt/b/y
RUN ln -s /nowhere /opt/link && ln /opt/a/z /opt/hard && chmod 4711 /opt/a/z && mkdir -m 1777 /opt/sticky && chown 12:34 /opt/b && mkfifo /opt/fifo
COPY --chmod=0640 --chown=7:8 part /opt/part
RUN --mount=type=bind,source=part,target=/bound --mount=type=cache,target=/cache cat /bound >/opt/bound && echo kept >/cache/kept
RUN <<'END'
echo "kernel of the build: $(uname -r)"
END
CMD ["sleep", "infinity"]
"""

LISTING = ["find", "/", "-xdev", "-path", "/proc", "-prune", "-o", "-path", "/sys", "-prune", "-o", "-path", "/dev", "-prune",
           "-o", "-printf", "%p %y %m %U %G %n %l %F\\n"]  # fmt: skip


@pytest.fixture(scope="module")
def machines():
    """A server whose builds run in MicroVMs."""
    with support.serving(CONFIG) as server:
        yield server


def tree(server, name: str) -> tuple[str, list[str], dict[str, str]]:
    """The log of a build, and what is in its image."""
    dockerfile = re.sub(r"^(FROM .*)$", rf"\1\nENV RUN_OF_TESTS={uuid.uuid4()}", CONTENT, flags=re.MULTILINE)
    uri = support.upload(server, f"{name}.zip", support.zip_of({"Dockerfile": dockerfile, "part": "of the archive"}))
    arn = support.create_image(server, name, uri)["imageArn"]
    support.wait_image(server, arn, "CREATED")
    log = server.hearth("logs", name).stdout
    microvm = support.run_microvm(server, arn, ingressNetworkConnectors=[ALL_INGRESS])
    microvm.wait("RUNNING")
    listing = server.hearth("exec", microvm.id, "--", *LISTING)
    assert listing.returncode == 0, listing.stderr
    files = {path: server.hearth("exec", microvm.id, "--", "cat", path).stdout for path in ("/opt/bound", "/opt/hard", "/tree/replaced/new")}
    microvm.terminate()
    microvm.wait("TERMINATED")
    support.delete_image(server, arn)
    return log, sorted(re.sub(r" ext4$", "", line) for line in listing.stdout.splitlines()), files


def test_build_in_a_microvm_makes_what_a_build_in_namespaces_makes(server, machines):
    log, in_namespaces, files = tree(server, "content")
    assert f"kernel of the build: {platform.release()}" in log, log
    log, in_microvm, same = tree(machines, "content")
    assert "kernel of the build: " in log and f"kernel of the build: {platform.release()}" not in log, log
    assert in_microvm == in_namespaces
    assert same == files == {"/opt/bound": "of the archive", "/opt/hard": "z\n", "/tree/replaced/new": "3\n"}
    assert any(line.startswith("/opt/b d 755 12 34 ") for line in in_microvm), in_microvm
    assert not any(line.startswith(("/opt/a/deep", "/opt/b/y", "/tree/gone", "/tree/replaced/old")) for line in in_microvm)


def test_step_in_a_microvm_has_no_way_out_and_the_network_of_its_image(machines, world, registry):
    script, number = attempts()
    with listener() as host:
        port = host.getsockname()[1]
        steps = [fetch(f"http://{address}:{port}/") for address in ("127.0.0.1", "10.0.2.2", "10.0.3.1", support.HOST_SIDE)]
        steps.append(fetch(machines.connect["api"].rstrip("/") + "/"))
        log = built(
            machines, "escapes", "\n".join([f"FROM {support.BASE_IMAGE}", "COPY attack.sh /", "RUN bash /attack.sh", fetch(world), *steps]), {"attack.sh": script}
        )
        assert not came(host)
    assert [line for line in log.splitlines() if line.startswith("escaped: ")] == [] and log.count("held: ") == number, log
    assert f"hello from the world to {support.HOST_SIDE}" in log and log.count("refused 1") == len(steps), log


def test_registry_of_the_host_is_for_the_builder_and_not_for_steps(registry, world):
    local = registry()
    local.push("tools/shell", "1", shell())
    port = local.address.rsplit(":", 1)[1]
    steps = [fetch(f"http://127.0.0.1:{port}/"), fetch(f"http://10.0.2.2:{port}/"), fetch(world)]
    dockerfile = "\n".join([f"FROM {local.address}/tools/shell:1 AS pulled", f"FROM {support.BASE_IMAGE}", "COPY --from=pulled /bin/sh /pulled",
                            "RUN ls /pulled", *steps])  # fmt: skip
    with support.serving(f'{CONFIG}[registries]\nlocal = ["{local.address}"]\n') as server:
        log = built(server, "local", dockerfile, egressNetworkConnectors=[NO_EGRESS])
    assert "/pulled" in log.splitlines() and log.count("refused 1") == len(steps), log


def test_step_that_takes_all_memory_of_its_microvm_is_told_so(machines):
    uri = support.upload(machines, "greedy.zip", support.zip_of({"Dockerfile": f"FROM {support.BASE_IMAGE}\nRUN perl -e '$x .= \"x\" x (1 << 20) for 1 .. 4096'\n"}))
    arn = support.create_image(machines, "greedy", uri)["imageArn"]
    support.wait_image(machines, arn, "CREATE_FAILED")
    log = machines.hearth("logs", "greedy").stdout
    assert "1024 MiB of memory" in log and "build_memory_mib" in log, log
    support.delete_image(machines, arn)


def test_killed_server_leaves_no_build_behind_and_its_layers_are_good():
    with support.serving(CONFIG) as server:
        endless = f"FROM {support.BASE_IMAGE}\nRUN echo endless {uuid.uuid4()}; while :; do :; done\n"
        uri = support.upload(server, "endless.zip", support.zip_of({"Dockerfile": endless}))
        support.create_image(server, "endless", uri)
        support.eventually(lambda: re.search("^endless ", server.hearth("logs", "endless").stdout, re.M), "the step to begin", support.BUILD_SECONDS)
        server.kill()
        server.start()
        log = built(server, "after", f"FROM {support.BASE_IMAGE}\nRUN echo built after\n")
        assert "built after" in log, log
