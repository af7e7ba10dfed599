"""The model's checkpoints under any layout and engine: state bit for bit, and training that goes on as if unbroken."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import run_ranks
from safetensors import safe_open

from megat2i import checkpoint
from megat2i.checkpoint.folder import part_boxes
from megat2i.config import Config
from megat2i.loss import ModalityLoss
from megat2i.model.freezing import is_trainable
from megat2i.model.gpt import initial_values
from megat2i.optim.engine import EXP_AVG_SQ, KINDS, WEIGHT
from megat2i.runtime import DTYPES
from megat2i.trainer import train_step

LOSS = ModalityLoss((1.0, 1.0, 1.0))
STEPS = 2


@dataclass(frozen=True)
class Layout:
    """An engine and the numbers of ranks along the axes."""

    engine: str
    pipeline: int = 1
    tensor: int = 1
    data: int = 1
    sequence: bool = False
    virtual_stages: int = 1

    @property
    def ranks(self) -> int:
        return self.pipeline * self.tensor * self.data

    def __str__(self) -> str:
        more = f"{'-sequence' * self.sequence}{'-interleaved' * (self.virtual_stages > 1)}"
        return f"{self.engine}-{self.pipeline}.{self.tensor}.{self.data}{more}"

    def config(self, tiny: Config, dtype: str) -> Config:
        return replace(
            tiny,
            vocab=replace(tiny.vocab, text_tokens=500),  # columns for each of four ranks
            model=replace(tiny.model, layers=4, qk_norm=True),
            runtime=replace(tiny.runtime, dtype=dtype),
            parallel=replace(
                tiny.parallel,
                pipeline=self.pipeline,
                tensor=self.tensor,
                sequence=self.sequence,
                virtual_stages=self.virtual_stages,
                schedule="interleaved" if self.virtual_stages > 1 else "1f1b",
            ),
        )


LAYOUTS = [
    Layout("torch"),
    Layout("deepspeed", tensor=2, data=2),
    Layout("torch", pipeline=2, tensor=2),
    Layout("deepspeed", data=4),
    Layout("torch", tensor=4, sequence=True),
    Layout("deepspeed", pipeline=2, tensor=2, data=2, sequence=True),
    Layout("torch", pipeline=2, data=2, virtual_stages=2),
    Layout("deepspeed", pipeline=4),
]


@pytest.fixture
def on_layout(make_training, make_batches, tiny_config):
    """Function of (layout, dtype, action) -> results of ``action(train, engine)`` on its ranks.

    ``train(first, last)`` makes those steps and returns (loss, gradient norm) of each. ``changes``: other values in
    sections of the configuration.
    """

    def run(layout: Layout, dtype: str, action, **changes):
        config = layout.config(tiny_config, dtype)
        for section, values in changes.items():
            config = replace(config, **{section: replace(getattr(config, section), **values)})

        def on_rank():
            pipeline, engine, groups = make_training(layout.engine, config)

            def train(first: int, last: int) -> list[tuple[float, float]]:
                records = []
                for step in range(first, last):
                    batches = make_batches(config, step, groups.data_rank, groups.data_size)
                    metrics, norm = train_step(pipeline, engine, batches, LOSS, groups, 1e-2 / (step + 1))
                    records.append((metrics.as_dict()["loss"], norm))
                return records

            return action(train, engine)

        return run_ranks(layout.ranks, on_rank)

    return run


def save(folder: Path, step: int, engine) -> None:
    checkpoint.save(folder, step, engine, "", keep=1)


def load(folder: Path, engine) -> None:
    for part in engine.fragments():
        part.values.fill_(torch.nan)  # what is not filled shows
    checkpoint.load_engine(checkpoint.latest(folder, pytest.fail), engine)
    assert engine.updates == STEPS


def global_state(folder: Path, step: int) -> dict[tuple[str, str], np.ndarray]:
    """The whole tensors of the checkpoint in a folder, put together by its manifest alone."""
    found = checkpoint.open_checkpoint(folder / f"step-{step}")
    tensors = {}
    for part in found.manifest["parts"]:
        tensor = tensors.setdefault((part["name"], part["kind"]), np.full(part["shape"], np.nan, np.float32))
        with safe_open(found.path / part["file"], framework="np") as file:
            values, offset = file.get_tensor(part["key"]), 0
        for box in part_boxes(part):
            place = tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))
            assert np.isnan(tensor[place]).all(), "written twice"
            tensor[place] = values[offset : offset + tensor[place].size].reshape(box.shape)
            offset += tensor[place].size
    assert not any(np.isnan(tensor).any() for tensor in tensors.values()), "not all was written"
    return tensors


def assert_same_state(one: Path, other: Path, step: int = STEPS) -> None:
    a, b = global_state(one, step), global_state(other, step)
    assert a.keys() == b.keys() and len(a) > 3 * 20
    for key, tensor in a.items():
        assert tensor.tobytes() == b[key].tobytes(), f"{key} differs"


def write(folder: Path):
    def action(train, engine):
        train(0, STEPS)
        save(folder, STEPS, engine)

    return action


def copy(sources: list[Path], targets: list[Path]):
    """Loads each of ``sources`` and writes it again; the model's weights are the masters, rounded."""

    def action(_, engine):
        for source, target in zip(sources, targets, strict=True):
            load(source, engine)
            masters = {part.name: part.values for part in engine.fragments() if part.kind == KINDS[0]}
            for name, parameter in engine.parameters.items():
                assert not torch.isnan(parameter).any()
                if name in masters and len(masters[name]) == parameter.numel():
                    assert torch.equal(parameter.flatten(), masters[name].to(parameter.dtype)), name
            save(target, STEPS, engine)

    return action


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_is_bit_equal_after_a_way_through_all_layouts(on_layout, tmp_path, dtype):
    """Every layout reads what the one before it wrote, and the first what the last wrote."""
    on_layout(LAYOUTS[0], dtype, write(tmp_path / "0"))
    state = global_state(tmp_path / "0", STEPS)
    assert all(values.any() for (name, kind), values in state.items() if kind == "exp_avg_sq" and "norm" not in name)
    for number, layout in enumerate([*LAYOUTS[1:], LAYOUTS[0]]):
        on_layout(layout, dtype, copy([tmp_path / str(number)], [tmp_path / str(number + 1)]))
        assert_same_state(tmp_path / "0", tmp_path / str(number + 1))


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_layout_reads_what_every_other_wrote(on_layout, tmp_path, dtype):
    sources = [tmp_path / str(layout) for layout in LAYOUTS]
    for layout, source in zip(LAYOUTS, sources, strict=True):
        on_layout(layout, dtype, write(source))
    for layout in LAYOUTS:
        targets = [tmp_path / f"{layout}-from-{source.name}" for source in sources]
        on_layout(layout, dtype, copy(sources, targets))
        for source, target in zip(sources, targets, strict=True):
            assert_same_state(source, target)


def go_on(folder: Path, first: int, last: int):
    """Continues at ``first`` (0: from the start) and saves at ``last``; returns the records."""

    def action(train, engine):
        if first:
            checkpoint.load_engine(checkpoint.latest(folder, pytest.fail), engine)
        records = train(first, last)
        save(folder, last, engine)
        return records

    return action


def records_of_a_chain(on_layout, folder: Path, chain: list[Layout], **changes) -> list:
    records = []
    for number, layout in enumerate(chain):
        steps = go_on(folder, STEPS * number, STEPS * (number + 1))
        records += on_layout(layout, "float32", steps, **changes)[0]
    return records


CHAINS = [[LAYOUTS[2], LAYOUTS[1], LAYOUTS[4]], [LAYOUTS[3], LAYOUTS[5], LAYOUTS[0]]]


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "_".join(map(str, chain)))
def test_a_run_that_changes_its_layout_twice_is_the_unchanged_run(on_layout, tmp_path, chain):
    unchanged = records_of_a_chain(on_layout, tmp_path / "unchanged", [LAYOUTS[0]] * 3)
    changed = records_of_a_chain(on_layout, tmp_path / "changed", chain)
    assert len(changed) == 3 * STEPS
    np.testing.assert_allclose(changed, unchanged, rtol=1e-5)


def step_counter_stays(engine) -> None:
    loaded = engine.loaded
    engine.loaded = lambda _: loaded(0)


def weights_are_not_refreshed(engine) -> None:
    engine.zero.update_lp_params = lambda: None


def parts_are_swapped(engine) -> None:
    """Query, key and value, gate and up, image and text rows."""
    for name, shard in engine.shards.items():
        if len(shard.pieces) > 1:
            engine.shards[name] = replace(shard, pieces=shard.pieces[::-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "noticed_at"), [(step_counter_stays, 1), (weights_are_not_refreshed, 0), (parts_are_swapped, 0)]
)
def test_the_comparison_of_runs_notices(on_layout, tmp_path, mistake, noticed_at):
    """A wrong step counter shows from the second resumed step only."""
    unchanged = records_of_a_chain(on_layout, tmp_path / "unchanged", [LAYOUTS[0]] * 2)[STEPS:]
    records_of_a_chain(on_layout, tmp_path / "changed", [LAYOUTS[2]])

    def mistaken(train, engine):
        mistake(engine)
        return go_on(tmp_path / "changed", STEPS, 2 * STEPS)(train, engine)

    changed = on_layout(LAYOUTS[1], "float32", mistaken)[0]
    assert not np.allclose(changed[noticed_at], unchanged[noticed_at], rtol=1e-4)
    np.testing.assert_allclose(changed[:noticed_at], unchanged[:noticed_at], rtol=1e-5)


@pytest.mark.parametrize(
    ("middle", "micro_batch_size"), [(Layout("torch", pipeline=2), 2), (Layout("torch", data=2), 4)], ids=str
)
def test_where_no_sum_changes_its_order_another_layout_gives_the_same_bits(
    on_layout, tmp_path, middle, micro_batch_size
):
    """Pipeline: every gradient is the same sum; the norm is added up otherwise, so that clipping must not use it.

    Data: two ranks of one micro-batch each add the same two numbers as one rank of two micro-batches.
    """
    changes = {"optimizer": {"clip": 0.0}, "training": {"micro_batch_size": micro_batch_size}}
    for name, chain in (("unchanged", [LAYOUTS[0]] * 3), ("changed", [LAYOUTS[0], middle, LAYOUTS[0]])):
        records_of_a_chain(on_layout, tmp_path / name, chain, **changes)
    assert_same_state(tmp_path / "unchanged", tmp_path / "changed", 3 * STEPS)


SELECTIVE = {"training": {"trainable": "embeddings_norms_first_half"}}
SELECTIVE_LAYOUTS = [LAYOUTS[1], LAYOUTS[6], LAYOUTS[0]]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_do_not_learn_are_in_every_checkpoint(on_layout, tiny_config, tmp_path, dtype):
    """... with the bits of the beginning and no moments, whatever layouts they went through and how they were saved."""

    def write_in_the_background(train, engine):
        train(0, STEPS)
        checkpoint.save(tmp_path / "background", STEPS, engine, "", keep=1, background=True)
        checkpoint.finish()
        save(tmp_path / "0", STEPS, engine)

    on_layout(SELECTIVE_LAYOUTS[0], dtype, write_in_the_background, **SELECTIVE)
    assert_same_state(tmp_path / "background", tmp_path / "0")
    written = checkpoint.latest_here(tmp_path / "0")
    checkpoint.write_changed(written, tmp_path / "again", lambda name, kind, values: values)
    assert_same_state(tmp_path / "again", tmp_path / "0")
    for number, layout in enumerate(SELECTIVE_LAYOUTS[1:]):
        on_layout(layout, dtype, copy([tmp_path / str(number)], [tmp_path / str(number + 1)]), **SELECTIVE)
        assert_same_state(tmp_path / "0", tmp_path / str(number + 1))
    frozen = 0
    for (name, kind), values in global_state(tmp_path / "0", STEPS).items():
        if is_trainable(name, SELECTIVE["training"]["trainable"], 4):
            assert kind != EXP_AVG_SQ or values.any() or "norm" in name
            continue
        start = initial_values(name, values.shape, tiny_config.model.seed).to(DTYPES[dtype]).float().numpy()
        assert kind == WEIGHT and values.tobytes() == start.tobytes(), (name, kind)
        frozen += 1
    assert frozen == 8  # the four matrices of two layers


@pytest.mark.slow
def test_a_selective_run_that_changes_its_layout_is_the_unchanged_run(on_layout, tmp_path):
    unchanged = records_of_a_chain(on_layout, tmp_path / "unchanged", [LAYOUTS[0]] * 3, **SELECTIVE)
    changed = records_of_a_chain(on_layout, tmp_path / "changed", SELECTIVE_LAYOUTS, **SELECTIVE)
    np.testing.assert_allclose(changed, unchanged, rtol=1e-5)
    other = records_of_a_chain(on_layout, tmp_path / "other", [LAYOUTS[0]])
    assert not np.allclose(other[1], unchanged[1], rtol=1e-4)  # another policy would show


@pytest.mark.parametrize(
    ("written", "read", "problem"),
    [
        ({}, SELECTIVE, "holds exp_avg of layers.2.attention.in_proj.weight, which this run does not have"),
        (SELECTIVE, {}, r"of layers.2.attention.in_proj.weight \(exp_avg\) are missing"),
    ],
    ids=["all to selective", "selective to all"],
)
def test_a_checkpoint_of_another_policy_is_refused(on_layout, tmp_path, written, read, problem):
    on_layout(LAYOUTS[0], "float32", write(tmp_path), **written)

    def refused(_, engine):
        with pytest.raises(checkpoint.CheckpointError, match=problem):
            checkpoint.load_engine(checkpoint.latest(tmp_path, pytest.fail), engine)

    on_layout(LAYOUTS[0], "float32", refused, **read)
