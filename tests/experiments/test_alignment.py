"""Contrastive alignment: CLIP's loss and gradient on any number of ranks, what is trained, what is refused."""

import math
from dataclasses import replace

import numpy as np
import plain_models
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from torch.nn import functional as F

from megat2i.config import ConfigError
from megat2i.data.batches import Batch
from megat2i.data.t2i_dataset import T2IDataset
from megat2i.experiments import alignment
from megat2i.experiments.alignment import TABLE, Alignment, OtherCaptions, Providers, Temperature, pairs_of, require
from megat2i.files import DataFileError
from megat2i.loss import ModalityLoss
from megat2i.model import expand
from megat2i.optim.torch_engine import TorchEngine
from megat2i.parallel.collectives import TensorParallel
from megat2i.pipeline import Pipeline
from megat2i.runtime import Backend
from megat2i.topology import ParallelGroups
from megat2i.trainer import train_step
from megat2i.vocab import IGNORE, IMAGE, TEXT

CPU = torch.device("cpu")
PAIRS, INCOMPLETE = 8, 5  # pairs of a batch, and the one that lacks its caption
STEPS = 3


@pytest.fixture(scope="module")
def text_tokens(tiny_store):
    from megat2i.tokenizers.text import load_text_tokenizer

    return load_text_tokenizer(tiny_store / "text.json").vocab_size


@pytest.fixture(scope="module")
def settings(run_config, tmp_path_factory, text_tokens):
    import torch._dynamo  # noqa: F401 (slow, and optimizers load it: here once instead of in every forked rank)

    folder = tmp_path_factory.mktemp("alignment")
    config = run_config(folder / "run")
    plain_models.save(folder / "lm", config.model, text_tokens + 3)
    return replace(
        config,
        data=replace(config.data, caption_dropout=0.0),
        model=replace(config.model, pretrained=str(folder / "lm")),
        training=replace(config.training, global_batch_size=PAIRS, micro_batch_size=PAIRS),
        # a large eps, so that an update is not decided by the sign of a gradient that is rounding noise
        optimizer=replace(config.optimizer, engine="torch", eps=1e-3, weight_decay=0.0),
    )


def rows_of(settings, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Caption rows and picture rows [PAIRS, S] as unified ids, very unequal in length."""
    vocab, length = settings.vocab_layout, settings.data.sequence_length
    generator = np.random.default_rng([1, step])
    captions, pictures = (np.full((PAIRS, length), vocab.special("<pad>")) for _ in range(2))
    for pair in range(PAIRS):
        words, codes = (1 + 2 * pair, length - 2 * pair) if pair != INCOMPLETE else (0, 4)
        captions[pair, :words] = generator.integers(0, vocab.text_tokens, words)
        pictures[pair, :codes] = generator.integers(*vocab.ranges[1], codes)
    return torch.from_numpy(captions), torch.from_numpy(pictures)


def batch_of(settings, step: int, rank: int, ranks: int) -> Batch:
    vocab, share = settings.vocab_layout, PAIRS // ranks
    own = slice(rank * share, (rank + 1) * share)
    rows = (part[own] for part in rows_of(settings, step))
    batches = [Batch(ids, ids, torch.from_numpy(vocab.modality(ids.numpy())), [], 0) for ids in rows]
    return pairs_of(*batches, first=rank * share)


def clip_in_float64(settings, rows, logit_scale, text, step: int) -> torch.Tensor:
    """The loss of the whole batch by its definition, one pair after the other."""
    vocab = settings.vocab_layout
    captions, pictures = [], []
    for pair, (words, codes) in enumerate(zip(*rows_of(settings, step), strict=True)):
        if pair != INCOMPLETE:
            chosen = text[words[words < vocab.text_tokens]]
            captions.append(chosen.mean(0) / chosen.mean(0).norm())
            chosen = rows[codes[codes >= vocab.image_start] - vocab.image_start]
            pictures.append(chosen.mean(0) / chosen.mean(0).norm())
    logits = logit_scale.exp() * torch.stack(pictures) @ torch.stack(captions).T
    right = torch.arange(PAIRS - 1)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def train(settings, ranks: int, mistake=lambda: None) -> dict:
    """Loss, gradients and gradient norm of the first step, and the parameters after ``STEPS``, on ``ranks`` ranks."""

    def on_rank():
        mistake()
        local = replace(settings, training=replace(settings.training, micro_batch_size=PAIRS // ranks))
        groups = ParallelGroups.create(local.parallel)
        model = Alignment(local, CPU)
        pipeline = Pipeline(model, groups)
        engine = TorchEngine(model, local.optimizer, local.training, groups)
        loss = ModalityLoss((1.0, 1.0, 0.0))
        batches = [[batch_of(local, step, groups.data_rank, ranks)] for step in range(STEPS)]
        pipeline.run_schedule(batches[0], loss, torch.tensor([PAIRS - 1, PAIRS - 1, 0]), engine.loss_scale)
        engine.sums.reduce()
        gradients = {name: gradient.clone().numpy() for name, gradient in engine.gradients.items()}
        engine.sums.zero()
        records = [train_step(pipeline, engine, batch, loss, groups, lr=0.05) for batch in batches]
        return {
            "gradients": gradients,
            "loss": [metrics.as_dict()["loss"] for metrics, _ in records],
            "pairs": [metrics.counts.tolist() for metrics, _ in records],
            "grad_norm": records[0][1],
            "parameters": {name: p.detach().numpy() for name, p in model.named_parameters()},
            "text": model.text.numpy(),
        }

    results = run_ranks(ranks, on_rank)
    for result in results[1:]:
        assert all(np.array_equal(p, results[0]["parameters"][name]) for name, p in result["parameters"].items())
    return results[0]


def assert_exact(found: dict, settings, expected: dict | None = None) -> None:
    """Against the definition in float64, and against the run of one process."""
    rows = alignment.initial_rows(settings).double().requires_grad_()
    scale = torch.tensor([-math.log(0.07)], dtype=torch.float64, requires_grad=True)
    loss = clip_in_float64(settings, rows, scale, torch.from_numpy(found["text"]).double(), 0)
    loss.backward()
    assert found["loss"][0] == pytest.approx(loss.item(), rel=1e-6)
    for name, reference in ((TABLE, rows.grad), ("temperature.logit_scale", scale.grad)):
        error = np.linalg.norm(found["gradients"][name] - reference.numpy()) / reference.norm().item()
        assert error < 1e-5, f"gradient of {name}: {error}"
    norm = math.hypot(rows.grad.norm().item(), scale.grad.norm().item())
    assert found["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert found["pairs"] == [[PAIRS - 1, PAIRS - 1, 0]] * STEPS
    if expected:
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        for name, values in expected["parameters"].items():
            assert np.abs(found["parameters"][name] - values).max() < 1e-5, name


@pytest.fixture(scope="module")
def one_process(settings):
    return train(settings, 1)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_any_number_of_ranks_trains_alike(settings, one_process, ranks):
    assert_exact(train(settings, ranks) if ranks > 1 else one_process, settings, one_process)


def without_gradient() -> None:
    """The gathered vectors of all ranks are constants."""
    gather = alignment.gather_statistics
    alignment.gather_statistics = lambda x, ranks: gather(x, ranks).detach()


def unsummed_gradient() -> None:
    """A rank keeps what it itself finds about its own pairs, not what the others find."""
    TensorParallel.start_reduce_scatter = lambda self, x: (x[slice(*self.share(len(x)))].contiguous(), None)


def local_answers() -> None:
    """A rank compares its own pairs with each other alone."""
    losses = Alignment.losses

    def local(self, x, labels, *rest):
        self.ranks = TensorParallel(dist.group.WORLD)
        return losses(self, x, torch.where(labels == IGNORE, IGNORE, labels - dist.get_rank() * len(x)), *rest)

    Alignment.losses = local


@pytest.mark.parametrize("mistake", [without_gradient, unsummed_gradient, local_answers])
def test_mistakes_in_gathering_show(settings, one_process, mistake):
    found = train(settings, 2, mistake)
    with pytest.raises(AssertionError):
        assert_exact(found, settings, one_process)


def test_codes_start_as_random_rows_and_text_stays(settings, one_process, text_tokens):
    model, vocab = settings.model, settings.vocab_layout
    text = alignment.open_pretrained(model.pretrained).read(TABLE)
    first = expand.expand(TABLE, text, vocab, "random", model.seed, None)[slice(*vocab.ranges[1])]
    assert torch.equal(alignment.initial_rows(settings), first)
    assert np.array_equal(one_process["text"], text[:text_tokens].numpy())  # after training
    assert set(one_process["parameters"]) == {TABLE, "temperature.logit_scale"}
    moved = np.abs(one_process["parameters"][TABLE] - first.numpy()).max(axis=1)
    used = torch.cat([rows_of(settings, step)[1].unique() for step in range(STEPS)]) - vocab.image_start
    used = used[used >= 0].unique().numpy()
    assert (moved[used] > 1e-4).all() and not np.delete(moved, used).any()


def test_the_temperature_is_held_as_in_clip():
    temperature = Temperature()
    assert 1 / temperature().item() == pytest.approx(0.07)
    with torch.no_grad():
        temperature.logit_scale.fill_(5.0)
    scale = temperature()
    assert scale.item() == pytest.approx(100.0) and temperature.logit_scale.item() == pytest.approx(math.log(100))
    scale.backward()  # at the limit it still learns, so that it can come back
    assert temperature.logit_scale.grad.item() == pytest.approx(100.0)


def provided(settings, shuffled: bool, rank: int = 0, ranks: int = 1, steps: int = 1):
    """(batches of the steps, validation batches) of one rank."""

    def on_rank():
        local = replace(settings, training=replace(settings.training, micro_batch_size=PAIRS // ranks))
        groups = ParallelGroups.create(local.parallel)
        data = Providers(local, shuffled).make_data(local, Backend.resolve(local), groups)
        return [data.micro_batches(step)[0] for step in range(steps)], data.validation["valid"]

    return run_ranks(ranks, on_rank)[rank]


def halves(settings, batch: Batch) -> tuple[list, list]:
    """Ids of every caption and of every picture."""
    ids, vocab = batch.tokens.numpy(), settings.vocab_layout
    return tuple([row[vocab.modality(row) == kind].tolist() for row in ids] for kind in (TEXT, IMAGE))


def test_pairs_are_the_rows_of_the_data(settings):
    (batch,), (valid,) = provided(settings, shuffled=False)
    dataset = T2IDataset(settings.data.train[0].prefix, settings.vocab_layout, settings.data.sequence_length)
    for sample, caption, picture in zip(batch.samples, *halves(settings, batch), strict=True):
        tokens = dataset.row(sample.row, None).tokens
        kinds = settings.vocab_layout.modality(tokens)
        assert caption == tokens[kinds == TEXT].tolist() and picture == tokens[kinds == IMAGE].tolist()
    assert batch.labels.tolist() == [[pair, pair] for pair in range(PAIRS)]
    assert valid.labels[:, 0].tolist() == [0, 1, 2, 3, 4, IGNORE, IGNORE, IGNORE]  # 5 held-out pairs
    assert valid.modality.tolist() == [[TEXT, IMAGE]] * 5 + [[-1, -1]] * 3
    second = provided(settings, shuffled=False, rank=1, ranks=2)[0][0]
    assert torch.equal(second.tokens, batch.tokens[PAIRS // 2 :]) and second.labels[0, 0] == PAIRS // 2


def test_the_control_has_the_pictures_with_captions_of_others(settings):
    true, valid = provided(settings, shuffled=False, steps=2)
    false, false_valid = provided(settings, shuffled=True, steps=2)
    for a, b in zip(true, false, strict=True):
        assert halves(settings, a)[1] == halves(settings, b)[1] and halves(settings, a)[0] != halves(settings, b)[0]
    assert torch.equal(valid[0].tokens, false_valid[0].tokens)  # held-out pairs are true in both
    data = settings.data
    kinds = [kind(data.train[0].prefix, settings.vocab_layout, 24, "text_only") for kind in (T2IDataset, OtherCaptions)]
    rows = [[tuple(kind.row(row, None).tokens) for row in range(len(kind))] for kind in kinds]
    assert sorted(rows[0]) == sorted(rows[1]) and rows[0] != rows[1]
    assert rows[1] == [tuple(kinds[1].row(row, 7).tokens) for row in range(len(kinds[1]))]  # the same in every epoch


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("model", {"pretrained": None}, "model.pretrained is not set"),
        ("data", {"valid": None}, "data.valid is not set"),
        ("data", {"caption_dropout": 0.1}, "needs data.caption_dropout=0.0"),
        ("data", {"mode": "image_only"}, "needs data.mode=text_to_image"),
        ("runtime", {"dtype": "bfloat16"}, "needs runtime.dtype=float32"),
        ("optimizer", {"engine": None}, "needs optimizer.engine=torch"),
        ("training", {"stop_at": 3}, "needs training.stop_at=None"),
        ("training", {"micro_batch_size": 4}, "set training.micro_batch_size=8"),
    ],
)
def test_what_is_no_alignment_is_refused(settings, section, change, words):
    require(settings, 1)
    with pytest.raises(ConfigError) as caught:
        require(replace(settings, **{section: replace(getattr(settings, section), **change)}), 1)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_fewer_pairs_than_a_step_compares_are_refused(settings):
    large = replace(settings, training=replace(settings.training, global_batch_size=24, micro_batch_size=24))

    def on_rank():
        groups = ParallelGroups.create(large.parallel)
        with pytest.raises(DataFileError, match="train: .* 23 pairs, a step compares 24.*global_batch_size"):
            Providers(large, False).make_data(large, Backend.resolve(large), groups)

    run_ranks(1, on_rank)
