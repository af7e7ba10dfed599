"""Steps that go wrong: skipped updates are told, broken state is not saved, spikes are skipped or gone back before."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from megat2i import checkpoint, spikes, trainer
from megat2i.loss import ModalityLoss
from megat2i.optim.engine import EXP_AVG, WEIGHT, Fragment
from megat2i.optim.finite import not_finite
from megat2i.parallel.shard import Shard
from megat2i.runtime import Backend
from megat2i.spikes import Spikes
from megat2i.trainer import Data, Run, RunError

TIMES = ("tokens_per_s", "step_s")


@pytest.fixture(scope="module")
def loop(make_training, make_batches, tiny_config):
    """Function of (folder, resume, engine, damage, parallel, dtype, bad, **training) that trains as ``pretrain`` does.

    ``damage(number of the batch, run)`` is called before every step. All batches are the same but the ``bad`` ones. To
    be called on every rank.
    """

    def train(
        folder, resume=False, engine="torch", damage=None, parallel=(), dtype="float32", bad=(SPIKE,), **training
    ):
        settings = replace(tiny_config, run=replace(tiny_config.run, dir=str(folder)))
        settings = replace(settings, parallel=replace(settings.parallel, **dict(parallel)))
        settings = replace(settings, runtime=replace(settings.runtime, self_test=False, dtype=dtype))
        settings = replace(settings, training=replace(settings.training, warmup_steps=0, **training))
        pipeline, made, groups = make_training(engine, settings)
        found = checkpoint.latest(folder / "checkpoints", print) if resume else None
        if found:
            checkpoint.load_engine(found, made)
        state = Spikes(settings.training.spike_sigma, norms=settings.training.on_spike == "skip")
        state.restore(found.manifest["training"] if found else {})

        def micro_batches(number):
            if damage:
                damage(number, run)
            return make_batches(settings, number if number in bad else 0, groups.data_rank, groups.data_size)

        folder.mkdir(exist_ok=True)
        data = Data(micro_batches, {}, samples=lambda number: [(0, 0, number)])
        loss, backend = ModalityLoss((1.0, 1.0, 1.0)), Backend.resolve(settings)
        run = Run(settings, pipeline, made, data, loss, groups, backend, None, state)
        trainer.train(run, found.step if found else 0)
        return made.updates

    return train


def entries(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key not in TIMES} for entry in lines]


def weights(folder: Path) -> dict[str, bytes]:
    """Everything in the newest checkpoint, bit by bit."""
    found = checkpoint.latest_here(folder / "checkpoints")
    kinds = {(part["name"], part["kind"]) for part in found.manifest["parts"]}
    state = {key: checkpoint.read_tensor(found, *key).numpy().tobytes() for key in kinds}
    return state | {"training": json.dumps(found.manifest["training"]), "step": found.step}


def poison(fragments, kind=WEIGHT, value=float("nan")) -> None:
    """One value of a tensor in a row that no batch uses."""
    next(part for part in fragments if part.kind == kind and "embedding" in part.name).values[2 * 32 + 3] = value


# --- updates that are skipped


def every_second_is_infinite(number, run):
    if number >= 2 and number % 2:
        next(iter(run.engine.gradients.values())).view(-1)[0] = float("inf")


def test_updates_that_are_skipped_are_in_the_record_and_told(loop, tmp_path, capfd):
    updates = run_ranks(1, loop, tmp_path, False, "torch", every_second_is_infinite)
    assert updates == [4]
    assert [entry["skipped"] for entry in entries(tmp_path)] == [0, 0, 0, 1, 0, 1]
    said = capfd.readouterr().out
    assert "step 4: the gradient is not finite, so the update is skipped (1 such step so far)" in said
    assert "2 of 6 updates were skipped: the gradient was not finite" in said


# --- state that is not finite


@pytest.mark.parametrize(
    ("engine", "background", "kind"), [("torch", True, WEIGHT), ("deepspeed", False, WEIGHT), ("torch", False, EXP_AVG)]
)
def test_state_that_is_not_finite_ends_all_ranks_and_is_not_saved(loop, tmp_path, engine, background, kind):
    """Only one rank sees it, in a row that no batch uses, so that no loss and no gradient shows it."""

    def damage(number, run):
        if number == 3 and dist.get_rank() == 0:
            poison(run.engine.fragments(), kind)

    def rank():
        with pytest.raises(RunError) as raised:
            loop(tmp_path, False, engine, damage, checkpoint_every=2, asynchronous_checkpoints=background)
        return str(raised.value)

    said = run_ranks(2, rank)
    assert len(set(said)) == 1, "every rank says the same"
    # a moment that is broken breaks its weight with the next update
    assert said[0].startswith("the weight tok_embeddings.weight in row 2 is not finite after step 4")
    assert f"{tmp_path / 'checkpoints' / 'step-2'}, is sound" in said[0] and "--resume" in said[0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


def test_a_checkpoint_with_a_value_that_is_not_finite_is_passed_over(loop, tmp_path, monkeypatch, capfd):
    """As an older version wrote it: its digests verify."""

    def write():
        monkeypatch.setattr(trainer, "require_sound_state", lambda run, step: None)
        loop(tmp_path, damage=lambda number, run: number == 3 and poison(run.engine.fragments()), checkpoint_every=2)

    run_ranks(1, write)
    assert (tmp_path / "checkpoints" / "step-6").is_dir()
    assert checkpoint.latest_here(tmp_path / "checkpoints") is None  # step-2 was pruned: keep_checkpoints is 2
    assert "is not finite in row 2" in capfd.readouterr().err


def test_the_row_is_the_one_of_the_global_tensor():
    values = torch.zeros(12)
    part = Fragment("w", WEIGHT, Shard((12, 4), 0, ((2, 4), (8, 10))), 2, values, True)
    assert not_finite([part]) is None
    values[9] = float("inf")  # local element 11: row 2 of the part
    assert not_finite([part]) == "the weight w in row 8"
    values[9] = 3e38
    values[8] = 3e38  # their sum overflows
    assert not_finite([part]) is None
    narrow = Fragment("v", WEIGHT, Shard.whole((3,)), 0, torch.tensor([0, 1, float("nan")], dtype=torch.bfloat16), True)
    assert not_finite([part, narrow]) == "the weight v in row 2"


# --- checkpoints that stay


def test_multiples_of_keep_every_are_never_removed(loop, tmp_path):
    run_ranks(1, lambda: loop(tmp_path, steps=9, checkpoint_every=1, keep_checkpoints=2, keep_every=3))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        f"step-{step}" for step in (3, 6, 8, 9)
    ]


# --- spikes

# One batch is learned by heart; of another one, which is met at SPIKE alone, the loss is far higher.
SPIKE = 50
FEW = {"steps": 56, "spike_sigma": 2.0, "checkpoint_every": 8, "keep_checkpoints": 3}
FULL = {"marks": pytest.mark.full}
LAYOUTS = [
    ("torch", 1, "float32", {}),
    pytest.param("torch", 2, "float32", {}, **FULL),
    pytest.param("torch", 2, "float32", {"tensor": 2}, **FULL),
    pytest.param("torch", 2, "float32", {"pipeline": 2}, **FULL),
    pytest.param("deepspeed", 2, "float32", {}, **FULL),
    pytest.param("deepspeed", 2, "bfloat16", {}, **FULL),
    ("deepspeed", 2, "bfloat16", {"pipeline": 2}),
]


def spiking(folder: Path) -> list[int]:
    return [entry["step"] for entry in entries(folder) if entry["spike"]]


@pytest.mark.parametrize(("engine", "ranks", "dtype", "parallel"), LAYOUTS, ids=str)
def test_the_update_of_a_spike_is_skipped_on_all_ranks(loop, tmp_path, engine, ranks, dtype, parallel):
    states = {}

    def note(number, run):
        states[number] = [part.values.clone() for part in run.engine.fragments()]

    def rank(folder, on_spike):
        updates = loop(folder, False, engine, note, parallel, dtype, on_spike=on_spike, steps=53, spike_sigma=2.0)
        before, after, later = (states[number] for number in (SPIKE, SPIKE + 1, SPIKE + 2))
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        return updates, same, all(torch.equal(a, b) for a, b in zip(after, later, strict=True))

    assert run_ranks(ranks, rank, tmp_path / "skip", "skip") == [(52, True, False)] * ranks
    record = entries(tmp_path / "skip")
    assert spiking(tmp_path / "skip") == [SPIKE + 1] == [entry["step"] for entry in record if entry["skipped"]]
    assert record[SPIKE]["samples"] == [[0, 0, SPIKE]] and 0 < record[SPIKE]["grad_norm"] < float("inf")
    assert record[SPIKE]["loss"] > 2 * record[SPIKE]["usual_loss"]
    if (engine, ranks) == ("torch", 1):
        assert run_ranks(ranks, rank, tmp_path / "log", "log") == [(53, False, False)]
        assert spiking(tmp_path / "log") == [SPIKE + 1] and not any(entry["skipped"] for entry in record[:SPIKE])


@pytest.mark.parametrize(("engine", "ranks"), [("torch", 1), pytest.param("deepspeed", 2, **FULL)])
def test_a_run_goes_back_before_a_spike_and_passes_over_its_batches(loop, tmp_path, capfd, engine, ranks):
    met = []

    def rank():
        loop(tmp_path, False, engine, lambda number, run: met.append(number), on_spike="rewind", **FEW)
        return met

    expected = [*range(SPIKE + 1), *range(SPIKE + 1, SPIKE + 9)]  # step 49 has the batch behind the spike's
    assert run_ranks(ranks, rank) == [expected] * ranks
    record = entries(tmp_path)
    assert [entry["step"] for entry in record] == list(range(1, 57)) and spiking(tmp_path) == []
    noted = [entry for entry in record if "rewound_from" in entry]
    assert [(e["step"], e["rewound_from"], e["passed_over"]) for e in noted] == [(49, SPIKE + 1, [49, SPIKE + 1])]
    said = capfd.readouterr().out
    assert "step 51: the loss spikes to" in said and "(dataset:epoch:row) are 0:0:50" in said
    assert "went back to step 48; batches 49 to 51 are passed over from now on" in said
    assert json.loads(weights(tmp_path)["training"])["passed_over"] == [[48, SPIKE + 1]]


@pytest.mark.parametrize(
    ("on_spike", "stop"),
    [
        *(pytest.param(on_spike, (SPIKE - 3,), **FULL) for on_spike in ("log", "skip", "rewind")),
        pytest.param("skip", (SPIKE + 1,), **FULL),
        ("rewind", (SPIKE, SPIKE + 4)),
    ],
)
def test_a_killed_and_resumed_run_equals_an_untouched_one(loop, tmp_path, on_spike, stop):
    """... in its record and in every bit of its state; killed before, in and behind the spike."""

    class Killed(Exception):
        pass

    def run(folder, kills):
        kills = list(kills)

        def kill(number, run):
            if kills and number == kills[0]:
                kills.pop(0)
                raise Killed

        resume = False
        while True:
            try:
                return loop(folder, resume, "torch", kill, on_spike=on_spike, **FEW)
            except Killed:
                checkpoint.finish()
                resume = True

    run_ranks(1, run, tmp_path / "whole", ())
    run_ranks(1, run, tmp_path / "killed", stop)
    assert entries(tmp_path / "killed") == entries(tmp_path / "whole")
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_rewinds_go_ever_further_back_and_are_bounded(loop, tmp_path, monkeypatch):
    """Every batch from SPIKE on has a high loss."""
    monkeypatch.setattr(spikes, "WINDOW", 4)
    back = []
    original = checkpoint.go_back
    monkeypatch.setattr(checkpoint, "go_back", lambda *a: back.append(original(*a)) or back[-1])

    def run():
        bad = range(SPIKE, 200)
        with pytest.raises(RunError, match="after each of 3 rewinds.*training.on_spike=skip"):
            loop(tmp_path, bad=bad, on_spike="rewind", **FEW | {"keep_checkpoints": 9})
        return [found.step for found in back]

    assert run_ranks(1, run) == [[48, 40, 32]]
    assert [path.name for path in checkpoint.committed(tmp_path / "checkpoints")][:2] == ["step-40", "step-32"]


@pytest.mark.full
def test_a_spike_before_the_first_checkpoint_does_not_end_the_run(loop, tmp_path, capfd):
    run_ranks(1, lambda: loop(tmp_path, on_spike="rewind", **FEW | {"checkpoint_every": 100}))
    assert spiking(tmp_path) == [SPIKE + 1] and len(entries(tmp_path)) == 56
    assert "there is no sound checkpoint before step 51" in capfd.readouterr().out
