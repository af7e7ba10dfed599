"""Launches of a training: ranks forked from this process, which has paid for the imports, or a real launcher.

Both are told what to do in the same way, and both show their output, their ends and the steps they have begun.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from soak.script import Pace, run

TICK = 0.004  # seconds between two looks at processes and files


def import_all() -> None:
    """Import what ranks need, so that forked ones need not, and leave these objects out of their garbage collections.

    To be called while the process has one thread.
    """
    import gc

    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    import torch._dynamo
    import torch.utils.tensorboard  # noqa: F401

    import megat2i.generate
    import megat2i.optim.deepspeed_engine
    import megat2i.pretrain  # noqa: F401

    assert deepspeed.ops.__compatible_ops__  # found out when first asked for, with a compiler's help
    torch.set_num_threads(1)
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)  # imports more when first used
    assert threading.active_count() == 1
    gc.collect()
    gc.freeze()


def free_port() -> int:
    """A port of this machine that nobody listens to."""
    while True:
        port = 20000 + secrets.randbelow(12000)  # below the ports that systems hand out by themselves
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Launch:
    """The processes of one start of a training. ``codes``: how each rank ended, None while it is there."""

    def __init__(self, logs: Path, pace: Pace):
        self.logs, self.pace, self.started = logs, pace, time.monotonic()
        self.codes: dict[int, int | None] = {}
        logs.mkdir()

    def over(self) -> bool:
        """Whether every process has ended."""
        raise NotImplementedError

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank; one that has ended does not mind."""
        raise NotImplementedError

    def kill(self) -> None:
        """End what is there of the launch, and wait for it."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """Steps that this launch has begun."""
        with contextlib.suppress(FileNotFoundError):
            return os.path.getsize(self.pace.steps)
        return 0

    def wait(self, seconds: float, steps: int | None = None) -> bool:
        """Wait until the launch is over, or has begun ``steps`` steps; False where neither came in ``seconds``."""
        end = time.monotonic() + seconds
        while not self.over():
            if steps is not None and self.steps >= steps:
                return True
            if time.monotonic() > end:
                return False
            time.sleep(TICK)
        return True

    def running(self) -> list[str]:
        """Names of the processes that are there."""
        return [f"rank {rank}" for rank, code in self.codes.items() if code is None]

    def failed(self) -> bool:
        return any(self.codes.values())

    def text(self) -> str:
        """What all ranks have printed, rank by rank."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.logs.iterdir()))


class ForkedRanks(Launch):
    """Ranks forked from this process; several of them find the environment that a launcher makes."""

    def __init__(self, ranks: int, arguments: list[str], logs: Path, pace: Pace):
        super().__init__(logs, pace)
        port, self.pids = str(free_port()), []
        for rank in range(ranks):
            pid = os.fork()
            if not pid:
                variables = {
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                }
                variables |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
                _become_rank(logs / f"rank-{rank}", variables if ranks > 1 else {}, pace, arguments)
            self.pids.append(pid)
        self.codes = dict.fromkeys(range(ranks))

    def over(self) -> bool:
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return None not in self.codes.values()

    def signal(self, rank: int, number: int) -> None:
        if self.codes[rank] is None:  # not reaped, so the number is still this process's
            os.kill(self.pids[rank], number)

    def kill(self) -> None:
        for rank in self.codes:
            self.signal(rank, signal.SIGKILL)
        while not self.over():
            time.sleep(TICK)


def _become_rank(log: Path, variables: dict[str, str], pace: Pace, arguments: list[str]) -> None:
    """Turn this forked process into a rank; never returns."""
    code = 70
    try:
        os.setpgid(0, 0)  # as if started from another terminal
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        output = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(variables)
        code = _as_script(pace, arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _as_script(pace: Pace, arguments: list[str]) -> int:
    """Run the script as the interpreter would; returns the exit code."""
    try:
        run(pace, arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return 1 if isinstance(end.code, str) else int(end.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


class Launched(Launch):
    """Ranks started by DeepSpeed's launcher, as on a command line. A mark in their environment finds them all."""

    def __init__(self, ranks: int, arguments: list[str], logs: Path, pace: Pace):
        super().__init__(logs, pace)
        self.mark = f"SOAK_LAUNCH={secrets.token_hex(8)}"
        folder = Path(__file__).parent
        program = str(Path(sys.executable).parent / "deepspeed")
        command = [program, "--num_gpus", str(ranks), "--master_port", str(free_port())]
        variables = dict([self.mark.split("=")]) | {"SOAK": json.dumps(asdict(pace)), "OMP_NUM_THREADS": "1"}
        variables["PYTHONPATH"] = os.pathsep.join([str(folder.parent), os.environ.get("PYTHONPATH", "")])
        with open(logs / "launcher", "wb") as output:
            self.launcher = subprocess.Popen(
                [*command, str(folder / "script.py"), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=os.environ | variables,
                start_new_session=True,
            )
        self.codes = {0: None}

    def processes(self) -> dict[int, str | None]:
        """Numbers of all processes of the launch that run, with their rank; None for the launcher's own."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if folder.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z":
                    continue
                variables = folder.joinpath("environ").read_text(errors="replace").split("\0")
                if self.mark in variables:
                    ranks = (text.removeprefix("RANK=") for text in variables if text.startswith("RANK="))
                    found[int(folder.name)] = next(ranks, None)
        return found

    def running(self) -> list[str]:
        return [f"rank {rank}" if rank else "a process of the launcher" for rank in self.processes().values()]

    def over(self) -> bool:
        self.codes[0] = self.launcher.poll()
        return self.codes[0] is not None and not self.processes()

    def signal(self, rank: int, number: int) -> None:
        for pid, of_rank in self.processes().items():
            if of_rank == str(rank):
                os.kill(pid, number)

    def kill(self) -> None:
        while not self.over():
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(TICK)
