"""The same five captioned pictures in every layout that the sources read."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image

from megat2i.data.samples import Refused
from megat2i.data.sources import find_parts

PICTURES = [(f"picture {number}", (number * 40, 100, 200 - number * 40)) for number in range(5)]


def png(colour, size=(12, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(folder: Path) -> str:
    for number, (caption, colour) in enumerate(PICTURES):
        path = folder / ("deep" if number % 2 else "") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(colour))
        path.with_suffix(".txt").write_text(f"\ufeff {caption}\n")
    return str(folder)


def write_jsonl(path: Path, keys=("image", "caption")) -> str:
    rows = []
    for number, (caption, colour) in enumerate(PICTURES):
        (path.parent / f"{number}.png").write_bytes(png(colour))
        rows.append(json.dumps({keys[0]: f"{number}.png", keys[1]: caption}))
    path.write_text("\n\n".join(rows) + "\n")
    return str(path)


def write_metadata_folder(folder: Path) -> str:
    folder.mkdir()
    write_jsonl(folder / "metadata.jsonl", keys=("file_name", "text"))
    return str(folder)


def write_tar(path: Path, caption_as="txt") -> str:
    """With the webdataset library, as img2dataset does."""
    with webdataset.TarWriter(str(path)) as sink:
        for number, (caption, colour) in enumerate(PICTURES):
            record = {"caption": caption, "url": "x"}
            text = {"txt": caption} if caption_as == "txt" else {}
            sink.write({"__key__": f"{number:09d}", "png": png(colour), "json": record, **text})
    return str(path)


def write_parquet(path: Path, image="image", caption="caption", structure=True) -> str:
    pictures = [png(colour) for _, colour in PICTURES]
    values = [{"bytes": value, "path": None} for value in pictures] if structure else pictures
    table = pa.table({image: values, caption: [caption for caption, _ in PICTURES], "width": [12] * 5})
    pq.write_table(table, path, row_group_size=2)
    return str(path)


def read(inputs, split="train"):
    return [sample for part in find_parts(inputs, split) for sample in part.samples()]


def reasons(inputs) -> dict[str, str]:
    return {one.name: one.reason for one in read(inputs) if isinstance(one, Refused)}
