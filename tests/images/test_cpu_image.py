"""The CPU image as another user's: read-only, without network, and nothing of how it was built left in it."""

import json
import mmap
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from images.containers import UID
from megat2i.config import to_yaml

LARGEST = 1.9e9  # bytes of the image's layers, not compressed
CODE = "/opt/megat2i"
# Asks a server for its page and its health, and ends it.
ASK = """
import json, subprocess, sys, time
from urllib.error import URLError
from urllib.request import urlopen
server = subprocess.Popen([sys.executable, sys.argv[1], "--run", sys.argv[2]])
while server.poll() is None:
    try:
        health = urlopen("http://127.0.0.1:8000/health")
        break
    except URLError:
        time.sleep(0.1)
page = urlopen("http://127.0.0.1:8000/").read().decode()
server.terminate()
print(json.dumps({"health": health.status, "page": page[:15], "code": server.wait()}))
"""


@pytest.fixture(scope="module")
def trained(storage, cpu_image, tiny_store, run_config, tmp_path_factory):
    """(folder of a run of five steps, the two launches that made it): three steps, then a resumed launch."""
    folder = tmp_path_factory.mktemp("runs")
    folder.chmod(0o777)
    (folder / "tiny.yaml").write_text(to_yaml(run_config(folder / "run")))
    tiny_store.chmod(0o755)
    mounts = {folder: str(folder), tiny_store: f"{tiny_store}:ro"}
    command = ("python", f"{CODE}/pretrain_t2i.py", "--config", str(folder / "tiny.yaml"))
    launches = [
        storage.run(cpu_image[0], *command, *arguments, mounts=mounts)
        for arguments in (["training.stop_at=3"], ["training.stop_at=5", "--resume"])
    ]
    return folder / "run", launches


@pytest.fixture(scope="module")
def layers(storage, cpu_image) -> Path:
    """Folder of the image's manifest, configuration and layers."""
    return storage.layers(cpu_image[0])


def test_revision_and_user_and_size(storage, cpu_image, repository):
    name, _ = cpu_image
    image = json.loads(storage.buildah("inspect", "--type", "image", name))["OCIv1"]["config"]
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=repository, text=True).strip()
    changes = subprocess.check_output(["git", "status", "--porcelain"], cwd=repository)
    revision = head + ("+changes" if changes else "")
    assert image["Labels"]["org.opencontainers.image.revision"] == revision
    assert f"MEGAT2I_REVISION={revision}" in image["Env"] and image["User"] == "1000:1000"


def test_size(cpu_image, layers):
    print(cpu_image[1])
    assert sum(blob.stat().st_size for blob in layers.iterdir()) < LARGEST


def test_sources_are_those_of_the_repository(storage, cpu_image, repository):
    done = storage.run(
        cpu_image[0], "find", CODE, "-type", "f", "-not", "-name", "*.pyc", "-not", "-path", "*.egg-info/*"
    )
    inside = {line.removeprefix(f"{CODE}/") for line in done.stdout.splitlines()}
    tracked = subprocess.check_output(["git", "ls-files"], cwd=repository, text=True).splitlines()
    assert set(tracked) - inside == {".ci/run", ".dockerignore", ".gitignore"}


def test_table_of_the_kernels(storage, cpu_image):
    done = storage.run(cpu_image[0])
    assert done.returncode == 0, done.stderr
    assert "AdamW                 torch AdamW (fused)" in done.stdout


def test_five_steps_and_a_resume(trained):
    run, launches = trained
    assert [done.returncode for done in launches] == [0, 0], launches[-1].stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "split" not in line] == [1, 2, 3, 4, 5]
    assert run.stat().st_uid == UID


def test_a_run_records_the_revision(storage, cpu_image, trained):
    run, _ = trained
    image = json.loads(storage.buildah("inspect", "--type", "image", cpu_image[0]))["OCIv1"]["config"]
    recorded = json.loads((run / "environment.json").read_text())["git_commit"]
    assert recorded == image["Labels"]["org.opencontainers.image.revision"]


def test_the_page_to_draw_on(storage, cpu_image, trained):
    run, _ = trained
    done = storage.run(cpu_image[0], "python", "-c", ASK, f"{CODE}/tools/serve.py", str(run), mounts={run: f"{run}:ro"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"health": 200, "page": "<!DOCTYPE html>", "code": 0}


def test_a_mounted_checkout_is_what_runs(storage, cpu_image, repository, tmp_path):
    for package in ("megat2i", "kernels"):
        shutil.copytree(repository / package, tmp_path / package)
    tmp_path.chmod(0o755)
    (tmp_path / "kernels/__main__.py").write_text("print('the mounted checkout')\n")
    done = storage.run(cpu_image[0], "python", "-m", "megat2i.kernels", mounts={tmp_path: f"{CODE}:ro"})
    assert done.stdout == "the mounted checkout\n", done.stderr


def test_no_trace_of_pips_settings(layers, secrets):
    assert traces(layers, secrets.traces) == []
    names = set()
    for blob in filter(tarfile.is_tarfile, layers.iterdir()):
        with tarfile.open(blob) as archive:
            names.update(archive.getnames())
    assert "opt/venv/bin/python" in names
    assert {name for name in names if Path(name).name == "pip.conf" or name.startswith("run/secrets/")} == set()


def test_a_trace_is_noticed(storage, base, secrets, tmp_path):
    """What the test above looks for is there where a build copies its secrets."""
    copy = "RUN --mount=type=secret,id=pip --mount=type=secret,id=ca cp -r /run/secrets /left"
    (tmp_path / "Dockerfile").write_text(f"FROM {base}\n{copy}\n")
    options = ("--secret", f"id=pip,src={secrets.conf}", "--secret", f"id=ca,src={secrets.certificate}")
    storage.buildah("bud", "--pull-never", *options, "--tag", "localhost/careless", str(tmp_path))
    noticed = traces(storage.layers("localhost/careless"), secrets.traces)
    assert set(secrets.traces[:2]) <= set(noticed)


def traces(layers: Path, needles: tuple[str, ...]) -> list[str]:
    """Those of ``needles`` that a blob of the image holds, its history included."""
    noticed = []
    for blob in layers.iterdir():
        with blob.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            noticed += [needle for needle in needles if content.find(needle.encode()) >= 0]
    return noticed
