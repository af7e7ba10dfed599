"""The ranges of the unified vocabulary."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megat2i.vocab import IGNORE, IMAGE, SPECIAL, SPECIALS, TEXT, VocabLayout


def test_the_papers_vocabulary():
    layout = VocabLayout(50_277, 16_384)
    assert [layout.special(name) for name in SPECIALS] == list(range(50_277, 50_284))
    assert (layout.image_start, layout.size) == (50_432, 66_816)
    assert layout.blocks == ((0, 50_432), (50_432, 66_816))
    assert layout.ranges == ((0, 50_284), (50_432, 66_816))


@given(st.integers(1, 70_000), st.integers(1, 70_000))
def test_blocks_are_aligned_and_modalities_partition_the_live_ids(text_tokens, image_codes):
    layout = VocabLayout(text_tokens, image_codes)
    assert layout.text_block % 256 == 0 and layout.size % 256 == 0
    assert text_tokens + len(SPECIALS) <= layout.text_block < text_tokens + len(SPECIALS) + 256
    ids = np.arange(-300, layout.size + 300)
    modality = layout.modality(ids)
    assert [(modality == code).sum() for code in (TEXT, IMAGE, SPECIAL)] == [text_tokens, image_codes, len(SPECIALS)]
    live = np.zeros(len(ids), bool)
    for start, end in layout.ranges:
        live |= (ids >= start) & (ids < end)
    assert ((modality >= 0) == live).all()


def test_modality_of_each_kind_of_id():
    layout = VocabLayout(10, 5)
    ids = [0, 9, 10, 16, 17, 255, 256, 260, 261, IGNORE]
    expected = [TEXT, TEXT, SPECIAL, SPECIAL, -1, -1, IMAGE, IMAGE, -1, -1]
    assert layout.modality(np.array(ids)).tolist() == expected
    assert layout.modality(np.array(ids)).dtype == np.int8


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (-1, 5)])
def test_empty_vocabularies_are_refused(sizes):
    with pytest.raises(ValueError, match="must be at least 1"):
        VocabLayout(*sizes)


def test_an_unknown_special_is_an_error():
    with pytest.raises(ValueError):
        VocabLayout(10, 5).special("<eos>")
