"""A real Slurm on loopback, thrown away after the tests.

Needs the Debian packages munge, slurmctld, slurmd and slurm-client, but neither root nor systemd nor cgroups
nor an accounting database; nothing below /etc or /var is used. Every node is a slurmd of its own. Where the
kernel allows mount and UTS namespaces, each has its own host name, loopback address and /etc/hosts, so that a
job finds the other nodes by name. Where it does not, there is one node, which is this machine.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "setpriv")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/sbin"])
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")

# Takes the host name $0, hides /etc/hosts behind $1 and becomes the rest.
ENTER = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'

# cred_expire is also how long a requeued job waits before it may start again; Slurm takes no less than 5 s.
# NoInAddrAny keeps every listener on the address of the host name. Without DefMemPerCPU a job takes all memory.
CONF = """\
ClusterName=test
FirstJobId={first_job}
SlurmctldHost={controller}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait={kill_wait}
SlurmdTimeout=5
SlurmctldTimeout=5
MessageTimeout=5
TCPTimeout=1
MinJobAge=3600
InactiveLimit=0
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=preemptible Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
"""
# Believed by config_overrides, whatever the machine has.
NODE = "NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs=64 RealMemory=64000 Gres=gpu:8"


@dataclass(frozen=True)
class Node:
    """One slurmd; jobs know it by its name, the daemons by its port."""

    name: str
    port: int


class SlurmCluster:
    """`with SlurmCluster(nodes=2) as cluster: cluster.sbatch(...)`."""

    def __init__(self, nodes: int = 2, kill_wait: int = 20) -> None:
        # The path of a Unix socket ends at 107 bytes and munged wants all directories above it searchable: pytest's
        # own temporary directories are too long and too private.
        self.root = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.root.chmod(0o711)
        self.kill_wait = kill_wait
        self._namespaces = _namespaces()
        self._host = socket.gethostname().split(".")[0]
        self._address = "127.0.0.1" if self._namespaces else socket.gethostbyname(self._host)
        names = [f"n{i + 1}" for i in range(nodes)] if self._namespaces else [self._host]
        self.nodes = [Node(name, _free_port(self._address)) for name in names]
        self._controller_port = _free_port(self._address)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmCluster:
        try:
            self._configure()
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def environment(self) -> dict[str, str]:
        """Return the environment of clients, without what a surrounding job left."""
        ours = {k: v for k, v in os.environ.items() if not re.match(r"(SLURM|SBATCH|SRUN|SQUEUE|SCANCEL)_|OMP_", k)}
        return {**ours, "PATH": PATH, "SLURM_CONF": str(self.root / "slurm.conf")}

    def run(self, *command: str, environment: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """Run a client and return its output."""
        env = {**self.environment(), **(environment or {})}
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, cwd=cwd)
        assert result.returncode == 0, (command, result.stdout, result.stderr)
        return result.stdout

    def sbatch(self, *arguments: str, cwd: Path, **environment: str) -> str:
        """Submit from a directory and return the number of the job."""
        return self.run("sbatch", "--parsable", *arguments, cwd=cwd, environment=environment).strip()

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm says about a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, timeout: float = 60) -> dict[str, str]:
        """Return the job once it is in one of the states; without states, once it has ended."""
        end = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] not in (states or ENDED):
            assert time.monotonic() < end, (states, job)
            time.sleep(0.1)
        return job

    def boot(self, name: str) -> None:
        """Start a node."""
        self._spawn(name, ["slurmd", "-D", "-N", name], name)

    def crash(self, name: str) -> None:
        """Take a node's power away: its slurmd, steps and tasks end at once, and nobody is told."""
        assert self._namespaces, "without namespaces there is nothing by which a node's processes are known"
        slurmd = self._daemons.pop(name)
        namespace = os.readlink(f"/proc/{slurmd.pid}/ns/uts")
        while found := [pid for pid in _processes() if _reads(f"/proc/{pid}/ns/uts", os.readlink) == namespace]:
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            slurmd.poll()
        slurmd.wait()

    def _configure(self) -> None:
        address = self._address
        hosts = [f"127.0.0.1 localhost {self._host} controller.test controller"]
        network = f"127.{os.getpid() >> 8 & 0x7F | 0x80}.{os.getpid() & 0xFF}"
        for i, node in enumerate(self.nodes):
            (self.root / f"spool-{node.name}").mkdir()
            # A task calls srun back at the source address of its request, which on loopback is 127.0.0.1: there
            # srun must listen. Jobs see the node under an address of its own.
            hosts += [f"127.0.0.1 {node.name}.test", f"{network}.{i + 1} {node.name} {node.name}.test"]
        (self.root / "state").mkdir()
        (self.root / "hosts").write_text("\n".join(hosts) + "\n")
        key = self.root / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        # A device node is wanted for a GPU, and a link to one is enough.
        for i in range(8):
            (self.root / f"gpu{i}").symlink_to("/dev/null")
        names = ",".join(node.name for node in self.nodes)
        (self.root / "gres.conf").write_text(f"NodeName={names} Name=gpu File={self.root}/gpu[0-7]\n")
        version = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, env={"PATH": PATH}).stdout
        if tuple(map(int, re.findall(r"\d+", version)[:2])) >= (23, 11):
            (self.root / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        lines = [NODE.format(name=n.name, host=n.name, address=address, port=n.port) for n in self.nodes]
        conf = CONF.format(
            controller="controller" if self._namespaces else self._host,
            address=address,
            port=self._controller_port,
            user=getpass.getuser(),
            root=self.root,
            # Clusters side by side share the ports of one machine, which follow from the numbers of jobs.
            first_job=1000 + os.getpid() * 97 % 8000,
            kill_wait=self.kill_wait,
            nodes="\n".join(lines),
        )
        (self.root / "slurm.conf").write_text(conf)

    def _start(self) -> None:
        munge = {name: self.root / f"munge.{name}" for name in ("socket", "pid", "seed", "log")}
        options = [f"--{k}-file={v}" for k, v in munge.items() if k != "socket"]
        key = f"--key-file={self.root}/munge.key"
        self._spawn("munged", ["munged", "--foreground", "--force", f"--socket={munge['socket']}", key, *options])
        self._until(munge["socket"].is_socket, "munge's socket")
        self._spawn("controller", ["slurmctld", "-D", "-i"], "controller")
        for node in self.nodes:
            self.boot(node.name)
        self._until(self._answers, "slurmctld's port")
        self._until(self._is_idle, "idle nodes")

    def _spawn(self, name: str, command: list[str], host: str | None = None) -> None:
        if host and self._namespaces:
            enter = ["sh", "-c", ENTER, f"{host}.test", str(self.root / "hosts")]
            command = [*self._namespaces, *enter, *command]
        # Whatever ends the tests ends the daemons; a Ctrl-C meant for the tests does not.
        command = ["setpriv", "--pdeathsig", "TERM", *command]
        with (self.root / f"{name}.out").open("wb") as out:
            self._daemons[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.environment(),
                cwd=self.root,
                start_new_session=True,
            )

    def _until(self, condition: object, what: str) -> None:
        assert callable(condition)
        end = time.monotonic() + 60
        while not condition():
            for name, daemon in self._daemons.items():
                assert daemon.poll() is None, (name, (self.root / f"{name}.out").read_text()[-2000:])
            assert time.monotonic() < end, what
            time.sleep(0.05)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((self._address, self._controller_port), 1):
            return True
        return False

    def _is_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").split()
        return states == ["idle"] * len(self.nodes)

    def stop(self) -> None:
        """End the daemons and everything that ran under them, and remove every trace."""
        for daemon in self._daemons.values():
            daemon.terminate()
        for daemon in self._daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(5)
        # Steps and tasks belong to process 1 by now; they are known by the configuration that they were given.
        mark = f"SLURM_CONF={self.root}/slurm.conf".encode()
        for pid in _processes():
            if mark in (_reads(f"/proc/{pid}/environ", _bytes) or b"").split(b"\0"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for daemon in self._daemons.values():
            daemon.wait()
        shutil.rmtree(self.root, ignore_errors=True)


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _reads(path: str, read: Callable[[str], T]) -> T | None:
    """Return what can be read of a process, None if it has ended or is another user's."""
    try:
        return read(path)
    except OSError:
        return None


def _bytes(path: str) -> bytes:
    return Path(path).read_bytes()


def missing_programs() -> list[str]:
    """Return what is not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def _namespaces() -> list[str]:
    """Return the unshare command that this machine permits; empty when it permits none."""
    plain = ["unshare", "--mount", "--uts", "--propagation", "private"]
    # An ordinary user keeps the own number: munge reports the one seen outside.
    mapped = [plain[0], "--user", "--map-current-user", "--keep-caps", *plain[1:]]
    for command in (plain, mapped):
        with tempfile.NamedTemporaryFile() as file:
            attempt = [*command, "sh", "-c", ENTER, "probe", file.name, "true"]
            if subprocess.run(attempt, capture_output=True).returncode == 0:
                return command
    return []
