"""The command line from end to end: real launchers, real kills."""

import json
import os
import re
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed import RankError, run_ranks
from launched import free_port, wait_for_step
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megat2i import config
from megat2i import pretrain as pretrain_module
from megat2i.data.manifest import Manifest
from megat2i.runtime import Backend
from megat2i.topology import ParallelGroups
from megat2i.vocab import SPECIAL, TEXT

pytestmark = pytest.mark.slow

TIMES = ("tokens_per_s", "step_s", "mfu")
KEYS = [
    "step",
    "lr",
    "loss",
    "loss/text",
    "loss/image",
    "loss/special",
    "ppl/text",
    "ppl/image",
    "tokens/text",
    "tokens/image",
    "grad_norm",
    "tokens_per_s",
    "step_s",
    "mfu",
]
LAUNCHER = ("deepspeed", "--num_accelerators", "2", "--master_port")


@pytest.fixture
def launcher():
    """DeepSpeed's launcher with two ranks on a free port."""
    return (*LAUNCHER, str(free_port()))


@pytest.fixture
def started(pretrain):
    """``pretrain``, but nothing that it started outlives the test."""
    processes = []

    def start(*arguments, **options):
        processes.append(pretrain(*arguments, **options))
        return processes[-1]

    yield start
    for process in processes:
        end(process)


def end(process) -> None:
    """Kill a process that we started, with its ranks (it leads its own session)."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def finish(process, expected: int = 0) -> tuple[str, str]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == expected, output + errors
    return output, errors


def entries(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def without_times(run_dir: Path) -> list[dict]:
    return [{key: value for key, value in entry.items() if key not in TIMES} for entry in entries(run_dir)]


def refusal(process) -> str:
    """The message of a run that was refused: one line on stderr, nothing of a traceback."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode not in (0, None), output
    assert "Traceback" not in output + errors
    lines = [line for line in errors.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), errors
    return lines[0]


@pytest.fixture(scope="module")
def unbroken(pretrain, tmp_path_factory):
    """A finished run of six steps in one process, validated and sampled on the way."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    finish(pretrain(run_dir, "training.evaluate_every=2", "training.sample_every=6", "sampling.prompts=[red hut]"))
    return run_dir


def test_a_run_leaves_its_whole_record(unbroken):
    found = entries(unbroken)
    training = [entry for entry in found if "split" not in entry]
    assert [entry["step"] for entry in training] == [1, 2, 3, 4, 5, 6]
    assert all(set(KEYS) <= entry.keys() for entry in training)
    assert all(entry[key] is not None for entry in training for key in KEYS if key != "mfu")
    valid = [entry for entry in found if entry.get("split") == "valid"]
    assert [entry["step"] for entry in valid] == [2, 4, 6] and all("loss/image" in entry for entry in valid)
    assert training[-1]["loss"] < training[0]["loss"]
    environment = json.loads((unbroken / "environment.json").read_text())
    assert environment["engine"] == "torch" and environment["layout"] == "1.1.1" and environment["resumed_from"] is None
    assert environment["parameters_total"] == environment["parameters_per_rank"] > 10_000
    assert environment["versions"]["torch"] == torch.__version__ and "device=cpu" in environment["backend"]
    assert config.load(unbroken / "config.yaml").optimizer.engine == "torch"
    assert [path.name for path in (unbroken / "checkpoints").iterdir()] == ["step-6"]
    assert [path.name for path in sorted(unbroken.glob("tokenizers/*/*"))] == ["image.safetensors", "text.json"]
    events = EventAccumulator(str(unbroken / "tensorboard")).Reload()
    assert {key for key in KEYS if key not in ("step", "mfu")} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["samples/red hut"]
    assert sorted(path.name for path in (unbroken / "drawn").iterdir()) == ["step-000006.json", "step-000006.png"]


def test_the_console_tells_how_it_ended_and_what_is_next(started, tmp_path):
    run = tmp_path / "run"
    output, errors = finish(started(run, "training.evaluate_every=3", "training.stop_at=5"))
    record = entries(run)
    held_out = next(entry for entry in record if entry.get("split") == "valid")
    said = (
        f"step 3: held-out loss text {held_out['loss/text']:.3f}, image {held_out['loss/image']:.3f} (training: text "
    )
    lines = output.splitlines()
    assert any(line.startswith(said) for line in lines)
    assert re.search(r"^model: [\d,]+ parameters$", output, re.M)
    assert lines[-5].startswith("stopped after step 5 of 6, in ") and lines[-5].endswith(f": the run is in {run}")
    losses = [entry["loss/image"] for entry in record if "split" not in entry]
    assert f"image {sum(losses) / 5:.3f}" in lines[-4] and "mean of the last 5 steps" in lines[-4]
    assert lines[-3].startswith("held-out loss at step 3: ") and "--resume" in lines[-1]
    assert re.match(r"data: all of [\d,]+ bytes compared with their digests, ", lines[-2])
    output, _ = finish(started(run, "training.evaluate_every=3", "--resume"))
    lines = output.splitlines()
    assert lines[-6].startswith("finished after step 6 of 6, ") and "last 6 steps" in lines[-5]
    assert lines[-2] == f"next: python tools/generate.py --run {run} --prompts 'a red apple'"
    assert "\r" not in output + errors


def test_two_ranks_under_deepspeeds_launcher(started, launcher, unbroken, tmp_path):
    quiet = (launcher[0], "--quiet", *launcher[1:])
    output, errors = finish(started(tmp_path / "run", "training.evaluate_every=2", launcher=quiet))
    ours = [line for line in output.splitlines() if "Setting accelerator to CPU" not in line]  # the launcher's
    assert len(output.splitlines()) - len(ours) <= 2 and ours[0].startswith("device=cpu") and not errors
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (environment["engine"], environment["layout"]) == ("deepspeed", "1.1.2")
    found, expected = without_times(tmp_path / "run"), without_times(unbroken)
    assert len(found) == len(expected)
    for entry, other in zip(found, expected, strict=True):
        assert entry.keys() == other.keys()
        assert [entry[f"tokens/{m}"] for m in ("text", "image")] == [other[f"tokens/{m}"] for m in ("text", "image")]
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-3)
    for key in ("loss", "loss/text", "loss/image", "loss/special", "grad_norm"):
        assert found[0][key] == pytest.approx(expected[0][key], rel=1e-5)


def test_verbose_shows_what_libraries_say(started, tmp_path):
    engine = "optimizer.engine=deepspeed"
    output, errors = finish(started(tmp_path / "run", "training.stop_at=1", engine))
    verbose, more = finish(started(tmp_path / "other", "training.stop_at=1", engine, "--verbose"))
    assert len((verbose + more).splitlines()) > len((output + errors).splitlines())


LONG = ("training.steps=60", "training.checkpoint_every=4", "training.evaluate_every=10")


@pytest.fixture(scope="module")
def killed(pretrain, tmp_path_factory):
    """(unbroken run, run that was killed in the middle and resumed, steps at the kill) of one process each."""
    folder = tmp_path_factory.mktemp("killed")
    finish(pretrain(folder / "whole", *LONG))
    process = pretrain(folder / "broken", *LONG)
    try:
        wait_for_step(folder / "broken", 14, process)
    finally:
        end(process)
    reached = entries(folder / "broken")[-1]["step"]
    finish(pretrain(folder / "broken", *LONG, "--resume"))
    return folder / "whole", folder / "broken", reached


def test_a_killed_run_goes_on_to_the_same_numbers(killed):
    whole, broken, reached = killed
    assert reached < 60, "the run was killed too late to mean anything"
    environment = json.loads((broken / "environment.json").read_text())
    assert "step-" in environment["resumed_from"]
    found, expected = without_times(broken), without_times(whole)
    assert found == expected
    changed = [entry | {"loss": entry["loss"] * (1 + 1e-15)} for entry in found]
    assert changed != expected, "the comparison is not bitwise"


def test_tensorboard_misses_no_step_of_a_killed_run(killed):
    _, broken, _ = killed
    events = EventAccumulator(str(broken / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 61))


def test_a_killed_run_of_two_ranks_goes_on_to_the_same_numbers(started, launcher, tmp_path):
    steps = ("training.steps=24", "training.checkpoint_every=3")
    finish(started(tmp_path / "whole", *steps, launcher=launcher))
    process = started(tmp_path / "broken", *steps, launcher=launcher)
    wait_for_step(tmp_path / "broken", 5, process)
    end(process)
    assert entries(tmp_path / "broken")[-1]["step"] < 24
    finish(started(tmp_path / "broken", *steps, "--resume", launcher=launcher))
    assert without_times(tmp_path / "broken") == without_times(tmp_path / "whole")


def interrupted(process, run_dir: Path) -> tuple[str, str]:
    """What a run says that Ctrl-C ends after its third step; the signal goes to the launcher and its ranks alike."""
    wait_for_step(run_dir, 3, process)
    os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=60)


def saved_on_ctrl_c(output: str, run_dir: Path) -> int:
    """The step after which a run says that it has stopped, once; its state is saved."""
    said = re.findall(
        r"^stopped after step ([\d,]+), which is saved \(Ctrl-C\): the same command with --resume goes on from there$",
        output,
        re.M,
    )
    assert len(said) == 1, output
    stop = int(said[0].replace(",", ""))
    assert stop >= 3 and entries(run_dir)[-1]["step"] == stop
    assert (run_dir / "checkpoints" / f"step-{stop}" / "manifest.json").exists()
    return stop


def test_ctrl_c_saves_and_says_how_to_go_on(started, tmp_path):
    arguments = ("training.steps=100000", "training.checkpoint_every=2")
    process = started(tmp_path / "run", *arguments)
    output, errors = interrupted(process, tmp_path / "run")
    assert process.returncode == 130
    answer = "Ctrl-C: the run saves after this step and ends; Ctrl-C again ends it at once, without saving"
    assert errors.splitlines().count(answer) == 1 and "Traceback" not in output + errors
    stop = saved_on_ctrl_c(output, tmp_path / "run")
    finish(started(tmp_path / "run", *arguments, f"training.stop_at={stop + 4}", "--resume"))
    assert entries(tmp_path / "run")[-1]["step"] == stop + 4


def test_ctrl_c_under_deepspeeds_launcher_is_said_by_the_first_rank_alone(started, launcher, tmp_path):
    process = started(tmp_path / "run", "training.steps=100000", launcher=(launcher[0], "--quiet", *launcher[1:]))
    output, errors = interrupted(process, tmp_path / "run")
    saved_on_ctrl_c(output, tmp_path / "run")
    assert errors.count("Ctrl-C: the run saves after this step") == 1
    assert errors.count("Traceback") == errors.count("deepspeed/launcher/runner.py") <= 1  # its own; ours print none


def test_stopping_and_resuming_under_another_engine(started, unbroken, tmp_path):
    finish(started(tmp_path / "run", "training.stop_at=3", "training.evaluate_every=2"))
    finish(started(tmp_path / "run", "training.evaluate_every=2", "optimizer.engine=deepspeed", "--resume"))
    found, expected = without_times(tmp_path / "run"), without_times(unbroken)
    assert found[:4] == expected[:4]
    assert [entry["loss"] for entry in found] == pytest.approx([entry["loss"] for entry in expected], rel=1e-4)


def test_a_run_folder_with_a_run_is_refused(started, unbroken):
    before = (unbroken / "metrics.jsonl").read_bytes()
    assert "--resume" in refusal(started(unbroken))
    assert (unbroken / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", ["model.hidden=64", "data.seed=3", "training.steps=9"])
def test_resuming_with_other_settings_is_refused(started, unbroken, change):
    before = (unbroken / "metrics.jsonl").read_bytes()
    assert change.split("=")[0] in refusal(started(unbroken, change, "--resume"))
    assert (unbroken / "metrics.jsonl").read_bytes() == before


def test_resuming_nothing_is_refused(started, tmp_path):
    assert "no run to resume" in refusal(started(tmp_path / "run", "--resume"))


@pytest.mark.parametrize(
    ("argument", "word"),
    [
        ("model.hiden=3", "model.hidden"),
        ("training.global_batch_size=7", "training.global_batch_size"),
        ("data.valid=nowhere/x", "nowhere/x"),
        ("vocab.image_codes=39", "image_codes"),
        ("vocab.text_tokens=0", "text_tokens"),
        ("data.sequence_length=8", "data.sequence_length"),
        ("data.seed=-1", "seed"),
        ("optimizer.beta1=1.5", "beta1"),
        ("data.mode=image_only", "caption_dropout"),
    ],
)
def test_bad_settings_are_one_line(started, tmp_path, argument, word):
    assert word in refusal(started(tmp_path / "run", argument))
    assert not (tmp_path / "run").exists()


def test_resuming_a_run_whose_checkpoints_are_all_damaged_is_refused(started, tmp_path):
    """Starting again from nothing would throw the record of the run away."""
    finish(started(tmp_path / "run", "training.stop_at=2"))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "checkpoints" / "step-2" / "manifest.json").write_text("{}")
    assert "checkpoints" in refusal(started(tmp_path / "run", "--resume"))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.fixture(scope="module")
def provided(run_config, providers, text_store):
    """Function of (key of data, value) -> the validation batches of one process."""

    def provide(**changes):
        config = run_config(text_store)
        config = replace(config, data=replace(config.data, **changes))

        def on_rank():
            return providers[1](config, Backend.resolve(config), ParallelGroups.create(config.parallel)).validation

        return run_ranks(1, on_rank)[0]

    return provide


def test_held_out_text_is_text_alone(provided, text_store, tiny_store):
    validation = provided(valid_text=str(text_store / "valid"))
    assert list(validation) == ["valid", "valid_text"]
    assert all((batch.modality == TEXT).all() and (batch.labels < 300).all() for batch in validation["valid_text"])
    captions = provided(valid=None, valid_text=str(tiny_store / "valid"))["valid_text"]
    assert {int(code) for batch in captions for code in batch.modality.unique()} == {-1, TEXT, SPECIAL}
    assert sum(len(batch.samples) for batch in captions) == 5
    assert provided(valid=None) == {}
    images = provided(mode="image_only", caption_dropout=0.0, valid_text=str(text_store / "valid"))
    assert (images["valid_text"][0].modality == TEXT).all() and not (images["valid"][0].modality == TEXT).any()


@pytest.mark.parametrize(("field", "value", "problem"), [
    ("sha256", "0" * 64, "its text tokenizer differs"),
    ("vocab_size", 299, "vocab_size is 299, vocab.text_tokens"),
])  # fmt: skip
def test_held_out_text_of_another_tokenizer_is_refused(provided, text_store, tmp_path, field, value, problem):
    shutil.copytree(text_store, tmp_path / "prose")
    manifest = Manifest.read(tmp_path / "prose/valid")
    replace(manifest, text=replace(manifest.text, **{field: value})).write(tmp_path / "prose/valid")
    with pytest.raises(RankError, match=problem):
        provided(valid_text=str(tmp_path / "prose" / "valid"))


def test_a_selective_run_with_held_out_text(started, launcher, text_store, tmp_path):
    """Under two ranks, one with the embedding and one with the output, as in one process."""
    arguments = ("training.trainable=embeddings", f"data.valid_text={text_store / 'valid'}",
                 "training.evaluate_every=2", "training.evaluate_samples=7", "training.steps=3")  # fmt: skip
    finish(started(tmp_path / "one", *arguments))
    pipeline = ("parallel.pipeline=2", "parallel.schedule=zero_bubble")
    finish(started(tmp_path / "run", *arguments, *pipeline, launcher=launcher))
    found, expected = without_times(tmp_path / "run"), without_times(tmp_path / "one")
    order = [(1, None), (2, None), (2, "valid"), (2, "valid_text"), (3, None), (3, "valid"), (3, "valid_text")]
    assert [(entry["step"], entry.get("split")) for entry in found] == order
    for entry, other in zip(found, expected, strict=True):
        assert [entry["loss"], entry["loss/text"]] == pytest.approx([other["loss"], other["loss/text"]], rel=1e-5)
        if entry.get("split") == "valid_text":
            assert (entry["tokens/text"], entry["tokens/image"], entry["tokens/special"]) == (7 * 24, 0, 0)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    settings = config.load(tmp_path / "run" / "config.yaml")
    assert environment["parameters_trained"] == 2 * settings.vocab_layout.size * settings.model.hidden
    assert str(text_store / "valid") in json.loads((tmp_path / "run" / "data.json").read_text())


def test_a_pipeline_rank_with_nothing_to_train_is_refused_before_anything_starts(run_config, tmp_path, monkeypatch):
    settings = run_config(tmp_path / "run")
    settings = replace(
        settings,
        model=replace(settings.model, layers=3),
        parallel=replace(settings.parallel, pipeline=3),
        training=replace(settings.training, trainable="embeddings"),
    )
    for name, value in {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(config.ConfigError, match="training.trainable=embeddings with parallel.pipeline=3"):
        pretrain_module.pretrain(settings, False, (None, None, None))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_cannot_be_written_is_one_line(started, tmp_path):
    process = started(tmp_path / "run", "training.checkpoint_every=3", "training.steps=200")
    wait_for_step(tmp_path / "run", 1, process)
    for _ in range(1000):
        with suppress(OSError):  # a plain file where the next folder is to be
            (tmp_path / "run" / "checkpoints" / "step-198.writing").write_text("in the way")
            break
        time.sleep(0.005)
    output, errors = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    assert "Traceback" not in errors and "step-198" in errors


def test_what_is_left_open_is_recorded_and_kept_by_a_resumed_run(started, tmp_path, monkeypatch):
    run, wish = tmp_path / "run", ("runtime.dtype=auto", "data.sequence_length=null")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    output, _ = finish(started(run, *wish, "training.stop_at=2"))
    recorded = config.load(run / "config.yaml")
    assert recorded.runtime.dtype == "float32" and "dtype=float32" in output and "in software" not in output
    assert recorded.data.sequence_length % 8 == 0 and "captions cut" not in output
    monkeypatch.delenv("ATEN_CPU_CAPABILITY")  # now a processor that may multiply bfloat16
    output, _ = finish(started(run, *wish, "training.stop_at=3", "--resume"))
    assert "resuming after step 2" in output and "dtype=float32" in output
    assert config.load(run / "config.yaml").data.sequence_length == recorded.data.sequence_length
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    output, _ = finish(started(tmp_path / "slow", "runtime.dtype=bfloat16", "training.stop_at=1"))
    assert "computes bfloat16 in software: a new run with runtime.dtype=float32 is many times faster" in output
