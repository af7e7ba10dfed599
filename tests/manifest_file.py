"""Changes a store's manifest, as a tool of another release or a hand at an editor would."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path


def change_manifest(prefix: str | Path, change: Callable[[dict], object], sign: bool = True) -> None:
    """Apply ``change`` to the content of PREFIX.json; with ``sign`` its digest of itself is made to match again."""
    path = Path(f"{prefix}.json")
    value = json.loads(path.read_text())
    change(value)
    if sign and "sha256" in value:
        fields = {key: field for key, field in value.items() if key not in ("format_version", "sha256")}
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        value["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(value))


def as_older_format(value: dict) -> None:
    """The content of a manifest as releases wrote it whose manifests had no digest of themselves."""
    value["format_version"] = 1
    del value["sha256"]
