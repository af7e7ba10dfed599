"""What only a GPU can show of the model: open_lm's golden runs, a training run, images drawn with CUDA graphs.

Part of ``make test-gpu``; beside torch, triton and pytest it needs numpy, omegaconf, safetensors, tqdm, tensorboard,
tokenizers, sentencepiece and Pillow.
"""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("omegaconf")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("tensorboard")
pytest.importorskip("tokenizers")
pytest.importorskip("sentencepiece")
pytest.importorskip("PIL")

from megat2i.config import (
    Config,
    DataConfig,
    DatasetConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    RuntimeConfig,
    SamplingConfig,
    TrainingConfig,
    VocabConfig,
)
from megat2i.data.indexed import IndexedWriter
from megat2i.kernels import choose_ops
from megat2i.model import open_lm
from megat2i.model.gpt import GPT
from megat2i.model.weights import fill
from megat2i.pretrain import pretrain

ROOT = Path(__file__).resolve().parent.parent
CUDA, BF16, F32 = torch.device("cuda"), torch.bfloat16, torch.float32

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


# Largest errors of a logit, of the loss and of a gradient (relative 2-norm). open_lm's own bfloat16 is 0.06 off.
GOLDEN_BOUNDS = {F32: (2e-4, 2e-5, 1e-3), BF16: (0.2, 0.02, 0.08)}


@pytest.mark.parametrize("dtype", GOLDEN_BOUNDS, ids=str)
@pytest.mark.parametrize("name", ["a_ln_headrotary_swiglu", "c_gainlp_qknorm_rotary_swiglutorch"])
def test_golden_runs_of_open_lm(name, dtype):
    folders = [folder / "shared/golden/open_lm" for folder in (ROOT.parent, ROOT)]
    path = next((folder / f"{name}.pt" for folder in folders if folder.is_dir()), None)
    if path is None:
        pytest.skip(f"the golden files are in none of {', '.join(map(str, folders))}")
    found = golden_errors(path, CUDA, dtype)
    print(f"\n{name}, {dtype}: logits {found[0]:.1e}, loss {found[1]:.1e}, gradient {found[2]:.1e}")
    assert all(error < bound for error, bound in zip(found, GOLDEN_BOUNDS[dtype], strict=True)), found


def golden_errors(path: Path, device: torch.device, dtype: torch.dtype) -> tuple[float, float, float]:
    golden = torch.load(path, weights_only=True)
    weights = open_lm.open_weights(path, golden["params"])
    model = GPT(weights.shape, weights.rows, ((0, weights.rows),), choose_ops(device, dtype))
    fill(model, weights.read)
    model = model.to(device, dtype)
    tokens, targets = golden["input_ids"].to(device), golden["targets"].to(device)
    with torch.no_grad():
        logits = (model.logits(tokens).cpu() - golden["logits"]).abs().max().item()
    loss = model.loss(tokens, targets)
    loss.backward()
    pairs = [(parameter.grad.float().cpu(), golden["grads"][n]) for n, parameter in model.named_parameters()]
    gradient = max(((found - expected).norm() / expected.norm()).item() for found, expected in pairs)
    return logits, abs(loss.item() - golden["ce_loss"].item()), gradient


def losses_of_a_run(folder: Path, device: str, dtype: str) -> list[float]:
    """The loss of every step of a run of ``pretrain`` on a small store without tokenizers: NCCL, a world of one."""
    generator = np.random.default_rng(0)
    with IndexedWriter(folder / "train", np.uint16) as writer:
        for _ in range(64):
            kind = generator.integers(4)
            caption = np.array([5 + kind, *generator.integers(20, 40, 3)], dtype=np.uint16)
            writer.add_document([caption, (kind * 16 + np.arange(16)).astype(np.uint16)], [0, 1])
    settings = Config(
        run=RunConfig(str(folder / f"run-{device}-{dtype}")),
        vocab=VocabConfig(text_tokens=300, image_codes=64),
        data=DataConfig(sequence_length=32, train=[DatasetConfig(str(folder / "train"))]),
        model=ModelConfig(hidden=256, layers=2, heads=4, ffn=384, positions="rotary", qk_norm=True),
        training=TrainingConfig(steps=12, global_batch_size=16, micro_batch_size=8, warmup_steps=2),
        optimizer=OptimizerConfig(lr=3e-3, min_lr=1e-3, engine="torch"),
        runtime=RuntimeConfig(device=device, dtype=dtype),
    )
    spec = importlib.util.spec_from_file_location("pretrain_t2i", ROOT / "pretrain_t2i.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    pretrain(settings, False, (script.model_provider, script.data_provider, script.loss_provider))
    lines = [json.loads(line) for line in (Path(settings.run.dir) / "metrics.jsonl").read_text().splitlines()]
    assert (Path(settings.run.dir) / "checkpoints" / "step-12").is_dir()
    return [line["loss"] for line in lines if "split" not in line]


def test_a_training_run_follows_the_one_on_the_cpu(tmp_path):
    expected = losses_of_a_run(tmp_path, "cpu", "float32")
    assert len(expected) == 12 and expected[-1] < expected[0] - 0.5
    found = losses_of_a_run(tmp_path, "cuda", "float32")
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(losses_of_a_run(tmp_path, "cuda", "bfloat16"), expected, rtol=6e-2)


SAMPLED = {
    "small, float32": (ModelConfig(hidden=64, layers=2, heads=4, ffn=96, positions="rotary", qk_norm=True), F32),
    "grouped, bfloat16": (ModelConfig(hidden=256, layers=3, heads=8, kv_heads=2, ffn=512, positions="rotary"), BF16),
    "1B's width, bfloat16": (ModelConfig(layers=3), BF16),
}
SETTINGS = (SamplingConfig(), SamplingConfig(guidance=3.0, top_k=20), SamplingConfig(guidance=2.0, top_p=0.8))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return small_tokenizers(tmp_path_factory.mktemp("tokenizers"))


def small_tokenizers(folder: Path):
    """(of text, of images of 32 x 32 pixels in 64 codes)."""
    from megat2i.tokenizers.patch import PatchTokenizer
    from megat2i.tokenizers.text import train_text_tokenizer

    words = [f"{color} {shape}" for color in ("red", "green", "blue") for shape in ("circle", "square", "hut")]
    images = torch.randint(0, 256, (60, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return train_text_tokenizer(words * 4, 300, folder / "text.json"), PatchTokenizer.fit(images, 4, 512)


def drawn(tokenizers, shape: ModelConfig, dtype: torch.dtype, device: torch.device, settings, graphs: bool):
    """Codes of 12 images of a model with random weights, and those of other prompts in the same memory behind them."""
    from megat2i.generate import Sampler

    text, image = tokenizers
    layout = replace(Config(), vocab=VocabConfig(text.vocab_size, 512)).vocab_layout
    model = GPT.empty(shape, layout, choose_ops(device, dtype), device, dtype)
    model.initialise(0)
    model.requires_grad_(False)
    with torch.no_grad():
        model.output.weight.mul_(3)  # predictions that hang on what came before
    sampler = Sampler(model, layout, text, image, 90, "text_to_image")
    prompts = ["red circle", "", "blue hut green square", "green hut"] * 3
    return sampler.codes(prompts, range(12), settings, batch_size=5, graphs=graphs)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", SAMPLED)
def test_images_are_the_same_with_and_without_graphs(tokenizers, name, settings):
    replayed, eager = (drawn(tokenizers, *SAMPLED[name], CUDA, settings, graphs) for graphs in (True, False))
    assert torch.equal(replayed, eager)
    assert len(replayed.unique()) > 20 and not torch.equal(replayed[0], replayed[4])


def test_images_are_those_of_the_cpu(tokenizers):
    """Up to a draw that rounding tips over, after which an image is another."""
    shape, dtype = SAMPLED["small, float32"]
    found, expected = (
        drawn(tokenizers, shape, dtype, device, SETTINGS[1], True) for device in (CUDA, torch.device("cpu"))
    )
    assert (found == expected).all(dim=1).sum() >= 10
