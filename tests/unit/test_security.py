"""What the code may not contain at all: ways to run what a file says."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "sds3d").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), *ROOT.glob("*.py")])
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "multiprocessing"}
CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "torch.load", "torch.save", "yaml.unsafe_load"}
CALLS |= {"np.load", "numpy.load", "np.save", "numpy.save", "torch.hub.load"}


def faults(source: str) -> list[str]:
    """Everything of the kind in a piece of code."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in CALLS or given.get("shell") == "True" or given.get("allow_pickle") == "True":
            found.append(ast.unparse(node))
        if name in ("yaml.load", "yaml.load_all") and "SafeLoader" not in ast.unparse(node):
            found.append(ast.unparse(node))
        if given.get("weights_only") == "False" or given.get("trust_remote_code") == "True":
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_trusted_with_code(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "bad",
    [
        "import pickle",
        "from multiprocessing import Queue",
        "import joblib.externals",
        "torch.load('a.pt')",
        "np.load('a.npy', allow_pickle=True)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run('ls', shell=True)",
        "eval('1')",
        "pipeline.from_pretrained('a', trust_remote_code=True)",
    ],
)
def test_the_scan_sees(bad: str) -> None:
    assert faults(bad)


def test_weights_that_ship_are_safetensors() -> None:
    kinds = {path.suffix for path in (ROOT / "assets").rglob("*") if path.is_file()}
    assert not kinds & {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".npy", ".npz"}
    assert ".safetensors" in kinds
