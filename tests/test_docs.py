"""The pages in docs/: their commands run, and the messages that they explain are the program's."""

import ast
import multiprocessing
import re
import runpy
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megat2i.config import to_yaml

PAGES = ("on-one-machine.md", "on-slurm.md", "in-a-container.md", "when-something-goes-wrong.md")
PROGRAMS = ("pretrain_t2i.py", "tools/status.py", "tools/submit.py")
ON_A_CLUSTER = ("sbatch", "scancel", "mkdir", "SHARES=100")  # tests/slurm/test_page.py runs these lines


def commands(page: str) -> list[list[str]]:
    """The words of each command in the page's shell blocks, from the program on: without its launcher."""
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [line[next((i for i, word in enumerate(line) if word in PROGRAMS), 0) :] for line in lines if line]


def is_for_a_cluster(line: tuple[str, ...]) -> bool:
    submits = line[0] == "tools/submit.py" and "--dry-run" not in line
    return line[0] in ON_A_CLUSTER or submits


@pytest.mark.slow
def test_the_commands_run(repository, run_config, tmp_path, monkeypatch):
    """Each once, in one process: launchers of several ranks have tests of their own, and so has --watch."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    config = run_config(Path("runs/mine"))
    training = replace(config.training, global_batch_size=64, micro_batch_size=1)  # also fits the page's 64 GPUs
    (tmp_path / "configs" / "mine.yaml").write_text(to_yaml(replace(config, training=training)))
    lines = [tuple(line) for page in PAGES for line in commands((repository / "docs" / page).read_text())]
    assert len(lines) >= 8
    requests = (repository / "megat2i/save_requests.py").read_text()
    for program, *arguments in dict.fromkeys(line for line in lines if not is_for_a_cluster(line)):
        if program == "touch":
            (path,) = map(Path, arguments)
            assert path.parent.is_dir() and f'"triggers/{path.name}"' in requests
        elif "--watch" not in arguments:
            assert program in PROGRAMS
            run_program(repository / program, arguments)


def run_program(program: Path, arguments: list[str]) -> None:
    """Run ``program`` in a forked process; fails where it ends with an error."""

    def run() -> None:
        sys.argv = [str(program), *arguments]
        runpy.run_path(str(program), run_name="__main__")

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(120)
    assert process.exitcode == 0, [program.name, *arguments]


def templates(repository: Path) -> list[str]:
    """All texts in the product's sources, with … for each value that is put in."""
    found = []
    for path in [*repository.glob("megat2i/**/*.py"), repository / "pretrain_t2i.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def symptoms(page: str) -> list[str]:
    """The messages in the first column of its table."""
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    return [symptom for row in rows for symptom in re.findall(r"`([^`]+)`", row)]


def test_the_messages_are_the_programs(repository):
    page = (repository / "docs" / PAGES[3]).read_text()
    listed, texts = symptoms(page), templates(repository)
    assert len(listed) > 20
    assert [symptom for symptom in listed if not any(symptom in text for text in texts)] == []
    assert not any("… holds a walk already" in text for text in texts)
