"""The server process: images equal the sampler's, OpenAI's own client, refusals, vanished clients, and its end."""

import base64
import io
import json
import re
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import openai
import pytest
import torch
from PIL import Image
from server_process import pixels

from megat2i.generate import Sampler
from megat2i.serving.requests import MAX_PROMPT

ROWS = 16
URL = "/v1/images/generations"


@pytest.fixture(scope="module")
def expected(run):
    """Function of (prompt, seed, changed settings) -> what the sampler draws: pixels [H, W, 3]."""
    sampler, settings = Sampler.from_run(run, torch.device("cpu"), torch.float32)

    def draw(prompt, seed, **changes):
        return sampler.images([prompt], [seed], replace(settings.sampling, **changes), 8)[0].transpose(1, 2, 0)

    return draw


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_health(server, run):
    status, headers, body = server.ask("GET", "/health")
    health = json.loads(body)
    assert status == 200 and health["status"] == "ok" and headers["content-type"] == "application/json"
    assert (health["model"], health["size"], health["rows"]) == ("run", "16x16", ROWS)
    assert (health["waiting"], health["drawing"]) == (0, 0) and health["guidance"] is True
    assert health["sampling"] == {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "guidance": 1.0}


def test_openais_client(client, expected):
    own = {"seed": 5, "temperature": 0.8, "top_k": 6, "guidance": 2.0}
    answer = client.images.generate(
        prompt="red hut", model="any", n=2, size="16x16", response_format="b64_json", user="me", extra_body=own
    )
    assert answer.created > 1_700_000_000 and len(answer.data) == 2
    for number, image in enumerate(answer.data):
        wanted = expected("red hut", 5 + number, temperature=0.8, top_k=6, guidance=2.0)
        assert np.array_equal(pixels(image.b64_json), wanted)


def test_openais_client_with_nothing_but_a_prompt(client):
    one, other = (client.images.generate(prompt="red hut").data for _ in range(2))
    assert len(one) == len(other) == 1
    assert not np.array_equal(pixels(one[0].b64_json), pixels(other[0].b64_json)), "seeds are random by default"


def test_openais_client_sees_errors_as_such(client):
    with pytest.raises(openai.BadRequestError, match="this model draws 16x16 pixels") as refused:
        client.images.generate(prompt="red hut", size="1024x1024")
    assert refused.value.param == "size" and refused.value.code == "invalid_size"
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        client.models.list()


def test_an_image_does_not_depend_on_the_load(server, expected):
    """Sixteen requests at once, two settings among them, and each image is the sampler's."""
    wanted = [{"prompt": f"{['red hut', ''][n % 2]}", "seed": n, "temperature": 1 + n % 4 // 2} for n in range(16)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda one: server.images(**one)[0], wanted))
    for one, image in zip(wanted, found, strict=True):
        assert np.array_equal(image, expected(one["prompt"], one["seed"], temperature=one["temperature"]))


def test_rows_arrive_before_the_image(server, expected):
    status, headers, body = server.ask("POST", "/draw", {"prompt": "green square", "n": 2, "seed": 3})
    lines = [json.loads(line) for line in body.splitlines()]
    assert status == 200 and headers["content-type"].startswith("application/x-ndjson")
    assert lines[0] == {"event": "start", "seeds": [3, 4], "rows": ROWS}
    for index in range(2):
        mine = [line for line in lines[1:] if line["index"] == index]
        rows = [line["rows"] for line in mine]
        assert rows == sorted(set(rows)) and rows[-1] == ROWS and rows[0] <= ROWS // 2
        assert [line["event"] for line in mine] == ["rows"] * (len(mine) - 1) + ["image"]
        whole = expected("green square", 3 + index)
        assert all(np.array_equal(pixels(line["png"]), whole[: line["rows"]]) for line in mine)


def test_the_file_says_how_it_was_drawn(server):
    _, _, body = server.ask("POST", URL, {"prompt": "ein grüner Hut 帽子", "seed": 9, "top_k": 4})
    image = Image.open(io.BytesIO(base64.b64decode(json.loads(body)["data"][0]["b64_json"])))
    settings = {"temperature": 1.5, "top_k": 4, "top_p": 1.0, "guidance": 1.0}
    assert json.loads(image.text["megat2i"]) == {
        "prompt": "ein grüner Hut 帽子",
        "seed": 9,
        **settings,
        "batch_size": 8,
    }


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({}, "prompt", "field required"),
        ({"prompt": 3}, "prompt", "string"),
        ({"prompt": "x" * (MAX_PROMPT + 1)}, "prompt", "at most 1000 characters"),
        ({"prompt": "\ud800"}, "prompt", "unicode"),
        ({"prompt": "x", "n": 0}, "n", "greater than or equal to 1"),
        ({"prompt": "x", "n": 11}, "n", "less than or equal to 10"),
        ({"prompt": "x", "n": "2"}, "n", "integer"),
        ({"prompt": "x", "n": True}, "n", "integer"),
        ({"prompt": "x", "seed": -1}, "seed", "greater than or equal to 0"),
        ({"prompt": "x", "seed": 2**32}, "seed", "less than or equal to"),
        ({"prompt": "x", "seed": 2**32 - 1, "n": 2}, "seed", "last image's seed"),
        ({"prompt": "x", "seed": 1.5}, "seed", "integer"),
        ({"prompt": "x", "size": "512x512"}, "size", "16x16"),
        ({"prompt": "x", "response_format": "url"}, "response_format", "b64_json"),
        ({"prompt": "x", "temperature": 0}, "temperature", "between"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature", "between"),
        ({"prompt": "x", "guidance": float("inf")}, "guidance", "between"),
        ({"prompt": "x", "top_k": -1}, "top_k", "at least 0"),
        ({"prompt": "x", "quality": "hd"}, "quality", "standard"),
        ({"prompt": "x", "stream": True}, "stream", "False"),
        ({"prompt": "x", "temprature": 1}, "temprature", "no parameter"),
        ([], None, "the body"),
        (b"{", None, "JSON"),
        (b"", None, "the body"),
        (b"[" * 20_000, None, "body"),
        (b'{"prompt": "\xff"}', None, "body"),
        (b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}", None, "body"),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [URL, "/draw"])
def test_a_bad_value_is_one_clear_error(server, path, body, param, words):
    status, _, answer = server.ask("POST", path, body)
    error = json.loads(answer)["error"]
    assert status == 400 and error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert words in error["message"] and "\n" not in error["message"] and len(error["message"]) < 200


def test_other_paths_and_methods(server):
    for method, path, status in (("GET", "/x", 404), ("GET", URL, 405), ("PUT", URL, 405), ("GET", "/docs", 404)):
        found, _, body = server.ask(method, path)
        assert found == status and json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost.evil"])
@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/health"), ("POST", URL)])
def test_another_name_for_this_machine_is_refused(server, host, method, path):
    status, _, body = server.ask(method, path, {"prompt": "x"}, {"Host": host})
    assert status == 403 and json.loads(body)["error"]["code"] == "wrong_host"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:8000", "LOCALHOST:80"])
def test_the_names_of_this_machine_are_accepted(server, host):
    assert server.ask("GET", "/health", headers={"Host": host})[0] == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_what_another_site_could_send_is_refused(server, kind):
    status, headers, body = server.ask("POST", "/draw", {"prompt": "x"}, {"Content-Type": kind})
    assert status == 415 and json.loads(body)["error"]["code"] == "wrong_content_type"
    status, headers, _ = server.ask("OPTIONS", "/draw", headers={"Origin": "http://evil.example"})
    assert status == 405 and not [name for name in headers if name.lower().startswith("access-control")]


def test_a_long_body_is_refused(server):
    status, _, body = server.ask("POST", URL, b'{"prompt": "' + b"x" * 100_000 + b'"}')
    assert status == 413 and json.loads(body)["error"]["code"] == "body_too_long"


def test_the_page_can_load_nothing_from_elsewhere(server):
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        status, headers, body = server.ask("GET", path)
        assert status == 200 and headers["content-type"] == f"{kind}; charset=utf-8"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert not re.search(rb"https?://|innerHTML|insertAdjacent|document\.write", body)


def posted(server, path: str, **wanted) -> socket.socket:
    """A connection whose request was sent and whose answer nobody reads."""
    host, port = server.address.split(":")
    body = json.dumps(wanted).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {server.address}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.parametrize("path", [URL, "/draw"])
def test_nothing_is_drawn_for_clients_that_vanished(server, expected, path):
    drawn = server.health()["drawn"]
    connections = [posted(server, path, prompt="red hut", n=10) for _ in range(6)]
    while server.health()["waiting"] == 0:
        pass
    for connection in connections:
        connection.close()
    assert np.array_equal(server.images(prompt="red hut", seed=1)[0], expected("red hut", 1))
    while (health := server.health())["waiting"] or health["drawing"]:
        pass
    assert health["status"] == "ok" and drawn < health["drawn"] < drawn + 50


def test_a_client_that_does_not_read_holds_up_nobody(server, expected):
    silent = posted(server, "/draw", prompt="red hut", n=10)
    assert np.array_equal(server.images(prompt="red hut", seed=2)[0], expected("red hut", 2))
    silent.close()


def test_half_a_request_holds_up_nobody(server, expected):
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(f"POST {URL} HTTP/1.1\r\nHost: {server.address}\r\n".encode())
        half.sendall(b'Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"prompt"')
        assert np.array_equal(server.images(prompt="", seed=2)[0], expected("", 2))


@pytest.fixture(scope="module")
def strict_server(run, start_server, tmp_path_factory):
    """A short queue, and a run that was trained without empty captions."""
    folder = shutil.copytree(run, tmp_path_factory.mktemp("strict") / "run")
    settings = (folder / "config.yaml").read_text()
    assert "caption_dropout: 0.1" in settings
    (folder / "config.yaml").write_text(settings.replace("caption_dropout: 0.1", "caption_dropout: 0.0"))
    return start_server("--queue", "10", folder=folder)


def test_guidance_needs_empty_captions_in_training(strict_server):
    assert json.loads(strict_server.ask("GET", "/health")[2])["guidance"] is False
    status, _, body = strict_server.ask("POST", URL, {"prompt": "red hut", "guidance": 2})
    error = json.loads(body)["error"]
    assert status == 400 and error["param"] == "guidance" and "caption_dropout" in error["message"]
    assert strict_server.ask("POST", URL, {"prompt": "red hut", "guidance": 1})[0] == 200


def test_beyond_the_queue_is_429(strict_server):
    with ThreadPoolExecutor(12) as pool:
        wanted = {"prompt": "red hut", "n": 10}
        answers = list(pool.map(lambda _: strict_server.ask("POST", URL, wanted), range(12)))
    statuses = [status for status, _, _ in answers]
    assert set(statuses) == {200, 429}
    _, headers, body = answers[statuses.index(429)]
    error = json.loads(body)["error"]
    assert int(headers["retry-after"]) >= 1
    assert error["type"] == "rate_limit_error" and error["code"] == "queue_full"
    assert all(len(json.loads(body)["data"]) == 10 for status, _, body in answers if status == 200)
    client = openai.OpenAI(base_url=f"{strict_server.url}/v1", api_key="none", max_retries=20)
    with ThreadPoolExecutor(6) as pool:  # the client waits as Retry-After says, and comes again
        patient = list(
            pool.map(lambda seed: client.images.generate(prompt="", n=10, extra_body={"seed": seed}), range(6))
        )
    assert all(len(answer.data) == 10 for answer in patient)


def first_row(server, **wanted):
    """An open connection to the stream of a drawing, and the file of its lines, read up to the first row."""
    connection = posted(server, "/draw", **wanted)
    file = connection.makefile("rb")
    while b'"rows"' not in (line := file.readline()) or b"start" in line:
        assert line, "the stream ended before a row"
    return connection, file


def test_sigterm_finishes_what_runs(start_server, expected):
    server = start_server()
    connection, file = first_row(server, prompt="red hut", n=10, seed=1)
    server.process.send_signal(signal.SIGTERM)
    server.line("SIGTERM: finishing")
    status, _, body = server.ask("POST", URL, {"prompt": "blue circle"})
    assert status == 503 and json.loads(body)["error"]["code"] == "stopping"
    status, _, body = server.ask("GET", "/health")
    assert status == 503 and json.loads(body)["status"] == "stopping"
    found = re.findall(rb'{"event": "image".*}', file.read())
    connection.close()
    images = {line["index"]: pixels(line["png"]) for line in map(json.loads, found)}
    assert all(np.array_equal(images[n], expected("red hut", 1 + n)) for n in range(10)) and len(images) == 10
    assert server.process.wait(timeout=60) == 0
    assert server.line("stopped") and server.errors.read_text() == ""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_an_idle_server_ends_at_once(start_server, name):
    server = start_server()
    server.process.send_signal(getattr(signal, name))
    assert server.process.wait(timeout=60) == 0
    assert server.errors.read_text() == ""


def test_a_second_signal_ends_what_runs(start_server):
    server = start_server()
    connection, file = first_row(server, prompt="red hut", n=10)
    others = [posted(server, "/draw", prompt="red hut", n=10) for _ in range(4)]
    while server.health()["waiting"] < 40:
        pass
    server.process.send_signal(signal.SIGTERM)
    server.line("SIGTERM: finishing")
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(timeout=60) == 0
    assert file.read().count(b'"event": "image"') < 10
    for open_one in (connection, *others):
        open_one.close()
