"""The start-up self-test: silent on a sound launch, and it names the axis that is broken."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks

from megat2i import pipeline, self_test
from megat2i.config import Config, ParallelConfig, VocabConfig
from megat2i.optim.torch_engine import TorchEngine
from megat2i.parallel import collectives, invariants
from megat2i.parallel.shard import Shard
from megat2i.pretrain import _engine
from megat2i.runtime import Backend
from megat2i.topology import ParallelGroups
from megat2i.trainer import Run, RunError, require_sound_state

LAYOUTS = {
    "data": (2, ParallelConfig()),
    "tensor": (2, ParallelConfig(tensor=2, sequence=True, recompute="selective")),
    "pipeline": (2, ParallelConfig(pipeline=2, schedule="zero_bubble", virtual_stages=2)),
    "all": (8, ParallelConfig(tensor=2, pipeline=2, sequence=True, recompute="full")),
}


@pytest.fixture
def settings(tiny_config, make_training):  # make_training: its slow imports, before the ranks are forked
    def make(layout: str, engine: str = "torch", dtype: str = "bfloat16", trainable: str = "all") -> Config:
        return replace(
            tiny_config,
            runtime=replace(tiny_config.runtime, dtype=dtype),
            model=replace(tiny_config.model, qk_norm=True, positions="rotary"),
            optimizer=replace(tiny_config.optimizer, engine=engine, clip=0.1),
            training=replace(tiny_config.training, trainable=trainable),
            parallel=LAYOUTS[layout][1],
        )

    return make


def start(settings: Config) -> str:
    """Runs the self-test on this rank; its error, or an empty string."""
    try:
        groups = ParallelGroups.create(settings.parallel)
        self_test.self_test(settings, Backend.resolve(settings), groups, _engine)
    except RunError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("layout", "engine"),
    [("data", "torch"), ("tensor", "torch"), ("pipeline", "torch"), ("all", "torch"), ("all", "deepspeed")],
)
def test_a_sound_launch_passes(settings, layout, engine):
    assert set(run_ranks(LAYOUTS[layout][0], start, settings(layout, engine))) == {""}


@pytest.mark.parametrize(
    ("layout", "engine", "trainable"),
    [("pipeline", "torch", "embeddings"), ("tensor", "deepspeed", "embeddings_norms_feed_forward")],
)
def test_it_trains_what_the_run_trains(settings, monkeypatch, layout, engine, trainable):
    chosen, sound, policies = settings(layout, engine, trainable=trainable), self_test.freeze, []

    def noted(model, policy):
        policies.append(policy)
        sound(model, policy)

    monkeypatch.setattr(self_test, "freeze", noted)
    assert run_ranks(2, lambda: (start(chosen), set(policies))) == [("", {trainable})] * 2
    monkeypatch.setattr(pipeline.Pipeline, "run_schedule", scaled(pipeline.Pipeline.run_schedule))
    assert all("differs" in error for error in run_ranks(2, start, chosen))


def scaled(run_schedule):
    """The mistake of a gradient that is a little too large."""
    return lambda self, batches, loss, counts, scale: run_schedule(self, batches, loss, counts, 1.01 * scale)


def refused(errors: list[str], what: str) -> None:
    """Every rank stops, and says where."""
    for error in errors:
        assert what in error and "runtime.self_test=false" in error, errors


def test_a_reduction_that_does_not_happen_is_on_the_tensor_axis(settings, monkeypatch):
    def own_part(parallel, x):
        start, stop = parallel.share(len(x))
        return x[start:stop], None

    monkeypatch.setattr(collectives.TensorParallel, "start_reduce_scatter", own_part)
    refused(run_ranks(2, start, settings("tensor")), "tensor-parallel axis")


def test_what_is_lost_between_stages_is_on_the_pipeline_axis(settings, monkeypatch):
    sound = pipeline._Step._send

    def lossy(self, what, direction, stage, micro_batch):
        self.leaving[what, stage, micro_batch] = self.leaving[what, stage, micro_batch] * 1.01
        sound(self, what, direction, stage, micro_batch)

    monkeypatch.setattr(pipeline._Step, "_send", lossy)
    refused(run_ranks(2, start, settings("pipeline")), "pipeline-parallel axis")


def test_a_reduction_that_is_lost_is_on_the_data_axis(settings, monkeypatch):
    sound = dist.all_reduce

    def lost(tensor, *arguments, group=None, **options):
        """The last rank's share is lost on the way, in every sum of gradients."""
        if tensor.dim() == 2 and dist.get_rank() == 1:
            return sound(torch.zeros_like(tensor), *arguments, group=group, **options)
        return sound(tensor, *arguments, group=group, **options)

    monkeypatch.setattr(dist, "all_reduce", lost)
    refused(run_ranks(2, start, settings("data")), "data-parallel axis")


def test_an_engine_that_scales_wrongly_shows_on_all_axes_together(settings, monkeypatch):
    monkeypatch.setattr(TorchEngine, "loss_scale", 1.01)
    refused(run_ranks(2, start, settings("data")), "axes together")


def test_not_a_number_is_a_difference(settings, monkeypatch):
    sound = collectives.finished
    monkeypatch.setattr(
        "megat2i.parallel.layers.finished", lambda started: torch.full_like(sound(started), float("nan"))
    )
    refused(run_ranks(2, start, settings("tensor")), "tensor-parallel axis")


@pytest.mark.parametrize("what", ["configuration", "data", "code"])
def test_a_rank_that_runs_something_else_is_named(settings, what, monkeypatch):
    def check():
        mine, data = settings("data"), {"train": {"index": "a"}}
        if dist.get_rank() == 1:
            if what == "configuration":
                mine = replace(mine, model=replace(mine.model, seed=1))
            elif what == "data":
                data = {"train": {"index": "b"}}
            else:
                monkeypatch.setattr(self_test.Path, "read_bytes", lambda path: b"other code")
        with pytest.raises(RunError, match=rf"ranks \[1\] have other {what} than rank 0"):
            self_test.require_same_launch(mine, data)
        return True

    assert all(run_ranks(3, check))


def test_equal_launches_pass(settings):
    assert run_ranks(2, lambda: self_test.require_same_launch(settings("data"), {"a": "b"})) == [None, None]


def test_copies_that_differ_are_found():
    def find(change: str | None, by: float):
        groups = ParallelGroups.create(ParallelConfig(tensor=2))
        parameters = {name: torch.nn.Parameter(torch.arange(6.0)) for name in ("cut", "copied")}
        shards = {"cut": Shard((12,), 0, (((0, 6), (6, 12))[groups.tensor_rank],)), "copied": Shard.whole((6,))}
        with torch.no_grad():
            if groups.tensor_rank == 1:
                parameters["cut"] += 1  # another part: need not be equal
            if change == "drift" and groups.tensor_rank == 1:
                parameters["copied"][2] += by
            elif change and dist.get_rank() == (3 if change == "cut" else 1):
                parameters[change][[0, 1]] = parameters[change][[1, 0]]  # the same values in other places
        return invariants.unequal_copy(parameters, shards, groups)

    # rank 1 is tensor rank 1 of the first copy, rank 3 of the second: its data-parallel peer is rank 1
    assert run_ranks(4, find, None, 0) == [None] * 4
    assert run_ranks(4, find, "copied", 0) == [("tensor", "copied"), ("data", "copied"), None, ("data", "copied")]
    assert run_ranks(4, find, "cut", 0) == [None, ("data", "cut"), None, ("data", "cut")]
    # tensor-parallel copies may differ by roundings, data-parallel ones by nothing
    assert run_ranks(4, find, "drift", 1e-6) == [None] * 4
    assert run_ranks(4, find, "drift", 0.1) == [("tensor", "copied")] * 4


def test_all_ranks_stop_where_one_sees_unequal_copies(settings, make_training):
    def check():
        pipeline, engine, groups = make_training("torch", replace(settings("all"), vocab=VocabConfig(500, 250)))
        run = Run(settings("all"), pipeline, engine, None, None, groups, Backend.resolve(settings("all")), None)
        require_sound_state(run, 0)
        with torch.no_grad():
            if dist.get_rank() == 5:
                next(pipeline.model.parameters())[0] += 1
        with pytest.raises(RunError, match="copies"):
            require_sound_state(run, 0)
        return True

    assert all(run_ranks(8, check))
