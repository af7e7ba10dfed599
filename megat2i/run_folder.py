"""What a run writes about itself: configuration, environment, identity of its data, copies of its tokenizers."""

import dataclasses
import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megat2i import config
from megat2i.config import Config, ConfigError
from megat2i.config_identity import changed_identity, changed_keys
from megat2i.data.manifest import Manifest
from megat2i.files import DataFileError, fsync_folder, read_json_object, store_path, write_file
from megat2i.progress import say
from megat2i.slurm import job_record
from megat2i.trainer import RunError

CONFIG, ENVIRONMENT, DATA, METRICS = "config.yaml", "environment.json", "data.json", "metrics.jsonl"


def with_recorded(settings: Config) -> Config:
    """The settings of a run to be resumed: what they leave to the machine or to the data is as the run recorded it."""
    if not (Path(settings.run.dir) / CONFIG).exists():
        return settings
    recorded, data, runtime = _recorded_settings(Path(settings.run.dir)), settings.data, settings.runtime
    if data.sequence_length is None:
        data = dataclasses.replace(data, sequence_length=recorded.data.sequence_length)
    if runtime.dtype == "auto":
        runtime = dataclasses.replace(runtime, dtype=recorded.runtime.dtype)
    return dataclasses.replace(settings, data=data, runtime=runtime)


def check(run_dir: Path, settings: Config, resume: bool) -> None:
    """Nothing that a run wrote is overwritten, and a resumed run is the same run on the same data; raises RunError.

    Run by every rank before the process group starts, so that all of them stop at the same problem.
    """
    _tokenizers(settings)
    begun = (run_dir / METRICS).exists() or (run_dir / "checkpoints").exists()
    if not resume:
        if begun:
            raise RunError(f"{run_dir} holds a run already: continue it with --resume, or choose another run.dir")
        return
    if not (run_dir / CONFIG).exists() and not begun:
        raise RunError(f"{run_dir / CONFIG} does not exist: there is no run to resume; start without --resume")
    changes = changed_identity(_recorded_settings(run_dir), settings)
    saved, present = _recorded_data(run_dir), data_identity(settings)
    changes += [f"the content of {prefix}" for prefix in saved if saved[prefix] != present.get(prefix, saved[prefix])]
    if changes:
        raise RunError(
            f"{run_dir} was started otherwise, so --resume would not continue it: {'; '.join(changes)}. Give the "
            "settings and data of the run, or start a new one in another run.dir. To train on from its checkpoint with "
            f"other settings, such as more steps: python tools/convert_checkpoint.py --from run {run_dir} NEW_DIR "
            "--to run --config FILE, then --resume in NEW_DIR"
        )


def write(run_dir: Path, settings: Config, engine: str, environment: dict, resume: bool = False) -> None:
    """``config.yaml`` (resolved), ``data.json``, the tokenizers, and one more entry in ``environment.json``.

    The first two are written once: a launch with ``resume`` leaves them alone, so that no kill can take them away.
    ``environment.json`` describes this launch; its ``earlier`` lists the launches before it, and ``changed_settings``
    the settings that are not those of ``config.yaml``. For the one that holds the lock of ``run_dir``.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(run_dir)
    for kind, (name, content) in _tokenizers(settings).items():  # so that the folder is all that sampling needs
        _keep_tokenizer(run_dir / "tokenizers" / kind, name, content)
    resolved = dataclasses.replace(settings, optimizer=dataclasses.replace(settings.optimizer, engine=engine))
    if not resume:
        (run_dir / CONFIG).unlink(missing_ok=True)  # of a first launch that was killed, perhaps on other data
        fsync_folder(run_dir)
        write_file(run_dir / DATA, (json.dumps(data_identity(settings), indent=1) + "\n").encode())
        # Last: where there is a configuration, all that a resumed launch needs is there.
        write_file(run_dir / CONFIG, config.to_yaml(resolved).encode())
    environment = environment | {
        "git_commit": _git_commit(),
        "image": os.environ.get("MEGAT2I_IMAGE") or None,
        "slurm": job_record(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("megat2i", "torch", "deepspeed", "triton", "numpy")},
        "changed_settings": changed_keys(_recorded_settings(run_dir), resolved) if resume else {},
        "earlier": _earlier_launches(run_dir / ENVIRONMENT),
    }
    write_file(run_dir / ENVIRONMENT, (json.dumps(environment, indent=1) + "\n").encode())


def _recorded_settings(run_dir: Path) -> Config:
    """The settings that the run was started with; raises RunError where they cannot be read."""
    try:
        return config.load(run_dir / CONFIG)
    except ConfigError as error:
        raise RunError(
            f"{error}: this file is the run's record of its settings; restore it from a copy, or copy the "
            f"configuration that the run was started with to {run_dir / CONFIG}"
        ) from error


def _recorded_data(run_dir: Path) -> dict:
    """The identity of the data that the run was started on; raises DataFileError where it cannot be read."""
    remedy = (
        "It says which data the run was started on; restore it from a copy, or train on in another folder on the data "
        f"as they are: python tools/convert_checkpoint.py --from run {run_dir} NEW_DIR --to run --config FILE"
    )
    return read_json_object(run_dir / DATA, remedy)


def _earlier_launches(path: Path) -> list[dict]:
    """The launches that ``environment.json`` lists; a damaged one is set aside, since a run does not depend on it."""
    if not path.exists():
        return []
    try:
        last = read_json_object(path, "It is set aside")
        earlier = last.pop("earlier", None)
        if not isinstance(earlier, list):
            raise DataFileError(path, "'earlier' is no list of launches", "It is set aside")
    except DataFileError as error:
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        say(f"{error} as {aside.name}; the run goes on without the record of its earlier launches")
        return []
    return [*earlier, last]


def _keep_tokenizer(folder: Path, name: str, content: bytes) -> None:
    """Make ``folder`` hold one file, with this ``content``; one that has it already is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(path for path in folder.iterdir() if path.is_file())
    if len(present) == 1 and present[0].read_bytes() == content:
        return
    write_file(folder / name, content)
    for path in present:
        if path.name != name:
            path.unlink()


def _remove_leftovers(run_dir: Path) -> None:
    """Temporary files of launches that were killed; what other programs write beside them is not touched."""
    patterns = [f"{name}.*.tmp" for name in (CONFIG, DATA, ENVIRONMENT, METRICS)]
    for pattern in (*patterns, "tokenizers/*/*.tmp"):
        for path in run_dir.glob(pattern):
            path.unlink()


def require_shared(run_dir: Path) -> None:
    """Raises RunError on all ranks where one does not see what the first one wrote. Collective."""

    def digest() -> Tensor:
        path = run_dir / ENVIRONMENT
        content = path.read_bytes() if path.exists() else b""
        return torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8).int().to(device)

    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    first = digest()
    dist.broadcast(first, src=0)  # which also waits until the first rank has written
    blind = torch.tensor(int(not torch.equal(first, digest())), device=device)
    dist.all_reduce(blind)
    if blind:
        raise RunError(
            f"{int(blind)} ranks do not see what the first one wrote to {run_dir.resolve()}: run.dir must be on a file "
            "system that all nodes share"
        )


def data_identity(settings: Config) -> dict[str, dict[str, str]]:
    """Digests of every dataset: of its index, and of its tokens where a manifest lists them."""
    prefixes = [dataset.prefix for dataset in settings.data.train]
    prefixes += [prefix for prefix in (settings.data.valid, settings.data.valid_text) if prefix]
    identity = {}
    for prefix in prefixes:
        manifest = Manifest.read(prefix)
        if manifest:
            blocks = hashlib.sha256("".join(manifest.bin_blocks.sha256).encode()).hexdigest()
            identity[prefix] = {"index": manifest.index_sha256, "tokens": blocks}
        else:
            identity[prefix] = {"index": _file_sha256(store_path(prefix, ".idx"))}
    return identity


def _file_sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataFileError(path, f"cannot be read: {error.strerror}", "Check the prefixes in data") from error


def _tokenizers(settings: Config) -> dict[str, tuple[str, bytes]]:
    """(file name, content) of the tokenizers of the first dataset by modality; raises DataFileError."""
    prefix = settings.data.train[0].prefix
    manifest = Manifest.read(prefix)
    found = {}
    for name in ("text", "image") if manifest else ():
        content = getattr(manifest, name)
        if content is None:
            continue
        source = Path(prefix).parent / content.tokenizer
        if not source.is_file():
            raise DataFileError(source, f"the {name} tokenizer of {prefix} is missing", "Put it back beside the data")
        found[name] = (source.name, source.read_bytes())
        if hashlib.sha256(found[name][1]).hexdigest() != content.sha256:
            raise DataFileError(source, f"is not the {name} tokenizer that wrote {prefix}", "Restore the original file")
    if settings.training.sample_every and "image" not in found:
        raise RunError(
            f"training.sample_every needs tokenizers, and {prefix} names none: set it to 0, or restore {prefix}.json"
        )
    return found


def _git_commit() -> str | None:
    """Commit of the source tree, with "+changes" where it was edited; None where it is not known.

    An image has no history, but the commit that it was built from in MEGAT2I_REVISION. That of a checkout which is
    mounted over the image's code is another one, also where git is missing or refuses to read it.
    """
    source = Path(__file__).resolve().parent
    if not any((folder / ".git").exists() for folder in source.parents):
        return os.environ.get("MEGAT2I_REVISION") or None
    try:
        commit_id = subprocess.check_output(
            ["git", "rev-parse", "HEAD"], cwd=source, text=True, stderr=subprocess.DEVNULL
        )
        changes = subprocess.check_output(["git", "status", "--porcelain"], cwd=source, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit_id.strip() + ("+changes" if changes.strip() else "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
