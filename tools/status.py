"""How a run stands: step, losses, speed, time left, last checkpoint, slowest rank, health, restarts.

``python tools/status.py RUN`` reads the files of the run folder alone and writes nothing; it works on any machine that
sees the folder, while the run trains and afterwards. With ``--json`` it prints one object with these keys (null: not
known, or there is none):

run                   the folder
health                state: starting | alive | standing still | interrupted | stopped | finished | dead | unknown (no
                      lock, as in runs of older versions); detail: a sentence; host, process, since: of the first rank
step, steps, stop_at  last step done, length of the schedule, training.stop_at
last_step_age_s       seconds since the last line of metrics.jsonl
time_left_s           seconds to the end of the schedule (or stop_at) at the pace of this launch; null where none trains
job                   job, left_s: the job that trains and seconds to its end
step_s, tokens_per_s, mfu   of the last 50 steps; step_s is the median
training_loss         text, image: means of the last 50 steps
held_out              for each split: step, text, image of the newest validation
checkpoint            newest committed one: step, path, age_s, bytes, number of all
slowest_rank          step, rank, host, slower (share above the median), clearly; see RUN/slowest_rank.json
skipped, spikes, rewinds    numbers of steps in metrics.jsonl
restarts, resumed_from      launches after the first; checkpoint of the last
backend, layout       of the last launch
problems              sentences on files that are damaged
"""

import argparse
import json
import signal
import sys
import time
from pathlib import Path

from megat2i.console import in_words
from megat2i.files import DataFileError
from megat2i.interrupt import said_on_interrupt
from megat2i.printable import ArgumentParser
from megat2i.run_status import RunStatus
from megat2i.status_screen import lines

CLEAR = "\033[H\033[2J"


def main() -> None:
    """Read the command line and show the run."""
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, as run.dir has it")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the screen")
    parser.add_argument("--watch", nargs="?", type=float, const=2.0, metavar="SECONDS", help="again and again (2)")
    arguments = parser.parse_args()
    if arguments.watch is not None and arguments.watch <= 0:
        parser.error(f"--watch is {arguments.watch:g}, expected more than 0 seconds")
    run = RunStatus(arguments.run)
    if arguments.watch is None:
        print(json.dumps(run.look(), indent=1) if arguments.json else "\n".join(lines(run.look())))
        return
    with said_on_interrupt("the run itself goes on"):
        watch(run, arguments.watch, arguments.json)


def watch(run: RunStatus, interval: float, as_json: bool) -> None:
    """Draw the screen anew in a terminal; in a log file a line where step or health has changed."""
    before = None
    while True:
        status = run.look()
        if as_json:
            print(json.dumps(status), flush=True)
        elif sys.stdout.isatty():
            print(CLEAR + "\n".join(lines(status)), flush=True)
        else:
            now = (status["health"]["state"], status["step"])
            if now != before:
                print(in_one_line(status), flush=True)
            before = now
        time.sleep(interval)


def in_one_line(status: dict) -> str:
    """Time, health, step and losses."""
    health, losses = status["health"]["state"], in_words(status["training_loss"])
    step = f"step {status['step']:,}" + (f" of {status['steps']:,}" if status["steps"] else "")
    return f"{time.strftime('%H:%M:%S')} {health}, {step}, training loss {losses}"


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `status.py RUN | head` ends without a word
    try:
        main()
    except DataFileError as error:
        sys.exit(f"error: {error}")
