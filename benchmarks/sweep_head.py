"""Tiles of the loss head's Triton products, tried one after another on the sizes of a chunk, the fastest printed."""

import argparse

import torch
from harness import Record, take_turns

ROWS = 3_840  # a chunk of the head
TRIALS = {  # for operands of two bytes
    "LOGITS_TILES": [
        {"ROWS": 128, "COLUMNS": columns, "DEPTH": depth, "num_warps": warps, "num_stages": stages}
        for columns, warps in ((128, 4), (128, 8), (256, 8))
        for depth in (32, 64, 128)
        for stages in (2, 3, 4)
    ],
    "HIDDEN_TILES": [
        {"ROWS": 128, "WIDTH": width, "DEPTH": depth, "num_warps": warps, "num_stages": stages}
        for width, warps in ((128, 4), (128, 8), (256, 8))
        for depth in (32, 64, 128)
        for stages in (2, 3, 4)
    ],
    "WEIGHT_TILES": [
        {"COLUMNS": 128, "WIDTH": width, "ROWS": 128, "DEPTH": depth, "num_warps": warps, "num_stages": stages}
        for width, warps in ((128, 4), (128, 8), (256, 8))
        for depth in (32, 64, 128)
        for stages in (2, 3, 4)
    ],
}


def sweep(arguments: argparse.Namespace, ranges, device: torch.device, record: Record) -> None:
    """Time every trial; tiles that need more than the chip has fail, which is a result, not an error."""
    if device.type != "cuda":
        raise SystemExit("error: --sweep needs a GPU: Triton's kernels do not run here")
    from megat2i.kernels.linear_cross_entropy import triton_kernels as kernels

    columns, width = ranges[-1][1], arguments.width
    operands = random_operands(columns, width, device)
    for table, trials in TRIALS.items():
        shipped = kernels.tiles_for(getattr(kernels, table), torch.empty(0, dtype=torch.bfloat16, device=device))
        trials = [shipped, *(trial for trial in trials if trial != shipped)]
        calls = {_name(trial): _call(table, trial, kernels, *operands) for trial in trials}
        results = take_turns(calls, max(5, arguments.rounds // 3), device, record)
        rows = {n: {"skipped": row["error"]} if "error" in row else row for n, row in results.items()}
        work = 2 * ROWS * columns * width
        for row in rows.values():
            row |= {"tflops": work / row["ms"] / 1e9} if "ms" in row else {}
        record.add(f"{table}, {ROWS} x {width} x {columns}", rows)
        ranked = sorted((row["ms"], name) for name, row in rows.items() if "ms" in row)
        print(f"\n{table}: shipped {_name(shipped)}")
        for ms, name in ranked[:5]:
            print(f"  {ms:8.3f} ms {work / ms / 1e9:7.1f} TFLOP/s  {name}")


def _name(tiles: dict) -> str:
    return " ".join(f"{key}={value}" for key, value in tiles.items())


def random_operands(columns: int, width: int, device: torch.device) -> list[torch.Tensor]:
    """x [n, D], w [c, D] and e [n, c], bfloat16."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((ROWS, width), (columns, width), (ROWS, columns))
    return [torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) * 0.03 for shape in shapes]


def _call(table: str, tiles: dict, kernels, x: torch.Tensor, w: torch.Tensor, e: torch.Tensor):
    """A function that runs the table's kernel once."""
    (columns, width), device = w.shape, x.device

    def tiles_of(length: int, by: str) -> int:
        return -(-length // tiles[by])

    if table == "LOGITS_TILES":
        target = torch.zeros(ROWS, dtype=torch.int32, device=device)
        offset = torch.zeros(ROWS, device=device)
        count = tiles_of(columns, "COLUMNS")
        sums, largest = torch.empty(2, count, ROWS, device=device)
        again = torch.zeros(tiles_of(ROWS, "ROWS"), dtype=torch.int32, device=device)
        return lambda: kernels.exponentials[(tiles_of(ROWS, "ROWS") * count,)](
            x, w, e, offset, target, sums, largest, again, ROWS, columns, width, width, width, columns, STORE=True,
            REDO=False, GROUP=8, **tiles,
        )  # fmt: skip
    if table == "HIDDEN_TILES":
        keep = torch.ones(tiles_of(ROWS, "ROWS"), dtype=torch.int32, device=device)
        total = torch.zeros(ROWS, width, device=device)
        return lambda: kernels.hidden_product[(tiles_of(width, "WIDTH"), tiles_of(ROWS, "ROWS"))](
            e, w, keep, total, ROWS, columns, width, columns, width, **tiles
        )
    kept = torch.arange(ROWS // tiles["ROWS"], device=device)
    count, total = torch.tensor(len(kept), device=device), torch.zeros(columns, width, device=device)
    return lambda: kernels.weight_product[(tiles_of(width, "WIDTH"), tiles_of(columns, "COLUMNS"))](
        e, x, kept, count, total, ROWS, columns, width, columns, width, **tiles
    )
