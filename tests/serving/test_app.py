"""Clients and batches that misbehave for longer than a test could wait: the application without a network."""

import asyncio
import json

import pytest
from fastapi import FastAPI

from megat2i.config import SamplingConfig
from megat2i.serving import app, guard
from megat2i.serving.app import FAILURES, DrawingResponse, Service
from megat2i.serving.guard import Guard
from megat2i.serving.requests import ServedRun
from megat2i.serving.worker import Order, Worker

POST = {
    "type": "http",
    "method": "POST",
    "path": "/",
    "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    "asgi": {"version": "3.0", "spec_version": "2.3"},
}


async def never(*_):
    await asyncio.get_running_loop().create_future()


@pytest.fixture
def worker(make_sampler):
    return Worker(make_sampler(), SamplingConfig(), 2, 10)


def test_a_client_that_never_reads_is_given_up(worker, monkeypatch, caplog):
    monkeypatch.setattr(app, "SEND_S", 0.05)
    order = Order([1], [0], SamplingConfig(), True, lambda: None)
    worker.submit(order)

    async def lines():
        while True:
            yield "{}\n"

    asyncio.run(DrawingResponse(lines(), worker, order)(POST, never, never))
    assert order.abandoned and worker.load() == (0, 0) and "stopped reading" in caplog.text


def test_a_body_that_never_comes_is_given_up(monkeypatch):
    monkeypatch.setattr(guard, "BODY_S", 0.05)
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(FastAPI(), loopback=True)(POST, never, send))
    assert sent[0]["status"] == 408
    assert json.loads(sent[1]["body"])["error"]["code"] == "body_too_slow"


def test_health_tells_of_batches_that_fail_in_a_row(worker):
    service = Service(ServedRun("run", worker.sampler, SamplingConfig(), True), worker)
    worker.failures = FAILURES
    answer = asyncio.run(service.health())
    assert answer.status_code == 503 and json.loads(answer.body)["status"] == "failing"
    worker.failures = FAILURES - 1
    assert asyncio.run(service.health()).status_code == 200
