"""A BERT checkpoint as one ONNX file, made once into build/, for the runtimes that read ONNX."""

import hashlib
import os
import warnings
from pathlib import Path

import torch
import transformers
from torch import nn

BUILD = Path(__file__).resolve().parents[2] / "build" / "rivals"


def cached(folder, suffix: str) -> Path:
    """Where what was made of the checkpoint in `folder` is kept; another checkpoint, other file."""
    weights = Path(folder, "model.safetensors").resolve()
    stamp = f"{weights} {weights.stat().st_size} {weights.stat().st_mtime_ns}"
    BUILD.mkdir(parents=True, exist_ok=True)
    return BUILD / f"{hashlib.sha256(stamp.encode()).hexdigest()[:12]}{suffix}"


class Classic(nn.Module):
    """BERT in the operators that the runtimes' graph fusions were written to find."""

    def __init__(self, model):
        super().__init__()
        self.model, self.heads = model, model.config.num_attention_heads

    def forward(self, input_ids, attention_mask):
        head = (
            self.model.config.hidden_size // self.heads
        )  # a number in every shape: -1 isn't fused
        bias = (1.0 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        hidden = self.model.embeddings(input_ids)
        for layer in self.model.encoder.layer:
            inner = layer.attention.self
            q, k, v = (
                m(hidden).view(*hidden.shape[:2], self.heads, head).permute(0, 2, 1, 3)
                for m in (inner.query, inner.key, inner.value)
            )
            scores = q @ k.transpose(-1, -2) / head**0.5 + bias
            context = (scores.softmax(-1) @ v).permute(0, 2, 1, 3).contiguous()
            hidden = layer.attention.output(
                context.view(*hidden.shape[:2], hidden.shape[2]), hidden
            )
            hidden = layer.output(layer.intermediate(hidden), hidden)
        return hidden


def onnx_file(folder) -> Path:
    """input_ids, attention_mask int64 [batch, seqlen] -> last_hidden_state fp32."""
    path = cached(folder, ".onnx")
    if not path.exists():
        model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
        example = torch.ones(2, 8, dtype=torch.long)
        axes = {0: "batch", 1: "seqlen"}
        part = path.with_suffix(f".{os.getpid()}.part")  # of several processes, any may be first
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")  # of the exporter by tracing, which needs no onnxscript
            torch.onnx.export(
                Classic(model),
                (example, example),
                part,
                input_names=["input_ids", "attention_mask"],
                output_names=["last_hidden_state"],
                dynamic_axes=dict.fromkeys(
                    ("input_ids", "attention_mask", "last_hidden_state"), axes
                ),
                opset_version=17,
                dynamo=False,
            )
        part.rename(path)
    return path
