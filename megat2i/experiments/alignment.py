"""Contrastive alignment of image codes with text (Zhang et al. 2024, section 3.2, Fig. 7), as a run of ``pretrain``.

A picture is the mean of the embeddings of its codes, a caption that of its tokens, both of length 1. Among the N =
``training.global_batch_size`` pairs of a step every picture has to find its caption and every caption its picture:
CLIP's loss with CLIP's learnable temperature (Radford et al. 2021). The text embeddings are those of
``model.pretrained`` and stay; the rows of the image codes are trained from the values that ``model.expansion=random``
would give them.

In the records of a run the questions of captions count as ``text``, those of pictures as ``image``: ``loss`` is CLIP's
(the mean of both), ``accuracy/image`` the rate of pictures that find their caption.
"""

import math
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from megat2i.config import Config, ConfigError
from megat2i.data import order
from megat2i.data.batches import Batch, TrainingData, evaluation_batches
from megat2i.data.t2i_dataset import T2IDataset, require_same_tokenizers
from megat2i.files import DataFileError
from megat2i.kernels import TokenLosses, choose_ops
from megat2i.loss import ModalityLoss
from megat2i.model.gpt import initial_values
from megat2i.model.part import Part
from megat2i.model.partition import StageLayers
from megat2i.model.pretrained import open_pretrained
from megat2i.parallel.collectives import TensorParallel, finished, gather_statistics
from megat2i.parallel.layers import WeightGradients
from megat2i.parallel.shard import Shard
from megat2i.runtime import Backend
from megat2i.topology import ParallelGroups
from megat2i.trainer import Data
from megat2i.vocab import IGNORE, IMAGE, TEXT

TABLE = "tok_embeddings.weight"
FIRST_TEMPERATURE, LARGEST_SCALE = 0.07, 100.0  # CLIP's
# settings that would mean nothing here, or something else
REQUIRED = {
    "data.mode": "text_to_image",
    "data.caption_dropout": 0.0,
    "loss.z_loss": 0.0,
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "runtime.dtype": "float32",
    "optimizer.engine": "torch",
    "training.trainable": "all",
    "training.stop_at": None,
    "training.sample_every": 0,
}


def require(settings: Config, ranks: int) -> None:
    """Raises ConfigError where ``settings`` cannot be an alignment on so many ranks."""
    for key, value in REQUIRED.items():
        section, name = key.split(".")
        found = getattr(getattr(settings, section), name)
        if found != value:
            raise ConfigError(f"{key}={found}: an alignment needs {key}={value}")
    if settings.model.pretrained is None:
        raise ConfigError(
            "model.pretrained is not set: codes are aligned with the text embeddings of such a model; name its folder"
        )
    if settings.data.valid is None:
        raise ConfigError("data.valid is not set: retrieval is measured on held-out pairs; name their files")
    training = settings.training
    if training.micro_batch_size * ranks != training.global_batch_size:
        raise ConfigError(
            f"training.micro_batch_size={training.micro_batch_size} on {ranks} ranks: each pair is compared with all "
            f"{training.global_batch_size} of the step, so a rank takes its share at once; set "
            f"training.micro_batch_size={max(1, training.global_batch_size // ranks)}"
        )


def initial_rows(settings: Config) -> Tensor:
    """Embeddings of the image codes [codes, D] as ``model.expansion=random`` makes them."""
    vocab, model = settings.vocab_layout, settings.model
    return initial_values(TABLE, (vocab.size, model.hidden), model.seed)[slice(*vocab.ranges[1])].clone()


class Temperature(nn.Module):
    """The factor on cosines [1]: CLIP learns its logarithm, starting at 1 / 0.07, and holds it at 100 at most."""

    def __init__(self):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor([-math.log(FIRST_TEMPERATURE)]))

    def forward(self) -> Tensor:
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(LARGEST_SCALE))
        return self.logit_scale.exp()


class Alignment(nn.Module):
    """What the pipeline runs in place of a language model: one stage, from the tokens of pairs to their losses.

    The data-parallel ranks, which are all there are, share the pairs of a step.
    """

    def __init__(self, settings: Config, device: torch.device):
        super().__init__()
        self.shape, self.vocab = settings.model, settings.vocab_layout
        self.stages, self.weight_gradients = (StageLayers(0, 0, embedding=True, head=True),), WeightGradients()
        self.ops = choose_ops(device, torch.float32)
        self.ranks = TensorParallel(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
        text = open_pretrained(settings.model.pretrained).read(TABLE)[: self.vocab.text_tokens]
        self.register_buffer("text", text.float().clone(), persistent=False)
        self.tok_embeddings = nn.Embedding.from_pretrained(initial_rows(settings), freeze=False)
        self.temperature = Temperature()
        self.to(device)

    @property
    def device(self) -> torch.device:
        return self.text.device

    def shards(self) -> dict[str, Shard]:
        """Every rank holds all parameters."""
        return {name: Shard.whole(tuple(parameter.shape)) for name, parameter in self.named_parameters()}

    def run_stage(self, stage: StageLayers, tokens: Tensor, x: None) -> Tensor:
        """Caption and picture of every pair as vectors of length 1 [B, 2, D], from ids [B, S] in any order."""
        captions = _mean_of_bags(tokens, 0, self.text)
        pictures = _mean_of_bags(tokens, self.vocab.image_start, self.tok_embeddings.weight)
        return torch.stack((captions, pictures), dim=1)

    def losses(self, x: Tensor, labels: Tensor, token_weight: Tensor | None, z_loss: float, live: None) -> TokenLosses:
        """Per-question losses [2 B] of ``x`` [B, 2, D]; ``labels`` [B, 2] number the pair in the global batch.

        A pair labelled IGNORE neither asks nor is an answer. The vectors of all ranks are gathered, and the gradients
        that they get on all ranks are summed, so that the loss is that of one process with the whole batch.
        """
        answers = gather_statistics(x.flatten(1), self.ranks).view(-1, *x.shape[1:]).flip(1)  # [N, 2, D]
        absent = finished(self.ranks.start_gather(labels[:, 0].contiguous())) == IGNORE
        logits = self.temperature() * torch.einsum("bqd,nqd->bqn", x, answers)
        logits, labels = logits.masked_fill(absent, -torch.inf).flatten(0, 1), labels.flatten()
        nll = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
        loss = nll if token_weight is None else nll * token_weight.flatten()
        seen, asked = logits.detach(), labels != IGNORE
        own = seen.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        correct = ((own >= seen.amax(dim=1)) & asked).float()
        return TokenLosses(loss, nll.detach(), seen.logsumexp(1) * asked, correct, torch.zeros_like(own))

    def report(self) -> dict[str, float]:
        """The temperature after a step, for its record."""
        return {"temperature": 1 / min(self.temperature.logit_scale.exp().item(), LARGEST_SCALE)}


def _mean_of_bags(tokens: Tensor, first: int, table: Tensor) -> Tensor:
    """Normalised means [B, D] of the rows of ``table`` for the ids from ``first`` on in each row of ``tokens``."""
    inside = (tokens >= first) & (tokens < first + len(table))
    counts = inside.sum(dim=1)
    return F.normalize(F.embedding_bag(tokens[inside] - first, table, counts.cumsum(0) - counts, mode="mean"))


class OtherCaptions(T2IDataset):
    """Captions dealt to other rows by one fixed permutation: the control, with nothing to learn about held-out rows."""

    def fill(self, sample: int, *arrays):
        return super().fill(int(order.sample(self.seed + 1, 0, sample, len(self))), *arrays)


class Providers:
    """``pretrain``'s providers of an alignment; ``model`` once there is one. ``shuffled``: of the control."""

    def __init__(self, settings: Config, shuffled: bool):
        self.settings, self.captions = settings, OtherCaptions if shuffled else T2IDataset
        self.model: Alignment | None = None

    def make_model(self, config: Config, backend: Backend, part: Part) -> Alignment:
        """Also in a resumed run, whose checkpoint has no text embeddings, from the pre-trained model."""
        self.model = Alignment(self.settings, backend.device)
        return self.model

    def make_loss(self, config: Config) -> ModalityLoss:
        """CLIP's where ``loss.text`` and ``loss.image``, the weights of the two questions, are equal."""
        weights = (config.loss.text, config.loss.image, config.loss.special)
        return ModalityLoss(weights, report=self.model.report)

    def make_data(self, config: Config, backend: Backend, groups: ParallelGroups) -> Data:
        """Pairs of the training files, and the true pairs of the held-out ones."""
        data, training = config.data, config.training
        rank = {"dp_rank": groups.data_rank, "dp_size": groups.data_size, "micro_batch_size": training.micro_batch_size}
        options = {"vocab": config.vocab_layout, "sequence_length": data.sequence_length, "seed": data.seed}
        train, held_out, datasets = [], [], []
        for kind, mode in ((self.captions, "text_only"), (T2IDataset, "image_only")):
            sources = [(kind(d.prefix, mode=mode, **options), d.weight) for d in data.train]
            valid = T2IDataset(data.valid, mode=mode, **options)
            datasets += [*(dataset for dataset, _ in sources), valid]
            train.append(TrainingData(sources, data.seed, training.global_batch_size))
            held_out.append(evaluation_batches(valid, **rank, rows=min(training.evaluate_samples, len(valid))))
        require_same_tokenizers(datasets)
        pairs = sum(len(dataset) for dataset in train[0].datasets)
        if pairs < training.global_batch_size:
            raise DataFileError(
                data.train[0].prefix,
                f"the training data has {pairs:,} pairs, a step compares {training.global_batch_size:,}",
                "Set training.global_batch_size to no more than there are",
            )

        def batches(captions, images) -> list[Batch]:
            first = groups.data_rank * training.micro_batch_size
            return [pairs_of(*both, first).to(backend.device) for both in zip(captions, images, strict=True)]

        return Data(
            micro_batches=lambda step: batches(*(part.micro_batches(step, **rank) for part in train)),
            samples=train[0].samples,
            validation={"valid": batches(*held_out)},
            captions={str(d.store.prefix): (len(d), d.cut_captions, d.longest_row) for d in train[0].datasets},
            stores=[dataset.store for dataset in datasets],
        )


def pairs_of(captions: Batch, images: Batch, first: int) -> Batch:
    """Pairs from rows of captions and rows of pictures: tokens [B, 2 S], labels and modality [B, 2] of their questions.

    ``first``: number of the first pair in the global batch. Without a caption or without a picture there is no pair.
    """
    whole = (captions.modality == TEXT).any(dim=1) & (images.modality == IMAGE).any(dim=1)
    labels = torch.where(whole, first + torch.arange(len(whole)), IGNORE)
    return replace(
        images,
        tokens=torch.cat((captions.tokens, images.tokens), dim=1),
        labels=labels[:, None].repeat(1, 2),
        modality=torch.where(whole[:, None], torch.tensor([TEXT, IMAGE]), -1).to(torch.int8),
        text_cut=captions.text_cut,
        live_capacity=0,
    )
