"""The paper's claims beside what the runs found: each is judged by a rule on numbers that stands in the report.

Statements are Zhang et al. (EMNLP 2024), in our words. A claim "holds" or "does not hold" at the scale that was run;
where seeds are too few or too different to tell, it is "undecided".
"""

from dataclasses import dataclass

SAME = 0.01  # losses that differ by less than this share count as the same, whatever the noise
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


def _same(comparison: dict) -> tuple[str, str]:
    """Whether pairs of losses are the same: within SAME, or with a confidence interval around 0."""
    pre_trained = sum(comparison["first"]) / len(comparison["first"])
    difference, interval = comparison["mean_difference"], comparison["interval_95"]
    share = difference / pre_trained
    evidence = f"pre-trained {pre_trained:.4f}, random {pre_trained + difference:.4f} ({share:+.2%})"
    if interval:
        evidence += f", 95% interval of the difference {interval[0]:+.4f} to {interval[1]:+.4f}"
    evidence += f", seeds: {len(comparison['first'])}"
    if abs(share) < SAME:
        return HOLDS, evidence
    if interval is None:
        return OPEN, evidence
    return (HOLDS if interval[0] <= 0 <= interval[1] else FAILS), evidence


SAME_RULE = f"the last held-out losses differ by less than {SAME:.0%}, or the interval of their difference holds 0"


def _fig3(numbers: dict) -> list[Claim]:
    verdict, evidence = _same(numbers["held_out_loss"])
    statement = "Pre-trained and random models end at the same loss: pre-training offers limited help."
    return [Claim("fig3", statement, SAME_RULE, verdict, evidence)]


def _fig4(numbers: dict) -> list[Claim]:
    result = []
    for modality, statement in (
        ("image", "On image tokens a pre-trained model is no better than a random one."),
        ("text", "Captions are simple: a random model reaches the pre-trained one's text loss."),
    ):
        verdict, evidence = _same(numbers["held_out_last"][f"loss/{modality}"])
        result.append(Claim("fig4", statement, SAME_RULE, verdict, evidence))
    first = numbers["held_out_first"]["loss/text"]
    ahead = first["mean_difference"]
    verdict = OPEN if first["interval_95"] is None else HOLDS if first["interval_95"][0] > 0 else FAILS
    evidence = f"random - pre-trained = {ahead:+.4f} nats of text at step {first['step']}"
    statement = "On text the pre-trained model begins ahead."
    rule = "at the first validation the random model's text loss is higher, its interval above 0"
    return [*result, Claim("fig4", statement, rule, verdict, evidence)]


def _table1(numbers: dict) -> list[Claim]:
    perplexity = numbers["held_out_text_perplexity"]
    before, after = perplexity["language model"], perplexity["pretrained"][-1][1]
    verdict = HOLDS if after > 2 * before else FAILS
    evidence = f"held-out text perplexity {before:.1f} before, {after:.1f} after"
    rule = "held-out text perplexity more than doubles"
    statement = "Training on image and caption pairs destroys the model's language ability."
    result = [Claim("table1", statement, rule, verdict, evidence)]
    rates = {model["run"]: model["accuracy"] for model in numbers["models"]}  # the last checkpoint of each run
    before, after = rates["language-model"], next(rates[name] for name in rates if name.startswith("pretrained"))
    chance, noise = numbers["chance"], (before * (1 - before) / numbers["questions"]) ** 0.5
    verdict = HOLDS if after - chance < (before - chance) / 2 else FAILS
    if before < chance + 2 * noise:
        verdict = OPEN  # there was no ability to lose
    rule = f"more than half of the accuracy above chance ({chance:.0%}) is lost, if it was two standard errors above it"
    evidence = f"few-shot probe {before:.1%} before, {after:.1%} after, {numbers['questions']} questions"
    return [*result, Claim("table1", "The loss of ability shows in few-shot answers.", rule, verdict, evidence)]


def _fig6(numbers: dict) -> list[Claim]:
    losses = numbers["held_out_image_loss"]
    whole, random = losses["image-pretrained"], losses["image-random"]
    verdict, evidence = _same({"first": [whole], "mean_difference": random - whole, "interval_95": None})
    statement = "For image tokens alone, without text, pre-training does not help either."
    result = [Claim("fig6", statement, f"last held-out image losses within {SAME:.0%}", verdict, evidence)]
    selective = {name: loss for name, loss in losses.items() if name not in ("image-pretrained", "image-random")}
    best = min(selective, key=selective.get)
    verdict = HOLDS if selective[best] > random * (1 + SAME) else FAILS
    rule = f"the best selectively tuned model stays more than {SAME:.0%} above the random one that is wholly tuned"
    evidence = f"best of four: {best} {selective[best]:.4f}; random {random:.4f}"
    statement = "Frozen language weights are not useful as they are: tuning few of them is worse than training anew."
    return [*result, Claim("fig6", statement, rule, verdict, evidence)]


def _fig7(numbers: dict) -> list[Claim]:
    losses = numbers["held_out_image_loss"]
    verdict, evidence = _same(
        {"first": [losses["aligned"]], "mean_difference": losses["random"] - losses["aligned"], "interval_95": None}
    )
    evidence = evidence.replace("pre-trained", "aligned")
    statement = "Image embeddings aligned with text embeddings give no better model than random ones."
    rule = f"last held-out image losses within {SAME:.0%}"
    result = [Claim("fig7", statement, rule, verdict, evidence)]
    words = numbers["word_like"]
    shares = {name: words[name]["share"] for name in ("aligned", "shuffled", "random")}
    test = words["tests"]["aligned against shuffled"]
    verdict = FAILS if test["z"] > 1.96 else HOLDS
    evidence = ", ".join(f"{name} {share:.1%}" for name, share in shares.items()) + " of codes nearest to a word"
    rule = "not significantly more codes are nearest to a word-like token than where captions were shuffled (z < 1.96)"
    statement = "Aligned image tokens do not come to mean words."
    return [*result, Claim("fig7", statement, rule, verdict, evidence)]


def _fig5(numbers: dict) -> list[Claim]:
    fid = numbers["fid"]
    interval = fid["interval_95"]
    means = [sum(fid[key]) / len(fid[key]) for key in ("first", "second")]
    evidence = f"distance {means[0]:.3f} pre-trained, {means[1]:.3f} random"
    verdict = OPEN
    if interval:
        evidence += f", 95% interval of the difference {interval[0]:+.3f} to {interval[1]:+.3f}"
        verdict = HOLDS if interval[0] <= 0 <= interval[1] else FAILS
    statement = "Both draw equally good pictures (the paper: FID 12.21 pre-trained, 12.27 random)."
    return [Claim("fig5", statement, "the interval of the difference over seeds holds 0", verdict, evidence)]


def _sweep(numbers: dict) -> list[Claim]:
    best = min(numbers["rows"], key=lambda row: row["loss"])
    evidence = f"best held-out loss {best['loss']:.4f} at learning rate {best['lr']:g}, batch {best['batch']}"
    rows = [row for row in numbers["rows"] if row["batch"] == best["batch"]]
    verdict = HOLDS if best["lr"] == max(row["lr"] for row in rows) else FAILS
    statement = "Of the learning rates tried (5e-5 to 3e-4), the paper trains with the largest."
    return [Claim("sweep", statement, "the lowest held-out loss is that of the largest rate", verdict, evidence)]


JUDGES = {
    "fig3": _fig3, "fig4": _fig4, "table1": _table1, "fig5": _fig5, "fig6": _fig6, "fig7": _fig7, "sweep": _sweep
}  # fmt: skip
