"""What people met in their first hour with the tools."""

import ast
import json
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image


@pytest.fixture
def call(repository):
    """Function of (tool, arguments) -> the finished process."""

    def run(name, *arguments, **variables) -> subprocess.CompletedProcess:
        command = [sys.executable, str(repository / name), *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)

    return run


def draw(folder, number: int, size=(40, 24)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture = Image.effect_noise(size, 90).convert("RGB")
    picture.save(folder / f"{number}.png")
    (folder / f"{number}.txt").write_text(f"a red circle, number {number}")


def test_every_tool_imports_megat2i_before_torch(repository):
    """megat2i sets how waiting threads behave, which counts only where torch is not loaded yet."""
    for path in [*sorted((repository / "tools").glob("*.py")), repository / "pretrain_t2i.py"]:
        nodes = sorted(ast.walk(ast.parse(path.read_text())), key=lambda node: getattr(node, "lineno", 0))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        lines = {}
        for node in nodes:
            if isinstance(node, ast.Import | ast.ImportFrom):
                roots = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                for root in roots:
                    lines.setdefault(root.split(".")[0], node.lineno)
        others = [lines[name] for name in lines if name not in sys.stdlib_module_names and name != "megat2i"]
        assert "megat2i" in lines or not others, f"{path.name}: {names}"
        assert all(lines["megat2i"] < line for line in others), f"{path.name} imports another package first"


def test_a_padded_dataset_hands_its_crop_on(call, tmp_path):
    for number in range(6):
        draw(tmp_path / "photos/sub", number)
    for ending in ("bmp", "BMP", "gif"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"photos/x{ending}.{ending}")
    done = call(
        "tools/preprocess_data.py", "--input", tmp_path / "photos", "--output-prefix", tmp_path / "data/train",
        "--train-text-tokenizer", 300, "--image-size", 16, "--patch-size", 4, "--codebook-size", 16, "--crop", "pad",
        "--workers", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("3 files of other kinds not looked at: .bmp 2, .gif 1\n")
    tokenizer = tmp_path / "data/image_tokenizer.safetensors"
    second = call(
        "tools/preprocess_data.py", "--input", tmp_path / "photos", "--output-prefix", tmp_path / "data/valid",
        "--text-tokenizer", tmp_path / "data/text_tokenizer.json", "--image-tokenizer", tokenizer, "--workers", 1,
    )  # fmt: skip
    assert second.returncode == 0, second.stderr
    crops = {json.loads((tmp_path / f"data/{name}.json").read_text())["image"]["crop"] for name in ("train", "valid")}
    assert crops == {"pad"}
    output = tmp_path / "copies.json"
    measured = call(
        "tools/evaluate.py", "reconstruction", "--images", tmp_path / "photos", "--image-tokenizer", tokenizer,
        "--protocol", "nano", "--output", output,
    )  # fmt: skip
    assert measured.returncode == 0, measured.stderr
    record = json.loads(output.read_text())
    assert record["image_tokenizer"]["crop"] == "pad" and record["images"]["images"] == 6


@pytest.fixture(scope="module")
def trained(pretrain, tmp_path_factory):
    """Folder of a tiny run after two steps."""
    folder = tmp_path_factory.mktemp("newcomer") / "run"
    process = pretrain(folder, "training.steps=2", "training.warmup_steps=1")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, output + errors
    return folder


def test_checkpoints_are_as_open_as_the_umask_lets_them_be(trained):
    (part,) = (trained / "checkpoints/step-2").glob("*.safetensors")
    manifest = part.parent / "manifest.json"
    assert part.stat().st_mode == manifest.stat().st_mode


def test_a_folder_of_samples_holds_those_of_one_call(call, trained, tmp_path):
    output, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_bytes("\ufeffred circle\r\n".encode())
    common = ("--run", trained, "--output", output)
    assert call("tools/generate.py", *common, "--prompts", "blue hut", "green square").returncode == 0
    shutil.copy(output / "grid.png", output / "mine.png")
    done = call("tools/generate.py", *common, "--prompts-file", prompts)
    assert done.returncode == 0 and done.stdout.startswith("1 image and grid.png in ")
    assert sorted(os.listdir(output)) == ["00000-red-circle-0.png", "grid.png", "mine.png", "samples.jsonl"]
    assert json.loads((output / "samples.jsonl").read_text())["prompt"] == "red circle"
    (output / "samples.jsonl").write_text('{"file": "../precious.png"}\n')
    (tmp_path / "precious.png").write_bytes(b"")
    refused = call("tools/generate.py", *common, "--prompts", "blue hut")
    assert refused.returncode == 1 and "samples.jsonl: no list of samples" in refused.stderr
    assert (tmp_path / "precious.png").exists()


def test_a_checkout_beside_an_installed_wheel_is_one_sentence(repository, tmp_path):
    shutil.copytree(repository / "megat2i", tmp_path / "megat2i", ignore=shutil.ignore_patterns("kernels"))
    shutil.copy(repository / "pretrain_t2i.py", tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "pretrain_t2i.py", "--config", "x.yaml"]  # -S: without what is installed here
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: megat2i.kernels is missing: ") and "pip install" in done.stderr


def test_a_planner_reads_what_the_data_say(call, tmp_path, tiny_store):
    config = tmp_path / "mine.yaml"
    config.write_text(f"data: {{train: [{{prefix: {tiny_store / 'train'}}}]}}\n")
    done = call("tools/plan.py", "--config", config, "--gpus", 8, "training.global_batch_size=32")
    assert done.returncode == 0, done.stderr
    assert "32 x 16 tokens a step" in done.stdout


def test_a_run_folder_that_cannot_be_made_is_one_sentence(pretrain, tmp_path):
    (tmp_path / "file").write_text("")
    process = pretrain(tmp_path / "run", f"run.dir={tmp_path / 'file/run'}")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1 and errors.splitlines()[-1].endswith(
        "cannot be made or written (Not a directory): choose another run.dir"
    )
    assert "Traceback" not in errors


def test_a_refused_resume_says_how_to_train_longer(pretrain, trained):
    process = pretrain(trained, "training.steps=9", "--resume")
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 1 and f"convert_checkpoint.py --from run {trained} NEW_DIR --to run" in errors


def test_comparing_into_a_closed_pipe_is_silent(repository, trained):
    command = (
        f"{sys.executable} {repository / 'tools/compare_runs.py'} {trained} {trained} | true; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == "" and done.returncode in (0, 141)
