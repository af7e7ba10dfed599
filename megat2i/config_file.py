"""The YAML of a configuration, read without trust: bounded in size and depth, and without OmegaConf's resolvers.

A run folder may be someone else's. libyaml composes nested lists by recursion and dies of deep ones, hence its events
are looked at first; a resolver such as ${oc.env:NAME} would carry the environment into records.
"""

import io
from pathlib import Path

import yaml
from omegaconf import OmegaConf

MAXIMUM_BYTES = 1 << 20
MAXIMUM_DEPTH = 50


def read(path: Path):
    """The content of the YAML file as OmegaConf has it. ValueError, YAML's or OmegaConf's error where it is none."""
    with open(path, "rb") as file:
        content = file.read(MAXIMUM_BYTES + 1)
    if len(content) > MAXIMUM_BYTES:
        raise ValueError(f"more than {MAXIMUM_BYTES:,} bytes")
    text = content.decode()
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAXIMUM_DEPTH:
            raise ValueError(f"nested more than {MAXIMUM_DEPTH} deep")
    return OmegaConf.load(io.StringIO(text))


def resolver(content) -> str | None:
    """The key of the first value of an OmegaConf ``content`` that calls a resolver, or None."""
    return _find(OmegaConf.to_container(content, resolve=False), "")


def _find(value, key: str) -> str | None:
    if isinstance(value, str):
        return key if ":" in value.partition("${")[2] else None
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = (_find(inner, f"{key}.{name}" if key else str(name)) for name, inner in items)
    return next((one for one in found if one), None)
