"""Hugging Face models both ways, against the real transformers library."""

import json
from dataclasses import replace

import pytest
import torch
from distributed import run_ranks

pytest.importorskip("transformers")
import huggingface_networks as networks
from transformers import AutoModelForCausalLM

from megat2i.config import ConfigError, ModelConfig
from megat2i.files import DataFileError
from megat2i.kernels import choose_ops
from megat2i.model import huggingface, weights
from megat2i.model.gpt import GPT
from megat2i.model.part import WHOLE_MODEL, Part
from megat2i.model.weights import ModelWeights
from megat2i.parallel.collectives import TensorParallel
from megat2i.vocab import VocabLayout

CASES = {
    "llama": ("llama", {}),
    "llama, all heads": ("llama", {"num_key_value_heads": 4}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}),
    "llama, several files": ("llama", {"shard": "100KB"}),
    "qwen3": ("qwen3", {}),
    "qwen3, wide heads, tied": ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
}
TOKENS = torch.randint(0, 320, (2, 19), generator=torch.Generator().manual_seed(0))
OPS = choose_ops(torch.device("cpu"), torch.float32)


def model_of(source: ModelWeights, part: Part = WHOLE_MODEL) -> GPT:
    ranges = source.vocab.ranges if source.vocab else ((0, source.rows),)
    blocks = source.vocab.blocks[::-1] if source.vocab else ((0, source.rows),)
    model = GPT(source.shape, source.rows, ranges, OPS, blocks, part)
    weights.fill(model, source.read)
    return model


def largest(found, expected) -> float:
    return (found - expected).abs().max().item()


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """(folder, transformers' logits of TOKENS)."""
    kind, settings = CASES[request.param]
    made = networks.save(tmp_path / "their", kind, **settings)
    with torch.no_grad():
        return tmp_path / "their", made(TOKENS).logits


@torch.no_grad()
def test_import_export_and_round_trip(case, tmp_path):
    folder, expected = case
    source = huggingface.load(folder)
    model = model_of(source)
    assert largest(model.logits(TOKENS), expected) < 1e-5
    cache = model.new_cache(2, 19)
    steps = [model.logits(TOKENS[:, :11], cache)]
    steps += [model.logits(TOKENS[:, at : at + 1], cache) for at in range(11, 19)]
    assert largest(torch.cat(steps, dim=1), expected) < 1e-5
    (tmp_path / "our").mkdir()
    huggingface.save(source, tmp_path / "our", 64, torch.float32)
    opened, report = AutoModelForCausalLM.from_pretrained(tmp_path / "our", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(opened(TOKENS).logits, expected)
    again = huggingface.load(tmp_path / "our")
    assert again.shape == source.shape and again.rows == source.rows
    assert all(torch.equal(again.read(name), source.read(name)) for name in source.dtypes)
    weights.save(source, tmp_path / "converted", {})
    converted = weights.load(tmp_path / "converted")
    assert converted.shape == source.shape
    assert all(torch.equal(converted.read(name), source.read(name)) for name in source.dtypes)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [{"norm_eps": 1e-2}, {"rotary_base": 100.0}, {"positions": "none"}, {"positions": "rotary_interleaved"}],
    ids=str,
)
def test_another_architecture_is_noticed(tmp_path, change):
    expected = networks.save(tmp_path / "their", "llama")(TOKENS).logits
    source = huggingface.load(tmp_path / "their")
    assert largest(model_of(replace(source, shape=replace(source.shape, **change))).logits(TOKENS), expected) > 1e-3


def swapped(source: ModelWeights, name: str, one: slice, other: slice) -> ModelWeights:
    def read(wanted):
        tensor = source.read(wanted)
        if wanted == name:
            tensor[one], tensor[other] = tensor[other].clone(), tensor[one].clone()
        return tensor

    return replace(source, read=read)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("layers.0.attention.in_proj.weight", slice(64, 96), slice(96, 128)),  # keys and values
        ("layers.0.attention.in_proj.weight", slice(16, 32), slice(32, 48)),  # query heads of two groups
        ("layers.1.feed_forward.w12.weight", slice(0, 96), slice(96, 192)),  # gate and up
    ],
)
def test_swapped_parts_are_noticed(tmp_path, name, one, other):
    expected = networks.save(tmp_path / "their", "llama")(TOKENS).logits
    source = swapped(huggingface.load(tmp_path / "their"), name, one, other)
    assert largest(model_of(source).logits(TOKENS), expected) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_parallel_ranks_are_transformers(tmp_path, kind, sequence):
    """Logits, and the gradients of every part: one gain of qk-norm serves the heads of all ranks."""
    tied = kind == "qwen3"
    their = networks.save(tmp_path / "their", kind, tie_word_embeddings=tied)
    tokens, targets = TOKENS[:, :16], TOKENS[:, 1:17]
    expected = their(tokens).logits
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    gradients = {name: p.grad for name, p in their.named_parameters()}
    expected = expected.detach()

    def on_rank():
        import torch.distributed as dist

        parallel = TensorParallel(dist.group.WORLD, dist.get_rank(), 2, sequence)
        model = model_of(huggingface.load(tmp_path / "their"), Part(parallel))
        with torch.no_grad():
            assert largest(model.logits(tokens), expected) < 1e-5
        model.loss(tokens, targets).backward()
        shards = model.shards()
        for name, parameter in model.named_parameters():
            whole = torch.cat([gradients[part] for part in huggingface.their_names(name)])
            right = shards[name].cut(whole)
            assert (parameter.grad - right).norm() < 1e-4 * right.norm(), name

    run_ranks(2, on_rank)


VOCAB = VocabLayout(text_tokens=100, image_codes=40)
SHAPE = ModelConfig(
    hidden=64, layers=2, heads=4, kv_heads=2, ffn=96, norm="rms_norm", positions="rotary", rotary_base=5e4
)


def unified(shape: ModelConfig) -> tuple[GPT, ModelWeights]:
    """A model of VOCAB and its weights."""
    model = GPT(shape, VOCAB.size, VOCAB.ranges, OPS, VOCAB.blocks[::-1])
    model.initialise(3)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    dtypes = {name: p.dtype for name, p in parameters.items()}
    return model, ModelWeights(None, shape, VOCAB.size, dtypes, parameters.__getitem__, VOCAB)


@torch.no_grad()
@pytest.mark.parametrize(
    "change", [{}, {"tied_embeddings": True}, {"qk_norm": True, "qk_norm_per_head": True}], ids=str
)
def test_a_unified_vocabulary_is_exported_without_its_unused_rows(tmp_path, change):
    model, source = unified(replace(SHAPE, **change))
    huggingface.save(source, tmp_path, 64, torch.float32)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    used = torch.cat([torch.arange(start, stop) for start, stop in VOCAB.ranges])
    assert opened.config.vocab_size == len(used) == 147
    tokens = used[torch.randint(0, len(used), (2, 19), generator=torch.Generator().manual_seed(0))]
    exported = torch.tensor([[huggingface.exported_id(VOCAB, int(i)) for i in row] for row in tokens])
    assert torch.equal(exported, torch.searchsorted(used, tokens))
    assert largest(opened(exported).logits, model.logits(tokens)[..., used]) < 1e-5
    content = json.loads((tmp_path / "megat2i_vocab.json").read_text())
    ranges = [{"unified": [0, 107], "exported": [0, 107]}, {"unified": [256, 296], "exported": [107, 147]}]
    assert content == {"format": 1, "text_tokens": 100, "image_codes": 40, "ranges": ranges}
    generation = opened.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (100, 101, 106)
    again = huggingface.load(tmp_path)
    assert (again.vocab, again.rows) == (VOCAB, VOCAB.size)
    for name in source.dtypes:
        rows = used if name in weights.TABLES else slice(None)
        assert torch.equal(again.read(name)[rows], source.read(name)[rows]), name
    assert not again.read("tok_embeddings.weight")[[107, 255, 296, 511]].any()


def test_ids_without_a_row_in_the_export_are_refused():
    for unused in (107, 255, 296):
        with pytest.raises(ValueError, match=f"id {unused} "):
            huggingface.exported_id(VOCAB, unused)


@torch.no_grad()
def test_bfloat16_on_request(tmp_path):
    _, source = unified(SHAPE)
    huggingface.save(source, tmp_path, 64, torch.bfloat16)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert opened.dtype == torch.bfloat16
    name = "layers.0.feed_forward.w3.weight"
    assert torch.equal(opened.model.layers[0].mlp.down_proj.weight, source.read(name).bfloat16())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"norm": "layer_norm"}, "model.norm=layer_norm"),
        ({"positions": "none"}, "model.positions=none"),
        ({"feed_forward": "gelu"}, "model.feed_forward=gelu"),
        ({"qk_norm": True}, "model.qk_norm_per_head=False"),
        ({"embedding_norm": True}, "model.embedding_norm=True"),
    ],
)
def test_shapes_that_they_do_not_have_are_not_exported(tmp_path, change, field):
    with pytest.raises(ConfigError, match=field):
        huggingface.save(unified(replace(SHAPE, **change))[1], tmp_path, 64, torch.float32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}, "llama3"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": 321}, r"lm_head.weight': expected shape \[321, 64\], found \[320, 64\]"),
        ({"num_hidden_layers": 3}, "model.layers.2.* found None"),
        ({"tie_word_embeddings": True, "hidden_size": 32}, "tensors differ"),
        ({"num_attention_heads": "DELETE"}, "lacks num_attention_heads"),
    ],
    ids=str,
)
def test_other_models_are_one_clear_error(tmp_path, change, problem):
    networks.save(tmp_path, "llama")
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in settings.items() if value != "DELETE"}))
    with pytest.raises((ConfigError, DataFileError), match=problem) as error:
        huggingface.load(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_an_older_name_of_theta_is_read(tmp_path):
    networks.save(tmp_path, "llama")
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    del settings["rope_parameters"]
    path.write_text(json.dumps(settings | {"rope_theta": 12_345.0, "rope_scaling": None}))
    assert huggingface.load(tmp_path).shape.rotary_base == 12_345.0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"image_codes": 41}, "ranges are not those"),
        ({"text_tokens": 0}, "vocab.text_tokens"),
        ({"ranges": "DELETE"}, "ranges are not those"),
    ],
)
def test_a_changed_map_of_ids_is_refused(tmp_path, change, problem):
    huggingface.save(unified(SHAPE)[1], tmp_path, 64, torch.float32)
    path = tmp_path / "megat2i_vocab.json"
    content = {k: v for k, v in (json.loads(path.read_text()) | change).items() if v != "DELETE"}
    path.write_text(json.dumps(content))
    with pytest.raises(DataFileError, match=problem):
        huggingface.load(tmp_path)


def test_a_map_of_ids_of_another_model_is_refused(tmp_path):
    huggingface.save(unified(SHAPE)[1], tmp_path, 64, torch.float32)
    other = VocabLayout(101, 40)
    (tmp_path / "megat2i_vocab.json").write_text(json.dumps(huggingface._vocab_content(other)))
    with pytest.raises(DataFileError, match="another model: vocab_size is 147"):
        huggingface.load(tmp_path)
