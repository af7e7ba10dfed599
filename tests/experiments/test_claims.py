"""Verdicts follow their rules: each claim is shown numbers for which it holds and numbers for which it does not."""

import pytest

from megat2i.experiments.claims import FAILS, HOLDS, OPEN, claims
from megat2i.experiments.record import paired


def verdicts(name: str, numbers: dict) -> list[str]:
    return [claim.verdict for claim in claims({name: numbers})]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([4.0, 4.1, 4.2], [4.001, 4.102, 4.201], HOLDS),  # surely different, by a fortieth of a percent
        ([4.0, 4.1, 4.2], [4.6, 4.0, 4.4], OPEN),  # the seeds differ as much: noise is not sameness
        ([4.0, 4.0, 4.0], [4.2, 3.9, 7.5], OPEN),
        ([4.0, 4.1, 4.2], [4.5, 4.6, 4.7], FAILS),
        ([4.5, 4.6, 4.7], [4.0, 4.1, 4.2], FAILS),
        ([4.0], [4.0], OPEN),  # one seed
    ],
)
def test_fig3(first, second, expected):
    assert verdicts("fig3", {"held_out_loss": paired(first, second)}) == [expected]


def at(step: int, first: list[float], shift: float) -> dict:
    return {"step": step, **paired(first, [value + shift for value in first])}


def test_fig4():
    def numbers(ahead: float, text: float) -> dict:
        return {
            "held_out_first": {"loss/text": at(1, [3.0, 3.1], ahead), "loss/image": at(1, [5.0, 5.1], 0.4)},
            "held_out_last": {"loss/image": at(9, [4.0, 4.1], 0.01), "loss/text": at(9, [2.0, 2.1], text)},
        }

    assert verdicts("fig4", numbers(0.5, 0.001)) == [HOLDS, FAILS, HOLDS, HOLDS]
    assert verdicts("fig4", numbers(-0.5, 0.5)) == [HOLDS, FAILS, FAILS, FAILS]
    assert verdicts("fig4", numbers(0.5, -0.5)) == [HOLDS, FAILS, HOLDS, HOLDS]  # a worse one is no better either
    unclear = numbers(0.5, 0.001)
    unclear["held_out_first"]["loss/text"] = {"step": 1, **paired([3.0, 3.1, 3.2], [3.6, 3.0, 3.5])}
    assert verdicts("fig4", unclear)[3] == OPEN


def test_table1():
    def numbers(perplexity: float, accuracy: float, before: float = 0.6) -> dict:
        def model(run: str, rate: float, perplexity: float) -> dict:
            right = [number < 1000 * rate for number in range(1000)]
            return {"run": run, "right": right, "perplexity": perplexity}

        models = [model("language-model", before, 20.0), model("pretrained-0", accuracy, perplexity)]
        models += [model("pretrained-1", 0.25, 900.0), model("random-0", 0.2, 5.0)]
        return {"models": models, "chance": 0.25}

    assert verdicts("table1", numbers(500.0, 0.3)) == [HOLDS, HOLDS]
    assert verdicts("table1", numbers(30.0, 0.55)) == [FAILS, FAILS]  # one seed has kept its ability
    assert verdicts("table1", numbers(30.0, 0.2, before=0.28)) == [FAILS, OPEN]  # 280 of 1,000 is chance


def test_fig6():
    def numbers(shift: float, best: float) -> dict:
        return {"whole": at(9, [3.0, 3.1, 3.2], shift), "selective": {"image-embeddings": 3.9, "image-x": best}}

    assert verdicts("fig6", numbers(0.001, 3.5)) == [HOLDS, HOLDS]
    assert verdicts("fig6", numbers(0.5, 3.2)) == [FAILS, FAILS]
    assert verdicts("fig6", numbers(-0.5, 3.5)) == [HOLDS, HOLDS]  # worse than random: no help
    assert verdicts("fig6", numbers(0.001, 3.1)) == [HOLDS, OPEN]  # among the seeds of the random model
    assert verdicts("fig6", numbers(0.001, 2.99)) == [HOLDS, OPEN]  # below them all by less than the margin


def test_fig7():
    def numbers(shift: float, more: list[float]) -> dict:
        words = [{"aligned": {"share": 0.4 + one}, "shuffled": {"share": 0.4}} for one in more]
        found = [{"aligned": {"pictures_found_caption": 180, "pairs": 205}}] * len(more)
        return {"against_pretrained": at(9, [3.0, 3.1], shift), "word_like": words, "retrieval": found}

    assert verdicts("fig7", numbers(0.001, [-0.10, -0.11, -0.09])) == [HOLDS, HOLDS]
    assert verdicts("fig7", numbers(-0.5, [0.20, 0.21, 0.22])) == [FAILS, FAILS]
    assert verdicts("fig7", numbers(0.001, [0.08, 0.02, 0.05]))[1] == OPEN  # more with each seed, yet who knows
    assert verdicts("fig7", numbers(0.001, [0.0]))[1] == OPEN


def test_fig5():
    def numbers(*second: float) -> dict:
        losses = {"pretrained": [0.3], "random": [0.25]}
        return {"fid": paired([12.2, 12.4, 12.1][: len(second)], list(second)), "training_image_loss": losses}

    assert verdicts("fig5", numbers(12.3, 12.5, 12.3)) == [HOLDS]
    assert verdicts("fig5", numbers(13.9, 14.2, 13.8)) == [FAILS]
    assert verdicts("fig5", numbers(12.3, 14.0, 11.0)) == [OPEN] == verdicts("fig5", numbers(12.2))


def test_the_sweep_is_judged_at_the_usual_batch():
    rows = [{"lr": lr, "batch": 32, "loss": loss} for lr, loss in ((1e-4, 3.0), (3e-4, 2.9))]  # a tenth apart
    rows.append({"lr": 3e-4, "batch": 16, "loss": 2.0})
    assert verdicts("sweep", {"rows": rows, "usual_batch": 32}) == [HOLDS]
    rows[0]["loss"] = 2.91
    assert verdicts("sweep", {"rows": rows, "usual_batch": 32}) == [OPEN]
    rows[0]["loss"] = 2.8
    assert verdicts("sweep", {"rows": rows, "usual_batch": 32}) == [FAILS]
