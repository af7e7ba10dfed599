"""Sampling: the draw by hand, and codes that depend on prompt, seed and settings alone."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from distributed import run_ranks

from megat2i import checkpoint
from megat2i.config import ConfigError, ParallelConfig, SamplingConfig, VocabConfig, to_yaml
from megat2i.generate import Drawing, Sampler, draw
from megat2i.model.gpt import GPT
from megat2i.tokenizers.image import load_image_tokenizer
from megat2i.tokenizers.text import load_text_tokenizer

LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


def drawn(noise, **settings):
    rows = torch.as_tensor(noise, dtype=torch.float32)
    return draw(LOGITS.repeat(len(rows), 1), rows, SamplingConfig(**settings)).tolist()


@pytest.mark.parametrize(
    ("settings", "noise", "expected"),
    [
        ({}, [0.0, 0.09, 0.11, 0.49, 0.51, 0.69, 0.71, 0.9999], [0, 0, 1, 1, 2, 2, 3, 3]),
        ({"top_k": 1}, [0.0, 0.5, 0.9999], [1, 1, 1]),
        ({"top_k": 2}, [0.0, 0.56, 0.58, 0.9999], [1, 1, 3, 3]),  # 4/7 and 3/7
        ({"top_k": 4}, [0.05], [0]),
        ({"top_k": 9}, [0.05], [0]),
        ({"top_p": 0.3}, [0.0, 0.9999], [1, 1]),
        ({"top_p": 0.5}, [0.0, 0.56, 0.58, 0.9999], [1, 1, 3, 3]),  # the one that crosses the bound is kept
        ({"top_p": 0.8}, [0.0, 0.43, 0.45, 0.66, 0.67, 0.9999], [1, 1, 2, 2, 3, 3]),
        ({"top_k": 3, "top_p": 0.6}, [0.0, 0.56, 0.58], [1, 1, 3]),  # of 4/9, 3/9 and 2/9 the first two
        ({"temperature": 0.5}, [0.032, 0.034, 0.566, 0.568, 0.69, 0.71], [0, 1, 1, 2, 2, 3]),  # 1, 16, 4, 9 of 30
        ({"temperature": 1e-6}, [0.0, 0.5, 0.9999], [1, 1, 1]),
    ],
    ids=str,
)
def test_draw_by_hand(settings, noise, expected):
    assert drawn(noise, **settings) == expected


def test_shares_of_many_draws():
    noise = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    found = torch.bincount(torch.tensor(drawn(noise, top_k=3, temperature=2.0)), minlength=4) / 20_000
    expected = torch.tensor([0.0, 0.4, 0.2, 0.3]).sqrt()
    expected /= expected.sum()
    assert found[0] == 0
    bound = 4 * (0.25 / 20_000) ** 0.5  # four standard deviations
    assert (found - expected).abs().max() < bound
    plain = torch.bincount(torch.tensor(drawn(noise)), minlength=4) / 20_000
    assert (plain - expected).abs().max() > bound


@pytest.fixture(scope="module")
def sampler(run_config, tiny_store, tmp_path_factory):
    """A sampler of an untrained model with sharp predictions: it hangs on every token before it."""
    settings = run_config(tmp_path_factory.mktemp("run"))
    layout = settings.vocab_layout
    from megat2i.kernels import choose_ops

    shape = replace(settings.model, positions="rotary")
    model = GPT(shape, layout.size, layout.ranges, choose_ops(torch.device("cpu"), torch.float32))
    model.initialise(0)
    with torch.no_grad():
        model.output.weight.mul_(3)
    text, image = (load(tiny_store / name) for load, name in TOKENIZERS)
    return Sampler(model, layout, text, image, 24, "text_to_image")


TOKENIZERS = ((load_text_tokenizer, "text.json"), (load_image_tokenizer, "image.safetensors"))
PROMPTS = ["red circle", "blue hut", "", "green square green square green square", "red hut"]
SETTINGS = SamplingConfig(temperature=0.9)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_image_does_not_depend_on_its_batch(sampler, guidance):
    settings = replace(SETTINGS, guidance=guidance)
    seeds = [5, 6, 7, 8, 9]
    together = sampler.codes(PROMPTS, seeds, settings, batch_size=4)
    for index, (prompt, seed) in enumerate(zip(PROMPTS, seeds, strict=True)):
        alone = sampler.codes([prompt], [seed], settings, batch_size=4)
        assert torch.equal(alone[0], together[index])
    backwards = sampler.codes(PROMPTS[::-1], seeds[::-1], settings, batch_size=4)
    assert torch.equal(backwards.flip(0), together)


def test_codes_are_seen_as_they_are_drawn(sampler):
    """By whoever asks; a batch that was left is forgotten by the next one in the same memory."""
    rows = [sampler.prompt_tokens(prompt) for prompt in PROMPTS[:3]]
    drawing, whole = Drawing(sampler, SETTINGS, 4, graphs=True), sampler.codes(PROMPTS[:3], [5, 6, 7], SETTINGS, 4)
    for count in drawing.steps(rows, [1, 2, 3]):
        if count == 2:
            break
    counts = []
    for count in drawing.steps(rows, [5, 6, 7]):
        counts.append(count)
        assert torch.equal(drawing.drawn(3, count), whole[:, :count])
    assert counts == [1, 2, 3, 4]


def test_codes_depend_on_prompt_and_seed(sampler):
    codes = sampler.codes(["red circle", "red circle", "red circle", "blue hut"], [1, 1, 2, 1], SETTINGS, batch_size=4)
    assert codes.shape == (4, 4) and codes.dtype == torch.int64
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2]) and not torch.equal(codes[0], codes[3])


def test_codes_are_image_codes_whatever_the_model_prefers(sampler):
    biased = replace(sampler, model=copy.deepcopy(sampler.model))
    weight, start = biased.model.output.weight, sampler.vocab.image_start
    with torch.no_grad():
        weight[:start] += 100
        weight[start + 40 :] += 100
    codes = biased.codes(["red circle"] * 16, range(16), replace(SETTINGS, temperature=50.0), batch_size=16)
    assert codes.min() >= 0 and codes.max() < 40 and len(codes.unique()) > 20


def greedy(sampler, prompt, guidance):
    """The most likely codes by full passes over the whole sequence, without cache, padding or batch."""
    start, count = sampler.vocab.image_start, sampler.vocab.image_codes
    rows = [sampler.prompt_tokens(prompt), sampler.prompt_tokens("")]
    codes = []
    for _ in range(sampler.image_tokens):
        with torch.no_grad():
            logits = [sampler.model.logits(torch.tensor([row]))[0, -1, start : start + count] for row in rows]
        code = int((logits[1] + guidance * (logits[0] - logits[1])).argmax())
        codes.append(code)
        rows = [[*row, start + code] for row in rows]
    return codes


@pytest.mark.parametrize("guidance", [1.0, 0.0, 4.0])
def test_greedy_codes_equal_passes_over_the_whole_sequence(sampler, guidance):
    settings = SamplingConfig(temperature=1e-6, guidance=guidance)
    found = sampler.codes(PROMPTS, [0] * 5, settings, batch_size=5).tolist()
    assert found == [greedy(sampler, prompt, guidance) for prompt in PROMPTS]
    assert found != [greedy(sampler, prompt, guidance + 3) for prompt in PROMPTS]


def without_cache(sampler, prompt, seed, sampling):
    """Codes drawn from passes over the whole sequence, which grows: no cache, padding or batch."""
    start, count = sampler.vocab.image_start, sampler.vocab.image_codes
    rows = [sampler.prompt_tokens(prompt), sampler.prompt_tokens("")]
    noise = torch.rand(sampler.image_tokens, generator=torch.Generator().manual_seed(seed))
    codes = []
    for number in noise:
        with torch.no_grad():
            logits = [sampler.model.logits(torch.tensor([row]))[:, -1, start : start + count] for row in rows]
        code = draw(logits[1] + sampling.guidance * (logits[0] - logits[1]), number[None], sampling).item()
        codes.append(code)
        rows = [[*row, start + code] for row in rows]
    return codes


SHAPES = [
    {"positions": "none"},
    {"positions": "rotary", "qk_norm": True},
    {"positions": "rotary_interleaved", "norm": "rms_norm", "qk_norm": True, "qk_norm_per_head": True},
    {"positions": "rotary", "norm": "layer_norm_no_gain", "qk_norm": True, "kv_heads": 2, "feed_forward": "gelu"},
]


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_the_static_cache_draws_what_the_growing_sequence_does(sampler, changes, implementation):
    """Prompts of several lengths, so left padding too; "reference" has the attention over the seen places alone."""
    from megat2i.kernels import choose_ops

    shape, layout = replace(sampler.model.shape, **changes), sampler.vocab
    ops = choose_ops(torch.device("cpu"), torch.float32, implementation)
    model = GPT(shape, layout.size, layout.ranges, ops)
    model.initialise(1)
    with torch.no_grad():
        model.output.weight.mul_(3)
    varied, settings, seeds = replace(sampler, model=model), replace(SETTINGS, guidance=2.0), range(8)
    found = varied.codes(PROMPTS[:4] * 2, seeds, settings, batch_size=3).tolist()
    assert found == [without_cache(varied, PROMPTS[seed % 4], seed, settings) for seed in seeds]


def test_tensor_parallel_ranks_draw_the_same(sampler, tiny_config, make_training):
    """Two ranks of a pipeline object, as in training, beside one process."""

    def drawn_by(parallel):
        config = replace(tiny_config, vocab=VocabConfig(sampler.vocab.text_tokens, 40), parallel=parallel)
        pipeline, _, _ = make_training(None, config)
        rank = replace(sampler, model=pipeline, vocab=config.vocab_layout)
        return rank.codes(PROMPTS, range(5), replace(SETTINGS, guidance=2.0), batch_size=3).tolist()

    (expected,) = run_ranks(1, drawn_by, ParallelConfig())
    assert run_ranks(2, drawn_by, ParallelConfig(tensor=2)) == [expected] * 2
    assert run_ranks(2, drawn_by, ParallelConfig(pipeline=2)) == [expected] * 2


def test_a_diverged_model_is_one_clear_error(sampler):
    broken = replace(sampler, model=copy.deepcopy(sampler.model))
    with torch.no_grad():
        broken.model.norm.weight[3] = float("nan")
    for settings in (SETTINGS, SamplingConfig(top_k=3), SamplingConfig(top_p=0.5, guidance=2.0)):
        with pytest.raises(ValueError, match="not finite"):
            broken.codes(["red hut"], [0], settings, batch_size=2)


def test_guidance_of_one_runs_no_second_branch(sampler, monkeypatch):
    widths = []
    original = GPT.next_logits

    def counted(self, tokens, cache, columns):
        widths.append(len(tokens))
        return original(self, tokens, cache, columns)

    monkeypatch.setattr(GPT, "next_logits", counted)
    sampler.codes(["red hut"], [0], SETTINGS, batch_size=3)
    assert set(widths) == {3}
    sampler.codes(["red hut"], [0], replace(SETTINGS, guidance=2.0), batch_size=3)
    assert set(widths) == {3, 6}


def test_a_long_prompt_is_cut_as_in_training(sampler):
    special = sampler.vocab.special
    words = "red green blue " * 30
    caption = sampler.text_tokenizer.encode([words])[0]
    room = 24 - 4 - 6
    assert len(caption) > room
    expected = [special("<doc>"), special("<text>"), *caption[:room], special("</text>"), special("<image>")]
    assert sampler.prompt_tokens(words) == expected
    assert len(expected) == sampler.prompt_width
    assert sampler.prompt_tokens("")[1:] == [special("<text>"), special("</text>"), special("<image>")]


def test_prompts_begin_as_training_rows_do(sampler, tiny_store):
    from megat2i.data.t2i_dataset import T2IDataset

    dataset = T2IDataset(tiny_store / "train", sampler.vocab, 24)
    prompt = sampler.prompt_tokens("red circle")
    assert dataset.row(0, 0).tokens[: len(prompt)].tolist() == prompt
    images = T2IDataset(tiny_store / "train", sampler.vocab, 24, mode="image_only")
    alone = replace(sampler, mode="image_only")
    assert images.row(0, 0).tokens[:2].tolist() == alone.prompt_tokens("")
    with pytest.raises(ConfigError, match="images alone"):
        alone.prompt_tokens("a hut")


def test_pictures_are_the_decoded_codes(sampler):
    pictures = sampler.images(["red hut", ""], [3, 4], SETTINGS, batch_size=2)
    codes = sampler.codes(["red hut", ""], [3, 4], SETTINGS, batch_size=2)
    assert pictures.dtype == "uint8" and pictures.shape == (2, 3, 8, 8)
    assert torch.equal(sampler.image_tokenizer.encode(torch.from_numpy(pictures)), codes)


def test_prompts_and_seeds_must_match(sampler):
    with pytest.raises(ValueError):
        sampler.codes(["red hut", ""], [3], SETTINGS, batch_size=2)


@pytest.fixture
def run_folder(run_config, tiny_store, make_training, tmp_path):
    """A run folder with two checkpoints of different weights, and the weights of the second."""
    settings = run_config(tmp_path / "run")
    for kind, (_, name) in zip(("text", "image"), TOKENIZERS, strict=True):
        (tmp_path / "run" / "tokenizers" / kind).mkdir(parents=True)
        shutil.copy(tiny_store / name, tmp_path / "run" / "tokenizers" / kind / name)
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(settings))

    def save():
        for step in (2, 10):
            changed = replace(settings, model=replace(settings.model, seed=step))
            _, engine, groups = make_training("torch", changed)
            checkpoint.save(tmp_path / "run" / "checkpoints", step, engine, groups.layout(), keep=5)
        return None

    run_ranks(1, save)
    return tmp_path / "run"


def step_of(run_dir, make_training, settings):
    """Which checkpoint ``from_run`` took."""
    found, _ = Sampler.from_run(run_dir, torch.device("cpu"), torch.float32)

    def first_weights():
        result = {}
        for step in (2, 10):
            pipeline, *_ = make_training(None, replace(settings, model=replace(settings.model, seed=step)))
            result[step] = pipeline.model.output.weight[0].tolist()
        return result

    weights = run_ranks(1, first_weights)[0]
    return next(step for step, row in weights.items() if row == found.model.output.weight[0].tolist())


def test_a_run_is_sampled_from_its_newest_checkpoint(run_folder, run_config, make_training):
    assert step_of(run_folder, make_training, run_config(run_folder)) == 10


def test_a_run_is_sampled_where_it_was_moved(run_folder, run_config, make_training, tmp_path):
    moved = run_folder.rename(tmp_path / "elsewhere")
    assert step_of(moved, make_training, run_config(moved)) == 10


def test_a_damaged_newest_checkpoint_means_the_one_before(run_folder, run_config, make_training):
    path = run_folder / "checkpoints" / "step-10" / "rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 4
    path.write_bytes(content)
    assert step_of(run_folder, make_training, run_config(run_folder)) == 2


def test_a_run_without_checkpoints_is_one_clear_error(run_folder):
    shutil.rmtree(run_folder / "checkpoints")
    with pytest.raises(ConfigError, match="no sound checkpoint"):
        Sampler.from_run(run_folder, torch.device("cpu"), torch.float32)
