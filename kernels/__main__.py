"""``python -m megat2i.kernels``: which implementation each op will use here, and why."""

from megat2i.kernels import describe

if __name__ == "__main__":
    print(describe())
