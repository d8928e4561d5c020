"""A Slurm of one machine, for tests: munged, slurmctld and slurmd in a folder of their own.

It uses the programs of Debian's slurm-wlm and munge and none of their configuration: every socket,
key, log and state file is in the folder, every port is free, so that it runs beside another Slurm
and is gone with ``stop``. It needs root: slurmd starts jobs as their user, and this one's user is
root.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")

#: No cgroups (a container may have none), no accounting; a job goes back into the queue at once.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={ctld}
SlurmdPort={d}
SrunPortRange={low}-{high}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=100000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=20
MinJobAge=300
SlurmdTimeout=5
InactiveLimit=0
ReturnToService=2
Epilog=/bin/true
NodeName={host} NodeAddr=127.0.0.1 NodeHostname={host} CPUs={cpus} State=UNKNOWN
PartitionName=low Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 \
GraceTime=40 OverSubscribe=NO
PartitionName=high Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no Slurm can be started here; None if one can."""
    lacking = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if lacking:
        return f"no Slurm: {', '.join(lacking)} not found (apt install slurm-wlm)"
    if os.geteuid() != 0:
        return "Slurm's daemons need root here"
    return None


_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


class Slurm:
    """A running Slurm; ``env`` makes sbatch and the rest find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = socket.gethostname().partition(".")[0]
        self.env = os.environ | {
            "PATH": _PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._daemons: dict[str, subprocess.Popen] = {}

    def start(self) -> None:
        """Start the daemons; returns when the node takes jobs.

        Raises:
            RuntimeError: it does not within a minute; with the logs' ends.
        """
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        os.chmod(self.folder, 0o755)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        ports = _free_ports(2)
        config = CONFIG.format(
            host=self.host,
            folder=self.folder,
            ctld=ports[0],
            d=ports[1],
            low=ports[1] + 1000 if ports[1] < 60000 else 40000,
            high=ports[1] + 1400 if ports[1] < 60000 else 40400,
            cpus=os.cpu_count(),
        )
        (self.folder / "slurm.conf").write_text(config)
        self._daemon(
            "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket",
            f"--key-file={key}", f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munged.seed",
        )  # fmt: skip
        self._wait("munge's socket", lambda: (self.folder / "munge.socket").exists())
        self._daemon("slurmctld", "-D", "-c", "-i")
        self.start_node()

    def start_node(self) -> None:
        """Start slurmd; returns when the node takes jobs."""
        self._daemon("slurmd", "-D", "-N", self.host)
        self._wait("the node", lambda: self.node() in ("idle", "mixed", "allocated"))

    def kill_node(self) -> None:
        """What a power failure does to a node: slurmd and every process of every job are gone."""
        daemon = self._daemons.pop("slurmd")
        daemon.kill()
        daemon.wait()
        of_jobs = self._processes_of_jobs()
        # Their keepers first: one that lives for a moment longer reports how its job ended.
        for process in sorted(of_jobs, key=lambda p: "slurmstepd" not in p.name()):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass

    def _processes_of_jobs(self) -> list[psutil.Process]:
        """Every process of this Slurm's jobs and the slurmstepd above it.

        A slurmstepd has written its title over its environment: it is known by its children.
        """
        found: dict[int, psutil.Process] = {}
        for process in psutil.process_iter():
            try:
                environ = process.environ()
                mine = environ.get("SLURM_CONF") == self.env["SLURM_CONF"]
                if mine and "SLURM_JOB_ID" in environ:
                    above = [p for p in process.parents() if "slurmstepd" in p.name()]
                    found |= {p.pid: p for p in (process, *above)}
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return list(found.values())

    def node(self) -> str:
        """The node's state in one word."""
        said = self.command("sinfo", "--noheader", "--format=%T", "--partition=low")
        return said.strip("*~#!%$@^-+\n ")

    def command(self, *words: str, check: bool = False) -> str:
        result = subprocess.run(
            words, env=self.env, capture_output=True, text=True, timeout=60, check=False
        )
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(words)}: {result.stderr}")
        return result.stdout

    def state(self, job: str) -> str:
        """A job's state, e.g. RUNNING; empty if it is not known."""
        said = self.command("scontrol", "show", "job", job, "--oneliner")
        return next((w[9:] for w in said.split() if w.startswith("JobState=")), "")

    def field(self, job: str, name: str) -> str:
        said = self.command("scontrol", "show", "job", job, "--oneliner")
        return next((w[len(name) + 1 :] for w in said.split() if w.startswith(f"{name}=")), "")

    def wait(self, job: str, seconds: float = 400.0) -> str:
        """The job's last state."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self._wait(f"job {job}", lambda: self.state(job) in ends, seconds)
        return self.state(job)

    def until(self, what: str, true: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait for something to become true."""
        self._wait(what, true, seconds)

    def stop(self) -> None:
        """End every job and every daemon."""
        self.command("scancel", "--state=PENDING", "--user=root")
        self.command("scancel", "--signal=KILL", "--full", "--user=root")
        self.command("scancel", "--user=root")
        end = time.time() + 15
        for process in self._processes_of_jobs():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        while time.time() < end and self.command("squeue", "--noheader"):
            time.sleep(0.2)
        for name in ("slurmd", "slurmctld", "munged"):
            daemon = self._daemons.pop(name, None)
            if daemon is None:
                continue
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _daemon(self, *words: str) -> None:
        with open(self.folder / f"{words[0]}.out", "ab") as log:
            self._daemons[words[0]] = subprocess.Popen(
                words, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def _wait(self, what: str, true: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.time() + seconds
        while not true():
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise RuntimeError(f"{name} has ended: {self.logs()}")
            if time.time() > end:
                raise RuntimeError(f"{what}: not within {seconds} s. {self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        found = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-1500:]}" for p in found)


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for s in held:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports
