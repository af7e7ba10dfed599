"""Runs functions in a process whose Triton kernels are interpreted on the CPU, or on the GPU where there is one."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def interpreter() -> Iterator[Callable]:
    """A function of (function, *arguments) that calls it in the interpreting process and returns or raises as it does.

    The process starts with TRITON_INTERPRET=1, which counts only when Triton is imported.
    """
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=400)
    finally:
        os.environ.pop("TRITON_INTERPRET")
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
