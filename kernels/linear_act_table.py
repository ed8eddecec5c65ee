"""Which product serves a linear layer: Triton's with the epilogue inside, or cuBLAS.

`benchmarks/linear_act_table.py` measures every candidate on a GPU and prints rows for `MEASURED`.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """A variant of the Triton product; an output tile is m x n, k its step."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    tma: bool = False  # operands and results by tensor descriptors, Hopper's
    programs: int = 0  # on a processor, which take tiles in turn; 0: one program a tile


TILES = {
    "small": Tile(64, 64, 64, 4, 4),
    "medium": Tile(128, 128, 64, 8, 3),
    "large": Tile(128, 256, 64, 8, 4, True, 1),
    # Two programs a processor: one's epilogue runs beside the other's products.
    "pair": Tile(128, 128, 64, 4, 3, True, 2),
    "narrow": Tile(64, 64, 32, 4, 3),
}
CUBLAS = "cublas"

# (capability, dtype, bucket(M), N, K, activation, z is stored, parts) -> a name in TILES,
# or CUBLAS.
# Empty: an H200 has timed these kernels for BERT-base alone, which the defaults follow.
MEASURED: dict[tuple, str] = {}


def bucket(rows: int) -> int:
    """The power of two at or above `rows`, from 16 to 65,536: how MEASURED groups M."""
    return min(max(1 << (rows - 1).bit_length(), 16), 65536)


def candidates(dtype, arch: int, k: int, vectors: bool, parts: int = 1) -> list[str]:
    """The names that can serve.

    vectors: the rows of all operands are dense and start at multiples of 16 bytes; parts: see
    `choose`.
    """
    if dtype == torch.float32 or not vectors:
        return [CUBLAS, "narrow"]
    names = [CUBLAS, "small", "medium"]
    # With a single step over k the large tile's registers spill.
    if parts == 1 and k > 64 and 90 <= arch < 100:
        names += [name for name, tile in TILES.items() if tile.tma]
    return names


def choose(arch, dtype, m, n, k, activation, save, vectors, parts=1) -> str:
    """A name in TILES, or CUBLAS, for [m, k] @ [n, k].T.

    arch: 10 * major + minor of the compute capability. activation, save: the operator's.
    parts: 3 where the weight is scattered in three, which cuBLAS needs copied together.

    Defaults for shapes that MEASURED lacks: cuBLAS where there is no activation, and in fp32, whose
    product without tensor cores hides one more pass over the output; else Triton, which saves that
    pass: at M = 16,384, N = 3072 and K = 768 in bf16 with GELU "pair" took 141 us on an H200,
    "large" 153, cuBLAS and its pass 162. Where fewer tiles take over is by arithmetic.
    Scattered parts: copying them costs the same at any m, so Triton up to 1,024 rows.
    """
    able = candidates(dtype, arch, k, vectors, parts)
    name = MEASURED.get((arch, dtype, bucket(m), n, k, activation, save, parts))
    if name in able:
        return name
    if dtype == torch.float32 or not (activation or (parts > 1 and m <= 1024)):
        return CUBLAS
    if not vectors:
        return "narrow"
    tiles = -(-m // 128) * -(-n // 128)
    if tiles < 128:  # too few to fill a GPU
        return "small"
    return "pair" if "pair" in able and tiles >= 512 else "medium"
