"""Every instruction set that was built and that this machine has: operators and models agree with
fp64 on each, not only on the best one, which all other tests run on. AVX-512 and AMX also where this
machine lacks them, by an extension in which their instructions are plain C++; 64-bit ARM's under
QEMU, as csrc/cpu/host/remote.h has it."""

import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import ROOT, build_extension, file_of

from bertfast.bench.measure import held_to
from bertfast.ops.extension import C

PROGRAM = """
import copy, json, warnings
import torch
from transformers import BertConfig
import bertfast
from helpers import apart, exact

warnings.filterwarnings("error", "int8")  # or a fault's layer would stay in bf16
torch.manual_seed(0)
found = {"isa": bertfast.build_info()["cpu_isa"]}
given = {"input_ids": torch.randint(100, (3, 40))}
given["attention_mask"] = (torch.arange(40) < torch.tensor([40, 1, 17])[:, None]).long()
for act in ("gelu", "gelu_new", "relu"):
    config = BertConfig(vocab_size=100, hidden_size=72, num_attention_heads=3, hidden_act=act,
                        intermediate_size=200, num_hidden_layers=2, initializer_range=0.1)
    model = bertfast.BertModel(config).eval()
    with torch.no_grad():
        # Sums of int8 products of one sign are the first that saturate in 16 bits. Negative, so
        # that what is lost makes the activation large: a row's own sum is 0 after layer norm.
        model.encoder.layer[1].intermediate.dense.weight[:9] = -0.3
        truth = exact(model, given).last_hidden_state
        for name in ("operators", "live", "fp32", "bf16", "int8"):
            known = name in ("operators", "live")
            one = model if known else bertfast.freeze(copy.deepcopy(model), name)
            with torch.set_grad_enabled(name == "operators"):
                states = one(**given).last_hidden_state
            found[f"{act} {name}"] = apart(states, truth)
print(json.dumps(found))
"""
EMULATED = ("avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16", "avx512_amx")
# By a processor that is the first to have it.
ARM = {"neon": "cortex-a72", "neon_dot": "neoverse-n1", "neon_bf16": "max"}
BOUND = {"operators": 1e-5, "live": 1e-5, "fp32": 1e-5, "bf16": 0.02, "int8": 0.07}
ISAS = C.build_info()["isas_built"] if C else []
# The quick suite's numeric part, in two halves that take about as long: files, and what is left of
# them without Triton's interpreter, which knows no instruction set, and without whole runs.
HALVES = [
    [
        "attention_relative",
        "attention_window",
        "dropin",
        "dropin_guards",
        "dropin_training",
        "dropin_sentences",
        "model",
        "pretrain",
        "optimizer",
        "train",
    ],
    ["linear_act", "attention", "cross_attention", "add_layer_norm", "embedding_layer_norm"]
    + [
        "gated_act",
        "rotary",
        "masked_cross_entropy",
        "pack",
        "dropout",
        "frozen",
        "whole_cpu",
        "whole_kinds",
        "graphs",
    ]
    + ["dropin_frozen", "families", "node", "run", "decoding_cpu"],
]
NUMERIC = "not triton and (not test_pretrain and not test_train or packed or accumul or lamb_)"


def run(command, isa, **other):
    environment = os.environ | other | {"BERTFAST_CPU_ISA": isa, "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if (
        "BERTFAST_EXTENSION" not in other
        and "which this processor lacks" in done.stdout + done.stderr
    ):
        pytest.skip(f"this processor lacks {isa}")
    return done


def check_models(isa, **environment):
    done = run([sys.executable, "-c", PROGRAM], isa, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found.pop("isa") == isa
    wrong = {name: e for name, e in found.items() if not e < BOUND[name.split()[1]]}
    assert not wrong


def check_operators(isa, **environment):
    command = [sys.executable, "-m", "pytest", "-q", "-k", "test_forward_backward and cpu"]
    command += [file_of(stem) for stem in ("linear_act", "attention", "attention_relative")]
    done = run(command, isa, **environment)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


@pytest.mark.seconds
@pytest.mark.parametrize("isa", ISAS)
def test_instruction_set(isa):
    check_models(isa)


def numeric(half, isa, threads):
    files = [file_of(stem) for stem in HALVES[half]]
    return run(
        [str(Path(sys.executable).parent / "pytest"), "-q", "-k", NUMERIC, *files],
        isa,
        OMP_NUM_THREADS=str(threads),
        OMP_WAIT_POLICY="passive",  # the other half runs beside it
        **held_to(isa),  # torch, the reference, too
    )


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_numeric_suite(isa):
    """Every numeric test on every instruction set, with torch held to the same one.

    The best one runs with 1 thread (`make test` runs it with 2), each other one half of the files
    with 1 and half with 2, the other way round on the next: every file meets every instruction set
    and, with more than one of them, both counts of threads. Both halves run at a time.
    """
    best = isa == C.build_info()["cpu_isa"]
    threads = [1 if best else 1 + (half + ISAS.index(isa)) % 2 for half in (0, 1)]
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(numeric, (0, 1), (isa, isa), threads):
            assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the kernels of x86-64 alone are emulated")
    folder = tmp_path_factory.mktemp("emulated")
    return str(build_extension(folder, "-DBERTFAST_EMULATE=ON", "-DBERTFAST_CUDA=off"))


@pytest.mark.slow
@pytest.mark.parametrize("isa", EMULATED)
def test_emulated_models(emulated, isa):
    check_models(isa, BERTFAST_EXTENSION=emulated)


@pytest.mark.slow
@pytest.mark.parametrize("isa", EMULATED)
def test_emulated_operators(emulated, isa):
    check_operators(isa, BERTFAST_EXTENSION=emulated)


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """isa -> the environment in which its kernels run."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("64-bit ARM is emulated on x86-64 alone")
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if not shutil.which(tool):
            pytest.skip(f"no {tool}: apt-get install g++-aarch64-linux-gnu qemu-user")
    host, guest = tmp_path_factory.mktemp("remote"), tmp_path_factory.mktemp("guest")
    cross = {"CXX_COMPILER": "aarch64-linux-gnu-g++", "SYSTEM_NAME": "Linux"}
    cross |= {"SYSTEM_PROCESSOR": "aarch64"}
    cross = [f"-DCMAKE_{name}={value}" for name, value in cross.items()]
    guest = build_extension(guest, "-DBERTFAST_GUEST=ON", *cross)
    host = build_extension(host, "-DBERTFAST_REMOTE=ON", "-DBERTFAST_CUDA=off")

    def environment(isa):
        command = f"qemu-aarch64 -cpu {ARM[isa]} {guest}"
        return {"BERTFAST_EXTENSION": str(host), "BERTFAST_GUEST": command}

    return environment


@pytest.mark.slow
@pytest.mark.parametrize("isa", ARM)
def test_arm_models(arm, isa):
    check_models(isa, **arm(isa))


@pytest.mark.slow
@pytest.mark.parametrize("isa", ARM)
def test_arm_operators(arm, isa):
    check_operators(isa, **arm(isa))
