"""The tuning scripts and the kernel variants that they try, in Triton's interpreter."""

import importlib
import os
import sys
import time
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
import triton_interpreter  # noqa: F401
from helpers import GPU

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_tune
from bertfast.kernels import add_layer_norm as norm_kernel
from bertfast.kernels import attention as attention_kernel
from variants import add_layer_norm, attention, linear_act

BASE = attention.Variant(32, 32, 4)
ATTENTION = [BASE, BASE._replace(tma=True), BASE._replace(programs=2), BASE._replace(poly=True)]
ATTENTION += [BASE._replace(tma=True, programs=1), attention.Variant(32, 128, 4, programs=2)]
STORED = [v._replace(stored=True) for v in ATTENTION]  # dropout's bits


def gap(found, expected):
    found, expected = found.float().nan_to_num(), expected.float().nan_to_num()
    return ((found - expected).norm() / expected.norm()).item()


def inputs(lengths, dim, p, dtype=torch.bfloat16):
    torch.manual_seed(0)
    starts = torch.tensor([0, *lengths]).cumsum(0).int().to(GPU)
    qkv = torch.randn(sum(lengths), 3, 2, dim, device=GPU).to(dtype)
    seed = torch.tensor([7, 9], device=GPU) if p else None
    return qkv, starts, max(lengths), dim**-0.5, p, seed


@pytest.mark.parametrize("p, lengths", [(0.0, [33, 1]), (0.0, [5, 0, 40]), (0.1, [33, 0, 1])])
def test_attention(p, lengths):
    given = inputs(lengths, 32, p)
    expected = attention_kernel.forward(*given, False, None, None)
    tried = STORED[1:3] if p else [*ATTENTION, BASE._replace(tma=True, specialize=True)]
    for variant in tried:
        found = attention.run(*given, variant)
        real = [gap(f, e) for f, e in zip(found, expected, strict=True)]
        assert max(real) < 4e-3, variant  # 2^-8: P is rounded in another place


def test_a_sequence_keeps_its_nan_to_itself():
    qkv, *rest = inputs([20, 33, 20], 32, 0.0)
    spoiled = qkv.clone()
    spoiled[20:53] = torch.tensor([float("nan"), float("inf"), float("-inf")] * 11)[
        :, None, None, None
    ]
    for variant in (ATTENTION[1], ATTENTION[4]):  # descriptors know nothing of sequences
        clean, found = (attention.run(t, *rest, variant)[0] for t in (qkv, spoiled))
        assert torch.equal(found[:20], clean[:20]) and torch.equal(found[53:], clean[53:])


@pytest.mark.parametrize("dim", [pytest.param(64, marks=pytest.mark.seconds), 128])
def test_attention_of_other_heads(dim):
    given = inputs([33], dim, 0.1)
    expected = attention_kernel.forward(*given, False, None, None)
    found = attention.run(*given, BASE._replace(tma=True, stored=True))
    assert max(gap(f, e) for f, e in zip(found, expected, strict=True)) < 4e-3


@pytest.mark.parametrize("hidden", [768, 300])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_add_layer_norm(hidden, p):
    torch.manual_seed(0)
    x, residual, grad = (torch.randn(9, hidden, device=GPU).bfloat16() for _ in range(3))
    weight, bias, x_bias = (torch.randn(hidden, device=GPU).bfloat16() for _ in range(3))
    seed = torch.tensor([7, 9], device=GPU) if p else None
    forward = norm_kernel.add_layer_norm(x, residual, weight, bias, 1e-12, x_bias, p, seed, False)
    given = grad, x, residual, weight, *forward[1:], x_bias, p, seed
    expected = norm_kernel.add_layer_norm_backward(*given, False)
    for variant in (add_layer_norm.Variant(1, 1, 2), add_layer_norm.Variant(4, 2, 1, True)):
        found = add_layer_norm.run(*given, variant)
        for f, e in zip(found, expected, strict=True):
            assert f.shape == e.shape and (not e.numel() or gap(f, e) < 1e-3), variant


@triton.jit
def tails(z, out, SIZE: tl.constexpr):  # noqa: N803
    at = tl.arange(0, SIZE)
    _, tail = linear_act.tail_once(tl.load(z + at))
    tl.store(out + at, tail)


def test_tail_by_one_special_function():
    """Against fp64's: a hundredth of what bf16 rounds off."""
    z = torch.linspace(-8, 8, 1024, device=GPU)
    found = torch.empty_like(z)
    tails[(1,)](z, found, 1024)
    exact = torch.special.log_ndtr(-z.double().abs()).exp()
    assert ((found.double() - exact) / exact).abs().max() < 4e-5
    z[:4] = torch.tensor([float("inf"), float("-inf"), float("nan"), 30.0])
    tails[(1,)](z, found, 1024)
    assert found[[0, 1, 3]].tolist() == [0, 0, 0] and found[2].isnan()


@pytest.mark.parametrize("save", [False, True])
def test_linear_act(save):
    torch.manual_seed(0)
    x, w, b = (torch.randn(*s, device=GPU) for s in ((130, 128), (256, 128), (256,)))
    exact = torch.nn.functional.linear(
        x.bfloat16().double(), w.bfloat16().double(), b.bfloat16().double()
    )
    for variant in {v._replace(m=64, n=128) for v in linear_act.CANDIDATES[::3]}:
        y, z = linear_act.run(x.bfloat16(), w.bfloat16(), b.bfloat16(), save, variant)
        assert gap(y, torch.nn.functional.gelu(exact)) < 4e-3
        assert z is None if not save else gap(z, exact) < 4e-3


@pytest.mark.seconds
@pytest.mark.parametrize(
    "name, only",
    [("attention", ["128 x 128, heads of 64, p=0.0"]), ("linear", ["base"]), ("norm", ["p=0.0"])],
)
def test_tuners(name, only, tmp_path, monkeypatch, capsys):
    module = importlib.import_module(f"gpu_tune_{name}")
    if name == "attention":
        monkeypatch.setattr(module, "HIDDEN", 64)
    options = ["--smoke", "--only", *only, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [name, *options])
    assert module.main() == 0
    shown = capsys.readouterr().out
    assert "BEST" in shown and "us" in shown and (tmp_path / f"tune_{name}.json").is_file()


def test_wrong_candidates_are_told(capsys):
    case = gpu_tune.Case(
        {"right": lambda x: [2 * x], "wrong": lambda x: [x], "other": lambda x: [-x]},
        [(torch.ones(3),)],
        None,
        lambda seconds: "",
        lambda name: None if name == "other" else name,
        loose=("other",),
    )
    late = {"right": "ok", "wrong": "ok"}
    assert "not compiled in time" in gpu_tune.race(case, late, "cpu")["other"]
    found = gpu_tune.race(case, None, "cpu")
    assert found["right"][1] == 0.0 and "wrong: relative error" in found["wrong"]
    rows = gpu_tune.show("case", case, found)
    assert [r["name"] for r in rows if "note" in r] == ["wrong"]
    assert "BEST right" in capsys.readouterr().out


@pytest.mark.seconds
def test_a_candidate_that_dies_costs_itself_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu_tune, "JOB", 1)

    def refuse():
        raise ValueError("no such tile")

    jobs = {"good": lambda: None, "dies": lambda: os._exit(3), "hangs": lambda: time.sleep(60)}
    jobs |= {"refuses": refuse, "last": lambda: None}
    found = gpu_tune.compile_all(jobs, 2, gpu_tune.Budget(30))
    assert found.pop("good") == found.pop("last") == "ok"
    assert "exit code 3" in found["dies"] and "nothing after 1 s" in found["hangs"]
    assert found["refuses"] == "ValueError: no such tile"
