"""Hosts on one machine: a network namespace each, on one bridge, so that Ray meets real addresses and real cuts.

Needs root and iproute2. Names are unique, so that several test runs do not meet; everything is gone with the block.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

RAY_PORT = 6379


def lacking() -> str:
    """Why hosts cannot be made here, or nothing."""
    if os.geteuid() != 0:
        return "hosts are network namespaces, which need root"
    if shutil.which("ip") is None:
        return "hosts are network namespaces, which need iproute2"
    probe = f"probe{uuid.uuid4().hex[:6]}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "network namespaces cannot be made here"
    _ip("netns", "del", probe)
    return ""


def _ip(*args: str) -> str:
    return subprocess.run(["ip", *args], check=True, capture_output=True, text=True).stdout


def wait_for(condition: Callable[[], object], what: str, seconds: float) -> float:
    """Poll until it holds and return how long that took; fail after so many seconds."""
    start_s = time.monotonic()
    while not condition():
        assert time.monotonic() - start_s < seconds, f"waited {seconds:g} s for {what}"
        time.sleep(0.05)
    return time.monotonic() - start_s


@dataclass(frozen=True)
class Host:
    """One host with its cable `link`; `ray_folder` is where its Ray keeps its session."""

    namespace: str
    link: str
    address: str
    ray_folder: Path

    def start(self, command: Sequence[str | Path], log: Path, **env: str) -> subprocess.Popen[bytes]:
        """Start a process there; what it prints goes to the end of `log`."""
        with log.open("ab") as out:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *map(str, command)],
                env=os.environ | {"RAY_AUTH_MODE": "disabled", "GLOO_SOCKET_IFNAME": "eth0"} | env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def start_ray(self, head: Host, log: Path, num_cpus: int = 1, **env: str) -> None:
        """`ray start`, as the head or joining it."""
        ray = Path(sys.executable).with_name("ray")
        command = [ray, "start", f"--node-ip-address={self.address}", f"--num-cpus={num_cpus}", "--num-gpus=0"]
        if self is head:
            command += ["--head", f"--port={RAY_PORT}", f"--temp-dir={self.ray_folder}", "--include-dashboard=false"]
        else:
            command += [f"--address={head.address}:{RAY_PORT}"]
        command += ["--disable-usage-stats", "--object-store-memory=100000000"]
        code = self.start(command, log, **env).wait(timeout=90)
        assert code == 0, log.read_text(encoding="utf-8", errors="replace")

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Those that run there and whose title begins so."""
        found = []
        for pid in _ip("netns", "pids", self.namespace).split():
            try:
                process = psutil.Process(int(pid))
                if " ".join(process.cmdline()).startswith(title) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill(self) -> None:
        """SIGKILL everything there, as when the power fails."""
        while processes := self.processes():
            for process in processes:
                if process.is_running():
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.05)

    def cut(self) -> None:
        """Take the cable out."""
        _ip("link", "set", self.link, "down")

    def heal(self) -> None:
        """Put the cable back."""
        _ip("link", "set", self.link, "up")


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts, each with `eth0` at an address of one network."""
    tag = uuid.uuid4().hex[:6]
    bridge = f"br{tag}"
    folder = Path(tempfile.mkdtemp(prefix=f"h{tag}", dir="/tmp"))  # short: it becomes part of socket names
    made = [Host(f"h{tag}-{n}", f"v{tag}-{n}", f"10.79.0.{n}", folder) for n in range(1, count + 1)]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("link", "set", bridge, "up")
        for host in made:
            _ip("netns", "add", host.namespace)
            _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("link", "set", host.link, "master", bridge, "up")
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            _ip("-n", host.namespace, "route", "add", "default", "dev", "eth0")  # by it Ray finds its address
        yield made
    finally:
        existing = _ip("netns", "list").split()
        for host in made:
            if host.namespace in existing:
                host.kill()
                _ip("netns", "del", host.namespace)
        subprocess.run(["ip", "link", "del", bridge], capture_output=True, check=False)
        shutil.rmtree(folder, ignore_errors=True)
