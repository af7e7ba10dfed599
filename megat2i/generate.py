"""Sampling: captions in, image codes out, with a static KV cache and classifier-free guidance.

Every shape is fixed by the run and the batch size, never by the prompts: prompts are padded on the left to the longest
one that training knows, short batches are filled up, and each image draws from its own seed. So an image depends on its
prompt, its seed and the settings (batch size and dtype among them: they decide the rounding), not on what else is in
the batch.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megat2i import checkpoint, config
from megat2i.config import Config, ConfigError, SamplingConfig
from megat2i.kernels import choose_ops
from megat2i.model.gpt import GPT
from megat2i.pipeline import Pipeline
from megat2i.tokenizers.image import ImageTokenizer, load_image_tokenizer
from megat2i.tokenizers.text import TextTokenizer, load_text_tokenizer
from megat2i.vocab import VocabLayout

BATCH_SIZE = 32  # images at a time


@dataclass(frozen=True)
class Sampler:
    """A model with its tokenizers. ``prompt_width``: tokens in front of the first image code, padding included."""

    model: GPT | Pipeline
    vocab: VocabLayout
    text_tokenizer: TextTokenizer
    image_tokenizer: ImageTokenizer
    sequence_length: int
    mode: str

    @staticmethod
    def from_run(run_dir: Path, device: torch.device, dtype: torch.dtype) -> tuple["Sampler", Config]:
        """The newest sound checkpoint of a run folder; raises ConfigError where the folder holds none."""
        settings = config.load(run_dir / "config.yaml")
        if settings.data.mode == "text_only":
            raise ConfigError(f"{run_dir}: trained with data.mode=text_only; it has never seen an image")
        # Where the run is now, which need not be where it was trained.
        settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, dir=str(run_dir)))
        found = checkpoint.latest_here(run_dir / "checkpoints")
        if found is None:
            raise ConfigError(f"{run_dir}/checkpoints: no sound checkpoint; train the run to its first checkpoint")
        model = GPT.empty(settings.model, settings.vocab_layout, choose_ops(device, dtype), device, dtype)
        model.requires_grad_(False)
        checkpoint.load_weights(found, model)
        return Sampler.for_model(settings, model), settings

    @staticmethod
    def for_model(settings: Config, model: GPT | Pipeline) -> "Sampler":
        """A sampler for ``model`` with the tokenizers that the run keeps in ``run.dir``."""
        text, image = (Path(settings.run.dir) / "tokenizers" / name for name in ("text", "image"))
        return Sampler(
            model,
            settings.vocab_layout,
            load_text_tokenizer(_only_file(text)),
            load_image_tokenizer(_only_file(image)).to(model.device),
            settings.data.sequence_length,
            settings.data.mode,
        )

    @property
    def image_tokens(self) -> int:
        rows, columns = self.image_tokenizer.grid
        return rows * columns

    @property
    def prompt_width(self) -> int:
        return self.sequence_length - self.image_tokens - 2  # </image></doc> follow the codes

    def images(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: SamplingConfig, batch_size: int = BATCH_SIZE
    ) -> np.ndarray:
        """Pictures [len(prompts), 3, H, W] uint8, one for every prompt and seed."""
        return self.image_tokenizer.decode(self.codes(prompts, seeds, sampling, batch_size)).numpy()

    @torch.no_grad()
    def codes(
        self, prompts: Sequence[str], seeds: Sequence[int], sampling: SamplingConfig, batch_size: int = BATCH_SIZE
    ) -> Tensor:
        """Image codes [len(prompts), image tokens] int64, on the CPU."""
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: expected one seed for every prompt")
        rows = [self.prompt_tokens(prompt) for prompt in prompts]
        done = []
        for start in range(0, len(rows), batch_size):
            batch, batch_seeds = rows[start : start + batch_size], list(seeds[start : start + batch_size])
            live = len(batch)
            batch += [self.prompt_tokens("")] * (batch_size - live)
            batch_seeds += [0] * (batch_size - live)
            done.append(self._batch(batch, batch_seeds, sampling)[:live])
        return torch.cat(done)

    def prompt_tokens(self, prompt: str) -> list[int]:
        """Ids up to and including ``<image>``; a caption that is too long is cut at its end, as in training."""
        special = self.vocab.special
        if self.mode == "image_only":
            if prompt:
                raise ConfigError(f"this model was trained on images alone: prompt '{prompt}' must be empty")
            return [special("<doc>"), special("<image>")]
        caption = self.text_tokenizer.encode([prompt])[0] if prompt else []
        room = self.prompt_width - 4
        return [special("<doc>"), special("<text>"), *caption[:room], special("</text>"), special("<image>")]

    def _batch(self, rows: list[list[int]], seeds: list[int], sampling: SamplingConfig) -> Tensor:
        device = self.model.device
        guided = sampling.guidance != 1
        if guided:  # the second half of the batch sees the same image behind an empty caption
            rows = rows + [self.prompt_tokens("")] * len(rows)
        tokens, first = self._left_padded(rows)
        tokens, first = tokens.to(device), first.to(device)
        noise = torch.stack(
            [torch.rand(self.image_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        ).to(device)
        columns = slice(self.vocab.image_start, self.vocab.image_start + self.vocab.image_codes)
        cache = self.model.new_cache(len(rows), self.prompt_width + self.image_tokens, first)
        codes = []
        for position in range(self.image_tokens):
            logits = self.model.next_logits(tokens, cache, columns)  # [rows, image codes]
            if guided:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + sampling.guidance * (conditional - unconditional)
            code = draw(logits, noise[:, position], sampling)
            codes.append(code)
            tokens = (self.vocab.image_start + (code.repeat(2) if guided else code))[:, None]
        return torch.stack(codes, dim=1).cpu()

    def _left_padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        tokens = torch.full((len(rows), self.prompt_width), self.vocab.special("<pad>"))
        for index, row in enumerate(rows):
            tokens[index, self.prompt_width - len(row) :] = torch.tensor(row)
        first = torch.tensor([self.prompt_width - len(row) for row in rows])
        return tokens, first


def draw(logits: Tensor, noise: Tensor, sampling: SamplingConfig) -> Tensor:
    """One index per row of ``logits`` [B, K] by inverting the cumulative distribution at ``noise`` [B] in [0, 1).

    Temperature first, then top-k, then top-p over what is left, as is usual. Returns int64 [B].
    """
    probabilities = (logits.double() / sampling.temperature).softmax(dim=-1)
    if not probabilities.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are damaged or its training diverged")
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = probabilities.topk(sampling.top_k, dim=-1).values[:, -1:]
        probabilities = probabilities.where(probabilities >= smallest, 0.0)
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # probability of everything more likely
        kept = ordered.where(before < sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, kept)
    cumulative = probabilities.cumsum(dim=-1)
    target = noise.double()[:, None] * cumulative[:, -1:]
    return (cumulative <= target).sum(dim=-1).clamp(max=logits.shape[-1] - 1)


def _only_file(folder: Path) -> Path:
    files = sorted(path for path in folder.glob("*") if path.is_file())
    if len(files) != 1:
        raise ConfigError(f"{folder}: expected the run's one tokenizer file, found {len(files)}")
    return files[0]
