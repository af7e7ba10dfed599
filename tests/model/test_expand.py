"""Vocabulary expansion: text rows keep their bits, new rows follow the named rule."""

import pytest
import safetensors.torch
import torch

from megat2i.files import DataFileError
from megat2i.model import expand
from megat2i.model.gpt import initial_values
from megat2i.vocab import VocabLayout

VOCAB = VocabLayout(text_tokens=300, image_codes=600)  # 512 rows of text, 768 of images
NAME = "tok_embeddings.weight"
UNUSED = [*range(307, 512), *range(512 + 600, 1280)]


@pytest.fixture
def table():
    """Rows of a language model whose dimensions have very different statistics."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(320, 16, generator=generator)
    return noise * torch.linspace(0.01, 2, 16) + torch.linspace(-3, 3, 16)


@pytest.fixture
def file(tmp_path):
    rows = torch.randn(600, 16, generator=torch.Generator().manual_seed(5))
    safetensors.torch.save_file({NAME: rows, "output.weight": -rows}, tmp_path / "aligned.safetensors")
    return str(tmp_path / "aligned.safetensors")


@pytest.mark.parametrize("rule", ["random", "mean", "gaussian", "file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_rows_keep_their_bits(table, file, rule, dtype):
    table = table.to(dtype)
    table[3, 3] = -0.0
    expanded = expand.expand(NAME, table, VOCAB, rule, 0, file)
    assert expanded.shape == (1280, 16) and expanded.dtype == torch.float32
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(expanded[:300].to(dtype).view(bits), table[:300].view(bits))
    assert torch.equal(expanded[307:320], table[307:].float()) and not expanded[[*range(320, 512)]].any()
    assert not expanded[512 + 600 :].any()
    assert expanded[300:307].any(dim=1).all() and not torch.equal(expanded[300:307], table[300:307].float())
    assert expanded[512 : 512 + 600].any(dim=1).all()


def test_random_rows_are_those_of_a_model_without_pre_training(table):
    expanded = expand.expand(NAME, table, VOCAB, "random", 7, None)
    fresh = initial_values(NAME, (1280, 16), 7)
    new = [*range(300, 307), *range(512, 1112)]
    assert torch.equal(expanded[new], fresh[new])
    assert expanded[new].std().item() == pytest.approx(0.9866 / 4, rel=0.05)
    other = expand.expand("output.weight", table, VOCAB, "random", 7, None)
    assert not torch.equal(other[new], expanded[new])
    assert not torch.equal(expand.expand(NAME, table, VOCAB, "random", 8, None)[new], expanded[new])


def test_mean_rows_are_the_mean_of_the_text_rows(table):
    expanded = expand.expand(NAME, table, VOCAB, "mean", 0, None)
    mean = table[:300].double().mean(0).float()  # not of the 20 rows that no token uses
    for rows in (expanded[300:307], expanded[512:1112]):
        torch.testing.assert_close(rows, mean.expand_as(rows), rtol=1e-6, atol=1e-7)
    assert (mean - table.mean(0)).abs().max() > 1e-3


def test_gaussian_rows_have_the_text_rows_statistics(table):
    rows = expand.expand(NAME, table, VOCAB, "gaussian", 0, None)[512:1112]
    text = table[:300]
    torch.testing.assert_close(rows.std(0), text.std(0), rtol=0.15, atol=0)
    error = (rows.mean(0) - text.mean(0)) / text.std(0)
    assert error.abs().max() < 5 / 600**0.5
    assert len(rows.unique(dim=0)) == 600
    assert torch.equal(rows, expand.expand(NAME, table, VOCAB, "gaussian", 0, None)[512:1112])
    assert not torch.equal(rows, expand.expand(NAME, table, VOCAB, "gaussian", 1, None)[512:1112])


def test_rows_of_a_file(table, file):
    content = safetensors.torch.load_file(file)
    for name in content:
        expanded = expand.expand(name, table, VOCAB, "file", 0, file)
        assert torch.equal(expanded[512:1112], content[name])
        assert torch.equal(expanded[300:307], initial_values(name, (1280, 16), 0)[300:307])


@pytest.mark.parametrize(
    ("vocab", "hidden", "problem"),
    [
        (VocabLayout(300, 601), 16, r"tok_embeddings.weight has shape \[600, 16\], expected \[601, 16\]"),
        (VOCAB, 32, r"expected \[600, 32\]"),
    ],
)
def test_a_file_for_another_codebook_or_model_is_refused(file, vocab, hidden, problem):
    expand.require_file(file, [NAME, "output.weight"], VOCAB, 16)
    with pytest.raises(DataFileError, match=problem):
        expand.require_file(file, [NAME], vocab, hidden)
    safetensors.torch.save_file({"output.weight": torch.ones(600, 16)}, file)
    with pytest.raises(DataFileError, match="tok_embeddings.weight has shape None"):
        expand.require_file(file, [NAME, "output.weight"], VOCAB, 16)
    safetensors.torch.save_file({NAME: torch.ones(600, 16), "output.weight": torch.ones(599, 16)}, file)
    with pytest.raises(DataFileError, match=r"output.weight has shape \[599, 16\]"):
        expand.require_file(file, [NAME, "output.weight"], VOCAB, 16)


def test_a_file_without_the_output_leaves_its_rows_random(table, file):
    rows = torch.ones(600, 16)
    safetensors.torch.save_file({NAME: rows}, file)
    expand.require_file(file, [NAME, "output.weight"], VOCAB, 16)
    assert torch.equal(expand.expand(NAME, table, VOCAB, "file", 3, file)[512:1112], rows)
    found = expand.expand("output.weight", table, VOCAB, "file", 3, file)
    assert torch.equal(found, expand.expand("output.weight", table, VOCAB, "random", 3, None))


@pytest.mark.parametrize("rows", [299, 300 + 1025])
def test_a_table_of_another_tokenizer_is_refused(rows):
    expand.require_fit("x", 300, VOCAB)
    expand.require_fit("x", 300 + 1024, VOCAB)
    with pytest.raises(DataFileError, match=f"{rows:,} vocabulary rows and the data's text tokenizer 300 ids"):
        expand.require_fit("x", rows, VOCAB)


def test_more_spare_rows_than_the_layout_has_are_dropped():
    table = torch.ones(700, 4)
    expanded = expand.expand(NAME, table, VOCAB, "mean", 0, None)
    assert expanded.shape == (1280, 4) and expanded[:512].all() and expanded[512:1112].all()
    assert not expanded[1112:].any()
