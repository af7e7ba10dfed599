"""CLIP score: transformers' own similarities of a small CLIP model, and the pixels of its own preprocessing."""

import json
import shutil

import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from megat2i.data.images import to_tensor
from megat2i.evaluate.clip_score import DEVIATION, MEAN, _prepare, clip_score
from megat2i.files import DataFileError

PROMPTS = ["red circle", "a blue square", "green", "red square " * 30, "blue circle"]
WORDS = ("<end>", "<start>", "<unknown>", "A", "photo", "depicts", "red", "green", "blue", "a", "circle", "square")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP model with a tokenizer of words, as transformers saves them."""
    folder = tmp_path_factory.mktemp("clip")
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, "<unknown>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("<start> $A <end>", None, [("<start>", 1), ("<end>", 0)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unknown>", eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=layers | {"vocab_size": len(WORDS), "max_position_embeddings": 20, "eos_token_id": 0},
        vision_config=layers | {"image_size": 24, "patch_size": 8},
        projection_dim=12,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    for parameter in model.parameters():  # far from each other, so that the inputs show in the similarities
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def generated(tmp_path):
    generator = torch.Generator().manual_seed(0)
    lines = []
    for number, prompt in enumerate(PROMPTS):
        pixels = torch.randint(0, 256, (24, 24, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"prompt": prompt, "file": f"{number}.png"}))
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    return tmp_path


@torch.no_grad()
def expected(clip_folder, generated, prefix: str) -> list[float]:
    """One image and one prompt at a time, without padding."""
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = Tokenizer.from_file(str(clip_folder / "tokenizer.json"))
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    scores = []
    for number, prompt in enumerate(PROMPTS):
        tokenizer.no_truncation(), tokenizer.no_padding()
        ids = tokenizer.encode(prefix + prompt).ids
        ids = torch.tensor([ids if len(ids) <= 20 else ids[:19] + ids[-1:]])
        pixels = (to_tensor(Image.open(generated / f"{number}.png")) / 255 - mean) / deviation
        found = model(input_ids=ids, pixel_values=pixels[None])
        scores.append(float(found.logits_per_image / model.logit_scale.exp()))
    return scores


@pytest.mark.parametrize("prefix", ["A photo depicts ", ""])
def test_the_similarities_of_transformers(clip_folder, generated, prefix):
    scores = torch.tensor(expected(clip_folder, generated, prefix), dtype=torch.float64)
    assert scores.std() > 0.01, "similarities that say something"
    found = clip_score(generated, clip_folder, prefix, batch_size=2)
    assert found["clip_score"] == pytest.approx(float(scores.mean()), abs=1e-5)
    assert found["standard_error"] == pytest.approx(float(scores.std() / 5**0.5), abs=1e-5)
    assert found["prefix"] == prefix and "cosine" in found["scale"] and len(found["model"]["sha256"]) == 64
    assert found["generated"]["images"] == 5 and len(found["generated"]["prompts"]["sha256"]) == 64


def test_prompts_and_prefix_matter(clip_folder, generated):
    found = clip_score(generated, clip_folder)["clip_score"]
    assert abs(clip_score(generated, clip_folder, prefix="")["clip_score"] - found) > 1e-4
    listing = generated / "samples.jsonl"
    listing.write_text(listing.read_text().replace("circle", "SQUARE").replace("square", "circle"))
    assert abs(clip_score(generated, clip_folder)["clip_score"] - found) > 1e-4


@pytest.mark.parametrize("size", [(53, 40), (40, 53), (224, 224), (301, 640)], ids=str)
def test_the_pixels_of_clips_own_preprocessing(photo, size):
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)()
    image = photo.resize(size)
    reference = torch.as_tensor(processor(images=image, return_tensors="pt")["pixel_values"][0])
    assert torch.allclose(_prepare(image, 224), reference, rtol=0, atol=1e-5)


def test_what_has_no_prompts_or_no_model_is_refused(clip_folder, generated, tmp_path_factory):
    plain = tmp_path_factory.mktemp("plain")
    shutil.copy(generated / "0.png", plain)
    with pytest.raises(DataFileError, match="no prompts"):
        clip_score(plain, clip_folder)
    with pytest.raises(DataFileError, match=r"model\.safetensors: cannot be read"):
        clip_score(generated, plain)
    damaged = shutil.copytree(clip_folder, plain / "clip")
    (damaged / "config.json").write_text("{}")
    with pytest.raises(DataFileError, match="not a CLIPModel"):
        clip_score(generated, damaged)
