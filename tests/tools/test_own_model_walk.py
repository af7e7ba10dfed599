"""The way of the README from one's own model and data to an exported model, with files that others' libraries write.

A LlamaForCausalLM and its tokenizer by transformers, tar shards by webdataset, a table by pyarrow.
"""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytestmark = pytest.mark.slow
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220), "grey": (120, 120, 120)}
CAPTIONS = [f"a {colour} picture number {number}" for number in range(6) for colour in COLOURS]
CONFIG = """
run: {{dir: {run}}}
data:
  train: [{{prefix: {data}}}]
  sequence_length: 48
model: {{pretrained: {model}, expansion: mean}}
training: {{steps: 6, global_batch_size: 8, micro_batch_size: 8, warmup_steps: 2}}
runtime: {{dtype: float32}}
"""


def tool(repository: Path, name: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, name, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, env=environment)


def succeed(*arguments) -> str:
    done = tool(*arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def jpeg(caption: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (40, 32), COLOURS[caption.split()[1]]).save(content, format="JPEG")
    return content.getvalue()


def write_llama(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CAPTIONS * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    shape = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-6, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(folder)


@pytest.fixture(scope="module")
def walked(repository, tmp_path_factory) -> dict[str, Path]:
    """Every step once: shards, table and model in, run, pictures and exported model out."""
    at = tmp_path_factory.mktemp("own")
    with webdataset.ShardWriter(str(at / "shard-%04d.tar"), maxcount=10, verbose=0) as shards:
        for number, caption in enumerate(CAPTIONS[:16]):
            shards.write({"__key__": f"{number:06d}", "jpg": jpeg(caption), "txt": caption})
    rest = CAPTIONS[16:]
    pq.write_table(pa.table({"image": [jpeg(c) for c in rest], "caption": rest}), at / "more.parquet")
    write_llama(at / "llama")
    succeed(
        repository, "tools/preprocess_data.py", "--input", at / "shard-0000.tar", at / "shard-0001.tar",
        at / "more.parquet", "--output-prefix", at / "data/train", "--text-tokenizer", at / "llama/tokenizer.json",
        "--image-size", 16, "--patch-size", 4, "--codebook-size", 4, "--workers", 1,
    )  # fmt: skip
    config = at / "mine.yaml"
    config.write_text(CONFIG.format(run=at / "run", data=at / "data/train", model=at / "llama"))
    return {"at": at, "config": config, "run": at / "run", "model": at / "llama"}


@pytest.fixture(scope="module")
def trained(repository, walked) -> list[str]:
    """The settings that the first error named; with them the run is trained."""
    refused = tool(repository, "pretrain_t2i.py", "--config", walked["config"])
    assert refused.returncode == 1 and not walked["run"].exists()
    (error,) = refused.stderr.splitlines()[-1:]
    settings = re.findall(r"model\.\w+=[\w.-]+", error.split("another model; set ")[1])
    assert "model.kv_heads=2" in settings and "model.norm=rms_norm" in settings
    succeed(repository, "pretrain_t2i.py", "--config", walked["config"], *settings)
    return settings


def test_the_error_names_what_to_set_and_then_it_trains(walked, trained):
    lines = [json.loads(line) for line in (walked["run"] / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "split" not in line]
    assert len(steps) == 6 and steps[-1]["loss"] < steps[0]["loss"]
    manifest = json.loads((walked["at"] / "data/train.json").read_text())
    assert [(s["name"], s["samples"]) for s in manifest["sources"]] == [
        ("shard-0000.tar", 10), ("shard-0001.tar", 6), ("more.parquet", 8)
    ]  # fmt: skip


def test_pictures(repository, walked, trained):
    output = walked["at"] / "pictures"
    succeed(repository, "tools/generate.py", "--run", walked["run"], "--prompts", "a red picture", "--output", output)
    (line,) = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    with Image.open(output / line["file"]) as picture:
        assert picture.size[0] % 16 == 0


def test_the_exported_model_opens_in_transformers_and_begins_another_run(repository, walked, trained):
    exported = walked["at"] / "exported"
    succeed(repository, "tools/convert_checkpoint.py", "--from", "run", walked["run"], exported, "--to", "huggingface")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    ids = tokenizer("a red picture", return_tensors="pt").input_ids
    assert tokenizer.convert_tokens_to_ids("<image_0>") < model.config.vocab_size
    assert model(ids).logits.isfinite().all()
    again = walked["at"] / "again"
    settings = [*trained, f"model.pretrained={exported}", f"run.dir={again}", "training.steps=1"]
    succeed(repository, "pretrain_t2i.py", "--config", walked["config"], *settings, "training.warmup_steps=0")
    first = json.loads((again / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    last = json.loads((walked["run"] / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    assert first == pytest.approx(last, rel=0.2)  # it goes on about where the first one ended, not from new image rows
