"""What the tuning scripts share: candidates compiled beforehand in processes that may die, checked,
and timed in turns."""

import argparse
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
from gpu_models import Budget, reason
from gpu_ops import Graph
from gpu_results import write

from bertfast.bench.measure import median, origin, turns

ROUNDS, JOB = 7, 60  # turns; seconds that one candidate may take to compile and run
ALLOWED = 1e-2  # relative error of any output; rivals are kernels in 16 bits too


@dataclass
class Case:
    """One shape: candidates, rivals among them, on the same inputs."""

    calls: dict[str, Callable]  # name -> run(*inputs) -> outputs
    sets: list[tuple]  # inputs, together more than the L2
    truth: Callable | None  # () -> the first set's outputs; None: what the first of `calls` gives
    rate: Callable  # seconds -> what is shown beside a time
    paste: Callable  # name -> what to write where, should it win; None for a rival
    loose: tuple[str, ...] = ()  # names whose values are others: rivals' dropout
    checks: dict[str, Callable] = field(default_factory=dict)  # called for the check instead


def worker(jobs, pipe):
    for name, job in jobs:
        pipe.send((name, None))
        try:
            job()
            torch.cuda.synchronize()
            pipe.send((name, "ok"))
        except Exception as error:
            pipe.send((name, reason(error)))


class Worker:
    """A process for its share of the jobs; it is replaced where one ends or hangs it."""

    def __init__(self, jobs):
        self.jobs, self.process = jobs, None

    def start(self):
        context = get_context("fork")  # spares the imports; nobody has touched the GPU yet
        self.pipe, other = context.Pipe(duplex=False)
        self.process = context.Process(target=worker, args=(self.jobs, other), daemon=True)
        self.process.start()
        other.close()
        self.current, self.since = None, time.monotonic()

    def poll(self, found) -> bool:
        """Whether it is at work; writes down what it has done."""
        if self.process is None:
            if not self.jobs:
                return False
            self.start()
        try:
            while self.pipe.poll():
                name, state = self.pipe.recv()
                self.since = time.monotonic()
                if state is None:
                    self.current = name
                else:
                    found[name], self.current = state, None
                    self.jobs = [job for job in self.jobs if job[0] != name]
        except EOFError:  # it has ended, by itself or not
            self.drop(found, "the process died")
        if self.process is not None and time.monotonic() - self.since > JOB:
            self.process.kill()
            self.drop(found, f"nothing after {JOB} s")
        return True

    def drop(self, found, why):
        self.process.join()
        if self.jobs:
            lost = self.jobs[0][0] if self.current is None else self.current
            found[lost] = f"{why}, exit code {self.process.exitcode}"
            self.jobs = [job for job in self.jobs if job[0] != lost]
        self.process = None


def compile_all(jobs: dict, workers: int, budget) -> dict:
    """{name: "ok", or why not}: each job has run once, its kernel is in Triton's cache on disk."""
    found, listed = {}, list(jobs.items())
    busy = [Worker(listed[i::workers]) for i in range(min(workers, len(listed)))]
    while busy and budget.left() > 0:
        busy = [w for w in busy if w.poll(found)]
        time.sleep(0.02)
    for w in busy:
        with contextlib.suppress(AttributeError):
            w.process.kill()
    return found


def errors(found, truth) -> float:
    """The largest relative one of any output; NaN where there is one."""
    gaps = [((f.float() - t.float()).norm() / t.float().norm()) for f, t in
            zip(found, truth, strict=True)]  # fmt: skip
    return torch.stack(gaps).max().item() if gaps else 0.0


def race(case: Case, compiled: dict | None, device) -> dict:
    """{name: (seconds, error), or why there are none}, in turns; on a CPU of the check's call.

    compiled: {name: "ok" or why not}; None for whatever it takes now."""
    found, graphs, times = {}, {}, {}
    truth = None if case.truth is None else case.truth()
    for name, call in case.calls.items():
        try:
            if compiled is not None and compiled.get(name) != "ok":
                raise RuntimeError(compiled.get(name, "not compiled in time"))
            start = time.perf_counter()
            outputs = case.checks.get(name, call)(*case.sets[0])
            times[name] = [time.perf_counter() - start]
            truth = outputs if truth is None else truth
            error = errors(outputs, truth) if name not in case.loose else 0.0
            if not error < ALLOWED:
                raise ValueError(f"wrong: relative error {error:.1e}")
            if device == "cuda":
                graphs[name], times[name] = Graph(call, case.sets), []
            found[name] = error
        except Exception as error:
            found[name] = reason(error)
    for _, name in turns(list(graphs), ROUNDS) if graphs else ():
        times[name].append(graphs[name].seconds())
    return {n: (median(times[n]), e) if isinstance(e, float) else e for n, e in found.items()}


def show(title, case, found) -> list[dict]:
    """Prints a line for each candidate, the quickest first, and what to write down; JSON's rows."""
    rows = []
    order = sorted(found, key=lambda n: found[n][0] if isinstance(found[n], tuple) else 1e9)
    for name in order:
        if isinstance(found[name], str):
            print(f"{title} {name:44} {found[name]}", flush=True)
            rows.append({"task": title, "name": name, "note": found[name]})
            continue
        seconds, error = found[name]
        rate = case.rate(seconds)
        print(f"{title} {name:44} {1e6 * seconds:9.1f} us  {rate}  error {error:.1e}", flush=True)
        row = {"task": title, "name": name, "milliseconds": round(1e3 * seconds, 5)}
        rows.append(row | {"rate": rate, "relative_error": error})
    ours = [n for n in order if isinstance(found[n], tuple) and case.paste(n) is not None]
    if ours:
        print(f"{title} BEST {case.paste(ours[0])}", flush=True)
    return rows


def main(name, doc, cases: dict[str, Callable], argv=None) -> int:
    """cases: {title: make(device, sets) -> Case}, what tells most first. sets: how many."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="cases whose titles have any of these in them")
    parser.add_argument("--out", type=Path, help="folder of the JSON")
    parser.add_argument("--seconds", type=float, default=600, help="no case begins past these")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile")
    parser.add_argument("--smoke", action="store_true", help="once, tiny, in the interpreter")
    args = parser.parse_args(argv)
    budget, device = Budget(args.seconds), "cpu" if args.smoke else "cuda"
    chosen = {t: c for t, c in cases.items() if not args.only or any(o in t for o in args.only)}
    state, rows = {}, []
    if not args.smoke:
        jobs = {}
        for title, make in chosen.items():
            for call in make("meta", 1).calls:
                jobs[title, call] = lambda m=make, c=call: run_once(m, c)
        state = compile_all(jobs, args.workers, Budget(args.seconds / 2))
        good = sum(s == "ok" for s in state.values())
        print(f"{good} of {len(jobs)} compiled after {args.seconds - budget.left():.0f} s")
        if not torch.cuda.is_available():
            parser.error("torch sees no GPU here")
    for title, make in chosen.items():
        if not budget.allows():
            print(f"{title}: left out, no time", flush=True)
            continue
        with budget.step():
            case = make(device, 4 if device == "cuda" else 1)
            compiled = {call: s for (t, call), s in state.items() if t == title}
            rows += show(title, case, race(case, compiled if device == "cuda" else None, device))
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            about = {"benchmark": f"tune_{name}", **origin(device)}
            write(args.out / f"tune_{name}.json", about, rows, lambda n: case.paste(n) is not None)
    return int(args.smoke and any("note" in row for row in rows))


def run_once(make, call):
    case = make("cuda", 1)
    case.checks.get(call, case.calls[call])(*case.sets[0])
