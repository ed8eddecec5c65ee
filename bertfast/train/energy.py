"""What a machine says of the energy it takes: RAPL for processors, NVML for GPUs."""

import os
import threading
import time
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")  # Documentation/power/powercap/powercap.rst
EVERY = 1.0  # seconds between readings: RAPL's counters wrap, NVML has a power alone


class Rapl:
    """The packages of all processors, and their memory where it has a counter: whatever runs there.
    Raises OSError where there is none that may be read (Linux gives them to root alone)."""

    def __init__(self, root: Path) -> None:
        self.zones, names = [], []
        for zone in sorted(root.glob("intel-rapl:*")):  # AMD's, too
            name = (zone / "name").read_text().strip()
            if name.startswith(("package", "dram")):  # cores are parts of a package
                names.append(name)
                most = int((zone / "max_energy_range_uj").read_text())
                self.zones.append([zone / "energy_uj", most, self._read(zone / "energy_uj")])
        if not names:
            raise FileNotFoundError(f"{root} has no counter of a processor's package")
        self.source = f"RAPL ({', '.join(names)})"

    @staticmethod
    def _read(path) -> int:
        return int(path.read_text())

    def joules(self) -> float:
        """Since the last call."""
        total = 0
        for zone in self.zones:
            path, most, before = zone
            zone[2] = now = self._read(path)
            total += now - before + (most if now < before else 0)
        return total / 1e6


class Nvml:
    """A GPU's power, between two readings taken for their mean. Raises what torch does without
    nvidia-ml-py."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.source = f"NVML power ({torch.cuda.get_device_name(device)})"
        self.at, self.watts = time.perf_counter(), self._read()

    def _read(self) -> float:
        return torch.cuda.power_draw(self.device) / 1e3

    def joules(self) -> float:
        at, watts = time.perf_counter(), self._read()
        total = (at - self.at) * (watts + self.watts) / 2
        self.at, self.watts = at, watts
        return total


class Meter:
    """This process's share of the counters: its GPU's, and on the first process of a machine the
    processors'. `why` says why there are none, else None. Read between `begin` and `end`."""

    def __init__(self, device: torch.device) -> None:
        self.counters, self.why, self.sum = [], None, 0.0
        self.lock, self.ended, self.thread = threading.Lock(), threading.Event(), None
        gpu, first = device.type == "cuda", os.environ.get("LOCAL_RANK", "0") == "0"
        for wanted, make in ((gpu, lambda: Nvml(device)), (first, lambda: Rapl(POWERCAP))):
            try:
                if wanted and self.why is None:
                    self.counters.append(make())
            except Exception as e:  # NVML's bindings have kinds of their own
                if not self.counters:  # a GPU's alone will do; a processor's for a GPU's work won't
                    self.why = str(e) or repr(e)

    @property
    def sources(self) -> list[str]:
        return [counter.source for counter in self.counters]

    def begin(self) -> None:
        if self.counters:
            self._read(count=False)
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()

    def end(self) -> None:
        self.ended.set()
        if self.thread is not None:
            self.thread.join()
            self._read()

    def _watch(self):
        while self.why is None and not self.ended.wait(EVERY):
            self._read()

    def _read(self, count: bool = True):
        with self.lock:
            try:
                self.sum += sum(counter.joules() for counter in self.counters) * count
            except Exception as e:
                self.why, self.counters = str(e) or repr(e), []

    def take(self) -> float | None:
        """Joules since the last call; None where they can't be told."""
        if self.thread is not None and not self.ended.is_set():
            self._read()
        with self.lock:
            taken, self.sum = self.sum, 0.0
        return taken if self.why is None else None
