"""The status of a run as lines for people: one aligned line for each thing there is to know."""

from megat2i.console import in_words, name_of
from megat2i.printable import printable
from megat2i.progress import count, size_in_words
from megat2i.run_status import RECENT, duration

LABEL_WIDTH = 14


def lines(status: dict) -> list[str]:
    """The screen of what ``RunStatus.look`` returned."""
    health = status["health"]
    rows = [("run", status["run"]), ("health", f"{health['state']}: {health['detail']}")]
    if "host" in health:
        rows.append(("launch", f"process {health['process']} on {health['host']}, since {health['since']}"))
    rows += [("step", _step(status)), ("time left", _time_left(status)), ("speed", _speed(status))]
    training = in_words(status["training_loss"])
    rows.append(("training loss", training + (f" (mean of up to {RECENT} steps)" if training != "none" else "")))
    for split, losses in status["held_out"].items():
        words = in_words({modality: loss for modality, loss in losses.items() if modality != "step"})
        rows.append((f"{name_of(split)}"[:LABEL_WIDTH], f"{words} (step {losses['step']:,})"))
    rows += [("checkpoint", _checkpoint(status)), ("slowest rank", _slowest_rank(status["slowest_rank"]))]
    updates = f"{status['skipped']:,} skipped, {count(status['spikes'], 'spike')}, {count(status['rewinds'], 'rewind')}"
    resumed = f", the last from {status['resumed_from']}" if status["resumed_from"] else ""
    rows += [("updates", updates), ("restarts", f"{status['restarts']}{resumed}")]
    if status["backend"]:
        rows.append(("machine", f"{status['backend']} layout={status['layout']}"))
    rows += [("problem", problem) for problem in status["problems"]]
    return [printable(f"{label:{LABEL_WIDTH}} {text}") for label, text in rows]


def _step(status: dict) -> str:
    step, steps = status["step"], status["steps"]
    share = f" of {steps:,} ({step / steps:.0%})" if steps else ""
    stop = f", to stop at {status['stop_at']:,}" if status["stop_at"] else ""
    return f"{step:,}{share}{stop}"


def _time_left(status: dict) -> str:
    left, job = status["time_left_s"], status["job"]
    schedule = "not known" if left is None else f"{duration(left)} of the schedule"
    if status["health"]["state"] in ("finished", "interrupted", "stopped", "dead"):
        return "nothing runs" if status["health"]["state"] != "finished" else "none"
    if job is None:
        return schedule
    ends = f"ends in {duration(job['left_s'])}" if job["left_s"] > 0 else "has ended"
    return f"{schedule}; job {job['job']} {ends}"


def _speed(status: dict) -> str:
    if status["tokens_per_s"] is None or status["step_s"] is None:
        return "not known"
    mfu = f", MFU {status['mfu']:.1%}" if status["mfu"] is not None else ""
    return f"{status['tokens_per_s']:,.0f} tokens/s, {status['step_s']:.3g} s a step{mfu}"


def _checkpoint(status: dict) -> str:
    saved = status["checkpoint"]
    if saved is None:
        return "none yet"
    behind = f", {count(status['step'] - saved['step'], 'step')} behind" if status["step"] > saved["step"] else ""
    return f"step {saved['step']:,}, {duration(saved['age_s'])} ago{behind}, {size_in_words(saved['bytes'])}"


def _slowest_rank(measured: dict | None) -> str:
    if not measured:
        return "not measured"
    try:
        place = f"rank {measured['rank']} on {measured['host']}, {measured['slower']:.0%} slower than the median"
        return f"{place} (step {measured['step']:,})" if measured["clearly"] else f"none stands out ({place})"
    except (KeyError, TypeError, ValueError):
        return "slowest_rank.json is damaged; it is measured again while the run goes on"
