"""Requests a second, as wrk counts them."""

import re
import subprocess


def load(url: str, headers: dict[str, str], connections: int, seconds: int) -> tuple[float, str, str]:
    """Requests a second, median and 99th percentile, as wrk tells them."""
    command = ["wrk", f"-t{min(2, connections)}", f"-c{connections}", f"-d{seconds}s", "--latency"]
    for name, value in headers.items():
        command += ["-H", f"{name}: {value}"]
    said = subprocess.run([*command, url], capture_output=True, text=True, timeout=seconds + 30, check=True).stdout
    if "Non-2xx" in said or "Socket errors" in said:
        raise SystemExit(f"some requests were refused:\n{said}")
    patterns = (r"^Requests/sec:\s+([\d.]+)", r"^\s+50%\s+(\S+)$", r"^\s+99%\s+(\S+)$")
    numbers = [re.search(pattern, said, re.MULTILINE) for pattern in patterns]
    if not all(numbers):
        raise SystemExit(f"wrk said something else than expected:\n{said}")
    rate, median, p99 = (found.group(1) for found in numbers)
    return float(rate), median, p99
