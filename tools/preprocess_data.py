"""Turn captioned images into token shards: PREFIX.bin, PREFIX.idx (Megatron's format) and PREFIX.json (the manifest).

Inputs: a folder of images (captions in .txt files of the same names, or in its metadata.jsonl), a .jsonl file of
{"image": path, "caption": text}, WebDataset .tar shards, .parquet files, or the word openmoji. Samples that cannot be
used are listed in PREFIX.ledger.jsonl. A run that was stopped goes on where it was when started again.

In a SLURM array (or with --shard-index and --num-shards) every task does its share of the shards and leaves a finished
dataset for each of them in PREFIX.shards, which tools/merge_data.py joins. With --num-shards the array's task id is the
share (from 0), so that single tasks can be done again: sbatch --array=7 with the same --num-shards. Without it an array
of task ids in a row, 0-99 or 1-100, is the whole job.

    python tools/preprocess_data.py --input photos --output-prefix data/photos/train --train-text-tokenizer 2048
    python tools/preprocess_data.py --input shards/*.tar --output-prefix data/web/train --text-tokenizer neox.json \
        --image-tokenizer movqgan --image-checkpoint movqgan_270M.ckpt
    sbatch --array=0-99 --wrap "python tools/preprocess_data.py --input shards/*.tar --output-prefix data/web/train \
        --text-tokenizer neox.json --image-tokenizer image_tokenizer.safetensors"
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import megat2i  # noqa: F401 (before torch: it sets how threads wait)

# isort: split
import torch

from megat2i.data.array_job import share_of, write_once, write_share
from megat2i.data.decoding import CROPS
from megat2i.data.encode_part import Encoding, code_agreement
from megat2i.data.fit_tokenizers import fit_image_tokenizer, fit_text_tokenizer
from megat2i.data.merge import check_output
from megat2i.data.openmoji import SPLITS
from megat2i.data.preprocess import preprocess
from megat2i.data.samples import Part
from megat2i.data.shards import check_tars, whole_files
from megat2i.data.sizes import captions_in_words
from megat2i.data.sources import find_parts, other_files
from megat2i.files import DataFileError
from megat2i.printable import ArgumentParser
from megat2i.tokenizers.image import NETWORKS, load_image_tokenizer
from megat2i.tokenizers.movqgan import MoVQGAN
from megat2i.tokenizers.patch import PatchTokenizer
from megat2i.tokenizers.text import load_text_tokenizer
from megat2i.tokenizers.vq_tokenizer import PRECISIONS

PATCH_DEFAULTS = {"image_size": 32, "patch_size": 4, "codebook_size": 512}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    description, _, examples = __doc__.partition("\n\n")
    parser = ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", required=True, metavar="INPUT", help="what to read: see below")
    parser.add_argument("--output-prefix", type=Path, required=True, metavar="PREFIX")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument(
        "--text-tokenizer", type=Path, metavar="FILE", help=".json (tokenizers) or .model (SentencePiece)"
    )
    text.add_argument(
        "--train-text-tokenizer",
        type=int,
        metavar="VOCAB_SIZE",
        help="train a byte-level BPE on the captions: text_tokenizer.json in the output folder",
    )
    parser.add_argument(
        "--image-tokenizer",
        default="patch",
        metavar=f"patch|{'|'.join(NETWORKS)}|FILE",
        help="patch (the default): fit a codebook to the images; a network: take it from --image-checkpoint; both "
        "write image_tokenizer.safetensors in the output folder, which later datasets pass as FILE",
    )
    parser.add_argument("--image-checkpoint", type=Path, metavar="FILE", help="weights of the network, as published")
    parser.add_argument("--ema", action="store_true", help="with a training checkpoint: its averaged weights")
    parser.add_argument(
        "--encoder-precision",
        choices=PRECISIONS,
        help="of the network (default float32); others are faster on GPUs, and the tool says how many codes change",
    )
    parser.add_argument(
        "--image-size", type=int, help="side in pixels (default: patch 32, networks 256, or the file's)"
    )
    parser.add_argument("--patch-size", type=int, help="with patch: side of a patch in pixels (default 4)")
    parser.add_argument("--codebook-size", type=int, help="with patch: number of codes (default 512)")
    parser.add_argument(
        "--crop",
        choices=CROPS,
        help="how images become square (default: movq with movqgan, as its original, or center)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        help="processes that decode and encode; with a network on CUDA, threads that decode for the one process of "
        "each device (default: the cores that this process may use)",
    )
    parser.add_argument("--split", choices=SPLITS, default="train", help="of openmoji (default train)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset and its tokenizers")
    for name, text in (("shard-index", "which task this is, from 0 (in a SLURM array: its task id)"),
                       ("num-shards", "tasks that share the work (in a SLURM array: their number)")):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, metavar="N", help=text)
    return _check(parser, parser.parse_args(arguments))


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Rules across options; ends the program with one sentence where one is broken."""
    fits, network = args.image_tokenizer == "patch", args.image_tokenizer in NETWORKS
    if args.split.endswith("valid") and (fits or args.train_text_tokenizer is not None):
        parser.error(f"--split {args.split}: tokenizers come from the train split; pass its files to "
                     "--text-tokenizer, --image-tokenizer")  # fmt: skip
    for name, given in (("image-checkpoint", args.image_checkpoint), ("ema", args.ema),
                        ("encoder-precision", args.encoder_precision)):  # fmt: skip
        if given and not network:
            parser.error(f"--{name} belongs to --image-tokenizer {' or '.join(NETWORKS)}")
    if network and args.image_checkpoint is None:
        parser.error(f"--image-tokenizer {args.image_tokenizer} needs --image-checkpoint, the file of its weights")
    if fits and args.crop == MoVQGAN.crop:
        parser.error(f"--crop {args.crop} belongs to networks; use center or pad")
    for name in PATCH_DEFAULTS:
        if fits and getattr(args, name) is None:
            setattr(args, name, PATCH_DEFAULTS[name])
        value = getattr(args, name)
        if not fits and name != "image_size" and value is not None:
            parser.error(f"--{name.replace('_', '-')} belongs to --image-tokenizer patch; a file has its own")
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected at least 1")
    if fits and args.image_size % args.patch_size:
        parser.error(f"--image-size {args.image_size} is not a multiple of --patch-size {args.patch_size}")
    if args.train_text_tokenizer is not None and args.train_text_tokenizer < 256:
        parser.error("--train-text-tokenizer needs at least 256: every byte has an id")
    if args.workers is not None and args.workers < 1:
        parser.error(f"--workers is {args.workers}, expected at least 1")
    _check_share(parser, args)
    return args


def _check_share(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Complete --shard-index and --num-shards from the environment of a SLURM array, and check what goes with them."""
    array = [os.environ.get(f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "MAX", "COUNT")]
    if all(array):
        task, least, largest, count = map(int, array)
        if args.num_shards is None:
            if args.shard_index is None and largest - least + 1 != count:
                parser.error(f"the task ids of this array, {least} to {largest}, are not {count} in a row: pass "
                             "--num-shards, of the whole job")  # fmt: skip
            args.num_shards, task = count, task - least
        args.shard_index = task if args.shard_index is None else args.shard_index
    if (args.shard_index is None) != (args.num_shards is None):
        parser.error("--shard-index and --num-shards go together")
    if args.num_shards is None:
        return
    if not 0 <= args.shard_index < args.num_shards:
        parser.error(f"--shard-index is {args.shard_index}, expected 0 to {args.num_shards - 1} (--num-shards - 1)")
    if args.image_tokenizer == "patch" or args.text_tokenizer is None:
        remedy = "run this tool once by itself, then pass its files to --text-tokenizer and --image-tokenizer"
        parser.error(f"tasks of an array do not fit tokenizers, which all of them need: {remedy}")
    if args.overwrite:
        parser.error(f"--overwrite is not for a task of an array: remove {args.output_prefix}.shards before the job")


def prepare_tokenizers(args: argparse.Namespace, parts: list[Part]) -> Encoding:
    """The tokenizer files that the options ask for; missing ones are trained, or made from their checkpoint."""
    folder = args.output_prefix.parent
    folder.mkdir(parents=True, exist_ok=True)
    text, image = args.text_tokenizer, Path(args.image_tokenizer)
    if args.image_tokenizer == "patch":  # first: it is the one that can fail, and then nothing was replaced
        image = folder / "image_tokenizer.safetensors"
        print(f"fitting the image tokenizer {image}", flush=True)
        sizes = (args.image_size, args.patch_size, args.codebook_size)
        fit_image_tokenizer(parts, *sizes, args.crop or PatchTokenizer.crop, image, args.overwrite)
    elif args.image_tokenizer in NETWORKS:
        image = folder / "image_tokenizer.safetensors"
        take_network(args, image)
    opened = load_image_tokenizer(image)
    if args.image_size not in (None, opened.image_size):
        problem = f"made for images of {opened.image_size} pixels, not --image-size {args.image_size}"
        raise DataFileError(image, problem, "Leave --image-size out")
    if text is None:
        text = folder / "text_tokenizer.json"
        print(f"training the text tokenizer {text}", flush=True)
        fit_text_tokenizer(parts, args.train_text_tokenizer, text, args.overwrite)
    if args.num_shards:  # what the shards are made with lies beside them
        load_text_tokenizer(text)
        text = copied(text, folder / f"text_tokenizer{text.suffix}")
        image = copied(image, folder / "image_tokenizer.safetensors")
    return Encoding(text, image, args.crop or opened.crop)


def copied(path: Path, target: Path) -> Path:
    """``target`` with the content of ``path``, which other tasks may be writing too."""
    write_once(target, path.read_bytes())
    return target


def take_network(args: argparse.Namespace, path: Path) -> None:
    """Write the network in ``args.image_checkpoint`` to ``path`` in the form that runs and later datasets open."""
    kind, size = NETWORKS[args.image_tokenizer], args.image_size or 256
    precision = args.encoder_precision or "float32"
    try:
        network = kind.from_checkpoint(args.image_checkpoint, None, args.ema, size, precision)
    except DataFileError:
        raise
    except ValueError as error:
        raise DataFileError(args.image_checkpoint, str(error), "Choose another --image-size") from error
    if path.exists() and not args.overwrite:
        if load_image_tokenizer(path).sha256 == network.sha256:
            return
        remedy = "Use it with --image-tokenizer, pass --overwrite, or choose another folder"
        raise DataFileError(path, "there is another tokenizer, and datasets may depend on it", remedy)
    print(f"taking the image tokenizer {path} from {args.image_checkpoint}", flush=True)
    if args.num_shards:  # other tasks may be writing it too
        with tempfile.TemporaryDirectory() as folder:
            network.save(Path(folder, path.name))
            copied(Path(folder, path.name), path)
    else:
        network.save(path)


def run_share(args: argparse.Namespace, parts: list[Part], encoding: Encoding, workers: int) -> str:
    """Do the share of this task; returns what to tell the user."""
    done = write_share(parts, args.output_prefix, encoding, workers, args.shard_index, args.num_shards)
    shards = f"shards {done.share.start} to {done.share.stop - 1}" if done.share else "no shard"
    folder = f"{args.output_prefix}.shards"
    said = f"task {args.shard_index} of {args.num_shards}: {shards} of {done.shards}: {done.samples - done.refused:,} "
    said += f"captioned images, {done.refused:,} samples refused; {done.finished} of {done.shards} shards are finished"
    if done.samples > done.refused:
        said += f"\ncodebook: {done.codebook}"
    if done.finished == done.shards:
        said += f"\nnext: python tools/merge_data.py {folder} --output-prefix {args.output_prefix}"
    return said


def run_whole(args: argparse.Namespace, parts: list[Part], encoding: Encoding, workers: int) -> str:
    """Do the whole job; returns what to tell the user."""
    prefix = args.output_prefix
    summary = preprocess(parts, prefix, encoding, workers, args.overwrite)
    manifest = summary.manifest
    return (
        f"{prefix}: {manifest.documents:,} captioned images, {manifest.tokens.text:,} text ids of "
        f"{manifest.text.vocab_size:,}, {manifest.tokens.image:,} image codes of {manifest.image.codebook_size:,}, "
        f"{manifest.dtype}; {summary.refused:,} samples refused"
        + (f", listed in {summary.ledger}" if summary.refused else "")
        + f"\ncodebook: {summary.codebook}\n"
        + "\n".join(captions_in_words(manifest, summary.longest))
    )


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)  # the workers use the other cores
    try:
        parts = find_parts(args.input, args.split, open_tars=not args.num_shards)
        if args.num_shards:
            parts = whole_files(parts)
            share = share_of(len(parts), args.shard_index, args.num_shards)
            check_tars(parts[share.start : share.stop])
        else:
            check_output(args.output_prefix, args.overwrite)  # before the time that fitting takes
            share = range(len(parts))
        encoding = prepare_tokenizers(args, parts)
        if (agreement := code_agreement(parts[share.start : share.stop], encoding)) is not None:
            images, equal = agreement
            print(f"encoder precision: {equal:.2%} of the codes of {images:,} images are those of float32", flush=True)
        workers = args.workers or len(os.sched_getaffinity(0))  # the cores that this process may use
        said = (run_share if args.num_shards else run_whole)(args, parts, encoding, workers)
    except DataFileError as error:
        sys.exit(f"preprocess_data.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("preprocess_data.py: interrupted; the same command goes on where it was")
    print(said)
    if left_out := other_files(args.input):
        print(left_out)


if __name__ == "__main__":
    main()
