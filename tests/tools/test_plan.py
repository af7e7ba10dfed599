"""tools/plan.py as a user calls it, and the plans that the configs carry."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from megat2i import config
from megat2i.planner.hardware import GPUS
from megat2i.planner.layout import Job
from megat2i.planner.ranking import plan
from megat2i.planner.report import report

PLANNED = ("open_lm_1b_t2i", "t2i_3b", "t2i_7b", "t2i_13b", "t2i_30b")


@pytest.fixture(scope="module")
def tool(repository):
    spec = importlib.util.spec_from_file_location("plan", repository / "tools/plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(repository):
    """Function of arguments -> the finished process."""

    def call(*arguments):
        command = [sys.executable, str(repository / "tools/plan.py"), *map(str, arguments)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)

    return call


@pytest.mark.parametrize("name", PLANNED)
def test_configs_carry_what_the_tool_prints_and_use_the_best_layout(repository, tool, name):
    path = repository / f"configs/{name}.yaml"
    settings = config.load(path)
    planned = plan(Job.of(settings), 64, GPUS["a100-80"])
    command = f"python tools/plan.py --config configs/{name}.yaml --gpus 64 --gpu a100-80"
    expected = tool.with_comment(path.read_text(), f"{command}\n\n{report(planned)}")
    assert path.read_text() == expected, f"run {command} --write"
    parallel, best = settings.parallel, planned[0].layout
    assert (parallel.tensor, parallel.pipeline, parallel.sequence) == (best.tensor, best.pipeline, best.sequence)
    assert (parallel.schedule, parallel.virtual_stages) == (best.schedule, best.virtual_stages)
    assert (parallel.recompute, settings.training.micro_batch_size) == (best.recompute, best.micro_batch)
    assert planned[0].fits


def test_a_plan_as_text_json_and_comment(run, repository, tmp_path):
    path = tmp_path / "small.yaml"
    source = (repository / "configs/open_lm_1b_t2i.yaml").read_text()
    path.write_text(source)
    result = run("--config", path, "--gpus", 8, "--gpu", "h100-80", "--json", tmp_path / "plan.json", "--write")
    assert result.returncode == 0, result.stderr
    assert "8 x h100-80" in result.stdout and "best: " in result.stdout and "layers of its" in result.stdout
    layouts = json.loads((tmp_path / "plan.json").read_text())["layouts"]
    first = layouts[0]
    assert {"tensor", "pipeline", "data", "fits", "memory_gb", "tokens_per_s_per_gpu", "mfu"} <= set(first)
    assert first["fits"] and all(x["tensor"] * x["pipeline"] * x["data"] == 8 for x in layouts)
    speeds = [x["tokens_per_s_per_gpu"] for x in layouts if x["fits"]]
    assert speeds == sorted(speeds, reverse=True)
    written = path.read_text()
    assert written != source and "--gpus 8 --gpu h100-80" in written
    assert config.load(path) == config.load(repository / "configs/open_lm_1b_t2i.yaml")


def test_the_comment_is_put_in_and_replaced(tool):
    once = tool.with_comment("# about\n\na: 1\n", "one\n\ntwo")
    assert once == f"# about\n\n{tool.BEGIN}\n# one\n#\n# two\n{tool.END}\na: 1\n"
    assert tool.with_comment(once, "three") == f"# about\n\n{tool.BEGIN}\n# three\n{tool.END}\na: 1\n"


def test_the_validation(run):
    result = run("--validate")
    assert result.returncode == 0 and "MPT-1B" in result.stdout and "held out" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--config"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
        (("--gpu", "abacus"), "a100-80"),
        (("--config", "CONFIG", "--gpus", "37"), "37 GPUs"),
        (("--config", "CONFIG", "--gpus", "0"), "--gpus"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, repository, arguments, words):
    path = str(repository / "configs/open_lm_1b_t2i.yaml")
    result = run(*(path if argument == "CONFIG" else argument for argument in arguments))
    assert result.returncode != 0 and words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
