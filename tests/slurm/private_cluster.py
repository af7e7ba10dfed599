"""A SLURM cluster of real daemons in a folder: munged, slurmctld and a slurmd for each node, all on this machine.

They live in process and mount namespaces of their own, under a process that dies with the test: when that one is
killed, so is every daemon, step and task. In there n1, n2, ... are names of 127.0.0.11, 127.0.0.12, ..., or of
addresses in network namespaces of their own, whose cables can be pulled. Only root can make all that.
"""

import ctypes
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "unshare", "nsenter", "ip")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
RANDOM = random.SystemRandom()
KILL_WAIT = 5  # seconds between SIGTERM and SIGKILL
CONFIGURATION = """\
ClusterName=private
SlurmctldHost=localhost({network}.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait={kill_wait}
WaitTime=0
SlurmdTimeout=10
SlurmctldTimeout=10
MessageTimeout=5
TCPTimeout=2
MailProg=/bin/true
{extra}
NodeName=n[1-{nodes}] NodeAddr={network}.[11-{last}] Port=[{first_port}-{last_port}] CPUs={cpus} Boards=1 \
SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=100000 {gres} State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


class ClusterError(RuntimeError):
    """The cluster did not come up or a command on it failed; the message holds what it said."""


def missing() -> str | None:
    """Why there can be no cluster on this machine; None where there can."""
    absent = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")]
    if absent:
        return f"a private SLURM cluster needs {', '.join(absent)}: apt-get install slurm-wlm munge iproute2"
    if os.geteuid():
        return "a private SLURM cluster needs root, for its namespaces"
    return None


class PrivateCluster:
    """A context manager; ``run`` calls SLURM's commands.

    ``user_signal``: a preempted job gets the signal of its ``--signal`` at once, else SIGTERM. ``grace``: seconds that
    a preempted job has. ``gpus``: of each node, null devices. ``wires``: each node in its own network namespace.
    """

    def __init__(self, folder: Path, nodes=2, cpus=8, gpus=0, grace=8, user_signal=True, wires=False):
        self.folder, self.nodes, self.gpus, self.wires = folder.resolve(), nodes, gpus, wires
        self.network = "10.99.0" if wires else "127.0.0"
        extra = ["SlurmctldParameters=preempt_send_user_signal"] if user_signal else []
        extra += ["GresTypes=gpu"] if gpus else []
        port, first, last = _free_ports(nodes)
        self._configuration = CONFIGURATION.format(
            network=self.network,
            port=port,
            # The port at which ranks meet follows from it: clusters of one machine are not to cross.
            first_job=RANDOM.randrange(1, 1_000_000),
            folder=self.folder,
            kill_wait=KILL_WAIT,
            extra="\n".join(extra),
            nodes=nodes,
            last=10 + nodes,
            first_port=first,
            last_port=last,
            cpus=cpus,
            gres=f"Gres=gpu:{gpus}" if gpus else "",
            grace=grace,
        )
        self._init: subprocess.Popen | None = None

    def __enter__(self) -> "PrivateCluster":
        self._write_files()
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
        unshare += ["--net"] if self.wires else []
        init = [sys.executable, __file__, str(self.folder), str(self.nodes), self.network]
        with open(self.folder / "init.log", "ab") as log:
            self._init = subprocess.Popen(
                [*unshare, *init],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        try:
            self.wait_for_nodes()
        except ClusterError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._init.kill()
        self._init.wait()

    def wait_for_nodes(self, seconds: float = 90) -> None:
        """Until all nodes are idle; raises ClusterError."""
        deadline = time.monotonic() + seconds
        while self._idle_nodes() < self.nodes:
            if self._init.poll() is not None or time.monotonic() > deadline:
                raise ClusterError(self._last_words())
            time.sleep(0.05)

    @property
    def environment(self) -> dict[str, str]:
        """For SLURM's commands: those of another cluster, or of a job that this test runs in, do not count."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        return clean | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": f"{clean['PATH']}:/usr/sbin:/sbin"}

    def run(self, *command: str, cwd: Path | None = None, environment: dict | None = None, check=True) -> str:
        """What ``command`` prints; raises ClusterError where it fails and ``check`` is set."""
        inside = ["nsenter", f"--net=/proc/{self._init.pid}/ns/net"] if self.wires else []
        environment = self.environment | (environment or {})
        done = subprocess.run([*inside, *command], env=environment, cwd=cwd, text=True, capture_output=True)
        if done.returncode and check:
            raise ClusterError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.run("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T")

    def restarts(self, job: str) -> int:
        return int(self.run("scontrol", "show", "job", job).partition("Restarts=")[2].split()[0])

    def wait_for(self, job: str, states: tuple[str, ...], seconds: float) -> str:
        """The first of ``states`` that the job is in; raises ClusterError after ``seconds``."""
        deadline = time.monotonic() + seconds
        while (state := self.state(job)) not in states:
            if time.monotonic() > deadline:
                raise ClusterError(f"job {job} is {state} after {seconds} s, expected {' or '.join(states)}")
            time.sleep(0.2)
        return state

    def start_again(self, job: str, restarts: int = 1, seconds: float = 120) -> None:
        """Wait until ``job`` was requeued for the ``restarts``-th time, and start it now, not after two minutes.

        A job that starts in the second in which it was requeued would get a credential that slurmd takes for the one
        that was revoked, and would fail.
        """
        deadline = time.monotonic() + seconds
        while self.restarts(job) < restarts or self.state(job) != "PENDING":
            if time.monotonic() > deadline:
                raise ClusterError(f"job {job} is {self.state(job)} after {seconds} s, expected its restart {restarts}")
            time.sleep(0.2)
        time.sleep(2)
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now")
        self.wait_for(job, ("RUNNING",), seconds)

    def pids(self, *words: str) -> list[int]:
        """Processes of this cluster with all ``words`` in their command line, in the order of their start."""
        found = []
        for path in Path("/proc").iterdir():
            try:
                inside = path.name.isdecimal() and os.readlink(path / "ns/mnt") == self._mount_namespace
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # it has ended
                continue
            if inside and all(word in command for word in words):
                found.append(int(path.name))
        return sorted(found)

    @property
    def _mount_namespace(self) -> str:
        child = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text().split()[0]
        return os.readlink(f"/proc/{child}/ns/mnt")

    def kill(self, pids: list[int], number: signal.Signals = signal.SIGKILL) -> None:
        assert pids
        for pid in pids:
            os.kill(pid, number)

    def cable(self, node: str, state: str) -> None:
        """``down`` pulls the network cable of a node, ``up`` plugs it in again; for a cluster with ``wires``."""
        self.run("ip", "link", "set", f"wire-{node}", state)

    def _idle_nodes(self) -> int:
        printed = self.run("sinfo", "--noheader", "--Node", "--partition=low", "--format=%t", check=False)
        return printed.split().count("idle")

    def _write_files(self) -> None:
        for name in ("state", *(f"spool.n{number}" for number in range(1, self.nodes + 1))):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "slurm.conf").write_text(self._configuration)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        devices = f"Name=gpu File={self.folder}/gpu[0-{self.gpus - 1}] Flags=nvidia_gpu_env\n"
        (self.folder / "gres.conf").write_text(devices if self.gpus else "")
        for number in range(self.gpus):  # slurmd wants character devices; these are /dev/null
            os.mknod(self.folder / f"gpu{number}", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        nodes = "".join(f"{self.network}.{10 + number} n{number}\n" for number in range(1, self.nodes + 1))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n{nodes}")

    def _last_words(self) -> str:
        logs = [self.folder / "init.log", *sorted(self.folder.glob("*.log"))]
        return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-800:]}" for path in logs if path.exists())


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; unshare ignores SIGTERM


def _free_ports(nodes: int) -> tuple[int, int, int]:
    """A free port for the controller, and the first and last of as many free ones in a row as there are nodes."""
    for _ in range(100):
        start = RANDOM.randrange(20_000, 32_000)  # below the ports that the system gives away
        probes = [socket.socket() for _ in range(nodes + 1)]
        try:
            for number, probe in enumerate(probes):
                probe.bind(("", start + number))
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
        return start, start + 1, start + nodes
    raise ClusterError("no free ports")


def _main(folder: Path, nodes: int, network: str) -> None:
    """The first process in the namespaces: starts the daemons, and ends when munged or slurmctld does."""
    subprocess.run(["mount", "--bind", folder / "hosts", "/etc/hosts"], check=True)
    os.environ |= {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    wires = network != "127.0.0"
    if wires:
        _ip("link set lo up", "link add hub type bridge", f"addr add {network}.1/24 dev hub", "link set hub up")
    munge = [f"--{name}={folder}/munge.{name.removesuffix('-file')}" for name in ("key-file", "log-file", "seed-file")]
    munge += [f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"]
    needed = [subprocess.Popen(["munged", "--foreground", "--force", "--num-threads=2", *munge]).pid]
    while not (folder / "munge.socket").exists():
        time.sleep(0.01)
    needed.append(subprocess.Popen(["slurmctld", "-D", "-c", "-f", folder / "slurm.conf"]).pid)
    for number in range(1, nodes + 1):
        _start_node(f"n{number}", f"{network}.{10 + number}", wires)
    while os.wait()[0] not in needed:
        pass


def _start_node(name: str, address: str, wires: bool) -> None:
    """A slurmd under its own host name, which waits for its network before it starts."""
    script = f'read -r _; hostname {name}; exec slurmd -D -N {name} -f "$SLURM_CONF" </dev/null'
    spaces = ["--uts", *(["--net"] if wires else [])]
    node = subprocess.Popen(["unshare", *spaces, "sh", "-c", script], stdin=subprocess.PIPE, start_new_session=True)
    if wires:
        while os.readlink(f"/proc/{node.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            time.sleep(0.005)
        _ip(f"link add wire-{name} type veth peer name eth0 netns {node.pid}", f"link set wire-{name} master hub up")
        inside = ("nsenter", f"--net=/proc/{node.pid}/ns/net")
        _ip(f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up", inside=inside)
    node.stdin.write(b"\n")
    node.stdin.close()


def _ip(*commands: str, inside: tuple[str, ...] = ()) -> None:
    for command in commands:
        subprocess.run([*inside, "ip", *command.split()], check=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
