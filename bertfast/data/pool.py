"""Jobs in processes, a bounded number at a time; and one thread that works ahead."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from typing import Any


class Pool:
    """Runs jobs in processes, a bounded number at a time; one process is this one."""

    def __init__(self, processes: int) -> None:
        self.processes, self.pool = processes, None

    def __enter__(self) -> "Pool":
        if self.processes > 1:
            self.pool = ProcessPoolExecutor(self.processes, initializer=_start_worker)
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def run(self, function: Callable[..., Any], jobs: Iterable[tuple]) -> Iterator[Any]:
        """function(*job) of each; results as they come."""
        if self.pool is None:
            for job in jobs:
                yield function(*job)
            return
        pending = set()
        for job in jobs:
            pending.add(self.pool.submit(function, *job))
            if len(pending) > self.processes:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (f.result() for f in done)
        yield from (f.result() for f in pending)


def ahead(items: Iterable) -> Iterator:
    """The items, none of them None, each made by a thread while the one before is worked on."""
    made = iter(items)
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, made, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, made, None)
            yield item


def _start_worker():
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
