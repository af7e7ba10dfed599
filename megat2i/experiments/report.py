"""report.md and report.html: each figure and table beside the paper's statement of it, with commands and verdicts.

The page is the Markdown rendered; it needs no network: its pictures lie beside it.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from megat2i.experiments.arms import Scale
from megat2i.experiments.claims import Claim, claims
from megat2i.files import write_file
from megat2i.html_page import page, plain, table

TITLES = {
    "fig3": "Figure 3: pre-trained against random",
    "fig4": "Figure 4: loss by modality",
    "table1": "Table 1: forgetting",
    "fig6": "Figure 6: image tokens alone, and selective tuning",
    "fig7": "Figure 7: contrastive alignment",
    "fig5": "Figure 5: pictures and their distance",
    "sweep": "Section 2.1: learning rate and batch",
}
PAPER = {  # what the paper reports, in our words
    "fig3": "open_lm-1b, 100B tokens on 64 A100: after a short lead both models have the same total perplexity.",
    "fig4": "There are about 30 image tokens for a text token, so the image loss decides the total. On images both "
    "models are the same from the beginning; on captions, which are simple, the random model catches up.",
    "table1": "Completions before training are sensible English; after training on pairs the model has lost them.",
    "fig6": "Unconditional image training gains nothing from pre-training. Selective tuning: (1) embeddings and "
    "output, (2) and norms, (3) and the first half of the layers, (4) or the feed-forward layers.",
    "fig7": "Bags of image tokens and of caption tokens, aligned by a contrastive loss over 1,024 pairs: image tokens "
    "have other semantics than text tokens, which is why a language model does not help to model them.",
    "fig5": "Zero-shot MS-COCO FID 12.21 pre-trained, 12.27 random.",
    "sweep": "Learning rates from 5e-5 to 3e-4 and batches from 0.5M to 2M tokens were tried; 3e-4 and 1M were used.",
}
WORDS = ("aligned", "shuffled", "random")
CODES, NEAREST = 16, 3  # listed, and tokens of each
SHOWN_MODELS = 3  # of table 1: before, and after from both starts


def write_report(
    folder: Path,
    scale: Scale,
    numbers: dict[str, dict],
    commands: Sequence[Sequence[str]],
    budget: str,
    facts: Sequence[Sequence[str]],
    differences: Sequence[Sequence[str]],
) -> list[Claim]:
    """Write both files and return the judged claims. ``budget``: Markdown; ``facts``: (what, value).

    ``differences``: (what, the paper's, here).
    """
    found = claims(numbers)
    not_run = ", ".join(TITLES[name] for name in TITLES if name not in numbers) or "nothing"
    blocks = [
        "# Pre-trained language models and text-to-image generation: the paper's experiments",
        f"Figures and tables of Zhang et al. (EMNLP 2024), run at the scale '{scale.name}'. Curves are drawn from the "
        f"runs' metrics.jsonl; the numbers behind each figure lie beside it as JSON. Not run: {not_run}.",
        "## Which claims hold at this scale",
        table(
            ("figure", "the paper's claim", "verdict", "evidence", "rule"),
            [(c.experiment, c.statement, c.verdict, c.evidence, c.rule) for c in found],
        ),
        "## How this differs from the paper",
        table(("what", "the paper", "here"), differences),
    ]
    for name, values in numbers.items():
        blocks += [f"## {TITLES[name]}", f"> The paper: {plain(PAPER[name])}"]
        for claim in (claim for claim in found if claim.experiment == name):
            blocks.append(f"**{claim.verdict.capitalize()}:** {plain(claim.statement)} {plain(claim.evidence)}.")
        blocks += [f"![{TITLES[name]}]({name}.png)", *TABLES.get(name, lambda values: [])(values)]
    blocks += ["## Token budget", budget, "## Data, machine, versions", table(("what", "value"), facts)]
    blocks += [f"## {scale.config}, which all runs share", f"```\n{Path(scale.config).read_text()}```"]
    listed = "\n".join(shlex.join(command) for command in commands)
    blocks += ["## Commands, each with what its run changes", f"```\n{listed}\n```"]
    text = "\n\n".join(blocks) + "\n"
    write_file(folder / "report.md", text.encode())
    write_file(folder / "report.html", page("The paper, reproduced", text))
    return found


def _completions(values: dict) -> list[str]:
    models = values["models"]
    rows = [
        (prompt, *(model["completions"][number] for model in models[:SHOWN_MODELS]))
        for number, prompt in enumerate(values["prompts"])
    ]
    names = [models[0]["run"], *(f"{model['run']}, step {model['step']}" for model in models[1:SHOWN_MODELS])]
    rates = [(model["run"], f"{model['perplexity']:.1f}", f"{model['accuracy']:.1%}") for model in models]
    probe = f"few-shot probe ({values['shots']} examples, {values['questions']} questions, four answers)"
    return [
        table(("prompt", "before: " + names[0], *(f"after: {name}" for name in names[1:])), rows),
        table(("model", "perplexity of held-out text, over text ids alone", probe), rates),
    ]


def _selective(values: dict) -> list[str]:
    losses, trained = values["held_out_image_loss"], values["trained_parameters"]
    rows = [(name, f"{trained[name]:,}", f"{losses[name]:.4f}") for name in losses]
    return [table(("run", "trained parameters", "held-out image loss"), rows)]


def _distances(values: dict) -> list[str]:
    rows = []
    for name, result in values["results"].items():
        interval = result["interval"]
        rows.append((name, f"{result['fid']:.3f}", f"{interval['low']:.3f} to {interval['high']:.3f}"))
    result = next(iter(values["results"].values()))
    note = f"Protocol {result['protocol']}, features: {result['feature_net']}."
    note += "".join(f" {warning}." for warning in result.get("warnings", ()))
    return [table(("run", "distance", "95% (bootstrap)"), rows), plain(note)]


def _sweep(values: dict) -> list[str]:
    rows = [
        (
            f"{row['lr']:.2g}",
            row["batch"],
            f"{row['tokens']:,}",
            *(f"{row[key]:.4f}" for key in ("loss", "loss/text", "loss/image")),
        )
        for row in values["rows"]
    ]
    return [table(("peak learning rate", "batch", "tokens", "held-out loss", "text", "image"), rows)]


def _nearest(values: dict) -> list[str]:
    """The most used codes with their nearest text tokens, beside the control's; word-like shares; retrieval."""
    words, found = values["word_like"][0], values["retrieval"][0]

    def tokens(entry: dict) -> str:
        return ", ".join(f"{token['text']!r} {token['cosine']:.2f}" for token in entry["tokens"][:NEAREST])

    pairs = zip(values["nearest_tokens"][:CODES], values["control"][:CODES], strict=True)
    nearest = [(own["code"], f"{own['uses']:,}", tokens(own), tokens(other)) for own, other in pairs]
    shares = [(name, f"{words[name]['share']:.1%}", words[name]["distinct_tokens"]) for name in WORDS]
    pictures = [
        (name, f"{found[name]['pictures_found_caption']} of {found[name]['pairs']}", f"{found[name]['chance']:.1%}")
        for name in WORDS[:2]
    ]
    return [
        table(("code", "uses", "nearest text tokens", "with shuffled captions"), nearest),
        table(("embeddings", "nearest token is word-like", "distinct nearest tokens"), shares),
        plain(
            f"Of the first seed. Word-like: {words['definition']}; of the vocabulary "
            f"{words['vocabulary']['share']:.1%}."
        ),
        table(("embeddings", "held-out pictures that found their caption", "chance"), pictures),
    ]


TABLES = {"table1": _completions, "fig6": _selective, "fig5": _distances, "sweep": _sweep, "fig7": _nearest}
