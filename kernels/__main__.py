"""``python -m megat2i.kernels [LIBRARY...]``: which implementation each op will use here, and why.

Every LIBRARY named (triton, flash-attn, apex) must be importable, else the exit code is 1: the images' import check.
"""

import sys

from megat2i.kernels import describe
from megat2i.kernels.libraries import LibraryError, describe_libraries, require_library

if __name__ == "__main__":
    print(describe())
    print("optional libraries")
    print(describe_libraries())
    try:
        for name in sys.argv[1:]:
            require_library(name)
    except LibraryError as error:
        sys.exit(f"error: {error}")
