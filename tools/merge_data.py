"""Join finished datasets into one, without tokenizing anything again.

Inputs: the PREFIX.shards folder of an array job, or prefixes of datasets that tools/preprocess_data.py finished, in the
order that they shall have. They must be made with the same tokenizers, crop and precision. The inputs stay as they are.

    python tools/merge_data.py data/web/train.shards --output-prefix data/web/train
    python tools/merge_data.py data/photos/train data/art/train --output-prefix data/both/train
"""

import argparse
import sys
from pathlib import Path

from megat2i.data.array_job import shard_prefixes
from megat2i.data.codebook_use import CodebookUse
from megat2i.data.merge import merge_datasets
from megat2i.data.sizes import captions_in_words
from megat2i.files import DataFileError
from megat2i.printable import ArgumentParser


def main() -> None:
    description, _, more = __doc__.partition("\n\n")
    parser = ArgumentParser(description=description, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="a PREFIX.shards folder, or a prefix")
    parser.add_argument("--output-prefix", type=Path, required=True, metavar="PREFIX")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    args = parser.parse_args()
    try:
        prefixes = [prefix for path in args.inputs for prefix in (shard_prefixes(path) if path.is_dir() else [path])]
        args.output_prefix.parent.mkdir(parents=True, exist_ok=True)
        manifest = merge_datasets(prefixes, args.output_prefix, args.overwrite)
        codebook = CodebookUse.read(args.output_prefix, manifest.image.codebook_size)
    except DataFileError as error:
        sys.exit(f"merge_data.py: error: {error}")
    counts = f"{manifest.tokens.text:,} text ids, {manifest.tokens.image:,} image codes"
    print(f"{args.output_prefix}: {len(prefixes):,} datasets, {manifest.documents:,} captioned images, {counts}")
    print(f"codebook: {codebook}")
    print("\n".join(captions_in_words(manifest)))


if __name__ == "__main__":
    main()
