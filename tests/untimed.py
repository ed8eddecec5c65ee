"""Benchmarks at sizes that take no time: nothing paused, repeated or measured to the peak."""

from bertfast.bench import encoder, measure, ops, train


def untimed(monkeypatch, *modules):
    """`modules`: scripts with yardsticks of their own."""
    for module in (encoder, train, ops, *modules):
        monkeypatch.setattr(module, "product", lambda *_: (lambda: None, 10**9))
    monkeypatch.setattr(ops, "copy", lambda *_: (lambda: None, 10**9))
    monkeypatch.setattr(measure, "rate", lambda _: 1)
    monkeypatch.setattr(measure, "burst", lambda run, *_: (run, 1, 0))
    monkeypatch.setattr(measure, "SETTLE", 0)

    def take_turns(runs, rounds, device="cpu", *_, **__):
        return measure.take_turns(runs, rounds, device)

    for module in (encoder, ops):  # in bursts of so many seconds after as many that don't count
        monkeypatch.setattr(module, "take_turns", take_turns)
