"""Two machines on one: network namespaces that a cable connects, which can be pulled out."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from .jobs import Job, free_port

INTERFACE = "net0"
ADDRESSES = ("10.87.0.1", "10.87.0.2")


class Nodes:
    """Where the two nodes of a job run; rank 0 is reached at `address` through `interface`."""

    interface: str
    address: str

    def command(self, node: int, command: list[str]) -> list[str]:
        """`command`, to be run on `node`."""
        raise NotImplementedError

    def cut(self, job: Job) -> None:
        """From now on nothing that one node sends reaches the other; connections stay open."""
        raise NotImplementedError

    def after_one_ended(self, job: Job) -> None:
        """One node has ended after the cut."""
        return

    def mend(self) -> None:
        """Connect the nodes again."""
        return

    def port(self) -> int:
        """Of rank 0's store."""
        return free_port()

    def close(self) -> None:
        """Leave nothing behind."""
        return


class Namespaces(Nodes):
    """Two network namespaces and a veth pair; needs root and `ip`.

    Raises:
        OSError, subprocess.CalledProcessError: the machine does not permit it.
    """

    interface, address = INTERFACE, ADDRESSES[0]

    def __init__(self) -> None:
        for program in ("ip", "nsenter", "unshare"):
            if shutil.which(program) is None:
                raise OSError(f"no {program} here")
        # A namespace lives as long as a process in it.
        self.holders: list[subprocess.Popen] = []
        try:
            for _ in ADDRESSES:
                self.holders.append(subprocess.Popen(["unshare", "--net", "sleep", "600"], start_new_session=True))
            self._wait_for_namespaces()
            peer = ["peer", "name", INTERFACE, "netns", str(self.holders[1].pid)]
            self._on(0, "ip", "link", "add", INTERFACE, "type", "veth", *peer)
            for node, address in enumerate(ADDRESSES):
                self._on(node, "ip", "address", "add", f"{address}/24", "dev", INTERFACE)
                for link in ("lo", INTERFACE):
                    self._on(node, "ip", "link", "set", link, "up")
        except BaseException:
            self.close()
            raise

    def _wait_for_namespaces(self) -> None:
        """`unshare` has made its namespace once it has become `sleep`."""
        deadline = time.monotonic() + 10
        for holder in self.holders:
            while True:
                with open(f"/proc/{holder.pid}/comm") as name:
                    if name.read().strip() == "sleep":
                        break
                if holder.poll() is not None or time.monotonic() > deadline:
                    raise OSError("no network namespaces here")
                time.sleep(0.01)

    def _on(self, node: int, *command: str) -> None:
        subprocess.run(self.command(node, list(command)), check=True, capture_output=True)

    def command(self, node: int, command: list[str]) -> list[str]:
        return ["nsenter", "--target", str(self.holders[node].pid), "--net", "--", *command]

    def cut(self, job: Job) -> None:
        self._on(0, "ip", "link", "set", INTERFACE, "down")

    def mend(self) -> None:
        self._on(0, "ip", "link", "set", INTERFACE, "up")

    def port(self) -> int:
        return 29500  # nobody else is there

    def close(self) -> None:
        for holder in self.holders:
            holder.kill()
            holder.wait()


class Frozen(Nodes):
    """The stand-in: both nodes share this machine's loopback device, and the second one is stopped instead of cut off.

    To the first it looks alike: connections stay open and nothing comes. The second goes on when the first has given
    up, and finds its connections closed.
    """

    interface, address = "lo", "127.0.0.1"

    def command(self, node: int, command: list[str]) -> list[str]:
        return command

    def cut(self, job: Job) -> None:
        job.signal_all(1, signal.SIGSTOP)

    def after_one_ended(self, job: Job) -> None:
        job.signal_all(1, signal.SIGCONT)


def two_nodes() -> Nodes:
    """Namespaces where the machine permits them."""
    try:
        return Namespaces()
    except (OSError, subprocess.CalledProcessError):
        return Frozen()


def launch(nodes: Nodes, config: Any, script: list[str]) -> list[list[str]]:
    """What each node runs: `accelerate launch` of a script on two ranks a node."""
    port = str(nodes.port())
    return [
        nodes.command(
            node,
            [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
            + ["--num_machines", "2", "--num_processes", "4", "--machine_rank", str(node)]
            + ["--main_process_ip", nodes.address, "--main_process_port", port, *script],
        )
        for node in range(2)
    ]
