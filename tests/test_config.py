"""The configuration: what loads, and one clear error for everything else."""

import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest

from megat2i import config
from megat2i.config import ConfigError, DatasetConfig, load, to_yaml
from megat2i.config_identity import EXECUTION_FIELDS, changed_identity
from megat2i.config_rules import validate

REPOSITORY_CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("**/*.y*ml"))
WORLD_SIZES = {"openmoji_demo": 1, "nano": 1}  # all others: 64


@pytest.mark.parametrize("path", REPOSITORY_CONFIGS, ids=lambda path: path.stem)
def test_every_config_of_the_repository_can_be_run(path):
    validate(load(path), WORLD_SIZES.get(path.stem, 64))


def test_the_repository_has_its_configs():
    names = {path.stem for path in REPOSITORY_CONFIGS}
    assert {"openmoji_demo", "open_lm_1b_t2i", "t2i_3b", "t2i_7b", "t2i_13b", "t2i_30b"} <= names


@pytest.fixture
def file(tmp_path):
    """Function of YAML text -> path."""

    def write(text="data: {train: [{prefix: a/b}]}"):
        (tmp_path / "c.yaml").write_text(text)
        return tmp_path / "c.yaml"

    return write


def refused(path, overrides=()) -> str:
    """The message of the refusal: one line."""
    with pytest.raises(ConfigError) as caught:
        load(path, list(overrides))
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def test_overrides_come_after_the_file(file):
    settings = load(file("model: {hidden: 64, heads: 4}"), ["model.heads=2", "data.train=[{prefix: x, weight: 2}]"])
    assert (settings.model.hidden, settings.model.heads) == (64, 2)
    assert settings.data.train == [DatasetConfig("x", 2.0)]
    assert load(file("")) == config.Config()
    assert load(file(), ["training.stop_at=3"]).training.stop_at == 3
    assert load(file("training: {stop_at: 3}"), ["training.stop_at=null"]).training.stop_at is None


@pytest.mark.parametrize(
    ("override", "key", "suggestion"),
    [
        ("trainng.steps=3", "trainng", "training"),
        ("training.step=3", "training.step", "training.steps"),
        ("model.hiden=3", "model.hiden", "model.hidden"),
        ("zzz=3", "zzz", None),
        ("model.zzz=3", "model.zzz", None),
    ],
)
def test_an_unknown_key_is_named_with_a_suggestion(file, override, key, suggestion):
    message = refused(file(), [override])
    assert f"'{key}'" in message and "unknown key" in message
    assert (f"did you mean '{suggestion}'" in message) if suggestion else ("did you mean" not in message)


@pytest.mark.parametrize("text", ["model: {hiden: 3}", "modle: {hidden: 3}", "data: {train: [{prefx: a}]}"])
def test_an_unknown_key_of_the_file_names_the_file(file, text):
    message = refused(file(text))
    assert "c.yaml" in message and "did you mean" in message


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("model.hidden=wide", "model.hidden"),
        ("model.hidden=1.5", "model.hidden"),
        ("model.hidden=null", "model.hidden"),
        ("model.qk_norm=perhaps", "model.qk_norm"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("training=5", "training"),
        ("training=null", "training"),
        ("data.train=5", "data.train"),
        ("data.train=[a]", "data.train"),
        ("data.train=[{prefix: a, weight: x}]", "data.train"),
        ("run.dir=[1]", "run.dir"),
        ("model.hidden=${nowhere}", "model.hidden"),
        ("model.hidden=???", "model.hidden"),
    ],
)
def test_a_wrong_type_is_named(file, override, key):
    assert key in refused(file(), [override])


@pytest.mark.parametrize(
    "override",
    [
        "data.mode=video",
        "model.norm=batch_norm",
        "model.positions=learned",
        "optimizer.engine=jax",
        "runtime.device=tpu",
        "runtime.dtype=float16",
        "data.sequence_length=3",
        "data.caption_dropout=1.5",
        "model.hidden=0",
        "model.layers=0",
        "model.heads=-1",
        "model.ffn=0",
        "training.steps=0",
        "training.stop_at=0",
        "training.global_batch_size=0",
        "training.micro_batch_size=0",
        "training.warmup_steps=-1",
        "training.evaluate_every=-1",
        "training.keep_checkpoints=0",
        "training.keep_every=-1",
        "training.on_spike=stop",
        "training.spike_sigma=0",
        "optimizer.lr=-1",
        "optimizer.lr=nan",
        "optimizer.lr=inf",
        "optimizer.clip=-1",
        "loss.text=-1",
        "loss.z_loss=nan",
        "sampling.temperature=0",
        "sampling.top_p=0",
        "sampling.top_p=1.5",
        "sampling.top_k=-1",
        "vocab.text_tokens=0",
        "vocab.image_codes=-5",
        "optimizer.beta1=1.0",
        "optimizer.beta2=-0.1",
        "optimizer.eps=-1",
        "model.norm_eps=-1",
        "model.rotary_base=0",
        "data.seed=-1",
    ],
)
def test_a_value_out_of_range_is_named(file, override):
    assert override.split("=")[0] in refused(file(), [override])


@pytest.mark.parametrize("override", ["steps", "=3", "training.steps", ".=3", "a..b=3", "training.steps.x=3"])
def test_a_malformed_override_is_an_error(file, override):
    refused(file(), [override])


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "just words", "3", "a: 1\na: 2", "\x00"])
def test_a_file_that_is_no_mapping_is_an_error(file, text):
    assert "c.yaml" in refused(file(text))


def test_a_missing_file_is_an_error(tmp_path):
    assert "nothing.yaml" in refused(tmp_path / "nothing.yaml")
    assert str(tmp_path) in refused(tmp_path)


@pytest.mark.parametrize("text", ["data: {train: [{weight: 1}]}", "data: {train: [{prefix: a, weight: 0}]}"])
def test_a_dataset_needs_a_prefix_and_a_weight(file, text):
    assert "data.train[0]" in refused(file(text))


@pytest.mark.parametrize(
    ("overrides", "world_size", "keys"),
    [
        (["parallel.tensor=3"], 3, ["parallel.tensor", "power of two"]),
        (["parallel.tensor=2"], 1, ["parallel.tensor", "1 processes"]),
        (["parallel.pipeline=2", "parallel.tensor=2"], 6, ["6 processes", "multiple of 4"]),
        (["parallel.tensor=32"], 32, ["model.heads=16", "parallel.tensor=32"]),
        (["parallel.tensor=2", "model.ffn=11"], 2, ["model.ffn=11"]),
        (["parallel.tensor=16", "parallel.sequence=true", "data.sequence_length=9"], 16, ["parallel.sequence"]),
        (["parallel.pipeline=32"], 32, ["model.layers=24", "32 stages"]),
        (["parallel.pipeline=2", "parallel.virtual_stages=2"], 2, ["parallel.virtual_stages", "parallel.schedule"]),
        (["parallel.virtual_stages=2", "parallel.schedule=interleaved"], 1, ["parallel.pipeline"]),
        (["parallel.pipeline=2", "parallel.schedule=interleaved"], 2, ["parallel.virtual_stages"]),
        (
            ["parallel.pipeline=3", "parallel.virtual_stages=2", "parallel.schedule=zero_bubble"],
            3,
            ["8 micro-batches", "parallel.pipeline=3"],
        ),
        (["data.train=[]"], 1, ["data.train"]),
        (["model.heads=3"], 1, ["model.hidden", "model.heads"]),
        (["model.positions=rotary", "model.hidden=12", "model.heads=4"], 1, ["model.positions"]),
        (["training.stop_at=2000"], 1, ["training.stop_at"]),
        (["training.keep_every=6", "training.checkpoint_every=4"], 1, ["training.keep_every=6", "checkpoint_every=4"]),
        (["training.keep_every=6"], 1, ["training.keep_every", "training.checkpoint_every=0"]),
        (["training.on_spike=rewind"], 1, ["training.on_spike=rewind", "training.checkpoint_every"]),
        (["training.global_batch_size=60"], 1, ["training.global_batch_size", "micro_batch_size"]),
        ([], 3, ["training.global_batch_size", "3"]),
        (["optimizer.lr=1e-5"], 1, ["optimizer.min_lr"]),
        (["loss.text=0", "loss.image=0", "loss.special=0"], 1, ["loss.text"]),
        (["training.sample_every=5"], 1, ["training.sample_every", "sampling.prompts"]),
        (["training.sample_every=5", "sampling.prompts=[a]", "sampling.guidance=2"], 1, ["sampling.guidance"]),
        (["data.mode=image_only", "data.caption_dropout=0.1"], 1, ["data.caption_dropout"]),
        (["data.mode=text_only", "training.sample_every=5", "sampling.prompts=[a]"], 1, ["training.sample_every"]),
        (["data.mode=image_only", "training.sample_every=5", "sampling.prompts=[a]"], 1, ["sampling.prompts"]),
        (["data.mode=image_only", "loss.image=0", "loss.special=0"], 1, ["loss"]),
    ],
)
def test_an_impossible_combination_is_refused(file, overrides, world_size, keys):
    validate(load(file()), 1)
    with pytest.raises(ConfigError) as caught:
        validate(load(file(), overrides), world_size)
    assert all(key in str(caught.value) for key in keys) and "\n" not in str(caught.value)


def test_the_resolved_config_reads_back_unchanged(tmp_path, file, tiny_config):
    odd = replace(tiny_config, sampling=replace(tiny_config.sampling, prompts=["a: b", "null", "3", "ümläut\n"]))
    for settings in (config.Config(), tiny_config, odd, load(file(), ["optimizer.lr=1e-5", "training.stop_at=7"])):
        (tmp_path / "resolved.yaml").write_text(to_yaml(settings))
        assert load(tmp_path / "resolved.yaml") == settings


def other(value):
    """Some other value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return {"": "x"}.get(value, f"{value}x") if isinstance(value, str) else ["x"] if value is not None else 1


EXECUTION = {f"{section}.{name}" for section, names in EXECUTION_FIELDS.items() for name in names}


@pytest.mark.parametrize(
    "key",
    [f"{s.name}.{f.name}" for s in dataclasses.fields(config.Config) for f in dataclasses.fields(s.default_factory)],
)
def test_identity_of_a_run_is_every_key_but_those_of_execution(key):
    before = config.Config()
    section, name = key.split(".")
    part = getattr(before, section)
    after = replace(before, **{section: replace(part, **{name: other(getattr(part, name))})})
    changes = changed_identity(before, after)
    assert changes == [] if key in EXECUTION else [change.split(":")[0] for change in changes] == [key]
    assert changed_identity(before, before) == []


def test_what_may_change_on_a_resume():
    assert {
        "run.dir",
        "optimizer.engine",
        "optimizer.reduce_dtype",
        "runtime.device",
        "runtime.self_test",
        "runtime.watchdog_s",
        *(f"parallel.{name}" for name in ("tensor", "pipeline", "sequence", "schedule", "virtual_stages", "recompute")),
        *(f"training.{name}" for name in ("stop_at", "micro_batch_size", "keep_checkpoints", "keep_every")),
        "training.on_spike",
        "training.spike_sigma",
        "training.asynchronous_checkpoints",
        *(f"training.{name}_every" for name in ("evaluate", "checkpoint", "sample")),
        "training.evaluate_samples",
        *(f"sampling.{name}" for name in ("prompts", "temperature", "top_k", "top_p", "guidance")),
    } == EXECUTION


@pytest.mark.parametrize("value", ["runs/${oc.env:HOME}", "${oc.env:NO,${oc.env:HOME}}", "${${model.norm}:HOME}"])
def test_no_resolver_reads_the_environment(tmp_path, value):
    path = tmp_path / "c.yaml"
    path.write_text(f"run: {{dir: '{value}'}}\n")
    for overrides, where in ([], str(path)), ([f"run.dir={value}"], "command line"):
        if overrides:
            path.write_text("run: {}\n")
        with pytest.raises(ConfigError) as caught:
            load(path, overrides)
        assert str(caught.value).startswith(f"{where}: run.dir: resolvers such as ${{oc.env:...}} are not allowed")


def test_keys_of_a_section_may_refer_to_each_other(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {hidden: 64, ffn: '${model.hidden}'}\n")
    assert load(path).model.ffn == 64


@pytest.mark.parametrize("content", ["a: " + "[" * 100_000, "a: " + "[" * 30_000 + "]" * 30_000, "{a: " * 30_000])
def test_yaml_that_is_nested_deep_is_an_error(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match="nested more than 50 deep"):
        load(path)


def test_yaml_of_megabytes_is_an_error(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("#" * (1 << 20) + "\n")
    with pytest.raises(ConfigError, match="more than 1,048,576 bytes"):
        load(path)
