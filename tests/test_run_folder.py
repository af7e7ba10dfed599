"""What a run keeps of itself, and that a resumed run is the same run on the same data."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from launched import SRUN
from manifest_file import change_manifest

from megat2i import run_folder
from megat2i.config import DatasetConfig
from megat2i.data.indexed import IndexedWriter
from megat2i.files import DataFileError
from megat2i.trainer import RunError


@pytest.fixture
def settings(run_config, tiny_store, text_store, tmp_path):
    """A run on a copy of the tiny store, which a test may change."""
    shutil.copytree(tiny_store, tmp_path / "data")
    config = run_config(tmp_path / "run")
    train = [DatasetConfig(str(tmp_path / "data/train"))]
    held_out = {"valid": str(tmp_path / "data/valid"), "valid_text": str(tmp_path / "data/prose/valid")}
    return replace(config, data=replace(config.data, train=train, **held_out))


def write(settings, **environment) -> None:
    run_folder.check(folder(settings), settings, resume=False)
    run_folder.write(folder(settings), settings, "torch", environment)


def folder(settings) -> Path:
    return Path(settings.run.dir)


def test_the_same_run_may_be_resumed(settings):
    write(settings)
    run_folder.check(folder(settings), settings, resume=True)
    assert {path.name for path in (folder(settings) / "tokenizers").rglob("*.*")} == {"text.json", "image.safetensors"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_keeps_what_it_began_with(settings, dtype):
    def wish(dtype, length):
        data, runtime = replace(settings.data, sequence_length=length), replace(settings.runtime, dtype=dtype)
        return replace(settings, data=data, runtime=runtime)

    write(wish(dtype, 24))
    resumed = run_folder.with_recorded(wish("auto", None))
    assert (resumed.runtime.dtype, resumed.data.sequence_length) == (dtype, 24)
    run_folder.check(folder(settings), resumed, resume=True)
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    with pytest.raises(RunError, match=f"runtime.dtype: {dtype} -> {other}"):
        run_folder.check(folder(settings), run_folder.with_recorded(wish(other, None)), resume=True)


@pytest.mark.parametrize("split", ["train", "valid", "prose/valid"])
def test_changed_data_under_the_same_name_is_refused(settings, tmp_path, split):
    write(settings)
    other_tokens = ["0" * 64]  # the digest of their one block
    change_manifest(tmp_path / f"data/{split}", lambda value: value["bin_blocks"].update(sha256=other_tokens))
    with pytest.raises(RunError, match=f"the content of .*{split}"):
        run_folder.check(folder(settings), settings, resume=True)


def test_a_changed_setting_is_refused_and_an_execution_setting_is_not(settings):
    write(settings)
    other = replace(settings, model=replace(settings.model, seed=5))
    with pytest.raises(RunError, match="model.seed: 0 -> 5"):
        run_folder.check(folder(settings), other, resume=True)
    other = replace(settings, training=replace(settings.training, trainable="embeddings"))
    with pytest.raises(RunError, match="training.trainable: all -> embeddings"):
        run_folder.check(folder(settings), other, resume=True)
    with pytest.raises(RunError, match="data.valid_text: .* -> None"):
        run_folder.check(folder(settings), replace(settings, data=replace(settings.data, valid_text=None)), resume=True)
    run_folder.check(folder(settings), replace(settings, training=replace(settings.training, stop_at=3)), resume=True)


def test_a_run_is_not_started_over_another(settings):
    write(settings)
    (folder(settings) / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(RunError, match="--resume"):
        run_folder.check(folder(settings), settings, resume=False)


def test_nothing_to_resume_is_said(settings):
    with pytest.raises(RunError, match="no run to resume"):
        run_folder.check(folder(settings), settings, resume=True)


def test_a_missing_or_foreign_tokenizer_stops_before_the_start(settings, tmp_path):
    tokenizer = tmp_path / "data/image.safetensors"
    content = tokenizer.read_bytes()
    tokenizer.unlink()
    with pytest.raises(DataFileError, match="is missing"):
        run_folder.check(folder(settings), settings, resume=False)
    tokenizer.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataFileError, match="is not the image tokenizer"):
        run_folder.check(folder(settings), settings, resume=False)
    assert not folder(settings).exists()


def test_samples_need_tokenizers(settings, tmp_path):
    with IndexedWriter(tmp_path / "plain", np.uint16) as writer:
        writer.add_document([np.array([1]), np.arange(4)], [0, 1])
    data = replace(settings.data, train=[DatasetConfig(str(tmp_path / "plain"))], valid=None)
    plain = replace(settings, data=data)
    run_folder.check(folder(plain), plain, resume=False)
    with pytest.raises(RunError, match="sample_every"):
        run_folder.check(folder(plain), replace(plain, training=replace(plain.training, sample_every=1)), resume=False)


def test_every_launch_is_recorded(settings):
    write(settings, layout="1.1.1")
    run_folder.write(folder(settings), settings, "torch", {"layout": "1.1.2"}, resume=True)
    run_folder.write(folder(settings), settings, "torch", {"layout": "1.1.4"}, resume=True)
    environment = json.loads((folder(settings) / "environment.json").read_text())
    assert environment["layout"] == "1.1.4" and environment["versions"]["torch"]
    assert [launch["layout"] for launch in environment["earlier"]] == ["1.1.1", "1.1.2"]
    assert all("earlier" not in launch for launch in environment["earlier"])


def test_the_job_and_the_image_are_recorded(settings, environment):
    environment(**SRUN, SLURM_RESTART_COUNT="1", MEGAT2I_IMAGE="megat2i.sqsh")
    write(settings)
    recorded = json.loads((folder(settings) / "environment.json").read_text())
    assert recorded["slurm"] == {"job": "17", "step": "0", "restart": "1", "nodes": "n[1-2]"}
    assert recorded["image"] == "megat2i.sqsh"
    environment()
    run_folder.write(folder(settings), settings, "torch", {}, resume=True)
    recorded = json.loads((folder(settings) / "environment.json").read_text())
    assert recorded["slurm"] is None and recorded["image"] is None and recorded["earlier"][0]["slurm"]["job"] == "17"


def test_the_revision_of_an_image_counts_only_without_a_checkout(environment, tmp_path, monkeypatch):
    """A checkout that is mounted over the image's code is another commit, also where git cannot read it."""
    environment(MEGAT2I_REVISION="abc")
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "megat2i" / "run_folder.py"))
    (tmp_path / "megat2i").mkdir()
    assert run_folder._git_commit() == "abc"
    (tmp_path / ".git").mkdir()  # no repository that git would read
    assert run_folder._git_commit() is None
    environment()
    (tmp_path / ".git").rmdir()
    assert run_folder._git_commit() is None


def started(settings) -> Path:
    """A run that has a record."""
    write(settings, layout="1.1.1")
    (folder(settings) / "metrics.jsonl").write_text("")
    return folder(settings)


@pytest.mark.parametrize(("name", "content"), [
    ("config.yaml", None), ("config.yaml", "[]"), ("config.yaml", "model: {"),
    ("data.json", None), ("data.json", ""), ("data.json", "[]"), ("data.json", "{"),
])  # fmt: skip
def test_a_damaged_record_of_the_beginning_is_one_sentence_with_a_way_out(settings, name, content):
    run = started(settings)
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content)
    with pytest.raises((RunError, DataFileError), match=f"{name}.*restore it from a copy, or ") as error:
        run_folder.check(run, run_folder.with_recorded(settings), resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"earlier": 3}', "{}"])
def test_a_damaged_environment_is_set_aside_and_the_run_goes_on(settings, content, capsys):
    run = started(settings)
    (run / "environment.json").write_text(content)
    run_folder.check(run, settings, resume=True)
    run_folder.write(run, settings, "torch", {"layout": "1.1.2"}, resume=True)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "is set aside as environment.json.damaged; the run goes on" in said
    assert (run / "environment.json.damaged").read_text() == content
    assert json.loads((run / "environment.json").read_text())["earlier"] == []


def test_leftovers_of_killed_launches_are_removed_and_files_of_others_are_not(settings):
    run = started(settings)
    leftovers = ("data.json.12-ab.tmp", "metrics.jsonl.12-ab.tmp", "tokenizers/text/text.json.12-ab.tmp")
    for name in (*leftovers, "report.html.13-cd.tmp"):
        (run / name).touch()
    copied = (run / "tokenizers/text/text.json").stat()
    run_folder.write(run, settings, "torch", {}, resume=True)
    assert [path.name for path in run.rglob("*.tmp")] == ["report.html.13-cd.tmp"]
    assert (run / "tokenizers/text/text.json").stat().st_ino == copied.st_ino
