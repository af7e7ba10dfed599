"""Waits of a client of ``tools/serve.py``: for the first row, for one image, for eight requests at once.

    python benchmarks/bench_serve.py --run runs/demo [--rounds R] [--json FILE]

A server process, and requests as the page sends them, in turns: one alone, then eight at the same moment from eight
threads. The last figure is the time until the last of the eight is finished, over the time of one alone.
"""

import http.client
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import torch
from harness import ROOT, Record, parser_for, spread

AT_ONCE = 8


def main() -> None:
    """Rounds of one request and of eight, after one of each that is not counted."""
    parser = parser_for(__doc__, minutes=False)
    parser.add_argument("--run", type=Path, default=ROOT / "runs/demo")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--prompt", default="tomato")
    arguments = parser.parse_args()
    command = [sys.executable, str(ROOT / "tools/serve.py"), "--run", str(arguments.run), "--port", "0"]
    started = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        address = next(line for line in server.stdout if line.startswith("ready")).split()[1].removeprefix("http://")
        ready = time.perf_counter() - started
        rows = measure(address, arguments.prompt, arguments.rounds)
    finally:
        server.terminate()
        server.wait()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = Record("serve", arguments.json, device)
    print(f"{processor()}, {torch.get_num_threads()} threads, load {record.entry['environment']['load']:.1f}")
    print(f"ready after {ready:.1f} s\n{'':36}{'ms':>9}{'min':>9}{'max':>9}")
    for name, row in rows.items():
        print(f"{name:36}{row['ms']:9.0f}{row['min']:9.0f}{row['max']:9.0f}")
    ratios = rows[f"{AT_ONCE} requests at once"]["ms"] / rows["one request"]["ms"]
    print(f"{AT_ONCE} at once over one: {ratios:.2f} (medians)")
    record.add(f"prompt '{arguments.prompt}', one image a request", rows)
    record.finish()


def measure(address: str, prompt: str, rounds: int) -> dict[str, dict]:
    """Milliseconds with their spread."""
    first_rows, singles, together = [], [], []
    for number in range(rounds + 1):
        row, single = draw(address, prompt, number)
        last = last_of(AT_ONCE, address, prompt)
        if number:
            first_rows.append(row)
            singles.append(single)
            together.append(last)
    parts = {"first row, one request": first_rows, "one request": singles, f"{AT_ONCE} requests at once": together}
    return {name: spread(milliseconds) for name, milliseconds in parts.items()}


def last_of(count: int, address: str, prompt: str) -> float:
    """Milliseconds until the last of so many requests that start together is finished."""
    barrier = Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        return max(pool.map(lambda seed: draw(address, prompt, seed, barrier)[1], range(count)))


def draw(address: str, prompt: str, seed: int, barrier: Barrier | None = None) -> tuple[float, float]:
    """Milliseconds from the request to its first row and to its image."""
    connection = http.client.HTTPConnection(address)
    connection.connect()
    if barrier:
        barrier.wait()
    began, first = time.perf_counter(), None
    body = json.dumps({"prompt": prompt, "seed": seed})
    connection.request("POST", "/draw", body, {"Content-Type": "application/json"})
    for line in connection.getresponse():
        event = json.loads(line)["event"]
        if event == "error":
            raise ValueError(line.decode())
        if event in ("rows", "image"):
            first = first or time.perf_counter()
    ended = time.perf_counter()
    connection.close()
    return 1000 * (first - began), 1000 * (ended - began)


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown processor")


if __name__ == "__main__":
    main()
