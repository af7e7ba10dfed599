"""A run starts from a pre-trained model: weights, ranks, what does not belong together, what a resumed run does."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from distributed import run_ranks

pytest.importorskip("transformers")
import huggingface_networks as networks

from megat2i.config import ConfigError, ModelConfig, ParallelConfig, to_yaml
from megat2i.files import DataFileError
from megat2i.kernels import choose_ops
from megat2i.model import huggingface, pretrained, weights
from megat2i.model.gpt import GPT
from megat2i.model.part import WHOLE_MODEL, part_of
from megat2i.topology import ParallelGroups

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text_tokens(tiny_store):
    from megat2i.tokenizers.text import load_text_tokenizer

    return load_text_tokenizer(tiny_store / "text.json").vocab_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_tokens):
    """A Llama of transformers with 5 rows more than the data's tokenizer has ids."""
    path = tmp_path_factory.mktemp("pretrained") / "llama"
    networks.save(path, "llama", rows=text_tokens + 5)
    return path


def settings_of(config, folder, **model):
    """``config`` with the model in ``folder``."""
    shape = replace(pretrained.open_pretrained(folder).shape, pretrained=str(folder))
    return replace(config, model=replace(shape, **model))


@pytest.fixture
def settings(run_config, folder, tmp_path):
    return settings_of(run_config(tmp_path / "run"), folder)


def model_for(settings, part=WHOLE_MODEL) -> GPT:
    model = GPT.empty(settings.model, settings.vocab_layout, choose_ops(CPU, torch.float32), CPU, torch.float32, part)
    pretrained.initialise(model, settings)
    return model


@torch.no_grad()
def test_the_model_speaks_text_as_before(settings, folder, text_tokens):
    from transformers import AutoModelForCausalLM

    pretrained.require_fit(settings)
    model, source = model_for(settings), huggingface.load(folder)
    tokens = torch.randint(0, text_tokens, (2, 11), generator=torch.Generator().manual_seed(0))
    expected = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits[..., :text_tokens]
    assert (model.logits(tokens)[..., :text_tokens] - expected).abs().max() < 1e-5
    for name, parameter in model.named_parameters():
        rows = slice(text_tokens) if name in weights.TABLES else slice(None)
        assert torch.equal(parameter[rows], source.read(name)[rows]), name


@pytest.mark.parametrize("rule", ["random", "mean", "gaussian"])
@pytest.mark.parametrize("layout", [{"tensor": 2}, {"pipeline": 2}])
def test_every_rank_has_its_part_of_the_same_model(settings, rule, layout, text_tokens):
    settings = replace(settings, model=replace(settings.model, expansion=rule))
    whole = {name: parameter.detach() for name, parameter in model_for(settings).named_parameters()}
    source = pretrained.open_pretrained(settings.model.pretrained)
    table = source.read("tok_embeddings.weight")
    split = replace(settings, parallel=ParallelConfig(**layout))

    def on_rank():
        part = part_of(split, ParallelGroups.create(split.parallel))
        model = model_for(split, part)
        shards = model.shards()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, shards[name].cut(whole[name])), name
        if "tok_embeddings.weight" in shards:  # the text rows of this rank are the file's, bit for bit
            local, offset = dict(model.named_parameters())["tok_embeddings.weight"].detach(), 0
            for start, stop in shards["tok_embeddings.weight"].pieces:
                used = range(start, min(stop, text_tokens))
                if len(used):
                    assert torch.equal(local[offset : offset + len(used)], table[used.start : used.stop])
                offset += stop - start
        return sorted(shards)

    names = run_ranks(2, on_rank)
    assert set(names[0]) | set(names[1]) == set(whole)


def started(pretrain, run_dir, settings, *arguments):
    """Run ``pretrain_t2i.py`` with the model section of ``settings``."""
    model = yaml.safe_load(to_yaml(settings))["model"]
    overrides = [f"model.{key}={'null' if value is None else value}" for key, value in model.items()]
    process = pretrain(run_dir, *arguments, *overrides)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.slow
def test_a_run_starts_from_it_and_a_resumed_one_does_not_need_it(pretrain, settings, folder, tmp_path):
    moved = tmp_path / "llama"
    shutil.copytree(folder, moved)
    settings = replace(settings, model=replace(settings.model, pretrained=str(moved)))
    code, out, err = started(pretrain, tmp_path / "run", settings, "training.stop_at=3")
    assert code == 0, err
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert list(environment["pretrained"]) == ["model.safetensors"]
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    code, _, err = started(pretrain, tmp_path / "scratch", replace(settings, model=replace(settings.model,
                           pretrained=None)), "training.stop_at=1")  # fmt: skip
    assert code == 0, err
    scratch = json.loads((tmp_path / "scratch" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] != scratch["loss"]
    shutil.rmtree(moved)
    code, _, err = started(pretrain, tmp_path / "run", settings, "--resume")
    assert code == 0, err
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["pretrained"] is None
    other = replace(settings, model=replace(settings.model, pretrained=None))
    code, _, err = started(pretrain, tmp_path / "run", other, "--resume")
    assert code != 0 and "model.pretrained" in err
    code, _, err = started(pretrain, tmp_path / "again", settings)
    assert code != 0 and "neither a folder of tools/convert_checkpoint.py" in err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hidden": 128}, "set model.hidden=64"),
        ({"kv_heads": 4}, "set model.kv_heads=2"),
        ({"norm_eps": 1e-5, "rotary_base": 5.0}, "set model.norm_eps=1e-06 model.rotary_base=10000.0"),
        ({"tied_embeddings": True}, "set model.tied_embeddings=False"),
    ],
    ids=str,
)
def test_another_shape_is_refused_with_the_right_one(settings, change, problem):
    pretrained.require_fit(settings)
    with pytest.raises(ConfigError, match=problem):
        pretrained.require_fit(replace(settings, model=replace(settings.model, **change)))


def test_another_way_to_write_the_same_shape_is_accepted(settings):
    pretrained.require_fit(replace(settings, model=replace(settings.model, head_width=None, seed=3)))


@pytest.mark.parametrize("rows", [-1, 1100])
def test_a_model_of_another_vocabulary_is_refused(run_config, tmp_path, text_tokens, rows):
    networks.save(tmp_path / "other", "llama", rows=text_tokens + rows)
    with pytest.raises(DataFileError, match="do not belong together"):
        pretrained.require_fit(settings_of(run_config(tmp_path / "run"), tmp_path / "other"))


def test_another_tokenizer_of_the_same_size_is_refused(settings, folder, tiny_store, tmp_path):
    shutil.copytree(folder, tmp_path / "llama")
    settings = replace(settings, model=replace(settings.model, pretrained=str(tmp_path / "llama")))
    shutil.copy(tiny_store / "text.json", tmp_path / "llama" / "tokenizer.json")
    pretrained.require_fit(settings)
    content = json.loads((tiny_store / "text.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["e"], vocab["r"] = vocab["r"], vocab["e"]
    (tmp_path / "llama" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataFileError, match="encodes text otherwise than .*text.json"):
        pretrained.require_fit(settings)


def test_an_exported_run_is_taken_as_it_is(run_config, tmp_path, text_tokens):
    """Its vocabulary is laid out already: no row is new, and the data must have the same sizes."""
    config = run_config(tmp_path / "run")
    shape = ModelConfig(hidden=32, layers=1, heads=2, ffn=48, norm="rms_norm", positions="rotary")
    vocab = config.vocab_layout
    model = GPT(shape, vocab.size, vocab.ranges, choose_ops(CPU, torch.float32), vocab.blocks[::-1])
    model.initialise(9)
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    source = weights.ModelWeights(
        None, shape, vocab.size, dict.fromkeys(named, torch.float32), named.__getitem__, vocab
    )
    (tmp_path / "exported").mkdir()
    huggingface.save(source, tmp_path / "exported", 24, torch.float32)
    weights.save(source, tmp_path / "converted", {})
    used = torch.cat([torch.arange(start, stop) for start, stop in vocab.ranges])
    for folder in ("exported", "converted"):
        settings = settings_of(config, tmp_path / folder, seed=1)
        pretrained.require_fit(settings)
        for name, parameter in model_for(settings).named_parameters():
            rows = used if name in weights.TABLES else slice(None)
            assert torch.equal(parameter[rows], named[name][rows]), (folder, name)
        smaller = replace(settings, vocab=replace(settings.vocab, image_codes=39))
        with pytest.raises(ConfigError, match="has the vocabulary .*image_codes=40.*the data has .*image_codes=39"):
            pretrained.require_fit(smaller)
        unused = replace(settings, model=replace(settings.model, expansion="file", expansion_file="rows.safetensors"))
        with pytest.raises(ConfigError, match="has image rows already, and model.expansion_file=rows.safetensors"):
            pretrained.require_fit(unused)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(DataFileError, match="--from open_lm FILE FOLDER"):
        pretrained.open_pretrained(tmp_path)
    (tmp_path / "megat2i_model.json").write_text('{"format": 1}')
    with pytest.raises(DataFileError, match="not readable as the description of a model"):
        pretrained.open_pretrained(tmp_path)
