"""report.html of the demo: one file with everything that there is to see of a run, pictures included."""

import html
import io
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from curves import Record, smoothed, value
from PIL import Image
from samples import SEED, SHOWN, Samples, chosen_steps

from megat2i.config import Config
from megat2i.data.manifest import Manifest
from megat2i.drawn import FOLDER, DrawnStep
from megat2i.evaluate.retrieval import OTHERS
from megat2i.html_page import embedded, page, plain, table

TITLE = "The OpenMoji demo"
NAMES = {"seen": "Prompts seen in training", "unseen": "Prompts held out of training"}
STYLE = (
    "body{max-width:72rem;font-family:Georgia,'Times New Roman',serif;background:#fdfdfb;color:#1c1c1a}"
    "h1{font-size:2.2rem;line-height:1.15;margin:.5rem 0}"
    "h2{font-size:1.4rem;margin:2.6rem 0 .6rem;border-top:1px solid #ddd8cc;padding-top:1.2rem}"
    "h3{font-size:1.05rem;margin:1.6rem 0 .4rem}p{max-width:44rem}"
    "table,.cards,pre,.steps{font-family:system-ui,sans-serif;font-size:.9rem}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere}"
    "td,th{border-width:0 0 1px;border-color:#ddd8cc;padding:.35rem 1rem .35rem 0}td{min-width:0}"
    "img.pixels{image-rendering:pixelated;display:block;outline:1px solid #e4e0d6}"
    ".curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1rem}"
    ".curves img{width:100%}"
    ".cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,15.5rem),1fr));gap:1.2rem 1.5rem}"
    ".card{margin:0;min-width:0}.card div{display:grid;grid-template-columns:repeat(3,1fr);gap:4px}"
    ".card img{width:100%}.card figcaption{padding-top:.3rem;line-height:1.3;overflow-wrap:anywhere}"
    ".empty img:first-child{outline:3px solid #c0392b}.flag{color:#c0392b;font-weight:600}"
    ".steps th{font-weight:400}.steps tbody th{position:sticky;left:0;background:#fdfdfb;max-width:9rem}"
    ".steps tbody th{min-width:6.5rem;overflow-wrap:anywhere;vertical-align:middle}"
    ".steps td{padding:.25rem .25rem;border:0}.steps td img{width:6rem;max-width:none}"
    ".steps th{border:0}"
    "@media(max-width:30rem){h1{font-size:1.7rem}.steps td img{width:4.5rem}}"
)


def report_page(
    folder: Path,
    settings: Config,
    environment: dict,
    record: Record,
    panels: Sequence[bytes],
    samples: dict[str, Samples],
    quality: dict[str, dict],
    steps: Sequence[DrawnStep],
) -> bytes:
    """The page of a run. ``panels``: PNG pictures of the curves; ``quality``: what quality.json holds."""
    blocks = [
        f"# {TITLE}",
        f"A language model that draws: it reads a caption and writes the codes of a picture, one after the other. "
        f"This is what the run in {plain(folder)} learned in {len(record.train):,} steps.",
        "## What was trained",
        table(("what", "value"), facts(settings, environment, record)),
        "## Losses",
        "Thin: each step. Thick: moving average. Dashed: pictures that training never sees.",
        curves(panels),
        losses(record),
        "## The same prompts during training",
        steps_table(steps),
    ]
    blocks += ["## Samples", sampling_note(settings)]
    for name, title in NAMES.items():
        blocks += [f"### {title}", cards(samples[name])]
    blocks += ["## Quality", *quality_table(quality), "## What to try next", *next_steps(folder, settings)]
    blocks.append(
        "Pictures and captions: [OpenMoji](https://openmoji.org), the open-source emoji and icon project, [CC BY-SA "
        "4.0](https://creativecommons.org/licenses/by-sa/4.0/). What a model draws that was trained on them is an "
        "adaptation under the same licence."
    )
    return page(f"{TITLE}: {folder}", "\n\n".join(blocks) + "\n", STYLE)


def facts(settings: Config, environment: dict, record: Record) -> list[tuple[str, str]]:
    """(what, value) of data, tokenizers, model, schedule and machine."""
    rows = []
    prefixes = [("Training pictures", dataset.prefix) for dataset in settings.data.train]
    prefixes += [("Held-out pictures", settings.data.valid)] if settings.data.valid else []
    for what, prefix in prefixes:
        manifest = Manifest.read(prefix)
        tokens = f"{manifest.tokens.text:,} text and {manifest.tokens.image:,} image tokens"
        rows.append((what, f"{manifest.documents:,} of {prefix}: {tokens}"))
    manifest = Manifest.read(settings.data.train[0].prefix)
    text, image, (grid_rows, grid_columns) = manifest.text, manifest.image, manifest.image.grid
    size = f"{image.image_size} x {image.image_size} pixels as {grid_rows} x {grid_columns} codes"
    per_caption = manifest.tokens.text / manifest.documents
    rows.append(("Text tokenizer", f"{text.vocab_size:,} ids; {per_caption:.1f} tokens a caption"))
    rows.append(("Image tokenizer", f"{image.kind}, {image.codebook_size:,} codes; {size}"))
    model, training = settings.model, settings.training
    shape = f"{model.layers} layers, hidden size {model.hidden}, {model.heads} heads"
    rows.append(("Model", f"{environment['parameters_total']:,} parameters: {shape}"))
    last = record.train[-1]["step"]
    epochs = last * training.global_batch_size / sum(Manifest.read(d.prefix).documents for d in settings.data.train)
    batch = f"{training.global_batch_size} pictures a step, {epochs:.1f} epochs"
    rows.append(("Steps", f"{last:,} of {training.steps:,}; {batch}"))
    launch = environment["backend"]  # device=cpu (NAME) dtype=float32 ... ranks=1 threads=2
    name, values = re.search(r"\((.*)\) dtype=", launch)[1], dict(re.findall(r"(\w+)=(\w+)", launch))
    rows.append(("Arithmetic", values["dtype"]))
    rows.append(("Processor", f"{name}, {values['ranks']} x {values['threads']} threads"))
    seconds = sum(entry["step_s"] for entry in record.train)
    speed = statistics.median(entry["tokens_per_s"] for entry in record.train)
    rows.append(("Time in training steps", f"{duration(seconds)} (median {speed:,.0f} tokens/s)"))
    versions = {name: number for name, number in environment["versions"].items() if number}
    versions["Python"] = environment["python"]
    rows.append(("Versions", ", ".join(f"{name} {number}" for name, number in versions.items())))
    return rows


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, without leading zeros."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def curves(panels: Sequence[bytes]) -> str:
    images = (embedded(panel, "curves of text, image and all tokens, in training and held out") for panel in panels)
    return f'<div class="curves">{"".join(images)}</div>'


def losses(record: Record) -> str:
    """The losses at the end, in training and held out."""
    rows = []
    for name in ("text", "image", "total"):
        row = [name]
        row.append(f"{smoothed([value(entry, 'loss', name) for entry in record.train])[-1]:.3f}")
        if record.valid:
            row.append(f"{value(record.valid[-1], 'loss', name):.3f}")
            row.append(f"{value(record.valid[-1], 'ppl', name):.1f}")
        rows.append(row)
    head = ["tokens", "training loss (moving average)"]
    return table(head + ["held-out loss", "held-out perplexity"] * bool(record.valid), rows)


def steps_table(steps: Sequence[DrawnStep]) -> str:
    """Prompts down, steps across."""
    shown = chosen_steps(steps)
    if not shown:
        return f"The run has no pictures in {FOLDER}/: it was trained with training.sample_every=0."
    head = "".join(f"<th>step {step.step:,}</th>" for step in shown)
    rows = []
    for number, prompt in enumerate(shown[-1].prompts):
        cells = (picture(step.images[number], f"{prompt}, after {step.step:,} steps") for step in shown)
        rows.append(f"<tr><th>{html.escape(prompt)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    body = f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<table class="steps">{body}</table>'


def sampling_note(settings: Config) -> str:
    sampling = settings.sampling
    numbers = f"Temperature {sampling.temperature}, top-k {sampling.top_k}, top-p {sampling.top_p}"
    return (
        f"Of three pictures, left: generated from the caption alone; middle: the true picture in the image tokenizer's "
        f"codes, the best that the model can do; right: OpenMoji's drawing. {numbers}, guidance {sampling.guidance}, "
        f"seed {SEED}; nothing was selected."
    )


def cards(samples: Samples) -> str:
    """The first SHOWN prompts, each with its three pictures."""
    kinds = ("generated", "in the tokenizer's codes", "OpenMoji's drawing")
    pictures = zip(samples.generated, samples.reconstructed, samples.true, strict=True)
    figures = []
    for caption, empty, images, _ in zip(samples.captions, samples.empty(), pictures, range(SHOWN), strict=False):
        row = "".join(picture(i.numpy(), f"{caption}: {kind}") for i, kind in zip(images, kinds, strict=True))
        flag = ' <span class="flag">empty picture</span>' if empty else ""
        kind = "card empty" if empty else "card"
        text = html.escape(caption)
        figures.append(f'<figure class="{kind}"><div>{row}</div><figcaption>{text}{flag}</figcaption></figure>')
    return f'<div class="cards">{"".join(figures)}</div>'


def picture(image: np.ndarray, alternative: str) -> str:
    """An ``img`` of ``image`` [3, H, W] uint8."""
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(content, format="PNG")
    return embedded(content.getvalue(), alternative, ' class="pixels"')


def quality_table(quality: dict[str, dict]) -> list[str]:
    """How often a picture is nearest to its own true one, beside chance and the best that the codes allow."""
    rows, names = [], {"seen": "seen in training", "unseen": "held out"}
    for name, result in quality.items():
        pixel, feature = result["pixel"], result["feature"]
        empty = f"{result['empty']} ({result['empty_shown']} of those shown)"
        rows.append((names[name], pixel["n"], f"{pixel['rate']:.0%}", f"{feature['rate']:.0%}", empty))
        best = result["codebook"]
        rates = (f"{best[space]['rate']:.0%}" for space in ("pixel", "feature"))
        rows.append((f"{names[name]}, in the tokenizer's codes", pixel["n"], *rates, ""))
    chance = [f"{result[space]['chance']:.0%}" for space in ("pixel", "feature")]
    rows.append(("chance", "", *chance, ""))
    return [
        f"How often a generated picture is nearer to its own true picture than to {OTHERS} others, by pixels and by "
        "features (layout of colors, directions of edges). The others are mostly other subjects: this measures the "
        "right kind of picture, not the exact skin tone. Empty: of one color where the true picture is not.",
        table(("prompts", "number", "pixels", "features", "empty pictures"), rows),
    ]


def next_steps(folder: Path, settings: Config) -> list[str]:
    """Three commands that work as printed, from the folder that the report was made in."""
    python, run = interpreter(), str(folder)
    longer = (f"run.dir={folder.parent / (folder.name + '-longer')}", f"training.steps={2 * settings.training.steps}")
    generate = (python, "tools/generate.py", "--run", run, "--prompts", "red apple", "flag of Japan")
    train = (python, "pretrain_t2i.py", "--config", str(folder / "config.yaml"), "optimizer.engine=torch", *longer)
    return [
        f"**Your own prompts.** The pictures come to {plain(folder / 'samples')}; words that no caption has do little.",
        command(*generate),
        "**A page to draw on**, in the browser, with the sampling settings to play with.",
        command(python, "tools/serve.py", "--run", run),
        "**Twice the steps**, from the start, in a run of its own.",
        command(*train),
        'Your own pictures are a folder of images with captions: the README\'s section "Train on your own pictures".',
    ]


def command(*words: str) -> str:
    return f"```\n{shlex.join(words)}\n```"


def interpreter() -> str:
    """This Python, as one types it here."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
