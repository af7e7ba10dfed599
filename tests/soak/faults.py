"""The kinds of faults. Each hurts a trial, recovers it, and says what became of it: "equal", "refused", or None where
the run had ended before and nothing was hurt. What must not happen raises Failure."""

import hashlib
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from soak import damage
from soak.ranks import TICK
from soak.trial import Failure, Trial, in_child, sentence, step_of, tail
from soak.world import TMPFS_MIB, can_mount

LAUNCHER_S = 10.0  # from the end of a launcher to that of its last rank
RANK_S = 30.0  # from the end of one rank to that of a launcher and all its ranks
WATCHDOG_S = 3
SLACK_S = 6.0  # of a busy machine


@dataclass
class Result:
    """``outcome`` as above; ``detail`` of the kind for the table, such as how a file was damaged; ``seconds`` from the
    fault until the run made steps again, or a reader had its answer; ``trained``: a training recovered, not a reader.
    """

    outcome: str
    detail: str
    seconds: float
    trained: bool = True


# Processes


def kill_one(trial: Trial) -> Result | None:
    """SIGKILL of one rank."""
    return _signal(trial, [signal.SIGKILL], everyone=False)


def kill_all(trial: Trial) -> Result | None:
    """SIGKILL of all ranks."""
    return _signal(trial, [signal.SIGKILL], everyone=True)


def terminate(trial: Trial) -> Result | None:
    """SIGTERM of one rank or all."""
    return _signal(trial, [signal.SIGTERM], everyone=trial.rng.random() < 0.5, saves=True)


def warn(trial: Trial) -> Result | None:
    """SIGUSR1, a job's warning before its end, of one rank or all."""
    return _signal(trial, [signal.SIGUSR1], everyone=trial.rng.random() < 0.5, saves=True)


def ask_to_save(trial: Trial) -> Result | None:
    """SIGUSR2 of a rank, or RUN/triggers/save: the run goes on."""
    launch = trial.at_random_instant(steps=2)
    if launch is None:
        return None
    hurt, how = time.monotonic(), trial.rng.choice(("SIGUSR2", "triggers/save"))
    if how == "SIGUSR2":
        launch.signal(trial.rng.randrange(trial.variant.ranks), signal.SIGUSR2)
    else:
        (trial.run / "triggers").mkdir(exist_ok=True)
        (trial.run / "triggers" / "save").touch()
    if not trial.progressing_further(launch):
        raise Failure("LOST", f"ended by {how}: {tail(launch)}")
    return Result("equal", how, time.monotonic() - hurt)


def interrupt(trial: Trial) -> Result | None:
    """SIGINT of one rank or all, once or, as DeepSpeed's launcher does it, with a SIGTERM behind."""
    numbers = trial.rng.choice(([signal.SIGINT], [signal.SIGINT, signal.SIGTERM]))
    return _signal(trial, numbers, everyone=trial.rng.random() < 0.5, saves=True)


def _signal(trial: Trial, numbers: list[int], everyone: bool, saves: bool = False) -> Result | None:
    """``saves``: a training that has begun must answer by saving its last step."""
    launch = trial.at_random_instant()
    if launch is None:
        return None
    hurt, ranks, begun = time.monotonic(), trial.variant.ranks, launch.steps >= 2
    victims = range(ranks) if everyone else [trial.rng.randrange(ranks)]
    for number in numbers:
        for rank in victims:
            launch.signal(rank, number)
    trial.all_end()
    if saves and begun:
        trial.require_saved(launch)
    return Result(trial.recover(), f"{'all' if len(victims) == ranks else 'one'} of {ranks}", time.monotonic() - hurt)


def kill_at_change(trial: Trial) -> Result | None:
    """SIGKILL of a rank exactly at one of its changes of the run folder."""
    trial.stop()
    number = trial.rng.randint(1, 60) if trial.rng.random() < 0.7 else trial.rng.randint(60, 600)
    started, sound = time.monotonic(), len(trial.sound())
    launch = trial.start(kill_at=number, kill_rank=0 if number <= 60 else trial.rng.randrange(trial.variant.ranks))
    while not launch.over() and not any(code == -signal.SIGKILL for code in launch.codes.values()):
        if time.monotonic() - started > 60 * trial.patience:
            raise Failure("LATE", f"neither killed nor ended after 60 s: {tail(launch)}")
        time.sleep(TICK)
    if launch.over() and not launch.failed():  # it had no such change
        trial.launch = None
        trial.finish()
        return None
    hurt = time.monotonic()
    trial.all_end()
    return Result(trial.recover(), "of a resumed launch" if sound else "of a new one", time.monotonic() - hurt)


def pause(trial: Trial) -> Result | None:
    """SIGSTOP of a rank, and SIGCONT after a while: the run goes on."""
    launch = trial.at_random_instant()
    if launch is None:
        return None
    hurt, victim = time.monotonic(), trial.rng.randrange(trial.variant.ranks)
    launch.signal(victim, signal.SIGSTOP)
    time.sleep(trial.rng.uniform(0.1, 1.5))
    launch.signal(victim, signal.SIGCONT)
    if not trial.progressing_further(launch):
        raise Failure("LOST", f"ended though its rank {victim} was continued: {tail(launch)}")
    return Result("equal", "", time.monotonic() - hurt)


def has_watchdog() -> bool:
    from megat2i.config import RuntimeConfig

    return "watchdog_s" in {field.name for field in fields(RuntimeConfig)}


def stop_for_good(trial: Trial) -> Result | None:
    """SIGSTOP of a rank: the watchdog names it and ends the launch."""
    if trial.variant.ranks == 1:
        return None
    trial.stop()
    launch = trial.start(trial.arguments(f"runtime.watchdog_s={WATCHDOG_S}"))
    launch = trial.at_random_instant(steps=2)
    if launch is None:
        return None
    hurt, victim = time.monotonic(), trial.rng.randrange(trial.variant.ranks)
    launch.signal(victim, signal.SIGSTOP)
    trial.all_end(2 * WATCHDOG_S + SLACK_S)
    if not launch.failed():  # the rank had done its part: nothing was hurt
        return None
    if not re.search(rf"rank {victim}\b", launch.text()):
        raise Failure("TRACEBACK", f"nobody named rank {victim}: {tail(launch)}")
    return Result(trial.recover(), "", time.monotonic() - hurt)


def launcher(trial: Trial) -> Result | None:
    """SIGTERM, SIGINT or SIGKILL of DeepSpeed's launcher, Ctrl-C for all, or SIGKILL of one of its ranks."""
    trial.stop()
    launch = trial.start_launcher()
    if not trial.wait(launch, 180, trial.rng.randint(1, 12)):
        launch.kill()
        raise Failure("LATE", f"no step within 180 s: {tail(launch)}")
    if launch.over():
        trial.complete()
        return None
    begun, what = launch.steps >= 2, trial.rng.choice(("SIGTERM", "SIGINT", "SIGKILL", "Ctrl-C", "SIGKILL of a rank"))
    if what != "Ctrl-C":  # else ranks without a launcher would come to the run's end, and to theirs
        Path(launch.pace.hold).touch()
    hurt = time.monotonic()
    if what == "Ctrl-C":
        os.killpg(launch.launcher.pid, signal.SIGINT)
    elif what == "SIGKILL of a rank":
        launch.signal(trial.rng.randrange(trial.variant.ranks), signal.SIGKILL)
    else:
        launch.launcher.send_signal(getattr(signal, what))
    trial.all_end(LAUNCHER_S if what in ("SIGTERM", "SIGINT", "SIGKILL") else RANK_S)
    if what == "Ctrl-C" and begun:
        trial.require_saved(launch)
    return Result(trial.recover(), what, time.monotonic() - hurt)


def second_run(trial: Trial) -> Result | None:
    """Another training is started in the folder: it is refused, and the first one goes on."""
    launch = trial.at_random_instant(steps=2)
    if launch is None:
        return None
    hold, settings = Path(launch.pace.hold), (trial.run / "config.yaml").read_bytes()
    hold.touch()  # no step begins, but the first training is alive in all its threads
    how, arguments = trial.rng.choice((("--resume", trial.arguments()), ("new settings", trial.new_settings())))
    hurt = time.monotonic()
    second = trial.fork(arguments)
    if not trial.wait(second, 60):
        second.kill()
        hold.unlink()
        raise Failure("WRONG", f"the second training was not refused: {tail(second)}")
    hold.unlink()
    if launch.over():
        trial.launch = None
        raise Failure("LOST", f"the first training has ended: {tail(launch)}; the second: {tail(second)}")
    if not second.failed():
        raise Failure("WRONG", f"the second training has run: {tail(second)}")
    said = sentence(second)
    if not trial.progressing_further(launch):
        trial.launch = None
        raise Failure("LOST", f"the first training has ended: {tail(launch)}; the second: {said}")
    if (trial.run / "config.yaml").read_bytes() != settings:
        raise Failure("WRONG", f"config.yaml was changed by the second training: {said}")
    return Result("refused", how, time.monotonic() - hurt)


def clock(trial: Trial) -> Result | None:
    """The clock goes back between two launches or within one, and the files' times lie in the future or the past."""
    trial.stop()
    jump = -trial.rng.choice((1.0, 3600.0, 86400.0, 10 * 365 * 86400.0)) * trial.rng.uniform(1, 3)
    within = trial.rng.random() < 0.5
    for path in [*trial.run.rglob("*"), *trial.prefix.parent.iterdir()]:
        seconds = time.time() - trial.rng.choice((jump, -jump))
        os.utime(path, (seconds, seconds), follow_symlinks=False)
    hurt = time.monotonic()
    outcome = trial.recover(clock=(0.0 if within else jump, jump), clock_step=2 if within else 0)
    return Result(outcome, "within a launch" if within else "between two", time.monotonic() - hurt)


# Disks and files


def full_disk(trial: Trial) -> Result | None:
    """The run's file system is full before the next checkpoint is written."""
    if not trial.stopped_with_checkpoints():
        return None
    size = sum(path.stat().st_size for path in trial.sound()[0].iterdir())
    launch = trial.at_random_instant(steps=1)
    if launch is None:
        return None
    hurt, ballast = time.monotonic(), trial.disk / "ballast"
    leave, last = trial.rng.randrange(int(0.9 * size)), launch.steps + 12
    end = time.monotonic() + 60 * trial.patience
    while launch.steps < last and not launch.over() and time.monotonic() < end:
        _fill(ballast, leave)  # again: a save that was under way removes an older checkpoint
        launch.wait(0.05)
    if launch.over() and not launch.failed():
        ballast.unlink()
        trial.launch = None
        trial.finish()
        return None
    if not launch.over():
        raise Failure("WRONG", f"goes on though no checkpoint can be written: {tail(launch)}")
    said = sentence(launch)
    ballast.unlink()
    trial.launch = None
    trial.audit()
    if trial.recover() != "equal":
        raise Failure("LOST", f"cannot be resumed after {said}")
    return Result("refused", "", time.monotonic() - hurt)


def _fill(ballast: Path, leave: int) -> None:
    """Let ``ballast`` grow until its file system has at most ``leave`` bytes of room."""
    usage = os.statvfs(ballast.parent)
    assert usage.f_blocks * usage.f_frsize <= TMPFS_MIB << 20, "not the trial's own file system"
    surplus = usage.f_bavail * usage.f_frsize - leave
    if surplus > 0:
        with open(ballast, "ab", buffering=0) as file, suppress(OSError):  # the training may be faster
            os.posix_fallocate(file.fileno(), file.tell(), surplus)


def truncate_while_training(trial: Trial) -> Result | None:
    """The dataset's .bin or .idx loses its end while it is read."""
    launch = trial.at_random_instant(steps=1)
    if launch is None:
        return None
    suffix = trial.rng.choice((".bin", ".idx"))
    path = Path(f"{trial.prefix}{suffix}")
    trial.copy(path)
    hurt = time.monotonic()
    os.truncate(path, trial.rng.randrange(path.stat().st_size))
    return _ends_by_name(trial, suffix, hurt)


def tokens_damaged(trial: Trial) -> Result | None:
    """The dataset's .bin is damaged between two launches, or is another dataset's."""
    trial.stop()
    tokens = Path(f"{trial.prefix}.bin")
    trial.copy(tokens)
    if trial.rng.random() < 0.15:
        tokens.write_bytes(trial.reference.donor.joinpath("train.bin").read_bytes())
        how = "of another dataset"
    else:
        how = damage.mutate(tokens, trial.rng)
    hurt = time.monotonic()
    trial.start()
    return _ends_by_name(trial, how, hurt)


def _ends_by_name(trial: Trial, how: str, hurt: float) -> Result | None:
    """A training on damaged tokens must end with one sentence, or as the untouched one."""
    launch = trial.launch
    if not trial.wait(launch, 60):
        launch.kill()
        raise Failure("LATE", f"goes on 60 s after its tokens were damaged: {tail(launch)}")
    trial.launch = None
    if not launch.failed():
        try:
            trial.finish()
        except Failure as failure:
            raise Failure(failure.outcome, f".bin {how}, exit code 0: {failure.detail}") from failure
        return Result("equal", how, time.monotonic() - hurt)
    sentence(launch)
    trial.repair()
    if trial.recover() != "equal":
        raise Failure("LOST", "cannot be resumed with the right tokens")
    return Result("refused", how, time.monotonic() - hurt)


def index_damaged(trial: Trial) -> Result | None:
    """The dataset's .idx is damaged between two launches."""
    return _dataset_damaged(trial, Path(f"{trial.prefix}.idx"))


def manifest_damaged(trial: Trial) -> Result | None:
    """The dataset's .json is damaged between two launches."""
    return _dataset_damaged(trial, Path(f"{trial.prefix}.json"))


def _dataset_damaged(trial: Trial, path: Path) -> Result | None:
    trained = trial.rng.random() < 0.1
    if trained:
        trial.stop()
        return _training_on_damaged(trial, path)
    # A copy: the training of this trial may be running.
    shutil.copytree(trial.prefix.parent, trial.folder / "damaged")
    prefix = trial.folder / "damaged" / trial.prefix.name
    before = in_child(lambda: _content(prefix))
    how, hurt = damage.mutate(prefix.with_name(path.name), trial.rng), time.monotonic()
    answer = in_child(lambda: _content(prefix))
    seconds = time.monotonic() - hurt
    shutil.rmtree(prefix.parent)
    if "refused" not in answer and answer != before:
        raise Failure("WRONG", f"{path.name}, {how}: opened with another content")
    if str(prefix) not in answer.get("refused", str(prefix)):
        raise Failure("TRACEBACK", f"{path.name}, {how}: no file is named: {answer}")
    return Result("refused" if "refused" in answer else "equal", how, seconds, trained=False)


def _training_on_damaged(trial: Trial, path: Path) -> Result:
    trial.stop()
    trial.copy(path)
    how, hurt = damage.mutate(path, trial.rng), time.monotonic()
    outcome = trial.recover()
    seconds = time.monotonic() - hurt
    trial.repair()
    return Result(outcome, how, seconds)


def _content(prefix: Path) -> dict:
    """What the program's reader makes of the dataset: its tokens and what they mean."""
    from megat2i.data.indexed import IndexedDataset

    store = IndexedDataset(prefix)
    tokens = store.read(0, int(store.lengths.sum()))
    arrays = (tokens, store.lengths, store.documents, store.modes)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    return {"content": digest, "manifest": repr(store.manifest)}


def checkpoint_damaged(trial: Trial) -> Result | None:
    """The newest checkpoint is damaged or mixed with another: the one before is taken."""
    if not trial.stopped_with_checkpoints():
        return None
    trial.remove_damaged()
    if trial.rng.random() < 0.15:
        return _resumed_from_damaged(trial)
    before = {step_of(path): in_child(lambda path=path: _values(path)) for path in trial.sound()[:2]}
    newest, older = trial.sound()[:2]
    files = {path: path.read_bytes() for path in newest.iterdir()}
    how, hurt = damage.damage_checkpoint(newest, older, trial.reference.donor, trial.rng), time.monotonic()
    answer = in_child(lambda: _latest(newest.parent))
    seconds = time.monotonic() - hurt
    for path, content in files.items():
        path.write_bytes(content)
    if answer is None or answer["step"] < step_of(older):
        raise Failure("LOST", f"{newest.name}, {how}: {older.name} is sound, but the reader takes {answer}")
    if answer["values"] != before.get(answer["step"]) or answer["name"] != f"step-{answer['step']}":
        raise Failure("WRONG", f"{newest.name}, {how}: taken as step {answer['step']}")
    return Result("equal", how, seconds, trained=False)


def _resumed_from_damaged(trial: Trial) -> Result:
    newest, older = trial.sound()[:2]
    how, hurt = damage.damage_checkpoint(newest, older, trial.reference.donor, trial.rng), time.monotonic()
    trial.mark_damaged(newest)
    return Result(trial.recover(), how, time.monotonic() - hurt)


def _latest(folder: Path) -> dict | None:
    """What the program's reader takes for the newest checkpoint."""
    from megat2i import checkpoint

    found = checkpoint.latest_here(folder)
    return found and {"step": found.step, "name": found.path.name, "values": _values(found.path)}


def _values(path: Path) -> str:
    """Digest of all tensors as the program's reader puts them together."""
    from megat2i import checkpoint

    found, digest = checkpoint.open_checkpoint(path), hashlib.sha256()
    for name, kind in sorted({(part["name"], part["kind"]) for part in found.manifest["parts"]}):
        digest.update(f"{name} {kind}".encode() + checkpoint.read_tensor(found, name, kind).numpy().tobytes())
    return digest.hexdigest()


def run_file_damaged(name: str) -> Callable[[Trial], Result | None]:
    """The kind of fault that damages or removes the file ``name`` of a run folder between two launches."""

    def fault(trial: Trial) -> Result | None:
        if not trial.stopped_with_checkpoints():
            return None
        path = trial.run / name
        trial.copy(path)
        if trial.rng.random() < 0.15 and name != "metrics.jsonl":
            path.unlink()
            how = "missing"
        else:
            how = damage.mutate(path, trial.rng)
        hurt = time.monotonic()
        outcome = trial.recover_run_file(path)
        return Result(outcome, how, time.monotonic() - hurt)

    fault.__doc__ = f"{name} of the run is damaged, or missing, between two launches."
    return fault


@dataclass(frozen=True)
class Kind:
    """``weight``: how often it comes in a deck; ``needs``: why it cannot be had here, or None."""

    name: str
    fault: Callable[[Trial], Result | None]
    weight: int
    needs: Callable[[], str | None] = lambda: None


KINDS = (
    Kind("SIGKILL, one rank", kill_one, 5),
    Kind("SIGKILL, all ranks", kill_all, 4),
    Kind("SIGKILL at a change of a file", kill_at_change, 6),
    Kind("SIGTERM", terminate, 3),
    Kind("SIGINT", interrupt, 3),
    Kind("SIGUSR1", warn, 3),
    Kind("SIGUSR2, trigger file", ask_to_save, 3),
    Kind("SIGSTOP, then SIGCONT", pause, 3),
    Kind("SIGSTOP for good", stop_for_good, 1, lambda: None if has_watchdog() else "no runtime.watchdog_s here"),
    Kind("launcher", launcher, 1),
    Kind("second run in the folder", second_run, 3),
    Kind("clock set back", clock, 3),
    Kind("disk full", full_disk, 3, lambda: None if can_mount() else "no right to mount a small disk"),
    Kind("dataset truncated in training", truncate_while_training, 2),
    Kind(".bin", tokens_damaged, 6),
    Kind(".idx", index_damaged, 10),
    Kind(".json", manifest_damaged, 10),
    Kind("checkpoint", checkpoint_damaged, 24),
    Kind("config.yaml", run_file_damaged("config.yaml"), 3),
    Kind("data.json", run_file_damaged("data.json"), 3),
    Kind("environment.json", run_file_damaged("environment.json"), 3),
    Kind("metrics.jsonl", run_file_damaged("metrics.jsonl"), 4),
)
