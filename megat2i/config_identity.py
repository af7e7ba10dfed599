"""Which settings make a run what it is, and which only say how it is executed."""

import dataclasses

from megat2i.config import Config, ParallelConfig, SamplingConfig

# Fields that say how a run is executed, not what it computes: a resumed run may change them.
EXECUTION_FIELDS = {
    "run": {"dir"},
    "training": {
        "stop_at",
        "micro_batch_size",
        "evaluate_every",
        "evaluate_samples",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_every",
        "on_spike",
        "spike_sigma",
        "asynchronous_checkpoints",
        "sample_every",
    },
    "optimizer": {"engine", "reduce_dtype"},
    "parallel": {f.name for f in dataclasses.fields(ParallelConfig)},
    "runtime": {"device", "self_test", "watchdog_s"},
    "sampling": {f.name for f in dataclasses.fields(SamplingConfig)},
}


def changed_identity(before: Config, after: Config) -> list[str]:
    """Keys that differ and decide what the run computes, as ``section.key: before -> after``."""
    changes = []
    for key, (old, new) in _differences(before, after).items():
        section, name = key.split(".")
        if name not in EXECUTION_FIELDS.get(section, ()):
            changes.append(f"{key}: {old} -> {new}")
    return changes


def changed_keys(before: Config, after: Config) -> dict:
    """The values in ``after`` of all keys ``section.key`` that differ."""
    return {key: new for key, (_, new) in _differences(before, after).items()}


def _differences(before: Config, after: Config) -> dict[str, tuple]:
    """``section.key``: (value before, value after) of all keys that differ."""
    differences = {}
    for section in dataclasses.fields(Config):
        old, new = getattr(before, section.name), getattr(after, section.name)
        for item in dataclasses.fields(old):
            values = getattr(old, item.name), getattr(new, item.name)
            if values[0] != values[1]:
                differences[f"{section.name}.{item.name}"] = values
    return differences
