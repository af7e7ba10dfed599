"""Rules of the house: import floors, sizes of files and functions, no pickle."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    {"kernels"},
    {
        "config",
        "config_file",
        "config_identity",
        "config_limits",
        "config_rules",
        "files",
        "interrupt",
        "last_words",
        "launch",
        "processes",
        "printable",
        "progress",
        "progress_marks",
        "rendezvous",
        "slurm",
        "watchdog",
        "vocab",
        "run_owner",
        "run_status",
        "runtime",
        "spikes",
        "topology",
        "weights_file",
    },  # fmt: skip
    {"parallel", "data", "tokenizers"},
    {"model", "loss"},
    {"optim", "pipeline", "pipeline_order", "checkpoint"},
    {
        "trainer",
        "console",
        "slowest_rank",
        "status_screen",
        "metrics",
        "record_file",
        "generate",
        "evaluate",
        "fonts",
        "pictures",
        "drawn",
        "html_page",
        "save_requests",
        "self_test",
    },
    {
        "pretrain",
        "run_folder",
        "run_lock",
        "planner",
        "experiments",
        "job_scripts",
        "serving",
        "pretrain_t2i",
        "tools",
        "examples",
    },
)
PRODUCT = sorted(
    [
        *ROOT.glob("megat2i/**/*.py"),
        *ROOT.glob("kernels/**/*.py"),
        *ROOT.glob("tools/**/*.py"),
        *ROOT.glob("examples/**/*.py"),
        ROOT / "pretrain_t2i.py",
    ]
)
# calls that unpickle, or pickle on their way to other ranks
FORBIDDEN = {
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "broadcast_object_list",
    "send_object_list",
    "recv_object_list",
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("megat2i", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(module: str) -> int:
    parts = module.split(".")
    room = parts[1] if parts[0] == "megat2i" and len(parts) > 1 else parts[0]
    return next((number for number, rooms in enumerate(FLOORS) if room in rooms), -1)


def imports(tree: ast.AST, names: set[str]) -> Iterator[str]:
    """Full names of everything imported, anywhere in the file; submodules of ``names`` instead of attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in names else node.module


def floor_faults(files: dict[str, str]) -> list[str]:
    """Imports from a higher floor, and cycles, among ``files``: {module: source}."""
    faults, graph = [], {}
    for module, source in files.items():
        inside = {name for name in imports(ast.parse(source), set(files)) if floor(name) >= 0 and name != module}
        inside = {name for name in inside if name in files}
        graph[module] = inside
        faults += [f"{module} imports {name}" for name in sorted(inside) if floor(name) > floor(module)]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        faults.append(f"cycle: {' -> '.join(error.args[1])}")
    return faults


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return {module_name(path): path.read_text() for path in PRODUCT}


def test_every_module_has_a_floor(files):
    assert len(files) > 30
    assert [module for module in files if floor(module) < 0 and module != "megat2i"] == []


def test_modules_import_from_their_floor_or_lower_and_in_no_circle(files):
    assert floor_faults(files) == []


def test_the_floor_check_notices(files):
    higher = files | {"megat2i.vocab": files["megat2i.vocab"] + "\nfrom megat2i.model import gpt\n"}
    assert any("megat2i.vocab imports megat2i.model.gpt" in fault for fault in floor_faults(higher))
    inside = files | {"megat2i.vocab": files["megat2i.vocab"] + "\ndef f():\n    import megat2i.trainer\n"}
    assert any("megat2i.vocab imports megat2i.trainer" in fault for fault in floor_faults(inside))
    circle = files | {"megat2i.vocab": files["megat2i.vocab"] + "\nfrom megat2i.config import Config\n"}
    assert any(fault.startswith("cycle") for fault in floor_faults(circle))


def test_kernels_import_torch_and_triton_alone(files):
    for module, source in files.items():
        if floor(module) == 0:
            roots = {name.split(".")[0] for name in imports(ast.parse(source), set(files))} - {"megat2i"}
            assert roots - sys.stdlib_module_names <= {"torch", "triton", "flash_attn"}, module


def test_one_module_imports_deepspeed(files):
    found = [
        m
        for m, source in files.items()
        if any(n.split(".")[0] == "deepspeed" for n in imports(ast.parse(source), set()))
    ]
    assert found == ["megat2i.optim.deepspeed_engine"]


def size_faults(module: str, source: str) -> list[str]:
    longest = 90 if floor(module) == 0 else 60
    faults = [f"{module}: {source.count(chr(10))} lines"] if source.count("\n") > 500 else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > longest:
                faults.append(f"{module}.{node.name}: {lines} lines")
    return faults


def test_files_and_functions_stay_small(files):
    assert [fault for module, source in files.items() for fault in size_faults(module, source)] == []
    long_function = "def f():\n" + "    x = 1\n" * 60
    assert size_faults("megat2i.data.x", long_function) and not size_faults("megat2i.kernels.x", long_function)
    assert size_faults("megat2i.kernels.x", "x = 1\n" * 501)


def pickle_faults(module: str, source: str) -> list[str]:
    tree = ast.parse(source)
    source = source.replace("from pickle import UnpicklingError", "")  # the name of an error loads nothing
    names = imports(ast.parse(source), set())
    faults = [f"{module} imports {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
    for node in ast.walk(tree):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None
        if name in FORBIDDEN:
            faults.append(f"{module}:{node.lineno} uses {name}")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if (
                options.get("weights_only") != "True"
                if "torch" in ast.unparse(node.func)
                else "allow_pickle" in options
            ):
                faults.append(f"{module}:{node.lineno} may unpickle")
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.save":
            faults.append(f"{module}:{node.lineno} pickles")
    return faults


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch.distributed as dist\ndist.all_gather_object([], 1)",
        "from torch.distributed import broadcast_object_list",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import torch\ntorch.save({}, 'x')",
    ],
)
def test_the_pickle_check_notices(source):
    if source.startswith("from torch"):
        source += "\nbroadcast_object_list([])"
    assert pickle_faults("x", source)


def test_nothing_is_pickled(files):
    assert [fault for module, source in files.items() for fault in pickle_faults(module, source)] == []
    assert pickle_faults("x", "import torch\ntorch.load('x', weights_only=True)") == []


def test_no_machine_path_is_written_down(files):
    words = [f"/{folder}/" for folder in ("work", "tmp", "root", "opt", "home")]
    assert [module for module, source in files.items() if any(word in source for word in words)] == []
