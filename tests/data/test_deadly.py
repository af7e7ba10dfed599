"""A picture that kills its decoder is refused at the next start, and a good one that was being decoded is not."""

import json
import os
import signal
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import pytest
from captioned_images import make_encoding
from PIL import Image

from megat2i.data.deadly import TRIES, DecodingGuard
from megat2i.data.decoding import decode
from megat2i.data.encode_part import encode_part
from megat2i.data.samples import Sample

DEADLY, COUNT = 5, 9


def picture(number, deadly, size):
    if number == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    return Image.effect_noise((size, size), number + 1).convert("RGB")


@dataclass(frozen=True)
class Pictures:
    """A part whose sample number ``deadly`` ends the process that decodes it."""

    deadly: int | None = DEADLY
    source: str = "pictures"
    expected: int = COUNT
    opens_source: bool = False

    def identity(self):
        return "pictures"

    def samples(self):
        for number in range(COUNT):
            yield Sample(f"sample {number}", "a caption", partial(picture, number, self.deadly))


def in_a_process(part, prefix, encoding) -> int:
    """Exit code of a process that encodes ``part``."""
    child = get_context("fork").Process(target=encode_part, args=(part, prefix, encoding, int))
    child.start()
    child.join()
    return child.exitcode


def test_the_second_start_gets_past_a_picture_that_kills(tmp_path):
    encoding, prefix = make_encoding(tmp_path), tmp_path / "part"
    assert in_a_process(Pictures(), prefix, encoding) == -signal.SIGKILL
    assert (tmp_path / "part.underway").exists()
    done = encode_part(Pictures(), prefix, encoding, int)
    assert (done.samples, done.refused) == (COUNT, 1)
    (row,) = map(json.loads, (tmp_path / "part.ledger.jsonl").read_text().splitlines())
    reason = "decoding it ends the process (SIGKILL)"
    assert row == {"source": "pictures", "sample": f"sample {DEADLY}", "reason": reason}
    assert not list(tmp_path.glob("part.underway")) + list(tmp_path.glob("part.deadly*"))


def test_a_good_picture_that_was_being_decoded_at_a_kill_stays(tmp_path):
    work = partial(decode, size=8, crop="center")
    with pytest.raises(RuntimeError), DecodingGuard(Pictures(None), tmp_path / "p", "f", 2, work):
        raise RuntimeError
    assert not list(tmp_path.iterdir()), "an error is no death"
    guard = DecodingGuard(Pictures(None), tmp_path / "p", "f", 2, work)
    guard.decoding(3).__enter__()  # and the process is killed
    assert DecodingGuard(Pictures(None), tmp_path / "p", "other", 2, work).reasons == {}
    guard = DecodingGuard(Pictures(None), tmp_path / "p", "f", 2, work)
    guard.decoding(3).__enter__()
    assert DecodingGuard(Pictures(None), tmp_path / "p", "f", 2, work).reasons == {}


def test_a_trial_that_takes_the_job_along_is_not_repeated_for_ever(tmp_path):
    record = {"fingerprint": "f", "reasons": {}, "tries": {"4": TRIES}}
    (tmp_path / "p.deadly.json").write_text(json.dumps(record))
    guard = DecodingGuard(Pictures(None), tmp_path / "p", "f", 1, partial(decode, size=8, crop="center"))
    assert guard.reasons == {4: "decoding it ended the job, several times"}
