"""ONNX Runtime: its transformer fusions in fp32, and those with dynamic int8 on top."""

import logging

import torch

from bertfast.bench.rivals import Rival

from .export import cached, onnx_file


def fused(folder):
    """The exported graph with attention, embeddings, skip layer norm and bias GELU fused."""
    import transformers
    from onnxruntime.transformers.optimizer import optimize_model

    path = cached(folder, ".fused.onnx")
    if not path.exists():
        config = transformers.BertConfig.from_pretrained(folder)
        model = optimize_model(
            str(onnx_file(folder)),
            model_type="bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
            opt_level=0,
        )
        found = model.get_fused_operator_statistics()
        if found["Attention"] != config.num_hidden_layers:
            raise RuntimeError(f"ONNX Runtime fused {found} of {config.num_hidden_layers} layers")
        model.save_model_to_file(str(path))
    return path


def quantized(folder):
    """Weights in int8 by output channel, activations by tensor as they come: no calibration."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = cached(folder, ".int8.onnx")
    if not path.exists():
        quantize_dynamic(
            fused(folder),
            path,
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    return path


class OnnxRuntime(Rival):
    name = "ONNX Runtime"
    precisions = ("fp32", "int8")
    packages = ("onnx", "onnxruntime")
    tolerance = 1e-4

    def __init__(self, folder, precision, threads):
        import onnxruntime

        logging.getLogger("onnxruntime").setLevel(logging.ERROR)
        logging.getLogger().setLevel(logging.ERROR)  # where its quantizer warns
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            (quantized if precision == "int8" else fused)(folder),
            options,
            providers=["CPUExecutionProvider"],
        )

    def __call__(self, batch):
        feed = {name: value.numpy() for name, value in batch.items()}
        return torch.from_numpy(self.session.run(None, feed)[0])
