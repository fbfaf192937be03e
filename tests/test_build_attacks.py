"""Image builds of a hostile tenant: what a Dockerfile or an archive tries, and that nothing comes of it. docs/build-sandbox.md has the list."""

from __future__ import annotations

import base64
import io
import json
import socket
import tarfile
import zipfile
from pathlib import Path

import pytest

import support
from test_builds import MIRRORED, NO_EGRESS, Registry, built, came, fetch, listener, registry, registry_program, shell  # noqa: F401

# Each line is a way out. Its command succeeds if it leads there.
ESCAPES = r"""
core-pattern      echo '|/tmp/x' >/proc/sys/kernel/core_pattern
sysrq             echo h >/proc/sysrq-trigger
sysctl            mount -o remount,rw /proc/sys && echo 1 >/proc/sys/kernel/panic
other-proc        mkdir -p /p && mount -t proc proc /p && echo x >/p/sys/kernel/core_pattern
root-of-process   for p in /proc/[0-9]*; do cat $p/root/build/daemon.json && exit 0; done; exit 1
cwd-of-process    for p in /proc/[0-9]*; do ls $p/cwd/var/lib/docker && exit 0; done; exit 1
descriptors       for d in 3 4 5 6 7 8 9; do ls /proc/1/fd/$d/ && exit 0; done; exit 1
memory-disk       mknod /d b 254 0 && head -c 1 /d
memory-device     mknod /m c 1 1 && head -c 1 /m
kernel-messages   head -c 1 /dev/kmsg || head -c 1 /proc/kmsg
kernel-memory     head -c 1 /proc/kcore | grep -q .
memory-disks      for n in 0 16 32 48 64; do mknod /d$n b 254 $n && head -c 1 /d$n && exit 0; done; exit 1
mount-tmpfs       mount -t tmpfs tmpfs /mnt
mount-disk        mount -t ext4 /dev/vda /mnt || mount -t ext4 /dev/sda1 /mnt
mount-bind        mount --bind / /mnt
mount-cgroup      mkdir -p /g && mount -t cgroup -o pids cgroup /g
release-agent     for g in /sys/fs/cgroup/*/; do echo /x >$g/release_agent && exit 0; done; exit 1
cgroup-limit      for g in /sys/fs/cgroup /sys/fs/cgroup/*; do [ -e $g/cgroup.procs ] && mkdir $g/x && exit 0; done; exit 1
user-namespace    unshare --user --map-root-user true
mount-namespace   unshare --mount true
network-namespace unshare --net true
other-namespace   nsenter --target 1 --mount --pid ls /build
pivot             mkdir -p /r/old && pivot_root /r /r/old
docker-socket     find / -xdev -name 'docker*.sock' -o -xdev -name 'containerd*.sock' | grep .
abstract-socket   grep @ /proc/net/unix
keyring           perl -e 'exit(syscall(250, 0, -3, 1) < 0)'
bpf               perl -e 'exit(syscall(321, 0, 0, 0) < 0 && !$!{EINVAL})'
perf-event        perl -e 'exit(syscall(298, 0, 0, -1, -1, 0) < 0 && !$!{EFAULT})'
io-uring          perl -e 'exit(syscall(425, 1, 0) < 0 && !$!{EFAULT})'
userfaultfd       perl -e 'exit(syscall(323, 0) < 0)'
open-by-handle    perl -e 'exit(syscall(304, 3, 0, 0) < 0 && $!{EPERM})'
clock             date -s 2001-01-01
reboot            perl -e 'exit(syscall(169, 0xfee1dead, 672274793, 0x89abcdef, 0) < 0)'
host-name         hostname changed
address           ip addr add 203.0.113.9/24 dev eth0 || perl -e 'exit 1'
host-files        cat /build/docker/config.json || cat /hearth/base.tar
logins            grep -rl TENANT-MUST-NOT-SEE / --include=config.json --exclude-dir=proc --exclude-dir=sys
"""

SECRET = "TENANT-MUST-NOT-SEE"


def attempts() -> tuple[str, int]:
    """A script that makes all of them, and their number."""
    lines = [line.split(None, 1) for line in ESCAPES.strip().splitlines()]
    steps = [f"cat >/try <<'TRY'\n{command}\nTRY\nif timeout 20 bash /try >/dev/null 2>&1 </dev/null; then echo 'escaped: {name}'; else echo 'held: {name}'; fi"
             for name, command in lines]  # fmt: skip
    return "\n".join(steps) + "\n", len(lines)


@pytest.fixture(scope="module")
def guarded():
    """A server with logins of its operator, which no tenant may see."""
    with support.scratch() as directory:
        logins = directory / "logins.json"
        logins.write_text(json.dumps({"auths": {"registry.example": {"auth": base64.b64encode(f"operator:{SECRET}".encode()).decode()}}}))
        with support.serving(f'[registries]\nauth_file = "{logins}"\n') as server:
            yield server


def archive(files: dict[str, str | bytes], links: dict[str, str]) -> bytes:
    data = io.BytesIO(support.zip_of(files))
    with zipfile.ZipFile(data, "a") as opened:
        for name, target in links.items():
            entry = zipfile.ZipInfo(name)
            entry.create_system, entry.external_attr = 3, 0o120777 << 16
            opened.writestr(entry, target)
    return data.getvalue()


def build_archive(server, name: str, data: bytes) -> str:
    uri = support.upload(server, f"{name}.zip", data)
    arn = support.create_image(server, name, uri)["imageArn"]
    support.wait_image(server, arn, "CREATE_FAILED")
    log = server.hearth("logs", name).stdout
    support.delete_image(server, arn)
    return log


def test_step_has_no_way_out_of_its_sandbox(guarded):
    script, number = attempts()
    log = built(guarded, "escapes", f"FROM {support.BASE_IMAGE}\nCOPY attack.sh /\nRUN bash /attack.sh\n", {"attack.sh": script})
    escaped = [line for line in log.splitlines() if line.startswith("escaped: ")]
    assert escaped == [] and log.count("held: ") == number, log
    assert SECRET not in log and base64.b64encode(f"operator:{SECRET}".encode()).decode() not in log


@pytest.mark.parametrize(
    "head", ["// syntax=registry.example/front:1", "#!/usr/bin/docker\n# syntax=registry.example/front:1", '{"syntax": "registry.example/front:1"}']
)
def test_frontend_of_the_tenant_is_not_run(guarded, head):
    log = built(guarded, "frontend", f"{head}\nFROM {support.BASE_IMAGE}\nRUN true\n")
    assert "builds understand docker/dockerfile only" in log and "resolve image config" not in log, log


def test_link_in_the_archive_leads_nowhere_on_the_host(guarded):
    links = {"up": "../../../../../../../..", "etc": "/etc", "beside": "../docker", "store": "/var/lib/docker"}
    for number, path in enumerate(["up/etc/passwd", "etc/hostname", "beside/config.json", "store/engine-id"]):
        dockerfile = f"FROM {support.BASE_IMAGE}\nCOPY {path} /copied\nRUN echo copied; cat /copied\n"
        log = build_archive(guarded, f"link-{number}", archive({"Dockerfile": dockerfile}, links))
        assert "STEP [2/3] COPY" in log and "STEP [3/3]" not in log, log
    for number, path in enumerate(["Dockerfile.dockerignore", ".dockerignore"]):
        log = build_archive(guarded, f"pattern-{number}", archive({"Dockerfile": f"FROM {support.BASE_IMAGE}\n"}, {path: "/etc/shadow"}))
        assert "leads out of the archive" in log, log


def test_tar_that_leads_out_stays_in_its_image(guarded):
    marker = Path("/tmp/hearth-test-led-out")
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, kind, target in [("out", tarfile.SYMTYPE, "/"), ("up", tarfile.SYMTYPE, "../../../../../..")]:
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, target
            tar.addfile(entry)
        for name in (f"out{marker}", f"up{marker}", f"../../../..{marker}"):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = 4, 0o4755
            tar.addfile(entry, io.BytesIO(b"here"))
    device = io.BytesIO()
    with tarfile.open(fileobj=device, mode="w") as tar:
        entry = tarfile.TarInfo("disk")
        entry.type, entry.devmajor, entry.devminor = tarfile.BLKTYPE, 254, 0
        tar.addfile(entry)
    hard = io.BytesIO()
    with tarfile.open(fileobj=hard, mode="w") as tar:
        entry = tarfile.TarInfo("shadow")
        entry.type, entry.linkname = tarfile.LNKTYPE, "../../../../../../../build/docker/config.json"
        tar.addfile(entry)
    for name, content in {"links": data, "device": device, "hard": hard}.items():
        dockerfile = f"FROM {support.BASE_IMAGE}\nADD {name}.tar /x/\nRUN cat /x/shadow; head -c 1 /x/disk >/x/byte && echo device read; true\n"
        log = built(guarded, f"tar-{name}", dockerfile, {f"{name}.tar": content.getvalue()})
        assert SECRET not in log and "auths" not in log and "\ndevice read" not in log, log
    assert not marker.exists()


def test_daemon_fetches_nothing_of_the_host(guarded):
    with listener() as host:
        port = host.getsockname()[1]
        for number, source in enumerate([f"http://127.0.0.1:{port}/x", f"http://10.0.2.2:{port}/x", f"http://[::1]:{port}/x.git"]):
            log = built(guarded, f"add-{number}", f"FROM {support.BASE_IMAGE}\nADD {source} /x\nRUN echo fetched\n")
            assert "\nfetched" not in log, log
        assert not came(host)


def test_add_of_an_image_without_egress_fetches_nothing(server, world):
    log = built(server, "add-world", f"FROM {support.BASE_IMAGE}\nADD {world}x /x\nRUN cat /x\n", egressNetworkConnectors=[NO_EGRESS])
    assert "hello from the world" not in log, log


def test_packets_of_other_families_and_raw_ones_do_not_reach_the_host(server, world):
    del world
    family, kind = socket.AF_INET, socket.SOCK_DGRAM
    with socket.socket(family, kind) as host:
        host.bind(("0.0.0.0", 0))
        host.setblocking(False)
        port = host.getsockname()[1]
        # To the host's address, everybody's and many's; and with another source than the step's own.
        code = f"""use Socket; my $n = 0;
for my $to (qw({support.HOST_SIDE} 10.0.2.2 255.255.255.255 10.0.3.255 224.0.0.1)) {{
  socket(S, PF_INET, SOCK_DGRAM, 17); setsockopt(S, SOL_SOCKET, SO_BROADCAST, 1); send(S, "plain", 0, sockaddr_in({port}, inet_aton($to))) and $n++;
  for my $from (qw(127.0.0.1 10.0.2.2 {support.WORLD_SIDE})) {{
    socket(R, PF_INET, SOCK_RAW, 255) or die "raw $!"; setsockopt(R, SOL_SOCKET, SO_BROADCAST, 1);
    my $p = pack("CCnnnCCna4a4", 0x45, 0, 33, 1, 0, 64, 17, 0, inet_aton($from), inet_aton($to)) . pack("nnnn", 9, {port}, 13, 0) . "spoof";
    send(R, $p, 0, sockaddr_in({port}, inet_aton($to))) and $n++;
  }}
}} print "sent $n\\n";"""
        log = built(server, "packets", f"FROM {support.BASE_IMAGE}\nCOPY send.pl /\nRUN perl /send.pl; ls /proc/net/if_inet6 && cat /proc/net/if_inet6; true\n",
                    {"send.pl": code})  # fmt: skip
        assert "sent " in log and "sent 0" not in log, log
        with pytest.raises(BlockingIOError):
            host.recv(100)


def test_malformed_tag_does_not_make_the_registry_unreachable_for_others(registry):  # noqa: F811
    mirror = registry()
    mirror.push(MIRRORED, "al2023-minimal", shell())
    with support.scratch() as directory:
        config = f'build_cache_dir = "{directory}/cache"\n[registries]\nlocal = ["{mirror.address}"]\nbase_mirror = "{mirror.address}/{MIRRORED}"\n'
        with support.serving(config) as server:
            log = built(server, "malformed", "FROM public.ecr.aws/lambda/microvms:-x\nRUN true\n")
            assert "invalid reference format" in log, log
            log = built(server, "next", f"FROM {support.BASE_IMAGE}\nRUN echo base $PULLED\n")
            assert "pulled from its registry" in log and "base yes" in log, log


def test_directories_without_end_leave_the_server_running():
    levels = "d/" * 1000
    step = f"RUN for part in $(seq 20); do mkdir -p {levels}; cd -P {levels} 2>/dev/null; done; echo deep"
    with support.scratch() as directory:
        # Over its limit, so that every store is measured and deleted at once.
        config = f'build_cache_dir = "{directory}/cache"\n[build_cache]\nmax_mib = 1\n'
        with support.serving(config) as server:
            for name in ("deep", "after"):
                log = built(server, name, f"FROM {support.BASE_IMAGE}\n{step if name == 'deep' else 'RUN echo deep'}\n")
                assert "\ndeep" in log, log
            assert server.running()
            assert not (directory / "cache/accounts/000000000000/0/data").exists()


def test_hostile_step_ends_with_its_image():
    step = "RUN perl -e '$| = 1; $SIG{$_} = \"IGNORE\" for qw(TERM INT HUP); fork; fork; fork; fork; print \"begun\\n\"; while (1) { select undef, undef, undef, 1 }'"
    with support.serving() as server:
        uri = support.upload(server, "hostile.zip", support.zip_of({"Dockerfile": f"FROM {support.BASE_IMAGE}\n{step}\n"}))
        arn = support.create_image(server, "hostile", uri)["imageArn"]
        support.eventually(lambda: "begun" in server.hearth("logs", "hostile").stdout.splitlines(), "the step to begin", 90)
        build = support.build_of(server, arn)["buildId"]
        support.delete_image(server, arn)
        groups = lambda: [path for path in Path("/sys/fs/cgroup").glob(f"**/hearth-build-{build}")]  # noqa: E731
        support.eventually(lambda: not groups() and not support.processes_of(server.data_dir), "the build to be gone")
        assert support.mounts_of(server.data_dir) == []
        assert list((server.data_dir / "tmp").iterdir()) == []
