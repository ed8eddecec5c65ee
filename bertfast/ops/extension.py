"""Loads the compiled kernels, `bertfast._C`, or says why they are missing."""

import importlib
import importlib.machinery
import importlib.util
import os

import torch  # noqa: F401  first, so that the extension shares torch's OpenMP runtime

C = None
error = None  # why the extension is missing, for `bertfast info` and the registry's errors


def _load():
    # A build elsewhere (sanitizers, mutation tests) can stand in for the installed one.
    path = os.environ.get("BERTFAST_EXTENSION")
    if path is None:
        return importlib.import_module("bertfast._C")
    loader = importlib.machinery.ExtensionFileLoader("bertfast._C", path)
    spec = importlib.util.spec_from_loader("bertfast._C", loader, origin=path)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


try:
    C = _load()
    C.build_info()  # chooses the instruction set: a wrong BERTFAST_CPU_ISA raises here
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=C.end_threads)
except ImportError as e:
    if "BERTFAST_EXTENSION" in os.environ:
        raise
    error = (
        f"the compiled extension bertfast._C is not available ({e}); "
        "reinstall bertfast with a C++17 compiler"
    )
