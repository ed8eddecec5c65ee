"""What a rival is."""

from importlib.util import find_spec


class Rival:
    """One way to run a BERT checkpoint on a CPU; a subclass says which and in what precisions.

    `Rival(folder, precision, threads)` loads the transformers checkpoint in `folder`; a call takes
    {"input_ids", "attention_mask"}, int64 [batch, seqlen] and right-padded, and gives
    last_hidden_state [batch, seqlen, hidden], in which padded positions mean nothing and which the
    next call may overwrite. torch's threads are the caller's to set.
    """

    name: str
    precisions: tuple[str, ...]
    packages: tuple[str, ...] = ()  # beyond bertfast's own dependencies
    tolerance = 2e-5  # of last_hidden_state in fp32, against transformers

    @classmethod
    def available(cls) -> str | None:
        """None, or why it can't run here."""
        missing = [name for name in cls.packages if find_spec(name) is None]
        return f"not installed: {', '.join(missing)} (pip install '.[bench]')" if missing else None

    def __init__(self, folder: str, precision: str, threads: int):
        raise NotImplementedError

    def __call__(self, batch):
        raise NotImplementedError
