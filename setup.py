"""Runs CMake for the extension `bertfast._C`; everything about its build is in CMakeLists.txt.

BERTFAST_CUDA=auto|on|off   build the CUDA kernels (auto: where there are nvcc and a GPU)
CMAKE_ARGS                  more arguments for CMake
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        # An absent compiler costs the fast kernels, not the installation.
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
        if compiler is None:
            print(
                "bertfast: no C++ compiler found: installing without the C++ and CUDA kernels, "
                "with the slower PyTorch (and, on a GPU, Triton) ones; install g++ or set CXX",
                file=sys.stderr,
            )
            return
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DBERTFAST_OUTPUT={target.parent}",
                f"-DBERTFAST_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
                f"-DBERTFAST_CUDA={os.environ.get('BERTFAST_CUDA', 'auto')}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ],
            check=True,
        )
        subprocess.run(["cmake", "--build", str(build)], check=True)


def version():
    text = (ROOT / "bertfast" / "__init__.py").read_text()
    return text.split('__version__ = "')[1].split('"')[0]


packages = [
    ".".join(p.parent.relative_to(ROOT).parts)
    for p in sorted((ROOT / "bertfast").rglob("__init__.py"))
]
setup(
    version=version(),
    packages=[*packages, "bertfast.kernels"],
    package_dir={"bertfast": "bertfast", "bertfast.kernels": "kernels"},
    package_data={"bertfast": ["py.typed"]},  # its annotations are for others' checkers, too
    ext_modules=[Extension("bertfast._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
