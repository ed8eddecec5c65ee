"""How fast a run is: tokens, time left, and the share of the machine's matrix products (MFU)."""

import time
from collections import deque
from functools import lru_cache, partial

import torch

from ..ops import linear_act


@lru_cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product here, the best of torch's and ours (faster on some CPUs);
    what MFU is a share of."""
    n = 8192 if device == "cuda" else 1024
    a = torch.ones(n, n, device=device, dtype=dtype).div_(n)
    b = a.clone()
    products = [torch.matmul] if device == "cuda" else [torch.matmul, linear_act]
    return max(_best_rate(partial(product, a, b), 2 * n**3, device) for product in products)


@torch.no_grad()
def _best_rate(run, flops: float, device: str) -> float:
    best, began = 0.0, time.perf_counter()
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        best = max(best, flops / (time.perf_counter() - start))
        if time.perf_counter() - began > 1:  # bf16 without an instruction for it
            break
    return best


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Speed:
    """Rates over the last steps; evaluation and checkpoints between them don't count."""

    def __init__(self, peak: float | None, window: int = 50) -> None:
        self.peak, self.steps = peak, deque(maxlen=window)

    def add(self, tokens: float, flops: float, seconds: float) -> None:
        self.steps.append((tokens, flops, seconds))

    def record(self, steps_left: int) -> dict:
        tokens, flops, seconds = (sum(column) for column in zip(*self.steps, strict=True))
        out = {"tokens_per_second": round(tokens / seconds, 1)}
        if flops and self.peak:
            out["mfu"] = round(flops / seconds / self.peak, 4)
        return out | {"eta_seconds": round(steps_left * seconds / len(self.steps), 1)}
