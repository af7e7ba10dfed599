"""Options, markers and fixtures of the whole suite."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: the tests' processes share few cores

import importlib.util
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megat2i.config import (
    Config,
    DataConfig,
    DatasetConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    RuntimeConfig,
    TrainingConfig,
    VocabConfig,
    to_yaml,
)
from megat2i.vocab import IGNORE

torch.set_num_threads(1)

RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")
REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    shared = REPOSITORY.parent / "shared"
    parser.addoption("--golden", type=Path, default=shared / "golden", help="folder of the golden files")
    parser.addoption("--shared-data", type=Path, default=shared / "data", help="folder of the shared data")
    parser.addoption("--full", action="store_true", help="also run the tests marked full")
    parser.addoption("--slurm", action="store_true", help="run the tests that start a SLURM cluster")


def pytest_ignore_collect(collection_path, config):
    """What ``make test-slurm`` runs is not even collected by the others."""
    return True if collection_path == REPOSITORY / "tests/slurm" and not config.getoption("--slurm") else None


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("full") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="needs --full"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def stride(pytestconfig) -> int:
    """Of the kill points of writers with many: all of them with --full, else every third."""
    return 1 if pytestconfig.getoption("--full") else 3


def _required_folder(config, option: str) -> Path:
    folder = config.getoption(option)
    if folder.is_dir():
        return folder
    problem = f"{folder} is absent; name the folder with {option} DIR"
    if os.environ.get("CI"):
        pytest.fail(problem)
    pytest.skip(problem)


@pytest.fixture(scope="session")
def golden(pytestconfig) -> Path:
    """Folder of the golden files. Absent: skipped, and failed where the variable CI is set."""
    return _required_folder(pytestconfig, "--golden")


@pytest.fixture(scope="session")
def shared_data(pytestconfig) -> Path:
    """Folder of the shared data. Absent: skipped, and failed where the variable CI is set."""
    return _required_folder(pytestconfig, "--shared-data")


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


TINY = Config(
    vocab=VocabConfig(text_tokens=300, image_codes=40),
    data=DataConfig(sequence_length=24, caption_dropout=0.2),
    model=ModelConfig(hidden=32, layers=2, heads=4, ffn=48),
    training=TrainingConfig(steps=6, global_batch_size=8, micro_batch_size=2, warmup_steps=2),
    optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, clip=0.5),
    runtime=RuntimeConfig(device="cpu", dtype="float32"),
)


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    """A configuration of a very small model, without data."""
    return TINY


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory) -> Path:
    """Folder of a token store with a manifest and real tokenizers: ``train`` (23 documents) and ``valid`` (5)."""
    from megat2i.tokenizers.patch import PatchTokenizer
    from megat2i.tokenizers.text import train_text_tokenizer

    folder = tmp_path_factory.mktemp("store")
    words = [f"{color} {shape}" for color in ("red", "green", "blue") for shape in ("circle", "square", "hut")]
    text = train_text_tokenizer(words * 4, 300, folder / "text.json")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (28, 3, 8, 8), generator=generator, dtype=torch.uint8)
    image = PatchTokenizer.fit(images, 4, 40)
    image.save(folder / "image.safetensors")
    codes = image.encode(images).numpy()
    for name, numbers in (("train", range(23)), ("valid", range(23, 28))):
        documents = [(np.array(text.encode([words[n % len(words)]])[0]), codes[n]) for n in numbers]
        _write_store(folder / name, documents, text, image)
    return folder


def _write_store(prefix: Path, documents, text, image) -> None:
    from megat2i.data.indexed import IndexedWriter
    from megat2i.data.manifest import ImageContent, Manifest, Source, TextContent, TokenCounts

    with IndexedWriter(prefix, np.uint16) as writer:
        for caption, codes in documents:
            writer.add_document([caption, codes], [0, 1])
    texts, images = (np.concatenate(part) for part in zip(*documents, strict=True))
    Manifest(
        documents=len(documents),
        sequences=2 * len(documents),
        tokens=TokenCounts(len(texts), len(images)),
        dtype="uint16",
        text=TextContent(text.vocab_size, int(texts.min()), int(texts.max()), "text.json", text.kind, text.sha256),
        image=ImageContent(
            image.codebook_size,
            int(images.min()),
            int(images.max()),
            image.grid,
            image.image_size,
            "center",
            image.encoder_precision,
            "image.safetensors",
            image.kind,
            image.sha256,
        ),
        sources=(Source("test", len(documents), size=1),),
        index_sha256=writer.digests.index_sha256,
        bin_blocks=writer.digests.bin_blocks,
    ).write(prefix)


@pytest.fixture(scope="session")
def text_store(tiny_store) -> Path:
    """Folder of streams of plain text, by the text tokenizer of ``tiny_store``: ``train`` and ``valid``."""
    from megat2i.data.indexed import IndexedWriter
    from megat2i.data.manifest import Manifest, Source, TextContent, TokenCounts
    from megat2i.tokenizers.text import load_text_tokenizer

    tokenizer, folder = load_text_tokenizer(tiny_store / "text.json"), tiny_store / "prose"
    folder.mkdir()
    shutil.copy(tokenizer.path, folder)
    generator = np.random.default_rng(0)
    for name, documents in (("train", 200), ("valid", 30)):
        ids = []
        with IndexedWriter(folder / name, np.uint16) as writer:
            for _ in range(documents):
                sentence = " and a ".join(generator.choice(["red circle", "green square", "blue hut"], 3))
                ids.append(np.array(tokenizer.encode([sentence])[0]))
                writer.add_document([ids[-1]], None)
        flat = np.concatenate(ids)
        text = (tokenizer.vocab_size, int(flat.min()), int(flat.max()), "text.json", tokenizer.kind, tokenizer.sha256)
        Manifest(
            documents=documents,
            sequences=documents,
            tokens=TokenCounts(len(flat), 0),
            dtype="uint16",
            text=TextContent(*text),
            image=None,
            sources=(Source("test", documents, size=1),),
            index_sha256=writer.digests.index_sha256,
            bin_blocks=writer.digests.bin_blocks,
        ).write(folder / name)
    return folder


@pytest.fixture(scope="session")
def run_config(tiny_config, tiny_store):
    """Function of (run folder) -> Config of a run on ``tiny_store``."""
    from megat2i.tokenizers.text import load_text_tokenizer

    text_tokens = load_text_tokenizer(tiny_store / "text.json").vocab_size

    def make(run_dir: Path) -> Config:
        data = replace(
            tiny_config.data, train=[DatasetConfig(str(tiny_store / "train"))], valid=str(tiny_store / "valid")
        )
        vocab = VocabConfig(text_tokens=text_tokens, image_codes=40)
        return replace(tiny_config, run=RunConfig(str(run_dir)), data=data, vocab=vocab)

    return make


@pytest.fixture(scope="session")
def pretrain(repository, run_config):
    """Function that writes the configuration of a run beside it and starts ``pretrain_t2i.py`` on it.

    ``launcher``: command in front of the script; further arguments as on the command line. Returns the Popen object.
    """

    def start(run_dir: Path, *arguments: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        file = run_dir.parent / f"{run_dir.name}.yaml"
        file.write_text(to_yaml(run_config(run_dir)))
        command = [*launcher, str(repository / "pretrain_t2i.py"), "--config", str(file), *arguments]
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=run_dir.parent,
            start_new_session=True,
        )

    return start


@pytest.fixture
def environment(monkeypatch):
    """Function that makes the variables of launchers exactly those it is given."""

    def set_to(**variables: str) -> None:
        for name in list(os.environ):
            if (
                name.startswith(("SLURM", "OMPI_", "PMI_", "MASTER_", "TORCHELASTIC_", "MEGAT2I_"))
                or name in RANK_NAMES
            ):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.fixture(scope="session")
def providers(repository):
    """Of model, data and loss, as ``pretrain_t2i.py`` has them."""
    spec = importlib.util.spec_from_file_location("pretrain_t2i", repository / "pretrain_t2i.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.model_provider, script.data_provider, script.loss_provider


@pytest.fixture(scope="session")
def make_training():
    """Function of (engine name or None, Config) -> (pipeline, engine, groups); to be called on every rank."""
    # Slow imports, here once instead of in every forked rank (optimizers load them when first used).
    import deepspeed.ops
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    import torch._dynamo  # noqa: F401

    assert deepspeed.ops.__compatible_ops__  # found out when first asked for, with a compiler's help
    from megat2i.kernels import choose_ops
    from megat2i.model.freezing import freeze
    from megat2i.model.gpt import GPT
    from megat2i.model.part import part_of
    from megat2i.optim.deepspeed_engine import DeepSpeedEngine
    from megat2i.optim.torch_engine import TorchEngine
    from megat2i.pipeline import Pipeline
    from megat2i.runtime import DTYPES
    from megat2i.topology import ParallelGroups

    def make(engine: str | None, config: Config):
        dtype, device = DTYPES[config.runtime.dtype], torch.device("cpu")
        groups = ParallelGroups.create(config.parallel)
        part = part_of(config, groups)
        model = GPT.empty(config.model, config.vocab_layout, choose_ops(device, dtype), device, dtype, part)
        model.initialise(config.model.seed)
        freeze(model, config.training.trainable)
        pipeline = Pipeline(model, groups, config.parallel.schedule)
        if engine is None:
            return pipeline, None, groups
        kind = TorchEngine if engine == "torch" else DeepSpeedEngine
        return pipeline, kind(model, config.optimizer, config.training, groups), groups

    return make


@pytest.fixture(scope="session")
def make_batches():
    """Function of (Config, step, rank, ranks) -> micro-batches of a rank with very uneven modalities."""
    from megat2i.data.batches import Batch

    def make(config: Config, step: int, rank: int = 0, ranks: int = 1) -> list[Batch]:
        training, layout, length = config.training, config.vocab_layout, config.data.sequence_length
        generator = np.random.default_rng([7, step])
        rows = training.global_batch_size
        tokens = np.full((rows, length), layout.special("<pad>"))
        for row in range(rows):  # the first rows are short and mostly text, the last ones long and mostly images
            live = 3 + (length - 3) * row // rows
            text = generator.integers(0, layout.text_tokens, length)
            image = generator.integers(*layout.ranges[1], length)
            tokens[row, :live] = np.where(generator.random(length) < (row + 1) / (rows + 2), image, text)[:live]
            tokens[row, live - 1] = layout.special("</doc>")
        labels = np.full_like(tokens, IGNORE)
        labels[:, :-1] = np.where(tokens[:, 1:] == layout.special("<pad>"), IGNORE, tokens[:, 1:])
        parts = [torch.from_numpy(part) for part in (tokens, labels, layout.modality(labels))]
        share, micro = rows // ranks, training.micro_batch_size
        starts = range(rank * share, (rank + 1) * share, micro)
        return [Batch(*(part[start : start + micro] for part in parts), [], 0) for start in starts]

    return make
