"""Which AdamW is chosen, and that an unrelated package called apex is not taken for NVIDIA's."""

import subprocess
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


def test_two_updates_equal_those_of_torch_adamw():
    """Bit for bit; a parameter without a gradient keeps its value."""
    results = []
    for for_deepspeed in (False, True):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 3), (7,), (2,))]
        build = choose_adamw(torch.device("cpu"), for_deepspeed).build
        optimizer = build(parameters, lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
        for lr in (0.1, 0.03):
            for parameter in parameters[:2]:
                parameter.grad = torch.randn_like(parameter)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        results.append([parameter.detach() for parameter in parameters])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
    torch.manual_seed(0)
    assert not torch.equal(results[0][0], torch.randn(5, 3))


def test_a_run_in_one_process_does_not_import_the_compiler():
    code = """import sys, torch
from megat2i.kernels.optimizer import choose_adamw
parameter = torch.nn.Parameter(torch.ones(3))
optimizer = choose_adamw(torch.device("cpu")).build([parameter], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
parameter.grad = torch.ones(3)
optimizer.step()
assert "torch._dynamo" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)
