# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A real SLURM of two nodes on this machine, with its own ports, state and key.

python -m tests.slurm.cluster sinfo    (as root: starts it, runs a command, stops it)
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
PROGRAMS |= {"munged": "munge"}  # program -> Debian's package
NODES = ("n1", "n2")
HOSTS = Path("/etc/hosts")
CONF = """
ClusterName=toy
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge/socket
SlurmctldPort={ports[0]}
SlurmctldPidFile={place}/ctld.pid
SlurmdPidFile={place}/%n.pid
SlurmdSpoolDir={place}/%n
SlurmctldLogFile={place}/ctld.log
SlurmdLogFile={place}/%n.log
StateSaveLocation={place}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=15
MinJobAge=100000
MessageTimeout=60
TCPTimeout=30
BatchStartTimeout=60
UnkillableStepTimeout=300
SlurmdParameters=config_overrides
NodeName=n1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=32
NodeName=n2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=32
PartitionName=toy Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(number: int) -> list[int]:
    """Return unused ports."""
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def install() -> None:
    """Install the Debian packages that are missing; RuntimeError if that fails."""
    if os.geteuid() != 0:
        raise RuntimeError("a SLURM of its own needs root: run it in a container")
    missing = [package for name, package in PROGRAMS.items() if shutil.which(name) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise RuntimeError(f"{', '.join(missing)} missing, and no apt-get here: install them")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    words = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    done = None
    for before in ([], ["apt-get", "update"]):
        if before:
            subprocess.run(before, env=environment, capture_output=True, check=False)
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
    raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr}")


class Cluster:
    """The daemons of a SLURM; they end with the `with` block. Requeued jobs start early."""

    def __init__(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.place.chmod(0o755)  # munge's socket must be reachable for all
        self.daemons: list[subprocess.Popen] = []
        self.line = f"127.0.0.1 {' '.join(NODES)}  # {self.place.name}\n"
        self.over = threading.Event()
        self.before = os.environ.get("SLURM_CONF")

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        install()
        place = self.place
        for name in ("munge", "state", *NODES):
            (place / name).mkdir()
        key = place / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (place / "slurm.conf").write_text(CONF.format(place=place, ports=free_ports(3)))
        os.environ["SLURM_CONF"] = str(place / "slurm.conf")
        HOSTS.write_text(HOSTS.read_text().rstrip("\n") + "\n" + self.line)
        munge = place / "munge"
        own = {"socket": munge / "socket", "key-file": key, "pid-file": munge / "pid"}
        own |= {"seed-file": munge / "seed", "log-file": munge / "log"}
        self._daemon("munged", "--foreground", *(f"--{k}={v}" for k, v in own.items()))
        self._until(lambda: (munge / "socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-f", place / "slurm.conf")
        for node in NODES:
            self._daemon("slurmd", "-D", "-f", place / "slurm.conf", "-N", node)
        self._until(lambda: ask("sinfo", "-h", "-t", "idle", "-o", "%D") == "2", "slurmd")
        threading.Thread(target=self._hurry, daemon=True).start()

    def _daemon(self, *words: object) -> None:
        with open(self.place / f"output-{len(self.daemons)}.txt", "w") as file:
            self.daemons.append(
                subprocess.Popen(list(map(str, words)), stdout=file, stderr=subprocess.STDOUT)
            )

    def _until(self, ready, what: str) -> None:
        end = time.monotonic() + 120
        while not ready():
            dead = any(daemon.poll() is not None for daemon in self.daemons)
            if dead or time.monotonic() > end:
                logs = [*self.place.glob("output-*.txt"), *self.place.glob("*.log")]
                text = "\n".join(f"{log}:\n{log.read_text()[-2000:]}" for log in logs)
                raise RuntimeError(f"SLURM does not start ({what}):\n{text}")
            time.sleep(0.1)

    def _hurry(self) -> None:
        """Restart requeued jobs three seconds after the last of their processes has ended.

        SLURM would wait for two minutes. An srun that is ending still sends signals, and a node
        still reports, by job ID: both would hit the restarted job.
        """
        quiet: dict[str, float] = {}
        while not self.over.wait(0.5):
            pending = ask("squeue", "-h", "-t", "PD", "-o", "%A %r").splitlines()
            waiting = {line.split()[0] for line in pending if line.endswith("BeginTime")}
            waiting -= jobs_with_processes() if waiting else set()
            quiet = {job: quiet.get(job, time.monotonic()) for job in waiting}
            for job, since in quiet.items():
                if time.monotonic() - since > 3:
                    ask("scontrol", "update", f"JobId={job}", "StartTime=now")

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        if len(self.daemons) > 1:
            ask("scancel", "--user=root")
            end = time.monotonic() + 60
            while ask("squeue", "-h") and time.monotonic() < end:
                time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        HOSTS.write_text(HOSTS.read_text().replace(self.line, ""))
        shutil.rmtree(self.place, ignore_errors=True)
        if self.before is None:
            os.environ.pop("SLURM_CONF", None)
        else:
            os.environ["SLURM_CONF"] = self.before


def jobs_with_processes() -> set[str]:
    """Return the IDs of jobs that still have processes on this machine, slurmstepd included."""
    found: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "environ").read_bytes() + b"\0" + (process / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        found.update(re.findall(r"(?:^|\0)SLURM_JOB_ID=(\d+)\0", text.decode(errors="replace")))
        found.update(re.findall(r"slurmstepd: \[(\d+)\.", text.decode(errors="replace")))
    return found


def ask(*words: str) -> str:
    """Return the output of a SLURM command, '' if it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    with Cluster():
        sys.exit(subprocess.run(sys.argv[1:], check=False).returncode)
