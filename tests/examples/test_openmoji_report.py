"""The demo's report: curves from metrics.jsonl alone, fixed prompts, a page that is complete and safe by itself."""

import io
import json
import math
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from megat2i.config import ConfigError
from megat2i.data.manifest import Manifest
from megat2i.data.openmoji import Drawing, captioned_images
from megat2i.drawn import DrawnStep
from megat2i.files import DataFileError
from megat2i.runtime import processor_name

SCRIPT = '<script>document.title = "taken"</script> & "quoted" *bold* | b'


@pytest.fixture(scope="module")
def demo(repository):
    """The modules of examples/openmoji."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repository / "examples/openmoji")
        import curves
        import page
        import report
        import samples

        yield SimpleNamespace(curves=curves, page=page, report=report, samples=samples)


def entry(step, loss, **more):
    losses = {"loss": loss, "loss/text": loss / 2, "loss/image": loss * 2, "step_s": 0.5, "tokens_per_s": 100.0}
    return {"step": step, **losses, "ppl/text": math.exp(loss / 2), "ppl/image": math.exp(loss * 2), **more}


def write_record(folder, entries):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))


def test_curves_are_drawn_from_the_record(demo, tmp_path):
    entries = [entry(step, 5 / step) for step in range(1, 40)] + [entry(39, 1.0, split="valid")]
    entries.append({"step": 39, "split": "valid_text", "loss": 9.0})
    write_record(tmp_path, entries)
    record = demo.curves.read_record(tmp_path)
    assert (len(record.train), len(record.valid)) == (39, 1)
    first = demo.curves.curves_png(record, "run")
    panel = Image.open(io.BytesIO(demo.curves.panel_png(record, "ppl")))
    assert panel.width < 700 < 1000 < Image.open(io.BytesIO(first)).width
    entries[20] |= entry(21, 4.0)
    write_record(tmp_path, entries)
    other = demo.curves.curves_png(demo.curves.read_record(tmp_path), "run")
    assert other != first, "another record, the same curves"


def test_curves_of_a_diverged_run_are_drawn(demo, tmp_path):
    write_record(tmp_path, [entry(1, 5.0), entry(2, 1.0) | {"loss": "nan", "loss/image": "inf"}])
    assert demo.curves.curves_png(demo.curves.read_record(tmp_path), "run")


@pytest.mark.parametrize("content", ["", "{", json.dumps({"step": 1, "split": "valid"}) + "\n"])
def test_a_run_without_a_step_is_one_sentence(demo, tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataFileError, match="Train the run first"):
        demo.curves.read_record(tmp_path)


def test_a_moving_average_has_no_bias_at_its_start(demo):
    smoothed = demo.curves.smoothed
    assert smoothed([3.0] * 5) == pytest.approx([3.0] * 5)
    values = smoothed([0.0] * 50 + [1.0] * 200)
    assert values[49] == 0 < values[60] < values[100] < 1 and values[-1] > 0.99


def test_prompts_are_fixed_and_the_held_out_ones_unseen(demo):
    seen, unseen = demo.samples.choose("train", 200), demo.samples.choose("valid", 100)
    assert seen == demo.samples.choose("train", 200)
    assert len({drawing.caption for drawing in seen}) == 200 and len({drawing.caption for drawing in unseen}) == 100
    train = {drawing.caption for drawing in captioned_images("train")}
    assert not train & {drawing.caption for drawing in unseen}


def test_true_pictures_are_those_of_their_captions(demo):
    france = [d for d in captioned_images("train") if d.caption == "flag of France"]
    picture = demo.samples.true_pictures(france, 48)
    assert picture.shape == (1, 3, 48, 48) and picture.dtype == torch.uint8
    blue, white, red = (picture[0, :, 24, column].tolist() for column in (10, 24, 38))
    assert blue[2] > blue[0] and min(white) > 240 and red[0] > red[2] + 50


def test_pictures_of_one_color_are_empty_where_the_true_ones_are_not(demo):
    flat = torch.tensor([250, 10, 90], dtype=torch.uint8)[:, None, None].expand(3, 8, 8).clone()
    nearly, point = flat.clone(), flat.clone()
    nearly[:, 0, 0] += 3
    point[1, 7, 7] = 60
    generated = torch.stack([flat, nearly, point, flat])
    true = torch.stack([point, point, point, nearly])
    drawings = [Drawing(str(n), str(n), str(n)) for n in range(4)]
    assert demo.samples.Samples(drawings, generated, true, true).empty() == [True, True, False, False]


def test_steps_are_spread_evenly_and_of_the_same_prompts(demo):
    steps = [DrawnStep(n, ["a"], np.zeros((1, 3, 2, 2), np.uint8)) for n in range(10, 310, 10)]
    shown = [step.step for step in demo.samples.chosen_steps(steps)]
    assert shown == sorted(set(shown)) and (len(shown), shown[0], shown[-1]) == (6, 10, 300)
    assert [step.step for step in demo.samples.chosen_steps(steps[:3])] == [10, 20, 30]
    other = DrawnStep(5, ["b"], np.zeros((1, 3, 2, 2), np.uint8))
    assert [step.step for step in demo.samples.chosen_steps([other, *steps[:2]])] == [10, 20]
    assert demo.samples.chosen_steps([]) == []


class Parsed(HTMLParser):
    """Tags, attributes and the text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_data(self, data):
        self.text += data

    def values(self, tag, name):
        return [value for t, n, value in self.attributes if (t, n) == (tag, name)]


@pytest.fixture(scope="module")
def small_run(pretrain, tiny_store, demo, tmp_path_factory):
    """A run of six steps, with its report, on data that say they are OpenMoji; its first prompt is an attack."""
    folder = tmp_path_factory.mktemp("openmoji")
    shutil.copytree(tiny_store, folder / "data")
    for prefix in (folder / "data/train", folder / "data/valid"):
        manifest = Manifest.read(prefix)
        replace(manifest, sources=(replace(manifest.sources[0], name="openmoji"),)).write(prefix)
    arguments = [f"data.train=[{{prefix: {folder}/data/train}}]", f"data.valid={folder}/data/valid"]
    arguments += [
        "training.sample_every=2",
        "training.evaluate_every=3",
        f"sampling.prompts={json.dumps([SCRIPT, 'b'])}",
    ]
    process = pretrain(folder / "a run", *arguments)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.samples, "SEEN", 20)
        patch.setattr(demo.samples, "UNSEEN", 18)
        demo.report.make_report(folder / "a run", folder / "images")
    return folder / "a run"


@pytest.fixture(scope="module")
def parsed(small_run):
    return Parsed((small_run / "report.html").read_text())


def test_the_page_is_one_file_without_scripts(parsed):
    assert not {"script", "link", "iframe", "object", "base"} & set(parsed.tags)
    sources = parsed.values("img", "src")
    assert len(sources) == 2 + 3 * 2 + 2 * 16 * 3, "two panels, three steps of two prompts, three pictures of a card"
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not any(name.startswith("on") or name in ("srcset", "background") for _, name, _ in parsed.attributes)
    assert all(parsed.values("img", "alt"))


def test_the_page_says_what_was_trained(parsed, small_run):
    environment = json.loads((small_run / "environment.json").read_text())
    for words in (
        "23 of ", "5 of ", "8 x 8 pixels as 2 x 2 codes", f"{environment['parameters_total']:,} parameters", "float32",
        f"{processor_name()}, 1 x 1 threads", "6 of 6; 8 pictures a step, 2.1 epochs", f"torch {torch.__version__}",
    ):  # fmt: skip
        assert words in parsed.text, words


def test_a_script_in_a_prompt_stays_text(demo, parsed, small_run):
    assert parsed.text.count(SCRIPT) == 1 and f"{SCRIPT}, after 6 steps" in parsed.values("img", "alt")
    pictures = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    card = Parsed(demo.page.cards(demo.samples.Samples([Drawing("x", SCRIPT, "x")], pictures, pictures, pictures)))
    assert card.text == SCRIPT and card.tags == ["div", "figure", "div", "img", "img", "img", "figcaption"]
    assert card.values("img", "alt")[0] == f"{SCRIPT}: generated"


def test_a_browser_runs_nothing_of_a_prompt(small_run, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is absent")
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--dump-dom")
    address = (small_run / "report.html").as_uri()
    shown = subprocess.run([chromium, *options, address], capture_output=True, text=True, timeout=120)
    assert "<title>The OpenMoji demo: " in shown.stdout and "Prompts held out" in shown.stdout, shown.stderr


def test_an_empty_picture_is_counted_and_flagged(demo):
    white = torch.full((40, 3, 8, 8), 255, dtype=torch.uint8)
    noise = torch.randint(0, 256, white.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    generated = noise.clone()
    generated[[3, 30]] = white[0]
    drawings = [Drawing(str(n), f"picture {n}", str(n)) for n in range(40)]
    samples = demo.samples.Samples(drawings, generated, noise.roll(1, 0), noise)
    measures = samples.measures()
    assert (measures["empty"], measures["empty_shown"]) == (2, 1)
    assert measures["codebook"]["pixel"]["rate"] < 0.3 < 0.9 < measures["pixel"]["rate"]
    card = Parsed(demo.page.cards(samples))
    assert card.values("figure", "class").count("card empty") == 1 and "picture 3 empty picture" in card.text
    table = "\n".join(demo.page.quality_table({"seen": measures, "unseen": measures}))
    assert "2 (1 of those shown)" in table


def test_quality_is_on_the_page_beside_chance(parsed, small_run):
    quality = json.loads((small_run / "quality.json").read_text())
    assert {name: result["pixel"]["n"] for name, result in quality.items()} == {"seen": 20, "unseen": 18}
    assert all({"pixel", "feature", "codebook", "empty", "empty_shown"} == result.keys() for result in quality.values())
    assert "chance" in parsed.text and f"{quality['seen']['pixel']['rate']:.0%}" in parsed.text


def test_the_other_files_are_there(small_run):
    assert Image.open(small_run / "curves.png").width > 1000 and Image.open(small_run / "samples.png").width > 1000
    for name in ("demo-samples.png", "demo-steps.png"):
        path = small_run.parent / "images" / name
        assert Image.open(path).width > 300 and path.stat().st_size < 75_000


def test_the_next_commands_are_quoted_and_their_options_exist(demo, parsed, small_run, repository):
    commands = [line for line in parsed.text.splitlines() if "tools/" in line or "pretrain_t2i.py" in line]
    assert len(commands) == 3 and all("'" in command for command in commands), "the run folder has a space in its name"
    settings = demo.report.config.load(small_run / "config.yaml")
    words = shlex.split(demo.page.next_steps(small_run, settings)[-2].strip("`"))
    stopped = subprocess.run([sys.executable, *words[1:], "training.stop_at=1"], cwd=repository, capture_output=True)
    assert stopped.returncode == 0, stopped.stderr
    assert (small_run.parent / "a run-longer/checkpoints/step-1").is_dir()


def test_a_run_on_other_pictures_is_refused_in_a_sentence(demo, small_run, tiny_store, tmp_path):
    text = (small_run / "config.yaml").read_text()
    for name in ("config.yaml", "data.json"):
        shutil.copy(small_run / name, tmp_path)
    (tmp_path / "config.yaml").write_text(text.replace(f"{small_run.parent}/data", str(tiny_store)))
    with pytest.raises(ConfigError, match="made from test, and this report compares with the demo's OpenMoji"):
        demo.report.make_report(tmp_path)
    (tmp_path / "config.yaml").write_text(text.replace(f"{small_run.parent}/data", "nowhere"))
    with pytest.raises(ConfigError, match=r"nowhere/train\.json: not found"):
        demo.report.make_report(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    saved = (small_run / "data.json").read_text()
    (tmp_path / "data.json").write_text(saved.replace('"tokens": "', '"tokens": "0'))
    with pytest.raises(ConfigError, match="has changed since"):
        demo.report.make_report(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "data.json"]
