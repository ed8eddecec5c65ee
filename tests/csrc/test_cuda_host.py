"""The CUDA kernels without a GPU: the host harness (csrc/cuda/host), and the shipped binary."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DEVICES, ROOT, build_extension, offsets, refused

from bertfast import ops
from bertfast.ops.library import CUDA_DEVICE

harness = pytest.mark.skipif(
    "cuda" not in DEVICES or CUDA_DEVICE != "cpu", reason="not a build with BERTFAST_CUDA_HOST"
)


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """run(name, order) of the faulty kernels in cuda_host/faults.cpp -> (exit status, output)."""
    binary = tmp_path_factory.mktemp("faults") / "faults"
    host = ROOT / "csrc" / "cuda" / "host"
    sources = [ROOT / "tests/csrc/cuda_host/faults.cpp", host / "runtime.cpp", host / "mma.cpp"]
    command = ["c++", "-std=c++17", "-O1", "-g", "-fsanitize=address", "-Wno-unknown-pragmas"]
    command += [f"-I{host}", f"-I{host.parent}", *map(str, sources), "-o", str(binary)]
    subprocess.run(command, check=True)

    def run(name, order="ascending"):
        env = os.environ | {"BERTFAST_HOST_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0"}
        env.pop("LD_PRELOAD", None)
        done = subprocess.run([binary, name], env=env, capture_output=True, text=True)
        return done.returncode, done.stdout + (done.stderr if done.returncode else "")

    return run


@pytest.mark.slow
def test_faults_show(faults):
    right = (0, "".join(f"{63 - i} " for i in range(64)))
    assert faults("right") == faults("right", "descending") == right
    assert "nan" in faults("missing barrier")[1]  # shared memory starts as NaN
    assert faults("missing barrier") != faults("missing barrier", "descending")
    assert faults("copy") == (0, "7 " * 64) and "nan" in faults("copy not awaited")[1]
    for name, message in {
        "divergent barrier": "deadlock: 32 of 64 threads wait in __syncthreads",
        "divergent shuffle": "lanes of one warp meet in different operations",
        "early return of a lane": "deadlock",
        "forgotten copy": "before its cp.async copies were waited for",
        "shared out of bounds": "heap-buffer-overflow",
        "global out of bounds": "heap-buffer-overflow",
    }.items():
        status, output = faults(name)
        assert status == 1 and message in output, f"{name}: {output[:300]}"


def _cases():
    """name -> a function of no arguments whose tensors every kernel has a part in."""
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=g).bfloat16().requires_grad_()
    seed = torch.tensor([5, 6])
    x, r, w, b, table = randn(40, 300), randn(40, 300), randn(300), randn(300), randn(40, 300)
    wide, square, ids = randn(3, 2000), randn(300, 300), torch.arange(40) % 7
    qkv, cu = randn(150, 3, 2, 64), offsets([20, 130])
    single = qkv.detach().float().requires_grad_()
    long, bias = randn(150, 3, 1, 128), randn(1, 1, 130, 130)
    dropout = {"dropout_p": 0.2, "seed": seed}
    short, far = randn(9, 1, 128), randn(150, 2, 1, 128)
    ones, deep, shallow = torch.ones(2000), randn(40, 1024), randn(72, 1024)
    words, labels = randn(2500, 300), torch.arange(40) * 60
    return {
        "add_layer_norm": lambda: ops.add_layer_norm(x, r, w, b, 1e-5, x_bias=b, **dropout),
        "wide rows": lambda: ops.add_layer_norm(wide, None, ones, ones, 1e-5),
        "embedding_layer_norm": lambda: ops.embedding_layer_norm(
            ids, ids, None, table, x, None, w, b, 1e-5, **dropout
        ),
        "linear_act": lambda: ops.linear_act(x, square, b, "gelu"),
        "few tokens": lambda: ops.linear_act(deep, shallow, None, "gelu"),
        "masked_cross_entropy": lambda: ops.masked_cross_entropy(x, words, None, labels),
        "attention": lambda: ops.attention(qkv, cu, 130, **dropout),
        "attention, fp32": lambda: ops.attention(single, cu, 130, **dropout),
        "attention, streaming": lambda: ops.attention(long, cu, 130, bias=bias, causal=True),
        "cross_attention": lambda: ops.cross_attention(
            short, far, offsets([4, 5]), cu, 5, 130, causal=True, **dropout
        ),
    }


@harness
@pytest.mark.parametrize("name", list(_cases()))
def test_thread_order_does_not_change_bits(name, monkeypatch):
    """A race between threads of a block would."""
    results = []
    for order in ("ascending", "descending"):
        monkeypatch.setenv("BERTFAST_HOST_ORDER", order)
        case = _cases()[name]
        leaves = [c.cell_contents for c in case.__closure__]
        leaves = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
        with ops.backend("cuda"):
            y = case()
            results.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@harness
def test_limits():
    x, w = torch.zeros(2, 4104), torch.zeros(4104)
    with ops.backend("cuda"):
        refused(RuntimeError, "hidden is 4104", ops.add_layer_norm, x, None, w, w, 1e-5)
        refused(RuntimeError, "not torch.float64", ops.linear_act, x.double(), x.double())


@harness
def test_every_kernel_serves_each_precision():
    """As the registry asks for `bertfast info`: without arguments."""
    served = [e["cuda"] for e in ops.registry._table.values() if "cuda" in e]
    assert len(served) > 10
    for entry in served:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert entry.limit(CUDA_DEVICE, dtype, ()) is None


@harness
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whole_model(dtype):
    """A small BERT runs on no other backend's operators and agrees with the reference."""
    from transformers import BertConfig

    from bertfast.model import BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, attn_implementation="eager",
    )  # fmt: skip
    model = BertModel(config).to(dtype).eval()
    ids, weight = torch.randint(0, 50, (3, 20)), torch.randn(3, 20, 64)
    mask = (torch.arange(20) < torch.tensor([[20], [7], [1]])).long()
    outputs = []
    runs = ("cuda", dtype), ("reference", dtype), ("reference", torch.float64)
    for backend, precision in runs:
        model.to(precision)
        with ops.backend(backend):
            y = model(input_ids=ids, attention_mask=mask)
            y = y.last_hidden_state if hasattr(y, "last_hidden_state") else y[0]
            loss = (y.double() * weight).sum()
            grad = torch.autograd.grad(loss, model.parameters(), allow_unused=True)
        outputs.append([y, *(g for g in grad if g is not None)])
    truth, floor = outputs.pop(), 2e-3 if dtype == torch.bfloat16 else 2e-5
    whole = max(t.norm() for t in truth[1:])
    for a, p, t in zip(*outputs, truth, strict=True):
        error, rounding = ((x.double() - t).norm() for x in (a, p))
        # a key's bias has no gradient but rounding
        assert error <= floor * t.norm() + 2 * rounding + floor / 20 * whole


# --- the shipped binary ---


@pytest.fixture(scope="module")
def binary():
    """The extension for every architecture, as .ci/run builds it; made here where it is missing."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    return build_extension(ROOT / "build" / "cuda", "-DBERTFAST_CUDA=on", "-DBERTFAST_ONE_ISA=ON")


def cuobjdump(*arguments):
    """The toolkit's, or the one that triton carries."""
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton")
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([str(tool), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


ARCHITECTURES = {"sm_80", "sm_86", "sm_89", "sm_90a"}


@pytest.mark.slow
def test_no_kernel_spills(binary):
    """ptxas's own count for every kernel: a spill would need a stack."""
    usage = cuobjdump("-res-usage", binary)
    assert set(re.findall(r"arch = (\S+)", usage)) >= ARCHITECTURES
    kernels = re.findall(r"Function (\S+):\s+(REG:\d+) (STACK:\d+) SHARED:\d+ (LOCAL:\d+)", usage)
    assert len(kernels) > 100
    spilling = [k for k in kernels if k[2:] != ("STACK:0", "LOCAL:0")]
    assert not spilling, spilling[:5]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_products_use_tensor_cores(binary, architecture):
    sass = cuobjdump("-sass", "-arch", architecture, binary)
    functions = re.split(r"Function : ", sass)[1:]
    attention = [f for f in functions if "attention" in f.split("\n", 1)[0]]
    tf32 = [f for f in attention if "HMMA.1688.F32.TF32" in f]
    attention = [f for f in attention if f not in tf32]
    assert len(attention) == 2 * 3 * 3 * 3  # types, head dims, kinds; forward, queries, keys
    assert len(tf32) == 3 * 3  # head dims; forward, queries, keys: of fp32
    linear = [f for f in functions if "linear_tile" in f.split("\n", 1)[0]]
    assert len(linear) == 2 * 2  # types, heights
    for f in attention + linear:
        name = f.split("\n", 1)[0]
        assert "HMMA.16816.F32" in f, f"{name} has no tensor-core product"
        assert "LDGSTS" in f and "LDSM" in f, f"{name} has no cp.async or ldmatrix"
    assert all("LDGSTS" in f for f in tf32)


@pytest.mark.slow
def test_chained_kernels_wait(binary):
    """What encoder.cu queues waits for its predecessor (csrc/cuda/chain.h), which the harness can't
    show: griddepcontrol.launch_dependents is PREEXIT in SASS, griddepcontrol.wait ACQBULK."""
    functions = re.split(r"Function : ", cuobjdump("-sass", "-arch", "sm_90a", binary))[1:]
    name = r"linear_tile|linear_reduce|copy_rows|_\d+_(attention|add_layer_norm)_cu_\w*7forward"
    chained = [f for f in functions if re.search(name, f.split("\n", 1)[0])]
    assert len(chained) == 2 * 2 + 2 + 2 * 3 + (2 * 3 * 3 + 3) + 3 * 3
    for f in chained:
        assert f.count("PREEXIT") == f.count("ACQBULK") == 1, f.split("\n", 1)[0]


@pytest.mark.slow
def test_binary_says_that_there_is_no_gpu(binary):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    code = "from bertfast.ops.extension import C; print(C.build_info())"
    env = os.environ | {"BERTFAST_EXTENSION": str(binary)}
    env.pop("LD_PRELOAD", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "'cuda_built': True" in done.stdout, done.stderr
    assert "'gpus': 'none: " in done.stdout
