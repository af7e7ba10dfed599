"""What a run says of its losses."""

import json

import pytest

from megat2i.console import RECENT, Console, Losses


def training(step: int, image: float) -> dict:
    return {"step": step, "loss/text": 2.0, "loss/image": image, "tokens_per_s": 10.0}


def held_out(step: int, image: float | str, split: str = "valid") -> dict:
    return {"step": step, "split": split, "loss/text": 2.5, "loss/image": image}


def run(losses: Losses, *validations: tuple[float, float]) -> list[str | None]:
    """Validations (training loss of the steps before, held-out loss) one after the other; what each of them says."""
    said = []
    for number, (before, found) in enumerate(validations, 1):
        for _ in range(RECENT):
            losses.add(training(100 * number, before))
        said.append(losses.add(held_out(100 * number, found)))
    return said


def test_overfitting_is_remarked_on_when_it_begins_and_at_the_end():
    losses = Losses("image")
    said = run(losses, (4.0, 4.2), (3.0, 3.5), (2.0, 3.6), (1.0, 4.3), (0.1, 4.5))
    assert said[:3] == [None] * 3 and said[4] is None
    sentence = "the run overfits: its held-out image loss is 4.300 at step 400, above its best, 3.500 at step 200, "
    assert said[3].startswith(sentence + "while the training loss fell from 3.000 to 1.000; ")
    summary = losses.summary()
    assert summary[0] == f"training loss, mean of the last {RECENT} steps: text 2.000, image 0.100"
    assert summary[1] == "held-out loss at step 500: text 2.500, image 4.500" and len(summary) == 3
    assert summary[2].startswith("the run overfits: its held-out image loss is 4.500 at step 500")


@pytest.mark.parametrize(
    "validations",
    [
        [(4.0, 4.2), (3.0, 4.1), (2.0, 4.2)],  # no more than noise
        [(4.0, 4.2), (4.5, 4.9)],  # both rise: a run that diverges
        [(4.0, 4.2), (3.0, 4.8), (2.5, 3.0)],  # for a while
    ],
)
def test_what_is_not_overfitting_ends_without_a_remark(validations):
    losses = Losses("image")
    run(losses, *validations)
    assert len(losses.summary()) == 2


def test_other_splits_and_losses_that_are_no_numbers_are_told_but_not_judged():
    losses = Losses("image")
    run(losses, (4.0, 4.2))
    assert losses.add(held_out(200, "nan")) is None
    assert losses.add(held_out(200, 9.0, "valid_text")) is None
    assert losses.summary()[1:] == [
        "held-out loss at step 200: text 2.500, image nan",
        "held-out text-only loss at step 200: text 2.500, image 9.000",
    ]


def test_a_resumed_run_remembers_its_best(tmp_path, capsys):
    records = [training(step, 3.0) for step in range(1, 60)] + [held_out(60, 3.2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    console = Console(tmp_path, "text_to_image", 60, 120, 120)
    for step in range(61, 121):
        console.step(training(step, 1.0))
    console.held_out(held_out(120, 4.0))
    console.end()
    output = capsys.readouterr().out.splitlines()
    assert output[0] == "step 120: held-out loss text 2.500, image 4.000 (training: text 2.000, image 1.000)"
    assert output[1].startswith("the run overfits: ") and "best, 3.200 at step 60" in output[1]
    assert output[2].startswith("finished after step 120 of 120, in 00:0") and output[-1] == output[1]
