"""The text tokenizer of an exported model: its own tokens, and one for every special token and image code."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from megat2i.files import DataFileError
from megat2i.tokenizers.text import load_text_tokenizer
from megat2i.vocab import SPECIALS, VocabLayout

JSON, SENTENCEPIECE, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"


def save(tokenizer: Path, vocab: VocabLayout, sequence_length: int, folder: Path) -> str:
    """Write what ``transformers.AutoTokenizer`` opens into ``folder``; returns a line on what was written.

    Ids are those of the exported model: text, specials, ``<image_0>`` and so on. A SentencePiece model is copied as it
    is, without them. Raises DataFileError where the tokenizer does not take the new tokens at these ids.
    """
    text = load_text_tokenizer(tokenizer)
    if text.kind != "tokenizers":
        (folder / SENTENCEPIECE).write_bytes(tokenizer.read_bytes())
        return f"{SENTENCEPIECE}: the text tokenizer alone; ids of special tokens and images are in megat2i_vocab.json"
    content = json.loads(tokenizer.read_text())
    plain = Tokenizer.from_str(json.dumps(content))
    # a text tokenizer may have a token of that name already
    special = {name: name if plain.token_to_id(name) is None else f"<|{name[1:-1]}|>" for name in SPECIALS}
    names = [*special.values(), *(f"<image_{code}>" for code in range(vocab.image_codes))]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ids = {name: vocab.text_tokens + number for number, name in enumerate(names)}
    content["added_tokens"] = [
        *(content.get("added_tokens") or []),
        *({"id": number, "content": name, **flags} for name, number in ids.items()),
    ]
    # ours never cuts, pads or adds tokens of its own, so neither does the exported one
    content["truncation"] = content["padding"] = content["post_processor"] = None
    whole = json.dumps(content, ensure_ascii=False)
    unified = Tokenizer.from_str(whole)
    for name, number in ids.items():
        if unified.token_to_id(name) != number:
            problem = f"does not take {name} as id {number}, but as {unified.token_to_id(name)}"
            raise DataFileError(tokenizer, problem, "Its ids must run from 0 without a gap")
    (folder / JSON).write_text(whole)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": sequence_length}
    settings |= {"bos_token": special["<doc>"], "eos_token": special["</doc>"], "pad_token": special["<pad>"]}
    settings["clean_up_tokenization_spaces"] = False
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    return f"{JSON}: {vocab.text_tokens:,} text tokens, {len(SPECIALS)} specials, {vocab.image_codes:,} image codes"
