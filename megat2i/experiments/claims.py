"""The paper's claims beside what the runs found: each is judged by a rule on numbers that stands in the report.

Statements are Zhang et al. (EMNLP 2024), in our words. A claim "holds" or "does not hold" at the scale that was run;
where seeds are too few or too different to tell, it is "undecided".
"""

from dataclasses import dataclass

from megat2i.experiments.record import paired

SAME_NATS = 0.05  # losses this close, that is perplexities within 5%, are the same: two curves of the paper coincide
SAME_SHARE = 0.05  # shares of word-like tokens
SAME_DISTANCE = 0.05  # distances of pictures within this share of each other are the same
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"


@dataclass(frozen=True)
class Claim:
    """``experiment``: the figure or table; ``rule`` says how ``verdict`` follows from ``evidence``."""

    experiment: str
    statement: str
    rule: str
    verdict: str
    evidence: str


def claims(numbers: dict[str, dict]) -> list[Claim]:
    """Claims on those experiments that are in ``numbers``, which the figures' functions returned."""
    return [claim for name, make in JUDGES.items() if name in numbers for claim in make(numbers[name])]


def _same(
    comparison: dict, names: tuple[str, str] = ("pre-trained", "random"), margin: float = SAME_NATS
) -> tuple[str, str]:
    """Whether two means are the same: HOLDS where the interval lies inside the margin, FAILS where they surely differ.

    That is, where the interval excludes 0 and the difference is beyond the margin. One seed decides nothing.
    """
    first = sum(comparison["first"]) / len(comparison["first"])
    difference, interval = comparison["mean_difference"], comparison["interval_95"]
    evidence = f"{names[0]} {first:.4f}, {names[1]} {first + difference:.4f} ({difference:+.4f})"
    if interval is None:
        return OPEN, f"{evidence}, one seed"
    low, high = interval
    evidence += f", 95% interval {low:+.4f} to {high:+.4f}, seeds: {len(comparison['first'])}"
    if -margin <= low and high <= margin:
        return HOLDS, evidence
    return (FAILS if (low > 0 or high < 0) and abs(difference) > margin else OPEN), evidence


def _no_better(comparison: dict) -> tuple[str, str]:
    """Whether the pre-trained (first) loss is not the lower one: the interval of random - pre-trained tells."""
    verdict, evidence = _same(comparison)
    interval = comparison["interval_95"]
    return (HOLDS if interval and interval[1] <= SAME_NATS else verdict), evidence


MARGIN = f"{SAME_NATS} nats (perplexities within {SAME_NATS:.0%})"


def _rule(what: str, margin: str = MARGIN) -> str:
    return (
        f"{what}: the 95% interval of the difference over seeds lies within {margin} (holds), or excludes 0 with a "
        "mean beyond that (does not hold)"
    )


def _one_sided(what: str) -> str:
    return (
        f"{what}: the 95% interval of random - pre-trained over seeds ends below {MARGIN} (holds), or begins above 0 "
        "with a mean beyond that (does not hold)"
    )


def _fig3(numbers: dict) -> list[Claim]:
    verdict, evidence = _same(numbers["held_out_loss"])
    statement = "Pre-trained and random models end at the same loss: pre-training offers limited help."
    return [Claim("fig3", statement, _rule("last held-out losses"), verdict, evidence)]


def _fig4(numbers: dict) -> list[Claim]:
    result = []
    for when, modality, statement in (
        ("last", "image", "On image tokens a pre-trained model is no better than a random one."),
        ("first", "image", "It is no better on them early in training either."),
        ("last", "text", "Captions are simple: a random model reaches the pre-trained one's text loss."),
    ):
        comparison = numbers[f"held_out_{when}"][f"loss/{modality}"]
        verdict, evidence = _no_better(comparison)
        rule = _one_sided(f"held-out {modality} losses at step {comparison['step']}")
        result.append(Claim("fig4", statement, rule, verdict, evidence))
    first = numbers["held_out_first"]["loss/text"]
    low, high = first["interval_95"] or (-1.0, 1.0)
    verdict = HOLDS if low > 0 else FAILS if high < 0 else OPEN
    evidence = f"random - pre-trained = {first['mean_difference']:+.4f} nats of text at step {first['step']}"
    statement = "On text the pre-trained model begins ahead."
    rule = "at the first validation the random model's text loss is higher: the interval over seeds is above 0"
    return [*result, Claim("fig4", statement, rule, verdict, evidence)]


def _table1(numbers: dict) -> list[Claim]:
    before, *trained = numbers["models"]
    after = [model for model in trained if model["run"].startswith("pretrained")]
    perplexities = [model["perplexity"] for model in after]
    verdict = HOLDS if min(perplexities) > 2 * before["perplexity"] else FAILS
    shown = ", ".join(f"{perplexity:.1f}" for perplexity in perplexities)
    evidence = f"held-out perplexity over text ids alone {before['perplexity']:.1f} before, {shown} after (seeds)"
    rule = "that perplexity more than doubles with every seed"
    statement = "Training on image and caption pairs destroys the model's language ability."
    result = [Claim("table1", statement, rule, verdict, evidence)]
    number, chance = len(before["right"]), numbers["chance"]
    rates = [sum(model["right"]) / number for model in (before, *after)]
    noise = (rates[0] * (1 - rates[0]) / number) ** 0.5
    verdict = OPEN  # there may have been no ability to lose
    if rates[0] > chance + 3 * noise:
        verdict = HOLDS if max(rates[1:]) + 2 * noise < (rates[0] + chance) / 2 else FAILS
    rule = (
        f"beforehand three standard errors ({noise:.1%}) above chance ({chance:.0%}), and afterwards, with every seed, "
        "two of them below the middle between chance and beforehand"
    )
    evidence = f"{rates[0]:.1%} before, {', '.join(f'{rate:.1%}' for rate in rates[1:])} after, {number} questions"
    return [*result, Claim("table1", "The loss of ability shows in few-shot answers.", rule, verdict, evidence)]


def _fig6(numbers: dict) -> list[Claim]:
    verdict, evidence = _no_better(numbers["whole"])
    statement = "For image tokens alone, without text, pre-training does not help either."
    result = [Claim("fig6", statement, _one_sided("last held-out image losses"), verdict, evidence)]
    random, selective = numbers["whole"]["second"], numbers["selective"]
    best = min(selective, key=selective.get)
    above, below = selective[best] - max(random), min(random) - selective[best]
    verdict = HOLDS if above > SAME_NATS else FAILS if below > SAME_NATS else OPEN
    rule = f"the best of the four is {SAME_NATS} nats above every wholly tuned random model (holds) or below all (not)"
    evidence = f"{best} {selective[best]:.4f}, one seed; random {', '.join(f'{loss:.4f}' for loss in random)}"
    statement = "Frozen language weights are of little use: tuning few of them is worse than training anew."
    return [*result, Claim("fig6", statement, rule, verdict, evidence)]


def _fig7(numbers: dict) -> list[Claim]:
    verdict, evidence = _same(numbers["against_pretrained"], ("aligned", "pre-trained, image rows random"))
    statement = "A model that begins with aligned image embeddings ends like one with random ones."
    result = [Claim("fig7", statement, _rule("last held-out image losses"), verdict, evidence)]
    words, found = numbers["word_like"], numbers["retrieval"]
    aligned, shuffled = ([one[name]["share"] for one in words] for name in ("aligned", "shuffled"))
    hits = [f"{one['aligned']['pictures_found_caption']} of {one['aligned']['pairs']}" for one in found]
    more = paired(shuffled, aligned)
    evidence = f"word-like {_shares(aligned)} aligned, {_shares(shuffled)} shuffled"
    verdict, interval = OPEN, more["interval_95"]
    if interval is not None:
        verdict = HOLDS if interval[1] <= SAME_SHARE else FAILS if interval[0] > 0 else OPEN
        evidence += (
            f", difference {more['mean_difference']:+.1%}, 95% interval {interval[0]:+.1%} to {interval[1]:+.1%}"
        )
    evidence += f"; yet held-out pictures find captions: {', '.join(hits)}"
    rule = (
        f"the 95% interval over seeds of the difference to the control ends below {SAME_SHARE:.0%} (holds), or begins "
        "above 0 (does not hold)"
    )
    statement = "Nearest text tokens of aligned image tokens are no more word-like than the control's."
    return [*result, Claim("fig7", statement, rule, verdict, evidence)]


def _shares(values: list[float]) -> str:
    return ", ".join(f"{value:.0%}" for value in values)


def _fig5(numbers: dict) -> list[Claim]:
    first = numbers["fid"]["first"]
    verdict, evidence = _same(numbers["fid"], margin=SAME_DISTANCE * sum(first) / len(first))
    recent = {start: sum(values) / len(values) for start, values in numbers["training_image_loss"].items()}
    evidence += "; image loss in the last tenth of training "
    evidence += ", ".join(f"{loss:.4f} {start}" for start, loss in recent.items())
    statement = "Both draw equally good pictures (the paper: FID 12.21 pre-trained, 12.27 random)."
    return [
        Claim(
            "fig5", statement, _rule("distances", f"{SAME_DISTANCE:.0%} of the pre-trained model's"), verdict, evidence
        )
    ]


def _sweep(numbers: dict) -> list[Claim]:
    rows = [row for row in numbers["rows"] if row["batch"] == numbers["usual_batch"]]
    best, second = sorted(rows, key=lambda row: row["loss"])[:2]
    ahead = second["loss"] - best["loss"]
    evidence = f"best held-out loss {best['loss']:.4f} at learning rate {best['lr']:g}, {ahead:.4f} ahead; one seed"
    largest = best["lr"] == max(row["lr"] for row in rows)
    verdict = OPEN if ahead <= SAME_NATS else HOLDS if largest else FAILS
    statement = "Of the learning rates tried the largest, which the paper chose, is best at the usual batch."
    rule = f"the lowest held-out loss is that of the largest rate, {SAME_NATS} nats ahead of the others"
    return [Claim("sweep", statement, rule, verdict, evidence)]


JUDGES = {
    "fig3": _fig3, "fig4": _fig4, "table1": _table1, "fig5": _fig5, "fig6": _fig6, "fig7": _fig7, "sweep": _sweep
}  # fmt: skip
