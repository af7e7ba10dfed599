"""Which AdamW is chosen, and that an unrelated package called apex is not taken for NVIDIA's."""

import sys

import pytest
import torch

from megat2i.kernels.optimizer import apex_problem, choose_adamw


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Function of file names that puts a package ``apex`` with those files, and other modules, first on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)

    def make(*files):
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text("raise RuntimeError('imported')\n")

    return make


def test_the_other_package_of_that_name_is_not_nvidias(package):
    package("apex/__init__.py", "apex/api.py")
    assert "not NVIDIA's" in apex_problem()


def test_nvidias_without_its_extensions(package):
    package("apex/__init__.py", "apex/optimizers/fused_adam.py")
    assert "without its CUDA extensions" in apex_problem()


def test_nvidias_whole(package):
    package("apex/__init__.py", "apex/optimizers/fused_adam.py", "amp_C.py")
    assert apex_problem() is None


def test_the_cpu_has_pytorchs():
    chosen = choose_adamw(torch.device("cpu"))
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = chosen.build([parameter], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    parameter.grad = torch.ones(3)
    optimizer.step()
    # by hand: decay by lr * 0.1, then a step of lr in the direction of the gradient
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 1 - 0.01 - 0.1))
    assert chosen.name == "torch AdamW (fused)" and chosen.reason == "no GPU"
