"""The paper's reproduction as a user runs it: every run for ten steps, and the paper's own scale as two tiny steps."""

import gc
import json
import multiprocessing
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megat2i import config, config_rules
from megat2i.experiments.arms import EXPERIMENTS, PAPER, SMOKE, arms_of

pytestmark = pytest.mark.slow
TINY = (
    *(setting for setting in SMOKE.settings if not setting.startswith("training.")),
    "model.positions=rotary", "model.rotary_base=1000.0",  # as the language model of the smoke scale
    "training.steps=2", "training.warmup_steps=1", "training.global_batch_size=4", "training.micro_batch_size=4",
    "training.evaluate_every=0", "training.evaluate_samples=4", "training.checkpoint_every=0",
)  # fmt: skip


def reproduce(repository, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/reproduce_paper.py", *map(str, arguments)]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True)


@pytest.fixture(scope="module")
def smoke(repository, tmp_path_factory) -> tuple[Path, Path, str]:
    """(what came out, data, standard output)"""
    folder = tmp_path_factory.mktemp("paper")
    done = reproduce(
        repository, "--scale", "smoke", "--output", folder / "out", "--data", folder / "data", "--workers", 2
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "out", folder / "data", done.stdout


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_figure_and_table(smoke, name):
    folder, _, printed = smoke
    numbers = json.loads((folder / f"{name}.json").read_text())
    assert numbers
    with Image.open(folder / f"{name}.png") as picture:
        assert np.asarray(picture).std() > 5  # not blank
    assert (folder / f"{name}.svg").read_text().lstrip().startswith("<?xml")
    assert re.search(rf"^{name} +(holds|does not hold|undecided) ", printed, re.MULTILINE)


def test_the_numbers_of_figure_7(smoke):
    numbers = json.loads((smoke[0] / "fig7.json").read_text())
    assert len(numbers["loss"]) == len(numbers["temperature"]) == 10 and len(numbers["retrieval"]) == 1
    assert numbers["nearest_tokens"] and numbers["control"]


def test_figures_are_drawn_from_the_record_alone(smoke):
    """The curve in the JSON is that of metrics.jsonl, to the last step."""
    folder = smoke[0]
    last = json.loads((folder / "fig4.json").read_text())["curves"]["random-0"]
    lines = [json.loads(line) for line in (folder / "runs/random-0/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "split" not in line]
    assert last["tokens"][-1] == sum(s[f"tokens/{m}"] for s in steps for m in ("text", "image", "special"))
    assert last["loss/image"][0] == pytest.approx(steps[0]["loss/image"])


def test_twins_differ_in_their_start_alone(smoke):
    folder = smoke[0]
    settings = [config.load(folder / f"runs/{name}-0/config.yaml") for name in ("pretrained", "random")]
    data = [(folder / f"runs/{name}-0/data.json").read_text() for name in ("pretrained", "random")]
    texts = [config.to_yaml(one).splitlines() for one in settings]
    different = [line for pair in zip(*texts, strict=True) for line in pair if pair[0] != pair[1]]
    assert {line.split(":")[0].strip() for line in different} == {"dir", "pretrained"} and data[0] == data[1]
    records = [(folder / f"runs/{name}-0/metrics.jsonl").read_text().splitlines() for name in ("pretrained", "random")]
    counts = [[json.loads(line)["tokens/text"] for line in record if "split" not in line] for record in records]
    assert counts[0] == counts[1] and len(set(counts[0])) > 1  # the same captions at every step


def test_the_report_is_whole(smoke):
    folder = smoke[0]
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    pictures = re.findall(r'<img [^>]*src="([^"]+)"', page)
    assert sorted(pictures) == sorted(f"{name}.png" for name in EXPERIMENTS) == sorted(re.findall(r"\]\((.*?)\)", text))
    assert all((folder / picture).is_file() for picture in pictures)
    assert not re.search(r'(src|href)="(https?:)?//', page)  # opens without a network
    for known in ("12.21", "12.27", "tools/align_embeddings.py", "training.trainable=embeddings_norms_first_half"):
        assert known in page and known in text


def test_what_is_done_is_not_done_again_and_a_missing_run_is_an_error(repository, smoke, tmp_path):
    folder, data, _ = smoke
    arguments = ("--scale", "smoke", "--only", "fig3", "--data", data, "--workers", 1)
    before = (folder / "runs/random-0/metrics.jsonl").stat().st_mtime_ns
    assert reproduce(repository, *arguments, "--output", folder).returncode == 0
    assert (folder / "runs/random-0/metrics.jsonl").stat().st_mtime_ns == before
    shutil.copytree(folder, tmp_path / "copy")  # another folder, hence other commands: nothing of it passes for done
    done = reproduce(repository, *arguments, "--output", tmp_path / "copy")
    assert done.returncode == 1 and "was done with other command" in done.stderr
    done = reproduce(repository, *arguments, "--report", "--output", tmp_path / "copy")
    assert done.returncode == 1 and "was done with other command" in done.stderr
    done = reproduce(repository, *arguments, "--report", "--output", tmp_path / "nothing")
    assert done.returncode == 1 and "language-model is not finished: run this experiment first" in done.stderr
    path = folder / "runs/random-0/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-4]))
    done = reproduce(repository, *arguments, "--report", "--output", folder)
    path.write_text("".join(lines))
    assert done.returncode == 1 and "metrics.jsonl ends at step 8 of 10: run this experiment to its end" in done.stderr


def test_pictures_of_ones_own(repository, smoke, tmp_path):
    """Their captions are drawn, against themselves, and the language model learns their text tokenizer."""
    _, data, _ = smoke
    generator, own = np.random.default_rng(0), tmp_path / "own"
    (tmp_path / "pictures").mkdir()
    for number in range(40):
        pixels = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(tmp_path / f"pictures/{number:02d}.png")
        (tmp_path / f"pictures/{number:02d}.txt").write_text(f"mosaic number {number}")
    for name, image in (
        ("train", ("patch", "--image-size", 16, "--patch-size", 4, "--codebook-size", 64)),
        ("valid", (own / "image_tokenizer.safetensors",)),
    ):
        command = [sys.executable, "tools/preprocess_data.py", "--input", tmp_path / "pictures", "--workers", 1]
        command += ["--text-tokenizer", data / "text_tokenizer.json", "--output-prefix", own / name]
        command += ["--image-tokenizer", *image]
        subprocess.run([str(word) for word in command], cwd=repository, check=True, capture_output=True)
    out = tmp_path / "out"
    done = reproduce(repository, "--scale", "smoke", "--only", "fig5", "--data", own, "--output", out, "--workers", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    listed = [json.loads(line) for line in (out / "reference.jsonl").read_text().splitlines()]
    assert len(listed) == 16 and all(line["prompt"].startswith("mosaic number ") for line in listed)
    number = int(listed[3]["prompt"].split()[-1])
    with Image.open(listed[3]["file"]) as shown, Image.open(tmp_path / f"pictures/{number:02d}.png") as true:
        assert shown.size == (16, 16)
        assert np.abs(np.asarray(shown, int) - np.asarray(true, int)).mean() < 40  # 64 codes for 640 colours
    report = (out / "report.md").read_text()
    assert "40 pictures of" in report and "OpenMoji" not in report.split("## Data, machine")[0]
    assert not (own / "text_tokenizer.json").exists() and "openmoji" not in report.split("## Commands")[1]


def test_dry_run_prints_every_command_and_the_budget(repository, tmp_path):
    done = reproduce(repository, "--scale", "nano", "--dry-run", "--output", tmp_path / "nothing")
    assert done.returncode == 0 and not (tmp_path / "nothing").exists()
    assert done.stdout.count("pretrain_t2i.py --config configs/paper/nano.yaml") == 35
    assert done.stdout.count("align_embeddings.py --config configs/paper/nano.yaml") == 5
    assert "| random-4 | 1,000 | 3,072,000 |" in done.stdout


@pytest.fixture(scope="module")
def paper(repository, tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("cluster")
    done = reproduce(repository, "--scale", "paper", "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_papers_scale_is_a_config_and_a_script_for_every_run(paper):
    folder, printed = paper
    names = {arm.name for arm in arms_of(PAPER, list(EXPERIMENTS))}
    assert {path.stem for path in (folder / "configs").glob("*.yaml")} == names
    for name in names - {"alignment-0"}:
        settings = config.load(folder / "configs" / f"{name}.yaml")
        config_rules.validate(settings, 64)
        assert (settings.model.hidden, settings.vocab.image_codes, settings.optimizer.beta2) == (2048, 16_384, 0.95)
    scripts = {path.stem: path.read_text() for path in (folder / "jobs").glob("*.sbatch")}
    measured = {f"{what}-{start}-0" for what in ("samples", "fid") for start in ("pretrained", "random")}
    assert scripts.keys() == names | measured | {"probe"}
    for name, script in scripts.items():
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
        assert f"--gpus-per-node={1 if name in {*measured, 'probe', 'alignment-0'} else 8}\n" in script
    assert f"--pretrained pretrained/open_lm_1b --runs {folder}/runs/pretrained-0" in scripts["probe"]
    assert "set -- tools/evaluate.py fid" in scripts["fid-random-0"] and "coco30k" in scripts["fid-random-0"]
    assert re.search(r"^random-0 +100\.0B +\d+\.\d +1,\d{3} ", printed, re.MULTILINE)
    assert "model.pretrained=pretrained/open_lm_1b [paper]" in printed and "seed=0 [ours]" in printed


def script_forked(script: str, *arguments: str) -> None:
    """Run ``script`` as the command line would, in a fork of this process, which has imported PyTorch already."""
    process = multiprocessing.get_context("fork").Process(target=_script, args=(script, arguments))
    process.start()
    process.join()
    assert process.exitcode == 0, f"{script} {shlex.join(arguments)}"


def _script(script: str, arguments: tuple[str, ...]) -> None:
    gc.freeze()  # else a collection copies all pages of the parent's objects
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def test_the_papers_runs_train_two_steps_at_tiny_width_and_are_reported(repository, paper, smoke, monkeypatch):
    """All kinds of runs; of the sweep, which differs in numbers alone, the first."""
    folder, _ = paper
    out, data, _ = smoke
    monkeypatch.chdir(repository)
    runs = []
    for arm in arms_of(PAPER, list(EXPERIMENTS)):
        if arm.name.startswith("sweep") and "5e-05" not in arm.name:
            continue
        path = folder / "configs" / f"{arm.name}.yaml"
        files = [f"data.train=[{{prefix: {data / 'train'}}}]", f"data.valid={data / 'valid'}", "data.valid_text=null"]
        if config.load(path).model.pretrained:
            files.append(f"model.pretrained={out / 'pretrained'}")
        if arm.name.startswith("aligned"):
            files.append(f"model.expansion_file={out / 'runs/alignment-0/image_embeddings.safetensors'}")
        script_forked(arm.tool, "--config", str(path), *files, *TINY)
        runs.append(folder / "runs" / arm.name)
    assert len(runs) == 11
    for run in runs:
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert sum("split" not in line for line in steps) == 2
    arguments = ("--scale", "paper", "--report", "--output", folder, "--data", data)
    done = reproduce(repository, *arguments, "--only", "fig3", "fig4", "fig6", "fig7")
    assert done.returncode == 0, done.stderr
    text = (folder / "report.md").read_text()
    assert "SHA-256 of train.json" in text and f"sbatch {folder}/jobs/aligned-0.sbatch" in text
    assert "Not run: Table 1: forgetting, Figure 5" in text and "134 million pairs of HQITP" in text
    done = reproduce(repository, *arguments, "--only", "fig5")
    assert done.returncode == 1 and "is absent: run this experiment first" in done.stderr


@pytest.fixture
def submit(repository, tmp_path):
    """Calls ``--submit`` for the twins, with an ``sbatch`` on the PATH that counts and writes down what it is given."""
    data, queue = tmp_path / "data", tmp_path / "queue"
    (tmp_path / "model").mkdir()
    data.mkdir()
    for name in ("train.json", "valid.json", "text_valid.idx", "val2014", "pt_inception-2015-12-05-6726825d.pth"):
        (data / name).touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/reference.jsonl").touch()
    stand_in = tmp_path / "bin/sbatch"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {queue}\nwc -l < {queue}\n')
    stand_in.chmod(0o755)

    def call(*more, path: str = f"{stand_in.parent}:/usr/bin:/bin") -> subprocess.CompletedProcess:
        command = [sys.executable, "tools/reproduce_paper.py", "--scale", "paper", "--only", "fig5", "--submit"]
        command += ["--output", tmp_path / "out", "--data", data, "--pretrained", tmp_path / "model", *more]
        command = [str(word) for word in command]
        return subprocess.run(command, cwd=repository, capture_output=True, text=True, env={"PATH": path})

    call.queue, call.jobs, call.data = queue, tmp_path / "out/jobs", data
    return call


def test_submitting_without_slurm_is_one_error(submit, tmp_path):
    done = submit(path=str(tmp_path))
    assert done.returncode == 1 and done.stderr.endswith("submit from a machine of a SLURM cluster\n")


def test_nothing_is_submitted_where_a_file_is_missing(submit):
    (submit.data / "valid.json").unlink()
    done = submit()
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not submit.queue.exists()
    assert "nothing was submitted; missing: " in done.stderr and "data/valid.json (tools/prep" in done.stderr


def test_a_job_is_submitted_once_and_after_those_it_needs(submit):
    jobs = submit.jobs
    assert submit().returncode == 0
    first = submit.queue.read_text().splitlines()
    assert first[:2] == [f"--parsable {jobs}/pretrained-0.sbatch", f"--parsable {jobs}/random-0.sbatch"]
    assert first[2:4] == [
        f"--parsable --dependency=afterok:1 {jobs}/samples-pretrained-0.sbatch",
        f"--parsable --dependency=afterok:3 {jobs}/fid-pretrained-0.sbatch",
    ]
    assert submit().returncode == 0 and submit.queue.read_text().splitlines() == first
    (jobs / "pretrained-0.submitted.json").unlink()  # it failed: what waits for it is submitted again, and no more
    done = submit()
    again = submit.queue.read_text().splitlines()[len(first) :]
    assert [line.rpartition("/")[2] for line in again] == [
        f"{name}.sbatch" for name in ("pretrained-0", "samples-pretrained-0", "fid-pretrained-0")
    ]
    assert "afterok:7 " in again[1] and "samples-pretrained-0: job 8; scancel 3," in done.stdout
    before = (submit.jobs.parent / "configs/pretrained-0.yaml").read_bytes()
    done = submit("--pretrained", submit.data)  # its scripts would change under the queue
    assert done.returncode == 1 and "was submitted with other settings" in done.stderr
    assert (submit.jobs.parent / "configs/pretrained-0.yaml").read_bytes() == before
