"""tools/convert_checkpoint.py as it is called: from open_lm to a run, from a run to transformers."""

import json
import multiprocessing
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from megat2i import checkpoint, config
from megat2i.config import DatasetConfig, to_yaml
from megat2i.files import DataFileError
from megat2i.kernels import choose_ops
from megat2i.model import open_lm, pretrained, weights
from megat2i.model.freezing import is_trainable
from megat2i.optim.engine import KINDS
from megat2i.pretrain import pretrain

LLAMA = ["model.norm=rms_norm", "model.positions=rotary", "model.qk_norm=true", "model.qk_norm_per_head=true",
         "model.kv_heads=2"]  # fmt: skip


@pytest.fixture
def convert(repository, tmp_path):
    """Function of arguments -> (exit code, stdout, stderr)."""

    def call(*arguments):
        command = [sys.executable, str(repository / "tools" / "convert_checkpoint.py"), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    return call


def test_open_lm_becomes_the_start_of_a_run(convert, golden, tmp_path, run_config, pretrain):
    source = golden / "open_lm" / "c_gainlp_qknorm_rotary_swiglutorch.pt"
    content = torch.load(source, weights_only=True)
    (tmp_path / "params.json").write_text(json.dumps(content["params"]))
    arguments = ("--from", "open_lm", source, tmp_path / "lm", "--params", tmp_path / "params.json")
    code, out, err = convert(*arguments)
    assert code == 0, err
    opened = pretrained.open_pretrained(tmp_path / "lm")
    assert opened.rows == 384 and opened.vocab is None
    own = [name for name in content["state_dict"] if not name.endswith("inv_freq")]
    assert sorted(opened.dtypes) == sorted(own)
    assert all(torch.equal(opened.read(name), content["state_dict"][name]) for name in own)
    # what it printed is the model of a run
    section = yaml.safe_load(out[out.index("model:") :])["model"]
    overrides = [f"model.{key}={'null' if value is None else value}" for key, value in section.items()]
    process = pretrain(tmp_path / "run", *overrides, "training.stop_at=1")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    code, _, err = convert(*arguments)
    assert code != 0 and "lm: exists already" in err and "Traceback" not in err


def test_a_wrong_file_is_one_line(convert, tmp_path):
    torch.save({"epoch": 1, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}}, tmp_path / "optimizer_1.pt")
    code, _, err = convert("--from", "open_lm", tmp_path / "optimizer_1.pt", tmp_path / "lm")
    assert code != 0 and "optimizer_1.pt: an optimizer file" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["optimizer_1.pt"]


@pytest.mark.slow
@torch.no_grad()
def test_a_run_becomes_a_model_of_transformers(convert, pretrain, tmp_path):
    transformers = pytest.importorskip("transformers")
    process = pretrain(tmp_path / "run", "training.stop_at=2", *LLAMA)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    code, out, err = convert("--from", "run", tmp_path / "run", tmp_path / "exported", "--to", "huggingface")
    assert code == 0, err
    assert "7 specials, 40 image codes" in out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    from megat2i.generate import Sampler

    cpu = torch.device("cpu")
    sampler, settings = Sampler.from_run(tmp_path / "run", cpu, torch.float32)
    vocab = settings.vocab_layout
    used = torch.cat([torch.arange(start, stop) for start, stop in vocab.ranges])
    tokens = used[torch.randint(0, len(used), (2, 17), generator=torch.Generator().manual_seed(0))]
    logits = theirs(torch.searchsorted(used, tokens)).logits
    assert (logits - sampler.model.logits(tokens)[..., used]).abs().max() < 1e-5
    # its tokenizer makes the exported ids
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    caption = sampler.text_tokenizer.encode(["red hut"])[0]
    assert tokenizer("red hut")["input_ids"] == caption
    prompt = tokenizer("<doc><text>red hut</text><image><image_0><image_39>")["input_ids"]
    unified = [*sampler.prompt_tokens("red hut"), vocab.image_start, vocab.image_start + 39]
    assert prompt == torch.searchsorted(used, torch.tensor(unified)).tolist()
    generated = theirs.generate(torch.tensor([prompt]), min_new_tokens=3, max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, len(prompt) + 3)
    # and back
    again = pretrained.open_pretrained(tmp_path / "exported")
    assert again.vocab == vocab
    model = weights.GPT(again.shape, vocab.size, vocab.ranges, choose_ops(cpu, torch.float32), vocab.blocks[::-1])
    weights.fill(model, again.read)
    found, right = (m.logits(tokens)[..., used] for m in (model, sampler.model))
    assert torch.equal(found, right)


def test_a_run_on_text_becomes_the_start_of_a_run_on_pictures(convert, providers, text_store, tmp_path, run_config):
    """... whose policies differ in what they learn, not in where they start, and leave the rest as it was."""

    def run(name: str, *overrides: str) -> list[dict]:
        (tmp_path / "run.yaml").write_text(to_yaml(run_config(tmp_path / name)))
        settings = config.load(tmp_path / "run.yaml", overrides)
        process = multiprocessing.get_context("fork").Process(target=pretrain, args=(settings, False, providers))
        process.start()
        process.join(120)
        assert process.exitcode == 0
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    record = run("lm_run", "data.mode=text_only", "data.caption_dropout=0", "training.steps=20", "vocab.image_codes=1",
                 f"data.train=[{{prefix: {text_store / 'train'}}}]", f"data.valid={text_store / 'valid'}")  # fmt: skip
    assert record[-1]["loss/text"] < 0.5 * record[0]["loss/text"]
    code, _, err = convert("--from", "run", tmp_path / "lm_run", tmp_path / "lm")
    assert code == 0, err
    source = pretrained.open_pretrained(tmp_path / "lm")
    trained = checkpoint.latest_here(tmp_path / "lm_run" / "checkpoints")
    text_tokens = run_config(tmp_path).vocab.text_tokens
    assert source.vocab is None and source.rows == text_tokens
    for name in source.dtypes:
        whole = checkpoint.read_tensor(trained, name)
        assert torch.equal(source.read(name), whole[:text_tokens] if name in weights.TABLES else whole), name
    start = (f"model.pretrained={tmp_path / 'lm'}", f"data.valid_text={text_store / 'valid'}", "training.steps=1")
    first, other = (run(p, *start, f"training.trainable={p}") for p in ("embeddings", "embeddings_norms_first_half"))
    assert first[0]["loss"] == other[0]["loss"] and first[0]["grad_norm"] < other[0]["grad_norm"]
    assert [entry["split"] for entry in first[1:]] == ["valid", "valid_text"] and first[2]["loss"] != other[2]["loss"]
    for policy in ("embeddings", "embeddings_norms_first_half"):
        after = checkpoint.latest_here(tmp_path / policy / "checkpoints")
        for name in set(source.dtypes) - set(weights.TABLES):
            kept = torch.equal(checkpoint.read_tensor(after, name), source.read(name))
            assert kept != is_trainable(name, policy, 2), (policy, name)
    # a text tokenizer that reads otherwise belongs to another model
    path = tmp_path / "lm" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(DataFileError, match="encodes text otherwise"):
        settings = run_config(tmp_path)
        pretrained.require_fit(replace(settings, model=replace(settings.model, pretrained=str(tmp_path / "lm"))))


def test_a_run_of_another_shape_is_not_exported(convert, pretrain, tmp_path):
    process = pretrain(tmp_path / "run", "training.stop_at=1")
    process.communicate(timeout=120)
    assert process.returncode == 0
    code, _, err = convert("--from", "run", tmp_path / "run", tmp_path / "exported", "--to", "huggingface")
    assert code != 0 and "model.norm=layer_norm cannot be exported" in err and err.count("\n") == 1
    assert not (tmp_path / "exported").exists()
    code, _, err = convert("--from", "run", tmp_path / "nothing", tmp_path / "exported")
    assert code != 0 and "config.yaml: no such config file" in err


def test_open_lm_with_the_shape_of_llama_is_exported(convert, tmp_path):
    transformers = pytest.importorskip("transformers")
    from open_lm_reference import make_state

    params = open_lm.RELEASED_1B | {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 96}
    params |= {"norm_type": "rms_norm", "positional_embedding_type": "rotary"}
    torch.save(make_state(params), tmp_path / "x.pt")
    (tmp_path / "params.json").write_text(json.dumps(params))
    code, _, err = convert("--from", "open_lm", tmp_path / "x.pt", tmp_path / "out", "--to", "huggingface", "--params",
                           tmp_path / "params.json")  # fmt: skip
    assert code == 0, err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = open_lm.load(tmp_path / "x.pt", params).logits(tokens)
        assert (theirs(tokens).logits - expected).abs().max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["mean", "random"])
def test_a_run_goes_on_with_more_image_codes(convert, pretrain, run_config, tiny_store, tmp_path, rule):
    """Weights by the rule, Adam's moments 0 for the new rows, everything else bit for bit, in training as before."""
    process = pretrain(tmp_path / "run", "training.stop_at=3")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    before = run_config(tmp_path / "more")
    for suffix in (".bin", ".idx"):  # without the manifest, which knows of 40 codes
        shutil.copy(tiny_store / f"train{suffix}", tmp_path / f"data{suffix}")
    before = replace(before, data=replace(before.data, train=[DatasetConfig(str(tmp_path / "data"))], valid=None))
    settings = replace(
        before, vocab=replace(before.vocab, image_codes=300), model=replace(before.model, expansion=rule)
    )
    (tmp_path / "more.yaml").write_text(to_yaml(settings))
    arguments = ("--from", "run", tmp_path / "run", tmp_path / "more", "--to", "run", "--config")
    code, _, err = convert(*arguments, tmp_path / "more.yaml")
    assert code == 0, err
    old, new = (checkpoint.latest_here(tmp_path / run / "checkpoints") for run in ("run", "more"))
    first, layout = before.vocab_layout.ranges[1][1], settings.vocab_layout
    assert new.step == 3 and new.manifest["optimizer_updates"] == 3
    for name, shape in checkpoint.weight_shapes(old).items():
        for kind in KINDS:
            was, now = checkpoint.read_tensor(old, name, kind), checkpoint.read_tensor(new, name, kind)
            if name not in weights.TABLES:
                assert torch.equal(was, now), (name, kind)
                continue
            assert now.shape == (layout.size, shape[1])
            assert torch.equal(now[:first], was[:first]), (name, kind)
            added = now[first : layout.ranges[1][1]]
            assert added.any(dim=1).all() if kind == "weight" else not added.any()
            if kind == "weight" and rule == "mean":
                torch.testing.assert_close(added, was[: layout.text_tokens].mean(0).expand_as(added))
    process = pretrain(tmp_path / "more", "--resume", "vocab.image_codes=300", f"model.expansion={rule}",
                       f"data.train=[{{prefix: {tmp_path / 'data'}}}]", "data.valid=null")  # fmt: skip
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    steps = [json.loads(line)["step"] for line in (tmp_path / "more" / "metrics.jsonl").read_text().splitlines()]
    assert min(steps) == 4
    (tmp_path / "fewer.yaml").write_text(to_yaml(replace(before, vocab=replace(before.vocab, image_codes=39))))
    code, _, err = convert(*arguments[:3], tmp_path / "fewer", *arguments[4:], tmp_path / "fewer.yaml")
    assert code != 0 and "can only get more image codes" in err and not (tmp_path / "fewer").exists()
