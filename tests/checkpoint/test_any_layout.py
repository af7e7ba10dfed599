"""State of drawn tensors goes from any layout to any other: real files, real ranks, an engine that knows each element.

The layouts of the real model are in ``test_layouts.py``.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed import RankError, run_ranks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numbered_engine import Layout, NumberedEngine, Split, rewrite_manifest

from megat2i import checkpoint
from megat2i.checkpoint import CheckpointError
from megat2i.checkpoint import folder as contents
from megat2i.checkpoint.folder import part_boxes
from megat2i.optim.engine import EXP_AVG, KINDS

STEP = 3
LAYOUTS = st.builds(
    Layout,
    pipeline=st.sampled_from([1, 2]),
    data=st.integers(1, 3),
    tensor=st.sampled_from([1, 2, 4]),
    zero=st.booleans(),
).filter(lambda layout: layout.ranks <= 6)
STAGES = st.sampled_from([0.0, 0.2, 0.5, 0.9])


@st.composite
def drawn_splits(draw) -> dict[str, Split]:
    """Tensors of every way to be split: whole, by rows or columns, and by parts, of which a later one may come first.

    The first and last one are whole, on the first and last stage: every rank of every layout has something.
    """
    splits = {"first": Split((draw(st.integers(1, 9)),)), "last": Split((3, 2), stage=0.9)}
    for number in range(draw(st.integers(1, 4))):
        rows, columns = draw(st.integers(1, 3)) * 4, draw(st.integers(1, 7))
        stage, kind = draw(STAGES), draw(st.sampled_from(["whole", "vector", "rows", "columns", "parts"]))
        if kind == "whole":
            split = Split((rows, columns), stage=stage)
        elif kind == "vector":
            split = Split((rows,), ((0, rows),), stage=stage)
        elif kind == "rows":
            split = Split((rows, columns), ((0, rows),), stage=stage)
        elif kind == "columns":
            split = Split((columns, rows), ((0, rows),), dimension=1, stage=stage)
        else:
            border = draw(st.integers(1, 3)) * 4
            parts = draw(st.permutations([(0, border), (border, border + rows)]))
            split = Split((border + rows, columns), tuple(parts), stage=stage)
        splits[f"{kind}.{number}"] = split
    return splits


def write(splits: dict[str, Split], layout: Layout, folder: Path, part_elements: int) -> None:
    contents.PART_ELEMENTS = part_elements  # in a forked process
    engine = NumberedEngine(splits, layout)
    engine.step(STEP)
    checkpoint.save(folder, STEP, engine, str(layout), keep=1)


def read(splits: dict[str, Split], layout: Layout, folder: Path) -> None:
    engine = NumberedEngine(splits, layout)
    checkpoint.load_engine(checkpoint.latest(folder, pytest.fail), engine)
    assert engine.updates == STEP


def assert_written_once(folder: Path, splits: dict[str, Split]) -> None:
    """Of every tensor and kind each element is in exactly one box of one part."""
    manifest = checkpoint.open_checkpoint(folder / f"step-{STEP}").manifest
    counts = {(name, kind): torch.zeros(split.shape) for name, split in splits.items() for kind in KINDS}
    for part in manifest["parts"]:
        for box in part_boxes(part):
            place = tuple(slice(a, b) for a, b in zip(box.start, box.stop, strict=True))
            counts[part["name"], part["kind"]][place] += 1
    for key, count in counts.items():
        assert (count == 1).all(), f"{key} is not written once: {count}"


@pytest.mark.parametrize("examples", [20, pytest.param(300, marks=pytest.mark.full)])
def test_what_one_layout_wrote_any_other_reads(tmp_path_factory, examples):
    seen = Counter()

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(drawn_splits(), LAYOUTS, LAYOUTS, st.sampled_from([3, 1 << 24]))
    def check(splits, writer, reader, part_elements):
        folder = tmp_path_factory.mktemp("checkpoint")
        run_ranks(writer.ranks, write, splits, writer, folder, part_elements)
        assert_written_once(folder, splits)
        run_ranks(reader.ranks, read, splits, reader, folder)
        seen[writer != reader] += 1

    check()
    assert seen[True] >= examples // 2


STRIPED = {"first": Split((5,)), "table": Split((12, 4), ((8, 12), (0, 8))), "last": Split((2, 2), stage=0.9)}
WRITER, READER = Layout(data=2, tensor=2), Layout(pipeline=2, tensor=2, zero=False)


@pytest.fixture
def striped(tmp_path) -> Path:
    run_ranks(WRITER.ranks, write, STRIPED, WRITER, tmp_path, 1 << 24)
    run_ranks(READER.ranks, read, STRIPED, READER, tmp_path)
    return tmp_path


def test_pieces_in_the_wrong_order_do_not_go_unnoticed(striped):
    """The negative control of the comparison: the reader's idea of the order differs from the writer's."""
    swapped = STRIPED | {"table": replace(STRIPED["table"], parts=((0, 8), (8, 12)))}
    run_ranks(READER.ranks, read, swapped, READER, striped)  # another order here is another layout: fine

    def wrong():
        engine, other = NumberedEngine(STRIPED, READER), NumberedEngine(swapped, READER)
        mistaken = [replace(part, shard=o.shard) for part, o in zip(engine.parts, other.parts, strict=True)]
        engine.fragments = lambda: mistaken  # ``loaded`` compares with the true order
        checkpoint.load_engine(checkpoint.latest(striped, pytest.fail), engine)

    with pytest.raises(RankError, match="table .* is wrong"):
        run_ranks(READER.ranks, wrong)


def test_boxes_in_the_wrong_order_do_not_go_unnoticed(striped):
    """... and the writer's: the manifest names the right boxes in another order than that of the values."""
    manifest = striped / f"step-{STEP}" / "manifest.json"
    parts = json.loads(json.loads(manifest.read_text())["manifest"])["parts"]
    several = [part for part in parts if len(part["boxes"]) > 1]
    assert several
    for part in several:
        part["boxes"].reverse()
    rewrite_manifest(manifest, parts=parts)
    with pytest.raises(RankError, match="is wrong"):
        run_ranks(READER.ranks, read, STRIPED, READER, striped)


def test_a_hole_is_refused_on_all_ranks_and_named(striped):
    manifest = striped / f"step-{STEP}" / "manifest.json"
    parts = json.loads(json.loads(manifest.read_text())["manifest"])["parts"]
    number = next(n for n, part in enumerate(parts) if (part["name"], part["kind"]) == ("table", EXP_AVG))
    del parts[number]
    rewrite_manifest(manifest, parts=parts)

    def refused():
        found = checkpoint.latest(striped, pytest.fail)
        with pytest.raises(CheckpointError) as error:
            checkpoint.load_engine(found, NumberedEngine(STRIPED, READER))
        return str(error.value)

    messages = run_ranks(READER.ranks, refused)
    assert any("of table (exp_avg) are missing" in message for message in messages)
    assert all("missing" in message or "another rank" in message for message in messages)


def test_a_rank_reads_what_it_needs_and_each_part_of_it_once(tmp_path, monkeypatch):
    splits = {"first": Split((40,)), "second": Split((8, 6), ((0, 8),)), "last": Split((50,), stage=0.9)}
    layout = Layout(pipeline=2, data=2)
    run_ranks(layout.ranks, write, splits, layout, tmp_path, 16)

    def read_here():
        hashed = []
        digest = contents.digest
        found = checkpoint.latest(tmp_path, pytest.fail)
        monkeypatch.setattr(contents, "digest", lambda values: hashed.append(digest(values)) or hashed[-1])
        checkpoint.load_engine(found, NumberedEngine(splits, layout))
        needed = set()
        for part in found.manifest["parts"]:
            boxes = {(own.name, own.kind): own.boxes for own in NumberedEngine(splits, layout).fragments()}
            if any(
                all(a < d and c < b for a, b, c, d in zip(*one, *other, strict=True))
                for one in part_boxes(part)
                for other in boxes.get((part["name"], part["kind"]), [])
            ):
                needed.add(part["sha256"])
        return hashed, needed, len(found.manifest["parts"])

    for hashed, needed, parts in run_ranks(layout.ranks, read_here):
        assert sorted(hashed) == sorted(needed) and len(needed) < parts


def test_damage_that_appears_after_the_verification_stops_every_rank(striped):
    def damaged():
        found = checkpoint.latest(striped, pytest.fail)
        torch.distributed.barrier()
        if torch.distributed.get_rank() == 0:
            path = striped / f"step-{STEP}" / "rank-00001.safetensors"
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        torch.distributed.barrier()
        with pytest.raises(CheckpointError, match="rank-00001.safetensors: the digest|another rank failed"):
            checkpoint.load_engine(found, NumberedEngine(STRIPED, READER))

    run_ranks(READER.ranks, damaged)
