"""The Inception network of the Fréchet Inception Distance: images to 2,048 numbers, with weights from a user's file.

It is the graph of 2015-12-05 that TensorFlow's FID code uses, with the names of pytorch-fid's file of its weights,
``pt_inception-2015-12-05-6726825d.pth``. It is not torchvision's network of the same name: it has 1,008 classes, its
average pools leave the padding out, and its last block pools by maximum.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megat2i.files import DataFileError
from megat2i.weights_file import read_checkpoint

FEATURES, CLASSES = 2048, 1008
REMEDY = "Pass pt_inception-2015-12-05-6726825d.pth of pytorch-fid, or the same file of torch-fidelity"

# A block is a list of branches whose results are concatenated. A branch is a chain of steps: a pool, a convolution
# (name, channels, kernel, stride), or a list of convolutions that all see the same input.


def _a(pooled: int) -> list:
    return [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ["average", ("branch_pool", pooled, 1)],
    ]


def _c(inner: int) -> list:
    row, column = (1, 7), (7, 1)
    double = [("1", inner, 1), ("2", inner, column), ("3", inner, row), ("4", inner, column), ("5", 192, row)]
    return [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", inner, 1), ("branch7x7_2", inner, row), ("branch7x7_3", 192, column)],
        [(f"branch7x7dbl_{number}", channels, kernel) for number, channels, kernel in double],
        ["average", ("branch_pool", 192, 1)],
    ]


def _e(pool: str) -> list:
    def fork(name: str) -> list:
        return [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]

    return [
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), fork("branch3x3_2")],
        [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), fork("branch3x3dbl_3")],
        [pool, ("branch_pool", 192, 1)],
    ]


_B = [
    [("branch3x3", 384, 3, 2)],
    [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
    ["halve"],
]
_D = [
    [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
    [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
     ("branch7x7x3_4", 192, 3, 2)],
    ["halve"],
]  # fmt: skip
BLOCKS = {
    "Mixed_5b": _a(32), "Mixed_5c": _a(64), "Mixed_5d": _a(64), "Mixed_6a": _B,
    "Mixed_6b": _c(128), "Mixed_6c": _c(160), "Mixed_6d": _c(160), "Mixed_6e": _c(192),
    "Mixed_7a": _D, "Mixed_7b": _e("average"), "Mixed_7c": _e("maximum"),
}  # fmt: skip
POOLS = {
    "average": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "maximum": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "halve": lambda x: F.max_pool2d(x, 3, stride=2),
}


class _Convolution(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padded: bool = True):
        super().__init__()
        rows, columns = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (rows // 2, columns // 2) if padded and stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, (rows, columns), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class _Block(nn.Module):
    def __init__(self, inputs: int, branches: list):
        super().__init__()
        self.branches, self.outputs = branches, 0
        for branch in branches:
            channels = inputs
            for step in branch:
                parallel = _convolutions(step)
                for name, *shape in parallel:
                    self.add_module(name, _Convolution(channels, *shape))
                channels = sum(outputs for _, outputs, *_ in parallel) or channels
            self.outputs += channels

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([functools.reduce(self._step, branch, x) for branch in self.branches], dim=1)

    def _step(self, x: Tensor, step) -> Tensor:
        if isinstance(step, str):
            return POOLS[step](x)
        return torch.cat([self.get_submodule(name)(x) for name, *_ in _convolutions(step)], dim=1)


def _convolutions(step) -> list[tuple]:
    return [] if isinstance(step, str) else step if isinstance(step, list) else [step]


class Inception(nn.Module):
    """float32 [B, 3, 299, 299] in about -1 .. 1 to features float32 [B, 2048]."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3, padded=False)
        channels = 192
        for name, branches in BLOCKS.items():
            self.add_module(name, block := _Block(channels, branches))
            channels = block.outputs
        self.fc = nn.Linear(FEATURES, CLASSES)  # of no use here, but part of the file

    def forward(self, x: Tensor) -> Tensor:
        x = POOLS["halve"](self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = POOLS["halve"](self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        for name in BLOCKS:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


def load_inception(path: str | Path) -> tuple[Inception, str]:
    """(the network with the weights in ``path``, for inference on the CPU; SHA-256 of the file).

    Raises DataFileError, with the first difference, where the file is not exactly this network's.
    """
    tensors, sha256 = read_checkpoint(path)
    with torch.device("meta"):  # no time for random weights
        net = Inception()
    # Files from before PyTorch 0.4.1 lack this counter, which only training uses.
    counters = {key: torch.tensor(0) for key in net.state_dict() if key.endswith("num_batches_tracked")}
    tensors, expected = counters | tensors, net.state_dict()
    for key in sorted(expected.keys() | tensors.keys()):
        if key not in tensors or key not in expected:
            problem = "is missing" if key in expected else "is unknown"
        elif tensors[key].shape != expected[key].shape:
            problem = f"is {list(tensors[key].shape)}, expected {list(expected[key].shape)}"
        elif not tensors[key].isfinite().all():
            problem = "holds values that are not finite"
        else:
            continue
        raise DataFileError(path, f"not the Inception network of FID: {key} {problem}", REMEDY)
    tensors = {key: value if key in counters else value.float() for key, value in tensors.items()}
    net.load_state_dict(tensors, assign=True)
    return net.eval().requires_grad_(False), sha256
