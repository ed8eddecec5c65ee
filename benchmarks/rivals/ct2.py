"""CTranslate2: fp32, and int8 with weights by channel and activations by token as they come."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from bertfast.bench.rivals import Rival

from .export import cached


def convert(folder, path):
    """Its converter asks for a setting that transformers 5 no longer writes."""
    import ctranslate2

    with tempfile.TemporaryDirectory() as copy:
        for file in Path(folder).resolve().iterdir():
            Path(copy, file.name).symlink_to(file)
        config = json.loads(Path(folder, "config.json").read_text())
        Path(copy, "config.json").unlink()
        Path(copy, "config.json").write_text(
            json.dumps({"position_embedding_type": "absolute"} | config)
        )
        ctranslate2.converters.TransformersConverter(copy).convert(str(path))


class CTranslate2(Rival):
    name = "CTranslate2"
    precisions = ("fp32", "int8")  # it refuses bf16 on a CPU
    packages = ("ctranslate2",)
    tolerance = 1e-4

    def __init__(self, folder, precision, threads):
        import ctranslate2

        path = cached(folder, ".ct2")
        if not path.exists():
            convert(folder, path)
        self.view = ctranslate2.StorageView.from_array
        self.encoder = ctranslate2.Encoder(
            str(path),
            device="cpu",
            inter_threads=1,
            intra_threads=threads,
            compute_type="int8" if precision == "int8" else "float32",
        )

    def __call__(self, batch):
        ids = batch["input_ids"].int().numpy()
        lengths = batch["attention_mask"].sum(1).int().numpy()
        out = self.encoder.forward_batch(self.view(ids), self.view(lengths)).last_hidden_state
        return torch.from_numpy(np.asarray(out))
