import pytest
import torch
from helpers import DEVICES, backends, keep, philox_numpy

from bertfast import ops
from bertfast.ops.dropout import keep_mask, philox, threshold

# Known answers published with Random123 (kat_vectors, philox4x32 of 10 rounds): key, counter, out
F = 0xFFFFFFFF
KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((F, F), (F, F, F, F), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("key, counter, words", KNOWN)
def test_known_answers(key, counter, words):
    assert philox_numpy(key, counter) == words
    seed = key[0] | key[1] << 32
    seed = torch.tensor([seed - (seed >> 63 << 64), counter[3]])
    row = counter[1] | counter[2] << 32
    row = torch.tensor([row - (row >> 63 << 64)])
    assert tuple(philox(seed, row, torch.tensor([counter[0]]))[0].tolist()) == words


def test_reference_mask_is_the_numbers():
    seed = torch.tensor([987654321987, 3])
    rows = torch.tensor([0, 5, 2**33 + 1])
    mask = keep_mask(seed, rows, 37, 0.3)
    assert torch.equal(
        mask, torch.stack([keep(987654321987, 3, r, 37, 0.3) for r in rows.tolist()])
    )


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("backend", backends("add_layer_norm"))
def test_mask_bits_of_every_backend(backend, p):
    """x = 0 but for a bias of 1, and a residual that makes the kept visible: bit for bit."""
    tokens, hidden, device = 257, 150, DEVICES[backend]
    seed = torch.tensor([2**62 + 12345, 9])
    with ops.backend(backend):
        y = ops.add_layer_norm(
            torch.zeros(tokens, hidden, device=device),
            None,
            *(torch.ones(hidden, device=device), torch.zeros(hidden, device=device), 1e-12),
            x_bias=torch.ones(hidden, device=device),
            dropout_p=p,
            seed=seed.to(device),
        ).cpu()
    mask = keep_mask(seed, torch.arange(tokens), hidden, p)
    assert torch.equal(y > 0, mask & (~mask).any(1, keepdim=True))
    assert abs(mask.double().mean().item() - (1 - p)) < 4 * (p * (1 - p) / mask.numel()) ** 0.5


def test_seeds():
    torch.manual_seed(3)
    a = ops.draw_seeds(4, "cpu")
    b = ops.draw_seeds(4, "cpu")
    torch.manual_seed(3)
    assert torch.equal(a, ops.draw_seeds(4, "cpu")) and not torch.equal(a[0], b[0])
    assert a.dtype == torch.int64 and a.shape == (4, 2) and a[:, 1].tolist() == [0, 1, 2, 3]
    assert threshold(0.5) == 2**31 and threshold(0.0) == 0


def test_seed_argument():
    x, w, b = torch.randn(20, 30), torch.ones(30), torch.zeros(30)
    run = lambda seed: ops.add_layer_norm(x, None, w, b, 1e-5, dropout_p=0.5, seed=seed)
    assert torch.equal(run(5), run(torch.tensor([5, 0])))
    assert not torch.equal(run(5), run(6)) and not torch.equal(run(5), run(torch.tensor([5, 1])))
    torch.manual_seed(0)
    first = run(None)
    assert not torch.equal(first, run(None))
    torch.manual_seed(0)
    assert torch.equal(first, run(None))
