"""Verdicts follow their rules: each claim is shown numbers for which it holds and numbers for which it does not."""

import pytest

from megat2i.experiments.claims import FAILS, HOLDS, OPEN, claims
from megat2i.experiments.record import paired


def verdicts(name: str, numbers: dict) -> list[str]:
    return [claim.verdict for claim in claims({name: numbers})]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([4.0, 4.0, 4.0], [4.01, 4.01, 4.01], HOLDS),  # surely different, by a quarter of a percent
        ([4.0, 4.1, 4.2], [4.5, 4.0, 4.4], HOLDS),  # by more, but the seeds differ as much
        ([4.0, 4.1, 4.2], [4.5, 4.6, 4.7], FAILS),
        ([4.0], [4.5], OPEN),
    ],
)
def test_fig3(first, second, expected):
    assert verdicts("fig3", {"held_out_loss": paired(first, second)}) == [expected]


def test_fig4():
    def numbers(ahead: float, text: float) -> dict:
        return {
            "held_out_first": {"loss/text": {"step": 1, **paired([3.0, 3.1], [3.0 + ahead, 3.1 + ahead])}},
            "held_out_last": {
                "loss/image": paired([4.0, 4.1], [4.01, 4.1]), "loss/text": paired([2.0, 2.0], [2 + text, 2 + text])
            },
        }  # fmt: skip

    assert verdicts("fig4", numbers(0.5, 0.001)) == [HOLDS, HOLDS, HOLDS]
    assert verdicts("fig4", numbers(-0.5, 0.5)) == [HOLDS, FAILS, FAILS]


def test_table1():
    def numbers(perplexity: float, accuracy: float, before: float = 0.6) -> dict:
        models = [
            {"run": "language-model", "accuracy": before},
            {"run": "pretrained-0", "accuracy": 0.6},  # an early checkpoint
            {"run": "pretrained-0", "accuracy": accuracy},
            {"run": "random-0", "accuracy": 0.2},
        ]
        held_out = {"language model": 50.0, "pretrained": [(0, 50.0), (9, perplexity)]}
        return {"held_out_text_perplexity": held_out, "models": models, "chance": 0.25, "questions": 200}

    assert verdicts("table1", numbers(500.0, 0.3)) == [HOLDS, HOLDS]
    assert verdicts("table1", numbers(60.0, 0.55)) == [FAILS, FAILS]
    assert verdicts("table1", numbers(60.0, 0.2, before=0.3)) == [FAILS, OPEN]  # 0.3 of 200 is chance


def test_fig6():
    def numbers(random: float, best: float) -> dict:
        losses = {"image-random": random, "image-pretrained": 3.0, "image-embeddings": 3.5, "image-x": best}
        return {"held_out_image_loss": losses}

    assert verdicts("fig6", numbers(3.01, 3.2)) == [HOLDS, HOLDS]
    assert verdicts("fig6", numbers(3.3, 3.2)) == [OPEN, FAILS]


def test_fig7_fig5_and_sweep():
    def fig7(random: float, z: float) -> dict:
        words = {name: {"share": 0.3} for name in ("aligned", "shuffled", "random")}
        words["tests"] = {"aligned against shuffled": {"z": z}}
        return {"held_out_image_loss": {"aligned": 3.0, "pretrained": 3.1, "random": random}, "word_like": words}

    assert verdicts("fig7", fig7(3.01, -1.0)) == [HOLDS, HOLDS]
    assert verdicts("fig7", fig7(3.5, 5.0)) == [OPEN, FAILS]
    assert verdicts("fig5", {"fid": paired([12.2, 12.4, 12.1], [12.3, 12.2, 12.2])}) == [HOLDS]
    assert verdicts("fig5", {"fid": paired([12.2, 12.4, 12.1], [13.2, 13.4, 13.2])}) == [FAILS]
    assert verdicts("fig5", {"fid": paired([12.2], [13.2])}) == [OPEN]
    rows = [{"lr": lr, "batch": 32, "loss": loss} for lr, loss in ((1e-4, 3.0), (3e-4, 2.9))]
    assert verdicts("sweep", {"rows": rows}) == [HOLDS]
    rows[0]["loss"] = 2.8
    assert verdicts("sweep", {"rows": rows}) == [FAILS]
