"""One model, one thread that draws with it, and a bounded queue in front.

The unit is the image: what waits is drawn in batches, the oldest first, with whatever else waits for the same sampling
settings. Every batch is filled up to the same size, so an image is the one that ``tools/generate.py`` draws with this
batch size, however busy the server is; an idle place in a batch costs little, as a step mostly reads the weights.
Settings are constants of a batch, not tensors with a value for each image: they decide what a step computes (guidance
doubles its rows) and what a CUDA graph records.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from megat2i.config import SamplingConfig
from megat2i.generate import Drawing, Sampler

GATHERING_S = 0.02  # requests that are sent together arrive within this time
PREVIEW_SHARE = 0.25  # of the worker's time at most goes into unfinished images; decoders may be slow networks

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """More images wait than the queue holds. ``retry_after``: seconds until there should be room."""

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Stopping(Exception):
    """The worker takes nothing new: it finishes what it has and ends."""

    def __init__(self):
        super().__init__("the server is stopping")


class View(NamedTuple):
    """What is to be seen of an image: pixels [3, H, W] uint8 of its first rows of codes."""

    rows: int
    pixels: np.ndarray


class Order:
    """The images of one request. The worker's thread replaces ``views`` and calls ``changed`` after each change."""

    def __init__(
        self,
        prompt_tokens: list[int],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        previews: bool,
        changed: Callable[[], None],
    ):
        self.prompt_tokens, self.seeds, self.sampling = prompt_tokens, seeds, sampling
        self.previews, self.changed = previews, changed
        self.views: list[View | None] = [None] * len(seeds)
        self.error: Exception | None = None
        self.abandoned = False


class Place(NamedTuple):
    """One image of an order."""

    order: Order
    index: int


class Worker:
    """Draws orders with ``sampler``; ``capacity``: images that may wait."""

    def __init__(self, sampler: Sampler, sampling: SamplingConfig, batch_size: int, capacity: int):
        self.sampler, self.batch_size, self.capacity = sampler, batch_size, capacity
        self.rows, self.columns = sampler.image_tokenizer.grid
        self.failures = 0  # of batches, in a row
        self.batch_s = 0.0  # duration of the last batch that was finished
        self.drawn = 0  # images finished so far
        self._waiting: deque[Place] = deque()
        self._drawing: list[Place] = []
        self._closed = False
        self._change = threading.Condition()
        self._sampling, self._canvas = sampling, Drawing(sampler, sampling, batch_size, graphs=True)
        self._thread = threading.Thread(target=self._run, name="drawing")

    def start(self) -> None:
        """Draw a first row, so that no request waits for what PyTorch does once, and begin to serve."""
        for count in self._canvas.steps([], []):
            if count >= self.columns:
                break
        self._thread.start()

    def submit(self, order: Order) -> None:
        """Queue the images of ``order``; raises QueueFull or Stopping."""
        with self._change:
            if self._closed:
                raise Stopping
            if len(self._waiting) + len(order.seeds) > self.capacity:
                excess = len(self._waiting) + len(order.seeds) - self.capacity
                batches = math.ceil(excess / self.batch_size)
                raise QueueFull(max(1, math.ceil(batches * self.batch_s)))
            self._waiting.extend(Place(order, index) for index in range(len(order.seeds)))
            self._change.notify_all()

    def abandon(self, order: Order) -> None:
        """Nobody looks at ``order`` any more: what waits of it is dropped, and a batch of nothing else ends."""
        with self._change:
            order.abandoned = True
            self._waiting = deque(place for place in self._waiting if place.order is not order)
            self._change.notify_all()

    def close(self, now: bool = False) -> None:
        """Take nothing new; the thread ends once everything is drawn, or ``now``: at the next code."""
        with self._change:
            self._closed = True
            for place in (*self._waiting, *self._drawing) if now else ():
                place.order.abandoned = True
            if now:
                self._waiting.clear()
            self._change.notify_all()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    @property
    def closed(self) -> bool:
        return self._closed

    def load(self) -> tuple[int, int]:
        """(images that wait, images that are being drawn)."""
        with self._change:
            return len(self._waiting), len(self._drawing)

    def _run(self) -> None:
        while places := self._next_batch():
            try:
                self._draw(places)
                self.failures = 0
            except Exception as error:  # whatever it is: these requests are told, the others go on
                log.exception("a batch failed")
                self.failures += 1
                for order in {place.order for place in places}:
                    order.error = error
                    order.changed()

    def _next_batch(self) -> list[Place]:
        """The oldest image and what waits for the same settings; empty where nothing will come any more."""
        with self._change:
            self._drawing = []
            while not self._waiting:
                if self._closed:
                    return []
                self._change.wait()
                # What waits now may have been abandoned when the time is over.
                self._change.wait_for(lambda: len(self._waiting) >= self.batch_size or self._closed, GATHERING_S)
            sampling = self._waiting[0].order.sampling
            alike = [place for place in self._waiting if place.order.sampling == sampling]
            self._drawing = alike[: self.batch_size]
            taken = set(self._drawing)
            self._waiting = deque(place for place in self._waiting if place not in taken)
            return self._drawing

    def _draw(self, places: list[Place]) -> None:
        canvas = self._canvas_for(places[0].order.sampling)
        prompts = [place.order.prompt_tokens for place in places]
        seeds = [place.order.seeds[place.index] for place in places]
        started, preview_from = time.monotonic(), 0.0  # the latter: time of the next preview
        for count in canvas.steps(prompts, seeds):
            if all(place.order.abandoned for place in places):
                return
            row, rest = divmod(count, self.columns)
            began = time.monotonic()
            if rest == 0 and row < self.rows and began >= preview_from:
                self._show(canvas, places, row)
                ended = time.monotonic()
                preview_from = ended + (ended - began) * (1 / PREVIEW_SHARE - 1)
        self._show(canvas, places, self.rows)
        self.drawn += len(places)
        self.batch_s = time.monotonic() - started

    def _show(self, canvas: Drawing, places: list[Place], rows: int) -> None:
        """Give the first ``rows`` rows of every image to the orders: all of them, or those that want previews."""
        last = rows == self.rows
        chosen = [number for number, place in enumerate(places) if last or place.order.previews]
        if not chosen:
            return
        codes = canvas.drawn(len(places), rows * self.columns)
        pixels = self.sampler.image_tokenizer.decode(codes[chosen], (rows, self.columns)).numpy()
        for number, image in zip(chosen, pixels, strict=True):
            order, index = places[number]
            order.views[index] = View(rows, image)
        for order in {places[number].order for number in chosen}:
            order.changed()

    def _canvas_for(self, sampling: SamplingConfig) -> Drawing:
        """The last batch's memory and recorded graph where the settings are the same, else new ones in their place."""
        if sampling != self._sampling:
            self._sampling = self._canvas = None  # freed first: there need not be room for two
            self._canvas = Drawing(self.sampler, sampling, self.batch_size, graphs=True)
            self._sampling = sampling
        return self._canvas
