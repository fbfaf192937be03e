"""How long launch, suspend and resume take, seen from outside: `cargo xtask bench` starts a server and runs this against it.

Every request uses a connection of its own. States are seen by polling GetMicrovm as fast as it answers, so each figure includes one
such call; its own time is in the table.
"""

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import support
from support import FLASK_HELLO, Server, idle_policy

WARM_UP = 3


def poll(microvm, wanted: str) -> None:
    end = time.monotonic() + 60
    while (state := microvm.state()) != wanted:
        if state == "TERMINATED" or time.monotonic() > end:
            raise SystemExit(f"{microvm.id} is {state} instead of {wanted}")


def timed(body) -> float:
    started = time.monotonic()
    body()
    return (time.monotonic() - started) * 1000


def first_answer(microvm) -> None:
    end = time.monotonic() + 60
    while microvm.http("/").status != 200:
        if time.monotonic() > end:
            raise SystemExit(f"{microvm.id} did not answer 200 within 60 s")


class Figures:
    def __init__(self):
        self.times: dict[str, list[float]] = {}

    def add(self, name: str, milliseconds: float) -> None:
        self.times.setdefault(name, []).append(milliseconds)

    def show(self) -> None:
        print(f"\n{'ms':<44} {'median':>9} {'p90':>9} {'least':>9} {'most':>9} {'n':>4}")
        for name, times in self.times.items():
            times = sorted(times)
            p90 = times[min(len(times) - 1, int(len(times) * 0.9))]
            print(f"{name:<44} {statistics.median(times):>9.1f} {p90:>9.1f} {times[0]:>9.1f} {times[-1]:>9.1f} {len(times):>4}")


def one_round(server: Server, image: str, figures: Figures, sizes: list[int]) -> None:
    started = time.monotonic()
    microvm = support.run_microvm(server, image, idlePolicy=idle_policy())
    figures.add("RunMicrovm returns", (time.monotonic() - started) * 1000)
    poll(microvm, "RUNNING")
    figures.add("RunMicrovm to RUNNING", (time.monotonic() - started) * 1000)
    figures.add("RUNNING, token, to first 200", timed(lambda: first_answer(microvm)))
    figures.add("GetMicrovm", timed(microvm.state))
    microvm.terminate()

    started = time.monotonic()
    microvm = support.run_microvm(server, image, idlePolicy=idle_policy())
    first_answer(microvm)
    figures.add("RunMicrovm, token, to first 200", (time.monotonic() - started) * 1000)
    figures.add("request to a running MicroVM", timed(microvm.count))

    started = time.monotonic()
    microvm.client.suspend_microvm(microvmIdentifier=microvm.id)
    poll(microvm, "SUSPENDED")
    figures.add("SuspendMicrovm to SUSPENDED", (time.monotonic() - started) * 1000)
    sizes.append(suspended_bytes(server, microvm.id))
    figures.add("request to a suspended MicroVM", timed(microvm.count))
    microvm.terminate()


def cold_boot(server: Server, uri: str, figures: Figures) -> None:
    """Builds the image anew and times, by its build log, from the start of the machine until the app listens."""
    name = "cold-boot"
    image = support.create_image(server, name, uri)["imageArn"]
    command = [support.HEARTH, "logs", name, "--follow", "--data-dir", server.data_dir]
    started = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as log:
        for line in log.stdout:
            if line.startswith("Booting"):
                started = time.monotonic()
            elif "listens on port" in line and started:
                figures.add("cold boot until the app listens", (time.monotonic() - started) * 1000)
    support.wait_image(server, image, "CREATED")
    server.microvms.delete_microvm_image(imageIdentifier=image)
    deadline = support.Deadline(30, "the image to be gone")
    while server.microvms.list_microvm_images(nameFilter=name)["items"]:
        deadline.tick()


def suspended_bytes(server: Server, microvm_id: str) -> int:
    """What a suspended MicroVM takes on disk, without the blocks that its files leave out."""
    files = [path for path in (server.data_dir / "microvms" / microvm_id).rglob("*") if path.is_file()]
    return sum(path.stat().st_blocks * 512 for path in files)


def show_sizes(server: Server, suspended: list[int]) -> None:
    mib = 1 << 20
    for path in (server.data_dir / "images").rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        print(f"\nmemory snapshot    {manifest['memory_bytes'] / mib:9.1f} MiB of {manifest['memory_mib']} MiB")
        print(f"device state       {manifest['device_state_bytes'] / 1024:9.1f} KiB")
        print(f"disk of the boot   {manifest['disk_bytes'] / mib:9.1f} MiB")
        print(f"platform           {manifest['platform']}")
    print(f"suspended MicroVM  {statistics.median(suspended) / mib:9.1f} MiB on disk (dirty pages, device state, disk writes)")


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--data-dir", type=Path, required=True)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--boots", type=int, help="cold boots; as many as rounds unless given")
    arguments = options.parse_args()

    server = Server.attach(arguments.data_dir)
    uri = support.upload(server, "flask-hello.zip", support.zip_directory(FLASK_HELLO))
    print("building the image", flush=True)
    image = support.create_image(server, "flask-hello", uri)["imageArn"]
    support.wait_image(server, image, "CREATED", 600)

    figures, sizes = Figures(), []
    for number in range(WARM_UP + arguments.rounds):
        one_round(server, image, Figures() if number < WARM_UP else figures, sizes)
        print(".", end="", flush=True)
    for _ in range(arguments.rounds if arguments.boots is None else arguments.boots):
        cold_boot(server, uri, figures)
        print("b", end="", flush=True)
    figures.show()
    show_sizes(server, sizes)


if __name__ == "__main__":
    main()
