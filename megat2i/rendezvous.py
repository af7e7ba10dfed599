"""The ranks of a launch find each other: rank 0 calls the roll and says which ranks are missing.

Rank 0 listens on the port of the launch until every rank has come, and then tells all of them the port of its store,
which the system chose. So the port of the launch is in use for seconds, and other launches may have the same. A message
is one line of JSON: a rank's call, then rank 0's greeting and, when all are there or the time is over, its verdict.
"""

import asyncio
import errno
import json
import os
import socket
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from megat2i.config import ConfigError
from megat2i.launch import Launch
from megat2i.progress_marks import beat
from megat2i.watchdog import ranks_in_words

ROLL_CALL_S = 60.0
# Rank 0 greets at once: who says nothing for so long is another program.
GREETING_S = 10.0
RETRY_S = 0.1
HEAD_START_S = 2.0  # for what rank 0 says: srun may end all tasks when the first one fails
LONGEST_LINE = 1 << 20


@dataclass(frozen=True)
class Call:
    """What a rank says when it comes. ``cpus``: those that it may use; ``ranks_here``: of its node, as far as known."""

    launch: str
    rank: int
    node: str
    machine: str
    cpus: list[int]
    ranks_here: list[int]

    @staticmethod
    def of(launch: Launch) -> "Call":
        ranks_here = launch.step.ranks_here if launch.step else []
        cpus = sorted(os.sched_getaffinity(0))
        return Call(launch.name, launch.rank, launch.node, socket.gethostname(), cpus, ranks_here)


@dataclass(frozen=True)
class Verdict:
    """The port of the store and the number of threads for the rank that is told, or why it ends.

    ``over``: all ranks end, and rank 0 says why.
    """

    problem: str = ""
    over: bool = False
    store: int = 0
    threads: int = 0


def meet(launch: Launch, limit: float = ROLL_CALL_S) -> tuple[dist.Store, int]:
    """The store that all ranks share, and how many threads this rank may start. Collective.

    Raises ConfigError where another launch or program has the port, and on rank 0 where a rank is missing after
    ``limit`` seconds: the others that are there end without a word, by SystemExit.
    """
    if launch.host is None or launch.port is None:
        raise ConfigError(
            "the launcher set RANK without MASTER_ADDR and MASTER_PORT: export both, equal on all ranks, or start with "
            "deepspeed, torchrun or srun"
        )
    deadline = time.monotonic() + limit
    board = _board(launch)
    if launch.rank == 0:
        with _listen(launch, 0 if board else launch.port) as listener:
            if board:
                board.set("port", str(listener.getsockname()[1]))
            return asyncio.run(_RollCall(launch, limit).hold(listener))
    port = _announced(board, launch, deadline) if board else launch.port
    verdict = _answer_the_roll(launch, port, deadline)
    if verdict.over:
        time.sleep(HEAD_START_S)
        raise SystemExit(1)
    if verdict.problem:
        raise ConfigError(verdict.problem)
    return _join_store(launch.host, verdict.store), verdict.threads


def shares(calls: list[Call]) -> dict[int, int]:
    """Threads by rank: a CPU that n ranks of a machine may use counts 1/n for each of them."""
    users = Counter((call.machine, cpu) for call in calls for cpu in call.cpus)
    threads = {}
    for call in calls:
        share = sum(1 / users[call.machine, cpu] for cpu in call.cpus)
        threads[call.rank] = max(1, int(share + 1e-6))  # thirds of three CPUs are one
    return threads


class _RollCall:
    """Rank 0's part."""

    def __init__(self, launch: Launch, limit: float):
        self.launch, self.limit = launch, limit
        self.present = {0: Call.of(launch)}
        self.writers: dict[int, asyncio.StreamWriter] = {}
        self.connections: dict[asyncio.Task, asyncio.StreamWriter] = {}
        self.departed: Call | None = None
        self.over = asyncio.Event()

    async def hold(self, listener: socket.socket) -> tuple[dist.Store, int]:
        """Take calls until the verdict, and tell it to all who came."""
        server = await asyncio.start_server(self._take, sock=listener, limit=LONGEST_LINE)
        await self._wait()
        server.close()
        try:
            problem = self._problem()
            if problem:
                await self._tell({rank: Verdict(problem, over=True) for rank in self.writers})
                raise ConfigError(problem)
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            threads = shares(list(self.present.values()))
            await self._tell({rank: Verdict(store=store.port, threads=threads[rank]) for rank in self.writers})
            return store, threads[0]
        finally:
            for writer in self.connections.values():
                writer.close()  # which ends its task
            await asyncio.gather(*self.connections)

    async def _wait(self) -> None:
        """Until all are there, one has left, or the time is over."""
        deadline = time.monotonic() + self.limit
        while len(self.present) < self.launch.world_size and not self.departed and time.monotonic() < deadline:
            beat()
            with suppress(TimeoutError):
                await asyncio.wait_for(self.over.wait(), min(1.0, deadline - time.monotonic()))
        self.over.set()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: hear who calls, and notice when it goes."""
        self.connections[asyncio.current_task()] = writer
        try:
            call = _call(await reader.readline())
            await _say(writer, {"launch": self.launch.name})
            if call is None or call.launch != self.launch.name:
                return
            problem = self._refusal(call)
            if problem:
                await _say(writer, asdict(Verdict(problem)))
                return
            self.present[call.rank], self.writers[call.rank] = call, writer
            if len(self.present) == self.launch.world_size:
                self.over.set()
            await reader.read()
            if not self.over.is_set():
                self.departed = call
                self.over.set()
        except (OSError, ValueError):  # of this connection: the rank is missing then, and will be named
            return
        finally:
            writer.close()

    def _refusal(self, call: Call) -> str:
        if call.rank in self.present:
            other = self.present[call.rank].node
            twice = f"rank {call.rank} is there already, from {other}"
            return f"{twice}: two launches of the same name meet at {_port(self.launch)}, end one of them"
        if call.rank not in range(self.launch.world_size):
            size = self.launch.world_size
            return (
                f"rank {call.rank} is none of this launch, whose rank 0 expects {size} ranks: start all with one size"
            )
        return ""

    async def _tell(self, verdicts: dict[int, Verdict]) -> None:
        for rank, verdict in verdicts.items():
            with suppress(OSError):  # of a rank that died just now: the others meet it in the process group
                await _say(self.writers[rank], asdict(verdict))

    def _problem(self) -> str:
        if self.departed:
            who = f"rank {self.departed.rank} on {self.departed.node}"
            return f"{who} left during the roll call: see what it said, and start again"
        present = self.present.values()
        node_of = {rank: call.node for call in present for rank in call.ranks_here}
        absent = [rank for rank in range(self.launch.world_size) if rank not in self.present]
        if not absent:
            return ""
        step = self.launch.step
        silent = [node for node in step.nodes if node not in {call.node for call in present}] if step else []
        elsewhere = f" on {' and '.join(silent)}" if silent else ""
        places = [(rank, f" on {node_of[rank]}" if rank in node_of else elsewhere) for rank in absent]
        missing = _by_place(places)
        verb = "is" if len(absent) == 1 else "are"
        there = _by_place([(call.rank, f" on {call.node}") for call in present])
        return (
            f"{missing} {verb} missing after {self.limit:g} s; there: {there}. See what the missing said, and whether "
            f"their nodes are up and reach {_port(self.launch)}; then start again"
        )


def _by_place(places: list[tuple[int, str]]) -> str:
    """Such as "rank 1 on n1, ranks 4-7 on n3"."""
    ranks: dict[str, list[int]] = {}
    for rank, place in sorted(places):
        ranks.setdefault(place, []).append(rank)
    return ", ".join(ranks_in_words(numbers) + place for place, numbers in ranks.items())


def _call(line: bytes) -> Call | None:
    """None where another program speaks."""
    try:
        return Call(**json.loads(line))
    except (ValueError, TypeError):
        return None


async def _say(writer: asyncio.StreamWriter, message: dict) -> None:
    writer.write(json.dumps(message).encode() + b"\n")
    await writer.drain()


def _listen(launch: Launch, port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
        reason = os.strerror(error.errno)
        if error.errno == errno.EADDRINUSE:
            reason = f"{reason} by {_holder(launch, port)}"
        raise ConfigError(
            f"rank 0 cannot listen on port {port} of {launch.node} ({reason}): choose another port ({HOW_TO_CHOOSE})"
        ) from error


HOW_TO_CHOOSE = "deepspeed and torchrun: --master_port, srun: export MASTER_PORT, or submit again without it"


def _holder(launch: Launch, port: int) -> str:
    """Who listens on a ``port`` of this machine."""
    with suppress(OSError), socket.create_connection(("localhost", port), timeout=GREETING_S) as connection:
        return _stranger(launch, _greeted(launch, connection, _Lines(connection))) or "a launch of the same name"
    return "another program"


def _answer_the_roll(launch: Launch, port: int, deadline: float) -> Verdict:
    with _connected(launch, port, deadline) as connection:
        lines = _Lines(connection)
        stranger = _stranger(launch, _greeted(launch, connection, lines))
        if stranger:
            raise ConfigError(
                f"rank {launch.rank} on {launch.node} met {stranger} at port {port} of {launch.host}, not its own "
                f"({launch.name}): choose another port ({HOW_TO_CHOOSE})"
            )
        verdict = lines.next(time.monotonic() + ROLL_CALL_S + GREETING_S)
    if verdict is None:
        raise ConfigError(
            f"rank {launch.rank} on {launch.node} came to the roll call, but rank 0 ended during it: see what rank 0 "
            "said, and start again"
        )
    try:
        return Verdict(**verdict)
    except TypeError as error:
        raise _stranger(launch, port, "a launch of another version of megat2i") from error


def _greeted(launch: Launch, connection: socket.socket, lines: "_Lines") -> str | None:
    """Call, and the name of the launch that answers; None where no rank 0 does."""
    with suppress(OSError):  # of a program that takes no such call
        connection.sendall(json.dumps(asdict(Call.of(launch))).encode() + b"\n")
        greeting = lines.next(time.monotonic() + GREETING_S)
        return greeting.get("launch") if greeting else None
    return None


def _stranger(launch: Launch, name: str | None) -> str:
    """Who it is that answers with ``name``; empty where it is this launch."""
    if name is None:
        return "another program"
    return "" if name == launch.name else f"another launch ({name})"


def _connected(launch: Launch, port: int, deadline: float) -> socket.socket:
    while True:
        try:
            left = deadline - time.monotonic()
            return socket.create_connection((launch.host, port), timeout=max(RETRY_S, min(left, GREETING_S)))
        except OSError as error:  # rank 0 may start later, and a name server may be busy
            if time.monotonic() > deadline:
                raise _unreachable(launch, f"{port}: {error.strerror or error}") from error
        beat()
        time.sleep(RETRY_S)


def _unreachable(launch: Launch, where: str) -> ConfigError:
    return ConfigError(
        f"rank {launch.rank} on {launch.node} did not reach rank 0 at {launch.host}:{where}. See what rank 0 said, and "
        f"whether {launch.host} is its node and lets other nodes in; MASTER_ADDR and MASTER_PORT override both"
    )


def _port(launch: Launch) -> str:
    return f"port {launch.port} of {launch.host}"


class _Lines:
    """The lines that arrive on a connection."""

    def __init__(self, connection: socket.socket):
        self.connection, self.arrived = connection, b""

    def next(self, deadline: float) -> dict | None:
        """The object in the next line; None where none comes before ``deadline`` or the connection ends."""
        self.connection.settimeout(1.0)
        while b"\n" not in self.arrived and len(self.arrived) < LONGEST_LINE:
            if time.monotonic() > deadline:
                return None
            beat()
            try:
                piece = self.connection.recv(1 << 16)
            except TimeoutError:
                continue
            except OSError:
                return None
            if not piece:
                return None
            self.arrived += piece
        line, _, self.arrived = self.arrived.partition(b"\n")
        with suppress(ValueError):
            message = json.loads(line)
            return message if isinstance(message, dict) else None
        return None


def _join_store(host: str, port: int) -> dist.Store:
    try:
        return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=ROLL_CALL_S))
    except dist.DistNetworkError as error:
        raise ConfigError(
            f"rank 0 answered the roll call, but its store at {host}:{port} cannot be reached: let the nodes connect "
            "to each other on all ports"
        ) from error


def _board(launch: Launch) -> dist.Store | None:
    """The store of torchrun's agent, which has the port of the launch for itself; None under other launchers."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(launch.host, launch.port, is_master=False, timeout=timedelta(seconds=ROLL_CALL_S))
    return dist.PrefixStore(f"megat2i/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _announced(board: dist.Store, launch: Launch, deadline: float) -> int:
    """The port that rank 0 has announced."""
    while not board.check(["port"]):
        if time.monotonic() > deadline:
            raise _unreachable(launch, f"{launch.port}: it announced no port to torchrun")
        beat()
        time.sleep(RETRY_S)
    return int(board.get("port"))
