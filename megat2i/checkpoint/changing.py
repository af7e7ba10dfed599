"""Writing a checkpoint again with changed tensors, one of them in memory at a time, without ranks or an engine."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from megat2i.checkpoint.folder import Checkpoint, write_manifest, write_rank
from megat2i.checkpoint.loading import read_tensor
from megat2i.optim.engine import Fragment
from megat2i.parallel.shard import Shard
from megat2i.progress import progress


def write_changed(found: Checkpoint, folder: Path, change: Callable[[str, str, Tensor], Tensor]) -> None:
    """Write ``folder/step-N`` with ``change(name, kind, tensor)`` for every whole tensor of ``found``, in float32.

    Each parameter gets a file of its own, as a rank would. To be called in a folder that nobody reads yet.
    """
    target = folder / f"step-{found.step}"
    target.mkdir(parents=True)
    kinds: dict[str, set[str]] = {}
    for part in found.manifest["parts"]:
        kinds.setdefault(part["name"], set()).add(part["kind"])
    for number, name in enumerate(progress(sorted(kinds), f"writing {folder}", "tensors")):
        fragments = []
        for kind in sorted(kinds[name]):
            values = change(name, kind, read_tensor(found, name, kind))
            shard = Shard.whole(tuple(values.shape))
            fragments.append(Fragment(name, kind, shard, 0, values.contiguous().view(-1), written=True))
        write_rank(target, number, fragments)
    content = {key: found.manifest[key] for key in ("step", "optimizer_updates", "written_by")}
    write_manifest(target, len(kinds), content)
