"""What a model knows of language: completions of prompts, and a few-shot probe with answers to choose from.

Works on any run with text ids, before and after it was trained on images; probability is given to text ids alone.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megat2i import checkpoint, config
from megat2i.config import ConfigError
from megat2i.data.indexed import IndexedDataset
from megat2i.data.wordnet import KIND, Entry
from megat2i.generate import only_file
from megat2i.kernels import choose_ops
from megat2i.model import weights
from megat2i.model.gpt import GPT
from megat2i.model.pretrained import open_pretrained
from megat2i.tokenizers.text import TextTokenizer, load_text_tokenizer

QUESTION = "{} is a kind of"
SHOTS, ANSWERS = 3, 4


@dataclass(frozen=True)
class Question:
    """``prompt`` (with solved examples before it) and ``answers``, the first of which is right."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class TextModel:
    """A model as a language model over the ids of ``tokenizer``; ``step``: of the checkpoint it comes from."""

    model: GPT
    tokenizer: TextTokenizer
    length: int  # positions of a window, at most
    step: int

    @staticmethod
    def from_run(run_dir: Path, device: torch.device) -> "TextModel":
        """The newest checkpoint of a run, in float32, with the run's text tokenizer. Raises ConfigError."""
        settings = config.load(run_dir / "config.yaml")
        found = checkpoint.latest_here(run_dir / "checkpoints")
        if found is None:
            raise ConfigError(f"{run_dir}/checkpoints: no sound checkpoint; train the run to its first checkpoint")
        dtype = torch.float32
        model = GPT.empty(settings.model, settings.vocab_layout, choose_ops(device, dtype), device, dtype)
        model.requires_grad_(False)
        checkpoint.load_weights(found, model)
        tokenizer = load_text_tokenizer(only_file(run_dir / "tokenizers" / "text"))
        return TextModel(model, tokenizer, settings.data.sequence_length, found.step)

    def beginning_from(self, folder: Path) -> "TextModel":
        """The pre-trained model in ``folder``, as ``model.pretrained`` takes it, with this model's text and windows.

        Raises DataFileError.
        """
        source, device = open_pretrained(folder), self.model.device
        ranges = ((0, source.rows),) if source.vocab is None else source.vocab.ranges
        model = GPT(source.shape, source.rows, ranges, choose_ops(device, torch.float32)).to(device)
        weights.fill(model.requires_grad_(False), source.read)
        return replace(self, model=model, step=0)

    def _logits(self, tokens: Tensor) -> Tensor:
        """Of text ids alone, on the CPU: [B, S, text ids] after ``tokens`` [B, S]."""
        return self.model.logits(tokens.to(self.model.device))[..., : self.tokenizer.vocab_size].cpu()

    @torch.no_grad()
    def complete(self, prompt: str, tokens: int) -> str:
        """The most probable next ids, one after another: at most ``tokens``, up to the end of the line."""
        ids = self.tokenizer.encode([prompt])[0]
        start = len(ids)
        for _ in range(tokens):
            window = torch.tensor([ids[-self.length :]])
            ids.append(int(self._logits(window)[0, -1].argmax()))
            if "\n" in self.tokenizer.decode(ids[-1:]):
                break
        return self.tokenizer.decode(ids[start:]).split("\n")[0].strip()

    @torch.no_grad()
    def scores(self, prompt: str, answers: Sequence[str]) -> list[float]:
        """Mean log-probability of the ids of each answer behind the prompt."""
        before = self.tokenizer.encode([prompt])[0]
        result = []
        for ids in self.tokenizer.encode([f" {answer}" for answer in answers]):
            tokens = (before + ids)[-self.length :]
            log_probabilities = self._logits(torch.tensor([tokens[:-1]]))[0, -len(ids) :].log_softmax(dim=-1)
            result.append(log_probabilities.gather(1, torch.tensor(ids)[:, None]).mean().item())
        return result

    def answers(self, questions: Sequence[Question]) -> list[bool]:
        """Of each question whether the right answer is the most probable one; chance is one in ANSWERS."""
        scores = (self.scores(question.prompt, question.answers) for question in questions)
        return [values.index(max(values)) == 0 for values in scores]

    @torch.no_grad()
    def perplexity(self, store: IndexedDataset, windows: int) -> float:
        """Of the first windows of a stream of text, over text ids alone: image codes take no probability from them."""
        total, count = 0.0, 0
        for start in range(0, min(store.token_count - 1, windows * self.length), self.length):
            ids = torch.from_numpy(store.read(start, min(self.length + 1, store.token_count - start)).astype("int64"))
            log_probabilities = self._logits(ids[None, :-1])[0].log_softmax(dim=-1)
            total -= log_probabilities.gather(1, ids[1:, None]).double().sum().item()
            count += len(ids) - 1
        return math.exp(total / count)


def questions(entries: Sequence[Entry], number: int, seed: int = 0) -> list[Question]:
    """What is a word a kind of? Behind SHOTS solved examples; the wrong answers are right for other words.

    Nouns of one meaning, from entries that the language model has seen in training: what it knows, not what it can
    guess.
    """
    senses = Counter(entry.words[0] for entry in entries if entry.kind == "n")
    known = {
        entry.words[0]: next(other for pointer, other in entry.relations if pointer == KIND)
        for entry in entries
        if entry.kind == "n" and senses[entry.words[0]] == 1 and not entry.held_out
        if any(pointer == KIND for pointer, _ in entry.relations)
    }
    chooser = random.Random(seed)
    words = sorted(known)
    result = []
    for word in chooser.sample(words, number):
        examples = [other for other in chooser.sample(words, SHOTS + 1) if other != word][:SHOTS]
        wrong: list[str] = []
        while len(wrong) < ANSWERS - 1:
            answer = known[chooser.choice(words)]
            if answer not in (known[word], *wrong):
                wrong.append(answer)
        lines = [f"{QUESTION.format(example)} {known[example]}.\n" for example in examples]
        result.append(Question("".join(lines) + QUESTION.format(word), (known[word], *wrong)))
    return result
