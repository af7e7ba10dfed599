"""Sampling: captions in, image codes out, with a static KV cache and classifier-free guidance.

Every shape is fixed by the run and the batch size, never by the prompts: prompts are padded on the left to the longest
one that training knows, short batches are filled up, and each image draws from its own seed. So an image depends on its
prompt, its seed and the settings (batch size and dtype among them: they decide the rounding), not on what else is in
the batch.
"""

import dataclasses
from collections.abc import Iterator, Sequence
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
            load_text_tokenizer(only_file(text)),
            load_image_tokenizer(only_file(image)).to(model.device),
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

    def codes(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        batch_size: int = BATCH_SIZE,
        graphs: bool = True,
    ) -> Tensor:
        """Image codes [len(prompts), image tokens] int64, on the CPU; ``graphs``: where they can be used, see Drawing.

        Raises ValueError where the model's logits are not finite.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: expected one seed for every prompt")
        rows = [self.prompt_tokens(prompt) for prompt in prompts]
        drawing, done = Drawing(self, sampling, batch_size, graphs), []
        for start in range(0, len(rows), batch_size):
            done.append(drawing.batch(rows[start : start + batch_size], seeds[start : start + batch_size]))
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

    def left_padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Prompts as tokens [B, prompt_width], and where each begins [B], both int64."""
        tokens = torch.full((len(rows), self.prompt_width), self.vocab.special("<pad>"))
        for index, row in enumerate(rows):
            tokens[index, self.prompt_width - len(row) :] = torch.tensor(row)
        first = torch.tensor([self.prompt_width - len(row) for row in rows])
        return tokens, first


class Drawing:
    """Batches of ``batch_size`` images, one after the other in the same memory on the model's device.

    A step is everything from the embedding of the last codes to the draw of the next. What it reads and writes, the
    number of the step included, is on the device at fixed addresses, and it never waits for the device. So where one
    GPU holds the whole model, the second step is recorded as a CUDA graph that is replayed for all others. Over several
    ranks, and on a CPU, the same step runs as it is: messages between pipeline ranks cannot be recorded.
    """

    def __init__(self, sampler: Sampler, sampling: SamplingConfig, batch_size: int, graphs: bool):
        model, device = sampler.model, sampler.model.device
        self.sampler, self.sampling, self.model = sampler, sampling, model
        self.guided = sampling.guidance != 1  # the second half of the rows sees the same image behind an empty caption
        rows, steps = batch_size * (2 if self.guided else 1), sampler.image_tokens
        vocab = sampler.vocab
        self.columns = slice(vocab.image_start, vocab.image_start + vocab.image_codes)
        self.first = torch.zeros(rows, dtype=torch.int64, device=device)
        self.cache = model.new_cache(rows, sampler.prompt_width + steps, self.first)
        self.noise = torch.zeros(batch_size, steps, device=device)
        self.codes = torch.zeros(batch_size, steps, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.graph = None
        self.recording = graphs and device.type == "cuda" and _on_one_device(model)

    def batch(self, rows: Sequence[list[int]], seeds: Sequence[int]) -> Tensor:
        """Image codes [len(rows), image tokens] behind the prompts ``rows``, on the CPU; at most ``batch_size``."""
        for _ in self.steps(rows, seeds):
            pass
        return self.drawn(len(rows), self.codes.shape[1])

    @torch.no_grad()
    def steps(self, rows: Sequence[list[int]], seeds: Sequence[int]) -> Iterator[int]:
        """Draw code after code, and say after each how many every image has; ``drawn`` reads them.

        Fewer prompts than ``batch_size`` are filled up with empty ones. Whoever stops asking ends the drawing; the next
        batch begins anew.
        """
        empty = self.sampler.prompt_tokens("")
        missing = self.codes.shape[0] - len(rows)
        rows, seeds = [*rows, *[empty] * missing], [*seeds, *[0] * missing]
        if self.guided:
            rows = rows + [empty] * len(rows)
        tokens, first = self.sampler.left_padded(rows)
        self.first.copy_(first)
        for row, seed in zip(self.noise, seeds, strict=True):
            row.copy_(torch.rand(len(row), generator=torch.Generator().manual_seed(seed)))
        self.cache.position.zero_()
        self.step.zero_()
        self._draw(self.model.next_logits(tokens.to(self.first.device), self.cache, self.columns))
        yield 1
        for count in range(2, self.codes.shape[1] + 1):
            if self.graph is None:
                self._one_code()  # the first one also compiles what the graph will hold
                self.graph = self._record() if self.recording else None
            else:
                self.graph.replay()
            yield count

    def drawn(self, images: int, count: int) -> Tensor:
        """The first ``count`` codes of the first ``images`` of the batch, int64 [images, count], on the CPU.

        Raises ValueError where the model's logits were not finite.
        """
        codes = self.codes[:images, :count].to("cpu", copy=True)
        if codes.min() < 0:
            raise ValueError("the model's logits are not finite: its weights are damaged or its training diverged")
        return codes

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's thread may look at its events
            self._one_code()
        return graph

    def _one_code(self) -> None:
        self._draw(self.model.next_logits(self.tokens, self.cache, self.columns))

    def _draw(self, logits: Tensor) -> None:
        """Draw the code of this step from ``logits`` [rows, image codes], and make it the next step's token."""
        if self.guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + self.sampling.guidance * (conditional - unconditional)
        code = draw(logits, self.noise.index_select(1, self.step)[:, 0], self.sampling)
        self.codes.index_copy_(1, self.step, code[:, None])
        self.tokens.copy_((self.columns.start + (code.repeat(2) if self.guided else code))[:, None])
        self.step += 1


def _on_one_device(model: GPT | Pipeline) -> bool:
    """Whether a step sends nothing to other ranks."""
    alone = isinstance(model, GPT) or model.groups.pipeline_size == 1
    return alone and (model if isinstance(model, GPT) else model.model).parallel.size == 1


def draw(logits: Tensor, noise: Tensor, sampling: SamplingConfig) -> Tensor:
    """One index per row of ``logits`` [B, K] by inverting the cumulative distribution at ``noise`` [B] in [0, 1).

    Temperature first, then top-k, then top-p over what is left, as is usual. Returns int64 [B], -1 where the
    logits are no distribution (a NaN or an infinity among them).
    """
    probabilities = (logits.double() / sampling.temperature).softmax(dim=-1)
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = probabilities.topk(sampling.top_k, dim=-1).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < smallest, 0.0)
        probabilities /= probabilities.sum(dim=-1, keepdim=True)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # probability of everything more likely
        kept = ordered.masked_fill(before >= sampling.top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, kept)
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:]
    found = (cumulative <= noise.double()[:, None] * total).sum(dim=-1).clamp(max=logits.shape[-1] - 1)
    return found.masked_fill(~(total[:, 0] > 0), -1)


def only_file(folder: Path) -> Path:
    """The run's tokenizer in a folder for one; raises ConfigError."""
    files = sorted(path for path in folder.glob("*") if path.is_file() and path.suffix != ".tmp")  # a killed writer's
    if len(files) != 1:
        raise ConfigError(f"{folder}: expected the run's one tokenizer file, found {len(files)}")
    return files[0]
