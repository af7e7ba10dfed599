"""The queue and the batches. A test holds the worker's thread in the callback of an order for as long as it needs."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from megat2i.config import SamplingConfig
from megat2i.serving.worker import Order, QueueFull, Stopping, Worker

SETTINGS = SamplingConfig(temperature=0.9)
ROWS, BATCH_SIZE, CAPACITY = 2, 4, 6


@pytest.fixture(scope="module")
def sampler(make_sampler):
    """Its images are two rows of two codes."""
    return make_sampler()


@pytest.fixture
def worker(sampler):
    worker = Worker(sampler, SETTINGS, BATCH_SIZE, CAPACITY)
    worker.start()
    yield worker
    worker.close(now=True)
    worker.join()


class Gate:
    """A callback that holds whoever calls it until ``open``; ``reached``: somebody is there."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self):
        self.reached.set()
        assert self.opened.wait(60)

    def open(self):
        self.opened.set()


def hold(worker, seeds=(0,)):
    """An order with whose first row the worker is held, and the gate."""
    gate = Gate()
    order = Order(worker.sampler.prompt_tokens("red hut"), list(seeds), SETTINGS, True, gate)
    worker.submit(order)
    assert gate.reached.wait(60)
    return order, gate


def submit(worker, prompt="blue hut", seeds=(1,), sampling=SETTINGS, previews=False):
    """An order that notes how many rows of its first image it has seen, and an event of its end."""
    ended, rows = threading.Event(), []

    def changed():
        views = order.views
        if views[0] is not None:
            rows.append(views[0].rows)
        if order.error or all(view and view.rows == ROWS for view in views):
            ended.set()

    order = Order(worker.sampler.prompt_tokens(prompt), list(seeds), sampling, previews, changed)
    worker.submit(order)
    return order, ended, rows


def images(order):
    return np.stack([view.pixels for view in order.views])


def test_images_are_the_samplers_whatever_else_is_asked_for(worker, sampler):
    """One alone; then many with several settings together, more than a batch holds."""
    alone, ended, _ = submit(worker, "green square", [7])
    assert ended.wait(60)
    expected = sampler.images(["green square"] * 3, [7, 8, 9], SETTINGS, BATCH_SIZE)
    assert np.array_equal(images(alone), expected[:1])
    (_, gate), warm = hold(worker), SamplingConfig(temperature=2.0, guidance=2.0)
    orders = [submit(worker, "green square", [7, 8, 9]), submit(worker, "red hut", [3], warm)]
    orders += [submit(worker, "", [4]), submit(worker, "red hut", [5], warm)]
    gate.open()
    assert all(ended.wait(60) for _, ended, _ in orders)
    found = [images(order) for order, _, _ in orders]
    assert np.array_equal(found[0], expected)
    assert np.array_equal(found[2], sampler.images([""], [4], SETTINGS, BATCH_SIZE))
    for number, seed in ((1, 3), (3, 5)):
        assert np.array_equal(found[number], sampler.images(["red hut"], [seed], warm, BATCH_SIZE))


def test_what_waits_for_the_same_settings_is_one_batch(worker):
    (_, gate), warm = hold(worker), replace(SETTINGS, temperature=2.0)
    orders = [submit(worker, seeds=[number], sampling=warm if number == 1 else SETTINGS) for number in range(5)]
    assert worker.load() == (5, 1)
    orders[0][0].changed = second = Gate()
    gate.open()
    assert second.reached.wait(60)
    assert worker.load() == (1, 4), "the four with equal settings are drawn, the other one waits"
    second.open()
    assert orders[1][1].wait(60)


def test_rows_are_shown_to_those_who_ask(worker):
    previewed, ended, rows = submit(worker, previews=True)
    plain, plain_ended, plain_rows = submit(worker)
    assert ended.wait(60) and plain_ended.wait(60)
    assert rows == [1, 2] and plain_rows == [2]
    assert np.array_equal(images(previewed), images(plain))


def test_the_first_rows_are_those_of_the_image(worker, sampler):
    order, gate = hold(worker, seeds=[5])
    first = order.views[0]
    gate.open()
    whole = sampler.images(["red hut"], [5], SETTINGS, BATCH_SIZE)[0]
    assert first.rows == 1 and np.array_equal(first.pixels, whole[:, :4])


def test_a_full_queue_refuses(worker):
    _, gate = hold(worker)
    submit(worker, seeds=range(CAPACITY - 1))
    with pytest.raises(QueueFull) as refused:
        submit(worker, seeds=[1, 2])
    assert refused.value.retry_after >= 1
    order, ended, _ = submit(worker, seeds=[3])
    assert worker.load() == (CAPACITY, 1)
    gate.open()
    assert ended.wait(60) and order.error is None


def test_an_abandoned_order_leaves_the_queue(worker):
    _, gate = hold(worker)
    gone, _, _ = submit(worker, seeds=range(5))
    other, ended, _ = submit(worker, seeds=[9])
    worker.abandon(gone)
    assert worker.load() == (1, 1)
    gate.open()
    assert ended.wait(60)
    assert gone.views == [None] * 5


def test_a_batch_that_nobody_waits_for_ends(worker):
    held, gate = hold(worker)
    worker.abandon(held)
    gate.open()
    _, ended, _ = submit(worker)
    assert ended.wait(60)
    assert held.views[0].rows == 1, "the image was drawn to its end for nobody"


def test_a_batch_goes_on_for_those_who_stay(worker):
    _, gate = hold(worker)
    gone, _, _ = submit(worker, seeds=[1])
    stays, ended, _ = submit(worker, seeds=[2])
    gone.changed, gone.previews = Gate(), True
    gate.open()
    assert gone.changed.reached.wait(60)
    worker.abandon(gone)
    gone.changed.open()
    assert ended.wait(60) and stays.error is None


def test_closing_finishes_what_was_accepted(worker):
    _, gate = hold(worker)
    orders = [submit(worker, seeds=[1, 2, 3]), submit(worker, seeds=[4], sampling=replace(SETTINGS, top_k=2))]
    worker.close()
    with pytest.raises(Stopping):
        submit(worker)
    gate.open()
    worker.join()
    assert all(ended.is_set() and order.error is None for order, ended, _ in orders)


def test_closing_now_drops_everything(worker):
    held, gate = hold(worker)
    waiting, _, _ = submit(worker, seeds=[1, 2, 3])
    worker.close(now=True)
    gate.open()
    worker.join()
    assert held.views[0].rows == 1 and waiting.views == [None] * 3


def test_a_failed_batch_is_told_and_the_next_one_is_drawn(sampler, caplog):
    weights = sampler.model.norm.weight.clone()
    worker = Worker(sampler, SETTINGS, BATCH_SIZE, CAPACITY)
    worker.start()
    try:
        sampler.model.norm.weight[3] = float("nan")
        broken, ended, _ = submit(worker)
        assert ended.wait(60)
        assert isinstance(broken.error, ValueError) and "not finite" in str(broken.error)
        assert worker.failures == 1 and "a batch failed" in caplog.text
        sampler.model.norm.weight.copy_(weights)
        sound, ended, _ = submit(worker)
        assert ended.wait(60) and sound.error is None and sound.views[0].rows == ROWS
    finally:
        sampler.model.norm.weight.copy_(weights)
        worker.close()
        worker.join()
    assert worker.failures == 0
