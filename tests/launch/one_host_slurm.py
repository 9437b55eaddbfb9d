"""A SLURM of four nodes on this host, in a folder: munged, slurmctld and four slurmd of Debian's packages.

However the tests end, nothing is left running: a process that waits for their end kills all that has the SLURM_CONF of
the folder, which are daemons, steps and ranks.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from clean_environment import environment

NODES = ("n1", "n2", "n3", "n4")  # two for a job of two nodes, two for small jobs beside it
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])

# 128 processors and 8 "GPUs" (empty files) a node, so that the scripts' own #SBATCH lines fit. A requeued job waits
# cred_expire seconds, 120 unless set.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=2
GresTypes=gpu
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE
"""


def missing() -> str:
    """The programs that are not installed here, separated by commas."""
    return ", ".join(name for name in PROGRAMS if shutil.which(name, path=PATH) is None)


def wait_until(reached: Callable[[], object], what: str, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.1)


def processes_with(variable: str) -> list[int]:
    """Processes that were started with this variable in their environment."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if variable.encode() in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found


def kill_all(folder: Path | str) -> None:
    """Kills the SLURM in this folder with its jobs: twice, because a process may just have started another one."""
    for _ in range(2):
        for pid in processes_with(f"SLURM_CONF={folder}/slurm.conf"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


class OneHostSlurm:
    """Starts the daemons in ``folder`` and waits for the nodes; `close` ends them and every job."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(1 + len(NODES))]
        ports = [probe.getsockname()[1] for probe in probes]
        for probe in probes:
            probe.close()
        size = "CPUs=128 RealMemory=1000 Gres=gpu:8"
        line = lambda node, port: f"NodeName={node} NodeAddr=127.0.0.1 Port={port} {size}"
        nodes = [line(node, port) for node, port in zip(NODES, ports[1:], strict=True)]
        text = CONFIGURATION.format(folder=folder, user=getpass.getuser(), port=ports[0], nodes="\n".join(nodes))
        (folder / "slurm.conf").write_text(text)
        (folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File={folder}/gpu[0-7]\n")
        for name in [f"gpu{number}" for number in range(8)]:
            (folder / name).touch()
        for name in ("state", *NODES):
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)
        self._daemons: dict[str, subprocess.Popen] = {}
        code = "import one_host_slurm, sys; sys.stdin.read(); one_host_slurm.kill_all(sys.argv[1])"
        self._undertaker = subprocess.Popen(
            [sys.executable, "-c", code, folder],
            stdin=subprocess.PIPE,
            cwd=Path(__file__).parent,
            start_new_session=True,
        )
        try:
            files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
            options = [f"--{option}={folder}/munge.{name}" for option, name in files.items()]
            # --force: the folder is open to its owner alone, which is enough here
            self._start("munged", ["munged", "--foreground", "--force", *options])
            wait_until((folder / "munge.socket").exists, f"munged is there\n{self.log('munged')}", 20)
            self._start("slurmctld", ["slurmctld", "-D", "-i"])
            for node in NODES:
                self.start_node(node)
            idle = lambda: self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split() == ["idle"] * 4
            wait_until(idle, "all nodes are idle", 90)
        except BaseException:
            self.close()
            raise

    def start_node(self, node: str) -> None:
        self._start(node, ["slurmd", "-D", "-N", node])

    def kill_node(self, node: str) -> None:
        """Kills the node's slurmd, the daemons of its job steps and their processes, as a power cut would."""
        self._daemons[node].kill()
        self._daemons[node].wait()
        ours = set(processes_with(f"SLURM_CONF={self.folder}/slurm.conf"))
        tasks = ours & set(processes_with(f"SLURMD_NODENAME={node}"))
        for pid in tasks:
            with contextlib.suppress(OSError):  # of one that has just ended
                parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                for victim in ours & {parent, pid}:
                    os.kill(victim, signal.SIGKILL)

    def run(self, *command: str, check: bool = True, **variables: str) -> str:
        """What a client command prints."""
        shown = environment(**self.environment, **variables)
        done = subprocess.run(command, env=shown, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}\n{self.log('slurmctld')}"
        return done.stdout

    def state(self, job: str) -> str:
        """The state of a job, such as RUNNING or PENDING."""
        return self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()

    def nodes(self, job: str) -> list[str]:
        """The names of the nodes on which a job runs."""
        names = self.run("squeue", "--noheader", f"--jobs={job}", "--format=%N").strip()
        return self.run("scontrol", "show", "hostnames", names).split()

    def log(self, daemon: str) -> str:
        return (self.folder / f"{daemon}.log").read_text()

    def close(self) -> None:
        """Kills everything and waits until it is gone."""
        self._undertaker.communicate()
        for daemon in self._daemons.values():
            daemon.wait(10)

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("a") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                env=environment(**self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
