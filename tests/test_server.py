"""Starting, finding and stopping a server, and what outlives it."""

import json
import os
import shutil
import stat
import subprocess

import pytest

import support
from support import HEARTH, Server, idle_policy


@pytest.fixture(scope="module")
def house():
    """A server of this module's own that may be stopped and killed, with the example image."""
    with support.scratch() as directory:
        server = Server(directory / "data").start()
        try:
            uri = support.upload(server, "flask-hello.zip", support.zip_directory(support.FLASK_HELLO))
            server.image = support.create_image(server, "flask-hello", uri)["imageArn"]
            support.wait_image(server, server.image, "CREATED")
            yield server
        finally:
            if server.running():
                server.stop()


@pytest.fixture
def home(house):
    """The same server, running, and without MicroVMs."""
    if not house.running():
        house.start()
    yield house
    if not house.running():
        house.start()
    for item in house.microvms.list_microvms()["items"]:
        house.microvms.terminate_microvm(microvmIdentifier=item["microvmId"])


def run(server, **options):
    microvm = support.run_microvm(server, server.image, **options)
    microvm.wait("RUNNING")
    return microvm


def again(microvm, server):
    """The same MicroVM, seen through the server's new life."""
    return support.Microvm(server, microvm.description)


def no_network_is_left_since(before: set[str]) -> None:
    """The kernel takes a namespace apart in the background, a moment after its last holder is gone."""
    support.eventually(lambda: support.network_of_hosts() <= before, "the network devices and tables to be gone")


class TestFindingIt:
    def test_connect_json_says_everything_and_only_to_its_owner(self, server):
        path = server.data_dir / "connect.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        connect = json.loads(path.read_text())
        assert set(connect) == {"api", "endpoint", "ca", "region", "account", "accessKeyId", "secretAccessKey", "pid"}
        assert connect["api"].startswith("http://127.0.0.1:") and not connect["api"].endswith(":0")
        assert connect["endpoint"].startswith("127.0.0.1:") and not connect["endpoint"].endswith(":0")
        assert (connect["region"], connect["account"]) == ("us-east-1", "000000000000")
        assert connect["pid"] == server.process.pid
        assert "BEGIN CERTIFICATE" in open(connect["ca"]).read()

    def test_hearth_env_is_all_that_the_aws_cli_needs(self, server):
        script = 'eval "$(%s env --data-dir %s)" && aws lambda-microvms list-microvms --query "length(items)"' % (HEARTH, server.data_dir)
        answer = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout.strip().isdigit()

    def test_secrets_are_not_readable_by_others(self, server):
        for path in [server.data_dir / "keys", server.data_dir / "ca"]:
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
        assert stat.S_IMODE((server.data_dir / "hearth.sock").stat().st_mode) == 0o600

    def test_a_second_server_on_the_same_directory_is_refused(self, server):
        second = Server(server.data_dir)
        answer = subprocess.run(second.command(), capture_output=True, text=True, timeout=60)
        assert answer.returncode != 0
        assert str(server.process.pid) in answer.stderr and str(server.data_dir) in answer.stderr
        assert server.microvms.list_microvms()["items"] is not None, "the first one is not disturbed"

    def test_verbs_without_a_server_say_how_to_get_one(self):
        with support.scratch() as directory:
            answer = subprocess.run([HEARTH, "ps", "--data-dir", directory], capture_output=True, text=True, timeout=60)
        assert answer.returncode != 0
        assert "hearth serve" in answer.stderr

    def test_a_configuration_that_is_not_understood_is_named(self):
        with support.scratch() as directory:
            server = Server(directory / "data", "colour = 'red'\n")
            answer = subprocess.run(server.command(), capture_output=True, text=True, timeout=60)
        assert answer.returncode != 0
        assert "colour" in answer.stderr and "line" in answer.stderr


class TestStopping:
    def test_sigterm_leaves_nothing_behind(self, home):
        network = support.network_of_hosts()
        running, suspended = run(home), run(home, idlePolicy=idle_policy())
        suspended.client.suspend_microvm(microvmIdentifier=suspended.id)
        suspended.wait("SUSPENDED")
        assert home.stop() == 0
        assert not running.processes()
        assert not support.processes_of(home.data_dir)
        assert not support.mounts_of(home.data_dir)
        assert not (home.data_dir / "connect.json").exists()
        assert not list((home.data_dir / "tmp").iterdir())
        no_network_is_left_since(network)

    def test_suspended_microvms_survive_a_restart_with_memory_and_disk(self, home):
        microvm = run(home, idlePolicy=idle_policy())
        for _ in range(3):
            microvm.count()
        microvm.client.suspend_microvm(microvmIdentifier=microvm.id)
        microvm.wait("SUSPENDED")
        home.stop()
        home.start()
        microvm = again(microvm, home)
        assert microvm.state() == "SUSPENDED"
        answer = microvm.count()
        assert (answer["memory"], answer["disk"]) == (4, 4)

    def test_running_microvms_are_not_forgotten_by_a_restart(self, home):
        """They are suspended and come back, or are terminated with a reason; they never linger as RUNNING without a process."""
        microvm = run(home, idlePolicy=idle_policy())
        microvm.count()
        home.stop()
        home.start()
        microvm = again(microvm, home)
        found = microvm.get()
        if found["state"] == "TERMINATED":
            assert found["stateReason"]
        else:
            answer = microvm.count()
            assert (answer["memory"], answer["disk"]) == (2, 2)

    def test_tokens_and_credentials_survive_a_restart(self, home):
        microvm = run(home, idlePolicy=idle_policy())
        token, keys = microvm.token(), home.connect["accessKeyId"]
        microvm.client.suspend_microvm(microvmIdentifier=microvm.id)
        microvm.wait("SUSPENDED")
        home.stop()
        home.start()
        assert home.connect["accessKeyId"] == keys
        assert again(microvm, home).http("/", token=token).status == 200

    def test_after_a_kill_nothing_runs_on_and_the_next_start_tidies_up(self, home):
        network = support.network_of_hosts()
        running, suspended = run(home), run(home, idlePolicy=idle_policy())
        suspended.count()
        suspended.client.suspend_microvm(microvmIdentifier=suspended.id)
        suspended.wait("SUSPENDED")
        home.kill()
        support.eventually(lambda: not support.processes_of(home.data_dir), "QEMU to die with its daemon")
        (home.data_dir / "tmp" / "rubbish").mkdir(parents=True)
        home.start()
        assert not list((home.data_dir / "tmp").iterdir())
        found = again(running, home).wait("TERMINATED")
        assert found["stateReason"], "why it ended is told"
        assert not (home.data_dir / "microvms" / running.id).exists()
        answer = again(suspended, home).count()
        assert (answer["memory"], answer["disk"]) == (2, 2)
        home.stop()
        no_network_is_left_since(network)

    def test_an_image_that_was_being_built_at_a_kill_is_failed_at_the_next_start(self, home):
        uri = support.upload(home, "slow.zip", support.zip_of({"Dockerfile": f"FROM {support.BASE_IMAGE}\nRUN sleep 100\nCMD [\"true\"]\n"}))
        arn = support.create_image(home, "interrupted", uri)["imageArn"]
        support.eventually(lambda: support.processes_of(home.data_dir), "the build to start")
        home.kill()
        home.start()
        support.wait_image(home, arn, "CREATE_FAILED", 30)
        assert support.build_of(home, arn)["stateReason"]
        support.eventually(lambda: not [line for line in support.processes_of(home.data_dir) if "runc" in line], "the build to end")
        home.microvms.delete_microvm_image(imageIdentifier=arn)


class TestWhatIsMissing:
    """`doctor` and `serve` say what is missing, and how to get it."""

    def test_doctor_is_content_here(self, server):
        answer = server.hearth("doctor")
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert "qemu" in answer.stdout.lower()
        assert "tcg" in answer.stdout.lower() or "kvm" in answer.stdout.lower(), "the engine choice is told"

    @pytest.fixture
    def path_without_qemu(self):
        """A PATH on which everything but QEMU is."""
        with support.scratch() as directory:
            for place in ("/usr/bin", "/usr/sbin"):
                for program in os.listdir(place):
                    if not program.startswith("qemu") and not os.path.lexists(directory / program):
                        os.symlink(f"{place}/{program}", directory / program)
            yield {**os.environ, "PATH": str(directory)}

    def test_without_qemu(self, path_without_qemu):
        with support.scratch() as directory:
            server = Server(directory / "data", env=path_without_qemu)
            options = {"capture_output": True, "text": True, "timeout": 60, "env": path_without_qemu}
            doctor = subprocess.run([HEARTH, "doctor", "--data-dir", directory / "data"], **options)
            serve = subprocess.run(server.command(), **options)
        for answer in (doctor, serve):
            assert answer.returncode != 0
            said = answer.stdout + answer.stderr
            assert "qemu-system-x86" in said, said

    def test_without_root(self):
        with support.scratch() as directory:
            # The program may be where others cannot look; a copy is not.
            program = directory / "hearth"
            shutil.copy(HEARTH, program)
            data = directory / "data"
            data.mkdir()
            shutil.chown(data, "nobody")
            nobody = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", program]
            options = {"capture_output": True, "text": True, "timeout": 60}
            doctor = subprocess.run([*nobody, "doctor", "--data-dir", data], **options)
            serve = subprocess.run([*nobody, "serve", "--data-dir", data, "--api", "127.0.0.1:0", "--endpoint", "127.0.0.1:0"], **options)
        for answer in (doctor, serve):
            assert answer.returncode != 0
            said = answer.stdout + answer.stderr
            assert "root" in said, said
