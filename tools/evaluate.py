"""Measure generated images, or an image tokenizer: ``python tools/evaluate.py fid --generated DIR --reference DIR``.

Prints a short table; ``--output`` keeps the number with all that decided it: protocol, files and their SHA-256, number
of images, versions.
"""

import argparse
import json
import sys
from pathlib import Path

from megat2i.config import ConfigError
from megat2i.data.manifest import Manifest
from megat2i.evaluate.clip_score import PREFIX, clip_score
from megat2i.evaluate.protocol import PROTOCOLS
from megat2i.evaluate.quality import BATCH_SIZE, REPLICATES, FeatureNet, measure_fid
from megat2i.evaluate.reconstruction import measure_reconstruction
from megat2i.files import DataFileError, store_path, write_file
from megat2i.interrupt import said_on_interrupt
from megat2i.printable import ArgumentParser
from megat2i.tokenizers.image import load_image_tokenizer

NUMBERS = ("fid", "precision", "recall", "psnr", "ssim", "clip_score", "standard_error")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    fid = commands.add_parser("fid", help="FID, precision and recall of generated images against a reference")
    fid.add_argument("--reference", type=Path, required=True, metavar="DIR|FILE", help="images, or saved features")
    fid.add_argument("--save-features", type=Path, metavar="FILE.npz", help="keep the reference's features")
    clip = commands.add_parser("clip-score", help="how well generated images fit their prompts")
    clip.add_argument("--clip", type=Path, required=True, metavar="DIR", help="a CLIPModel in Hugging Face's layout")
    clip.add_argument("--prefix", default=PREFIX, help=f"before each prompt (default {PREFIX!r})")
    for command in (fid, clip):
        command.add_argument("--generated", type=Path, required=True, metavar="DIR", help="images to be measured")
    copies = commands.add_parser("reconstruction", help="what an image tokenizer loses")
    copies.add_argument("--images", type=Path, required=True, metavar="DIR", help="images to be encoded and decoded")
    tokenizer = copies.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--image-tokenizer", type=Path, metavar="FILE")
    tokenizer.add_argument("--data", type=Path, metavar="PREFIX", help="dataset: its tokenizer, crop and codebook use")
    fid.add_argument("--replicates", type=int, default=REPLICATES, help="resamples for the interval, or 0")
    for command in (fid, copies):
        command.add_argument("--protocol", choices=tuple(PROTOCOLS), required=True)
        command.add_argument("--inception", type=Path, metavar="FILE", help="pt_inception-2015-12-05-6726825d.pth")
    for command in (fid, clip, copies):
        command.add_argument("--batch-size", type=int, default=BATCH_SIZE)
        command.add_argument("--output", type=Path, metavar="FILE.json", required=True)
    args = parser.parse_args()
    if args.batch_size < 1 or getattr(args, "replicates", 0) in (-1, 1):
        parser.error("--batch-size must be at least 1, --replicates 0 or at least 2")
    return args


def measure(args: argparse.Namespace) -> dict:
    """The record that the command line asks for."""
    if args.command == "clip-score":
        return clip_score(args.generated, args.clip, args.prefix, args.batch_size)
    if args.command == "fid":
        options = {"batch_size": args.batch_size, "replicates": args.replicates, "save_features": args.save_features}
        return measure_fid(args.generated, args.reference, args.protocol, args.inception, **options)
    net = FeatureNet.open(args.protocol, args.inception, args.batch_size)
    if args.data is None:
        tokenizer = load_image_tokenizer(args.image_tokenizer)
        return measure_reconstruction(args.images, tokenizer, tokenizer.crop, net)
    manifest = Manifest.read(args.data)
    if manifest is None or manifest.image is None:
        raise DataFileError(args.data, "says nothing of images", "Pass a dataset of tools/preprocess_data.py")
    tokenizer = load_image_tokenizer(args.data.parent / manifest.image.tokenizer)
    found = measure_reconstruction(args.images, tokenizer, manifest.image.crop, net)
    return found | {"codebook_of_dataset": json.loads(store_path(args.data, ".codebook.json").read_text())}


def table(found: dict) -> str:
    """The numbers of a record, a line each."""
    rows = {key: f"{found[key]:.4f}" for key in NUMBERS if key in found}
    rows |= {key: found[key] for key in ("protocol", "feature_net") if key in found}
    if found.get("interval"):
        rows["fid"] += f"   95%: {found['interval']['low']:.4f} .. {found['interval']['high']:.4f}"
    for key in ("codebook", "codebook_of_dataset"):
        if key in found:
            rows[key] = "{used:,} of {codebook_size:,} codes, perplexity {perplexity:,.0f}".format(**found[key])
    images = [f"{found[key]['images']:,}" for key in ("generated", "reference", "images") if key in found]
    rows["images"] = " against ".join(images)
    lines = [f"{key.replace('_', ' '):20}{value}" for key, value in rows.items()]
    return "\n".join(lines + [f"warning: {warning}" for warning in found.get("warnings", ())])


def main() -> None:
    """Measure, write, print."""
    args = parse_arguments()
    for path in filter(None, (args.output, getattr(args, "save_features", None))):
        path.parent.mkdir(parents=True, exist_ok=True)  # first: measuring may take hours
    found = measure(args)
    write_file(args.output, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())
    print(table(found))


if __name__ == "__main__":
    try:
        with said_on_interrupt("interrupted; nothing was measured"):
            main()
    except (ConfigError, DataFileError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
