"""Ranks that come, that are missing, that leave, and that meet strangers: real processes and sockets."""

import json
import multiprocessing
import os
import socket
import time
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from launched import SRUN, free_port

from megat2i import rendezvous
from megat2i.config import ConfigError
from megat2i.launch import Launch
from megat2i.rendezvous import Call, meet, shares
from megat2i.slurm import Step

LIMIT = 1.0  # seconds of a roll call in which ranks are missing
PATIENCE = 30.0  # of one in which they only come late on a busy machine


def srun_step(rank: int, name: str = "17.0") -> Step:
    """Task ``rank`` of four, dealt to two nodes in turns."""
    node = rank % 2
    return Step(name, 0, 0, ["n1", "n2"], f"n{node + 1}", rank, rank // 2, 4, [node, node + 2])


@dataclass
class Ranks:
    """Ranks of one launch as processes. Each reports (seconds, sum over the ranks, threads), or what it was told."""

    size: int
    port: int
    name: str = "SLURM step 17.0, restart 0"
    limit: float = PATIENCE
    host: str = "127.0.0.1"
    launcher: str = "slurm"

    def __post_init__(self):
        self.context, self.processes, self.readers = multiprocessing.get_context("fork"), {}, {}

    def start(self, *ranks: int) -> "Ranks":
        for rank in ranks:
            self.readers[rank], writer = self.context.Pipe(duplex=False)
            self.processes[rank] = self.context.Process(target=self._rank, args=(rank, writer), daemon=True)
            self.processes[rank].start()
            writer.close()
        return self

    def _rank(self, rank: int, writer) -> None:
        step = srun_step(rank) if self.launcher == "slurm" else None
        launch = Launch(self.launcher, rank, rank, self.size, self.name, self.host, self.port, step)
        started = time.monotonic()
        try:
            store, threads = meet(launch, self.limit)
            seconds = time.monotonic() - started
            dist.init_process_group("gloo", store=store, rank=rank, world_size=self.size)
            total = torch.ones(1)
            dist.all_reduce(total)
            dist.barrier()
            writer.send((seconds, total.item(), threads))
            dist.destroy_process_group()
        except ConfigError as error:
            writer.send((time.monotonic() - started, str(error)))

    def results(self) -> dict[int, tuple]:
        ended = {}
        for rank, reader in self.readers.items():
            assert reader.poll(60), f"rank {rank} is still there"
            ended[rank] = reader.recv()
        return ended

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()


@pytest.fixture
def ranks():
    """Function that makes Ranks; none outlives the test."""
    made = []

    def make(size: int, **options) -> Ranks:
        made.append(Ranks(size, options.pop("port", None) or free_port(), **options))
        return made[-1]

    yield make
    for one in made:
        one.end()


def test_all_ranks_come_and_work_together(ranks):
    together = ranks(3)
    together.start(2, 1)
    time.sleep(0.3)  # rank 0 is the last
    together.start(0)
    assert [(total, threads >= 1) for _, total, threads in together.results().values()] == [(3.0, True)] * 3


def test_missing_ranks_and_their_nodes_are_named_by_all_that_are_there(ranks):
    """Of n1 there is one rank of two; nobody of n2 has come."""
    results = ranks(4, limit=LIMIT).start(0).results()
    seconds, said = results[0]
    assert said.startswith("ranks 1, 3 on n2, rank 2 on n1 are missing after 1 s; there: rank 0 on n1. ")
    assert LIMIT <= seconds < LIMIT + 2
    results = ranks(4, limit=LIMIT).start(0, 1, 3).results()
    assert {said for _, said in results.values()} == {results[0][1]}
    assert results[0][1].startswith("rank 2 on n1 is missing after 1 s; there: rank 0 on n1, ranks 1, 3 on n2. See ")


def test_a_launcher_that_tells_no_nodes_names_the_ranks(ranks):
    said = ranks(4, limit=LIMIT, launcher="deepspeed").start(0).results()[0][1]
    assert said.startswith(f"ranks 1-3 are missing after 1 s; there: rank 0 on {os.uname().nodename}. ")


@pytest.mark.parametrize(("host", "reason"), [("127.0.0.1", "Connection refused"), ("no-such-host", "not known")])
def test_without_rank_0_the_others_say_so_within_the_limit(ranks, host, reason):
    seconds, said = ranks(3, limit=LIMIT, host=host).start(1).results()[1]
    assert said.startswith(f"rank 1 on n2 did not reach rank 0 at {host}:") and reason in said
    assert LIMIT <= seconds < LIMIT + 5


def test_a_rank_that_leaves_during_the_roll_call_is_not_waited_for(ranks):
    started = time.monotonic()
    launch = ranks(4).start(0, 1, 3)
    time.sleep(0.5)
    launch.processes.pop(1).kill()
    launch.readers.pop(1)
    assert {said for _, said in launch.results().values()} == {
        "rank 1 on n2 left during the roll call: see what it said, and start again"
    }
    assert time.monotonic() - started < PATIENCE / 2


def test_a_stranger_is_refused_by_name_and_the_launch_there_goes_on(ranks):
    first = ranks(3).start(0, 1)
    time.sleep(0.5)
    second = ranks(3, port=first.port, name="SLURM step 18.0, restart 1").start(0, 1)
    results = second.results()
    stranger = "another launch (SLURM step 17.0, restart 0)"
    assert results[0][1].startswith(
        f"rank 0 cannot listen on port {first.port} of n1 (Address already in use by {stranger}): choose another port ("
    )
    assert results[1][1].startswith(
        f"rank 1 on n2 met {stranger} at port {first.port} of 127.0.0.1, not its own (SLURM step 18.0, restart 1)"
        ": choose another port ("
    )
    assert max(seconds for seconds, _ in results.values()) < 5
    first.start(2)
    assert [total for _, total, _ in first.results().values()] == [3.0] * 3


def test_the_port_is_free_while_the_ranks_work(ranks):
    """Two launches with the same port, as every deepspeed has it, work at the same time."""
    first = ranks(2)
    assert [result[1] for result in first.start(0, 1).results().values()] == [2.0] * 2
    stays = socket.create_server(("", first.port))  # as the next launch would
    stays.close()


def test_the_second_of_two_equal_ranks_is_refused(ranks):
    first = ranks(3).start(0, 1)
    time.sleep(0.5)
    said = ranks(3, port=first.port).start(1).results()[1][1]
    there = f"rank 1 is there already, from n2: two launches of the same name meet at port {first.port} of 127.0.0.1"
    assert said == f"{there}, end one of them"
    first.start(2)
    assert [total for _, total, _ in first.results().values()] == [3.0] * 3


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b'["a list"]\n', b""])
def test_another_program_at_the_port_is_said_at_once(ranks, answer):
    with socket.create_server(("127.0.0.1", 0)) as server:
        launch = ranks(2, port=server.getsockname()[1]).start(1)
        connection, _ = server.accept()
        with connection:
            connection.recv(1)
            connection.sendall(answer)
        seconds, said = launch.results()[1]
    assert "met another program at port" in said and seconds < 5


def test_a_store_of_another_program_is_not_joined(ranks, monkeypatch):
    """PyTorch's own store says nothing to strangers, and a client of it would wait for its answer forever."""
    monkeypatch.setattr(rendezvous, "GREETING_S", 1.0)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    seconds, said = ranks(2, port=store.port).start(1).results()[1]
    assert "met another program at port" in said and seconds < 10


def test_what_others_send_to_rank_0_does_no_harm(ranks):
    launch = ranks(2).start(0)
    time.sleep(0.5)
    connections = [socket.create_connection(("127.0.0.1", launch.port)) for _ in range(5)]
    for connection, line in zip(
        connections[1:], [b"GET /\n", b"\0" * (3 << 20), b"{}\n", b'{"rank": 1}\n'], strict=True
    ):
        connection.settimeout(1.0)
        try:
            connection.sendall(line)
        except OSError:
            assert len(line) > 1 << 20, "only the endless line is cut off"
    launch.start(1)
    assert [total for _, total, _ in launch.results().values()] == [2.0] * 2


def test_a_rank_that_another_world_would_have_is_refused(ranks):
    first = ranks(2).start(0)
    time.sleep(0.3)
    said = ranks(8, port=first.port, limit=LIMIT).start(5).results()[5][1]
    assert "rank 5 is none of this launch" in said
    first.start(1)
    assert [total for _, total, _ in first.results().values()] == [2.0] * 2


CPUS = {"bound": [[0, 1], [2, 3], [4, 5], [6, 7]], "shared": [list(range(8))] * 4, "uneven": [[0, 1, 2]] * 3 + [[3]]}


@pytest.mark.parametrize(("case", "threads"), [("bound", [2] * 4), ("shared", [2] * 4), ("uneven", [1] * 4)])
def test_cpus_are_divided_among_the_ranks_that_share_them(case, threads):
    calls = [Call("", rank, "n1", "n1", cpus, []) for rank, cpus in enumerate(CPUS[case])]
    elsewhere = [replace(call, rank=call.rank + 4, machine="n2") for call in calls]
    assert shares(calls + elsewhere) == dict(enumerate(threads * 2))


def test_more_ranks_than_cpus_have_a_thread_each():
    assert shares([Call("", rank, "n1", "n1", [0, 1], []) for rank in range(3)]) == {0: 1, 1: 1, 2: 1}


def test_a_launcher_without_an_address_is_told_what_to_export():
    with pytest.raises(ConfigError, match="RANK without MASTER_ADDR and MASTER_PORT: export both"):
        meet(Launch("torchrun", 1, 1, 2, "run.dir=runs/a"), LIMIT)


def test_the_call_holds_the_cpus_that_this_rank_may_use(environment):
    environment(**SRUN)
    call = Call.of(Launch.here())
    assert set(call.cpus) == os.sched_getaffinity(0) and call.ranks_here == [2, 3] and call.node == "n2"
    assert json.loads(json.dumps(call.cpus)) == call.cpus
