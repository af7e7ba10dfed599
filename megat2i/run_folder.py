"""What a run writes about itself: configuration, environment, identity of its data, copies of its tokenizers."""

import dataclasses
import hashlib
import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megat2i import config
from megat2i.config import Config
from megat2i.config_identity import changed_identity
from megat2i.data.manifest import Manifest
from megat2i.files import DataFileError, PendingFile, commit, store_path
from megat2i.trainer import RunError

CONFIG, ENVIRONMENT, DATA = "config.yaml", "environment.json", "data.json"


def with_recorded(settings: Config) -> Config:
    """The settings of a run to be resumed: what they leave to the machine or to the data is as the run recorded it."""
    path = Path(settings.run.dir) / CONFIG
    if not path.exists():
        return settings
    recorded, data, runtime = config.load(path), settings.data, settings.runtime
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
    if not resume:
        if (run_dir / "metrics.jsonl").exists() or (run_dir / "checkpoints").exists():
            raise RunError(f"{run_dir} holds a run already: continue it with --resume, or choose another run.dir")
        return
    if not (run_dir / CONFIG).exists():
        raise RunError(f"{run_dir / CONFIG} does not exist: there is no run to resume; start without --resume")
    changes = changed_identity(config.load(run_dir / CONFIG), settings)
    saved, present = json.loads((run_dir / DATA).read_text()), data_identity(settings)
    changes += [f"the content of {prefix}" for prefix in saved if saved[prefix] != present.get(prefix, saved[prefix])]
    if changes:
        raise RunError(
            f"{run_dir} was started otherwise, so --resume would not continue it: {'; '.join(changes)}. Give the "
            "settings and data of the run, or start a new one in another run.dir. To train on from its checkpoint with "
            f"other settings, such as more steps: python tools/convert_checkpoint.py --from run {run_dir} NEW_DIR "
            "--to run --config FILE, then --resume in NEW_DIR"
        )


def write(run_dir: Path, settings: Config, engine: str, environment: dict) -> None:
    """``config.yaml`` (resolved), ``data.json``, the tokenizers, and one more entry in ``environment.json``.

    ``environment.json`` describes this launch; its ``earlier`` lists the launches before it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    for kind, (name, content) in _tokenizers(settings).items():  # so that the folder is all that sampling needs
        (run_dir / "tokenizers" / kind).mkdir(parents=True, exist_ok=True)
        file = PendingFile(run_dir / "tokenizers" / kind / name)
        file.write(content)
        commit([file])
    before = json.loads((run_dir / ENVIRONMENT).read_text()) if (run_dir / ENVIRONMENT).exists() else None
    earlier = [*before.pop("earlier"), before] if before else []
    environment = environment | {
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("megat2i", "torch", "deepspeed", "triton", "numpy")},
        "earlier": earlier,
    }
    resolved = dataclasses.replace(settings, optimizer=dataclasses.replace(settings.optimizer, engine=engine))
    files = []
    for name, text in (
        (CONFIG, config.to_yaml(resolved)),
        (DATA, json.dumps(data_identity(settings), indent=1) + "\n"),
        (ENVIRONMENT, json.dumps(environment, indent=1) + "\n"),
    ):
        files.append(PendingFile(run_dir / name))
        files[-1].write(text.encode())
    commit(files)


def make(run_dir: Path) -> None:
    """Make the folder of a run; raises RunError on every rank that cannot."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{run_dir} cannot be made ({error.strerror}): choose another run.dir") from error


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
    """Commit of the source tree, with "+changes" where it was edited; None outside a checkout."""
    source = Path(__file__).resolve().parent
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
