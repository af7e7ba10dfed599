"""Rows per second of the data part, beside megatron-core's IndexedDataset on the same shard in the same run.

    python benchmarks/bench_dataset.py [--json FILE]

Three measurements, each over the same shuffled documents of one synthetic shard (warm page cache, one thread):
sequences   one stored sequence at a time; ours is a copy, megatron-core's a view of its map
rows        text and image of a document assembled to tokens, labels and modality of one training row
batches     rows in micro-batches of 8 as tensors: ours by TrainingData, as one of 8 ranks of a global batch of 512,
            blend and order included; megatron-core's side takes a permutation that was computed before

megatron-core does not assemble such rows, so its side uses ``naive_row`` below: plain concatenation and a look-up of
the modality, without a check of the ids. Both sides are first checked to give the same rows. They take turns, so that a
slow moment of the machine meets both; medians, smallest and largest are reported, and the ratio of each round.
"""

import importlib.util
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from harness import Record, parser_for

from megat2i.data.batches import TrainingData
from megat2i.data.indexed import IndexedWriter
from megat2i.data.t2i_dataset import T2IDataset
from megat2i.vocab import IGNORE, VocabLayout

VOCAB = VocabLayout(text_tokens=50_277, image_codes=16_384)
SEQUENCE_LENGTH, IMAGE_TOKENS, TEXT_TOKENS = 1_152, 1_024, (10, 50)
MICRO_BATCH, GLOBAL_BATCH, RANKS = 8, 512, 8


def write_shard(prefix: Path, documents: int) -> None:
    generator = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in generator.integers(*TEXT_TOKENS, documents, endpoint=True):
            text = generator.integers(0, VOCAB.text_tokens, length, dtype=np.uint16)
            image = generator.integers(0, VOCAB.image_codes, IMAGE_TOKENS, dtype=np.uint16)
            writer.add_document([text, image], [0, 1])


def naive_row(text: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, labels and modality [S] as one would write them down."""
    doc, end_doc, start_text, end_text, start_image, end_image, pad = range(VOCAB.text_tokens, VOCAB.text_tokens + 7)
    image = image.astype(np.int64) + VOCAB.image_start
    parts = [[doc, start_text], text.astype(np.int64), [end_text, start_image], image, [end_image, end_doc]]
    ids = np.concatenate(parts)
    tokens = np.concatenate([ids, np.full(SEQUENCE_LENGTH - len(ids), pad)])
    labels = np.concatenate([tokens[1:], [IGNORE]])
    labels[labels == pad] = IGNORE
    return tokens, labels, VOCAB.modality(labels)


def our_contenders(prefix: Path, documents: np.ndarray) -> dict:
    dataset = T2IDataset(prefix, VOCAB, SEQUENCE_LENGTH)
    data = TrainingData([(dataset, 1.0)], seed=0, global_batch_size=GLOBAL_BATCH)
    steps = max(1, len(documents) * RANKS // GLOBAL_BATCH)

    def sequences() -> int:
        for document in documents.tolist():
            dataset.store.sequence(2 * document)
            dataset.store.sequence(2 * document + 1)
        return 2 * len(documents)

    def rows() -> int:
        for document in documents.tolist():
            dataset.row(document, 0)
        return len(documents)

    def batches() -> int:
        for step in range(steps):
            data.micro_batches(step, 0, RANKS, MICRO_BATCH)
        return steps * GLOBAL_BATCH // RANKS

    return {"sequences": sequences, "rows": rows, "batches": batches}


def megatron_contenders(prefix: Path, documents: np.ndarray) -> dict:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    store = IndexedDataset(str(prefix), multimodal=True)
    check_same_rows(store, T2IDataset(prefix, VOCAB, SEQUENCE_LENGTH), documents[:200])

    def sequences() -> int:
        for document in documents.tolist():
            store[2 * document]
            store[2 * document + 1]
        return 2 * len(documents)

    def rows() -> int:
        for document in documents.tolist():
            naive_row(store[2 * document][0], store[2 * document + 1][0])
        return len(documents)

    def batches() -> int:
        whole = len(documents) // MICRO_BATCH * MICRO_BATCH
        for start in range(0, whole, MICRO_BATCH):
            numbers = documents[start : start + MICRO_BATCH].tolist()
            made = [naive_row(store[2 * number][0], store[2 * number + 1][0]) for number in numbers]
            for arrays in zip(*made, strict=True):
                torch.from_numpy(np.stack(arrays))
        return whole

    return {"sequences": sequences, "rows": rows, "batches": batches}


def check_same_rows(store, dataset: T2IDataset, documents: np.ndarray) -> None:
    for document in documents.tolist():
        row, (text, image) = dataset.row(document, 0), (store[2 * document][0], store[2 * document + 1][0])
        for ours, theirs in zip((row.tokens, row.labels, row.modality), naive_row(text, image), strict=True):
            if not np.array_equal(ours, theirs):
                raise RuntimeError(f"document {document}: the two sides assemble different rows; nothing to compare")


def measure(contenders: dict[str, dict], repeats: int) -> dict:
    """Items per second: {measurement: {side: {"median", "minimum", "maximum", "repeats"}}}, sides taking turns."""
    results = {}
    for name in contenders["megat2i"]:
        rates: dict[str, list[float]] = {side: [] for side in contenders}
        for repeat in range(repeats + 1):
            for side, functions in contenders.items():
                start = time.perf_counter()
                done = functions[name]()
                if repeat:  # the first round warms the page cache
                    rates[side].append(done / (time.perf_counter() - start))
        results[name] = {side: spread(values) for side, values in rates.items()}
        if len(contenders) == 2:
            ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
            results[name]["ratio"] = spread(ratios)
    return results


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "minimum": min(values), "maximum": max(values), "repeats": values}


def print_table(results: dict) -> None:
    print(f"{'per second':<12}{'side':<16}{'median':>12}{'minimum':>12}{'maximum':>12}")
    for name, sides in results.items():
        for side, figures in sides.items():
            digits = 2 if side == "ratio" else 0
            numbers = "".join(f"{figures[key]:>12,.{digits}f}" for key in ("median", "minimum", "maximum"))
            print(f"{name:<12}{side:<16}{numbers}")


def main() -> None:
    parser = parser_for(__doc__, minutes=False)
    parser.add_argument("--documents", type=int, default=20_000, help="documents of the synthetic shard")
    parser.add_argument("--repeats", type=int, default=7, help="measured rounds, after one that warms up")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "shard"
        write_shard(prefix, arguments.documents)
        documents = np.random.default_rng(1).permutation(arguments.documents)
        contenders = {"megat2i": our_contenders(prefix, documents)}
        if importlib.util.find_spec("megatron") is None:
            print("megatron-core is not installed: only our own figures")
        else:
            contenders["megatron-core"] = megatron_contenders(prefix, documents)
        results = measure(contenders, arguments.repeats)
    print_table(results)
    record = Record("dataset", arguments.json, torch.device("cpu"))
    for name, sides in results.items():
        record.add(f"{name} per second, of {IMAGE_TOKENS:,} image tokens each", sides)
    record.finish()


if __name__ == "__main__":
    main()
