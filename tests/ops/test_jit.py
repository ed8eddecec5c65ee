"""Launches that skip Triton's binding: as few compilations as Triton makes, and never a wrong one."""

from types import SimpleNamespace

import pytest
import torch

jit = pytest.importorskip("bertfast.kernels.jit")


class OnGpu(torch.Tensor):
    is_cuda = True


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self, number, launches):
        self.number, self.launches = number, launches

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *values):
        assert (stream, function, metadata) == (5, self.function, self.packed_metadata)
        assert launch_metadata is enter is leave is None
        self.launches.append((self.number, (x, y, z), values))

    def __getitem__(self, grid):
        return lambda *values, stream: self.launches.append(("watched", grid, values))


class Stub:
    """A JIT function of (x, n, free, scale, SIZE), which notes its compilations and launches."""

    names = ("x", "n", "free", "scale", "SIZE")
    params = tuple(
        SimpleNamespace(
            num=i, name=name, is_constexpr=name.isupper(), do_not_specialize=name == "free"
        )
        for i, name in enumerate(names)
    )

    def __init__(self):
        self.compilations, self.launches, self.arg_names = 0, [], list(self.names)

    def __getitem__(self, grid):
        def first(*args, num_warps, num_stages):
            self.compilations += 1
            return Compiled(self.compilations, self.launches)

        return first


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 5, raising=False)
    return jit.Kernel(Stub())


def test_second_launch_reuses_the_first(kernel):
    x = torch.zeros(32).as_subclass(OnGpu)
    kernel[(3,)](x, 5, 7, 0.5, 8)
    kernel[(4, 2)](x[16:], 6, 16, 0.25, 8)  # another aligned address, no multiples of 16
    stub = kernel.function
    assert stub.compilations == 1
    assert stub.launches == [(1, (4, 2, 1), (x[16:].data_ptr(), 6, 16, 0.25, 8))]
    kernel[(4,)](x, 9, 1, 1.0, 8)
    assert stub.launches[-1] == (1, (4, 1, 1), (x.data_ptr(), 9, 1, 1.0, 8))


x = torch.zeros(32).as_subclass(OnGpu)
CHANGES = {
    "dtype": (x.bfloat16(), 5, 7, 0.5, 8),
    "alignment": (x[1:], 5, 7, 0.5, 8),
    "one": (x, 1, 7, 0.5, 8),
    "multiple of 16": (x, 32, 7, 0.5, 8),
    "64 bits": (x, 5, 2**33 + 1, 0.5, 8),
    "absent": (None, 5, 7, 0.5, 8),
    "a constant": (x, 5, 7, 0.5, 16),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_triton_specialises_on_compiles_anew(kernel, change):
    stub = kernel.function
    kernel[(1,)](x, 5, 7, 0.5, 8)
    kernel[(1,)](*CHANGES[change])
    assert stub.compilations == 2 and not stub.launches
    kernel[(1,)](*CHANGES[change])
    kernel[(1,)](x, 5, 7, 0.5, 8)
    assert [number for number, *_ in stub.launches] == [2, 1]


@pytest.mark.parametrize("option", [{"num_warps": 8}, {"num_stages": 1}])
def test_options_compile_anew(kernel, option):
    kernel[(1,)](x, 5, 7, 0.5, 8)
    kernel[(1,)](x, 5, 7, 0.5, 8, **option)
    assert kernel.function.compilations == 2


def test_devices_have_kernels_of_their_own(kernel, monkeypatch):
    kernel[(1,)](x, 5, 7, 0.5, 8)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    kernel[(1,)](x, 5, 7, 0.5, 8)
    assert kernel.function.compilations == 2


def test_profilers_see_launches(kernel, monkeypatch):
    triton = pytest.importorskip("triton")
    for _ in range(2):
        kernel[(1,)](x, 5, 7, 0.5, 8)
    for seen in ("launch_enter_hook", "launch_exit_hook"):
        hooks = dict.fromkeys(("launch_enter_hook", "launch_exit_hook"), SimpleNamespace(calls=[]))
        hooks[seen] = SimpleNamespace(calls=[print])
        monkeypatch.setattr(triton.knobs, "runtime", SimpleNamespace(**hooks))
        kernel[(1,)](x, 5, 7, 0.5, 8)
    assert [number for number, *_ in kernel.function.launches] == [1, "watched", "watched"]


def test_tensors_on_a_cpu_are_left_to_triton(kernel):
    """Which refuses them: as an address they would be an illegal access."""
    kernel[(1,)](x, 5, 7, 0.5, 8)
    for _ in range(2):
        kernel[(1,)](torch.zeros(32), 5, 7, 0.5, 8)
    assert kernel.function.compilations == 3 and not kernel.function.launches


def test_tensor_descriptors_are_left_to_triton(kernel):
    for _ in range(2):
        kernel[(1,)](object(), 5, 7, 0.5, 8)
    assert kernel.function.compilations == 2 and not kernel.function.launches
