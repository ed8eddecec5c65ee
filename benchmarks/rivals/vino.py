"""OpenVINO: fp32, bf16, and int8 in its two ways, with and without calibration data."""

import torch

from bertfast.bench.rivals import Rival

from .export import cached, onnx_file


def feed(batch):
    return [batch["input_ids"].numpy(), batch["attention_mask"].numpy()]


def kept(folder, suffix, make):
    """An OpenVINO model that `make` makes of the exported one, once."""
    import openvino

    path = cached(folder, suffix)
    if not path.exists():
        model = make(openvino.Core().read_model(onnx_file(folder)))
        openvino.save_model(model, path, compress_to_fp16=False)
    return path


class OpenVino(Rival):
    """In int8 nncf rounds the weights by channel, and the plug-in the activations as they come."""

    name = "OpenVINO"
    precisions = ("fp32", "bf16", "int8")
    packages = ("openvino", "nncf")
    tolerance = 1e-4

    def __init__(self, folder, precision, threads):
        import openvino

        options = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else "bf16",
        }
        file = onnx_file(folder)
        if precision == "int8":
            file = self.quantized(folder)
            options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = str(2**64 - 1)  # a scale for each token
        compiled = openvino.Core().compile_model(file, "CPU", options)
        self.request = compiled.create_infer_request()

    def quantized(self, folder):
        import nncf

        mode = nncf.CompressWeightsMode.INT8_SYM
        return kept(folder, ".w8.xml", lambda model: nncf.compress_weights(model, mode=mode))

    def __call__(self, batch):
        out = self.request.infer(feed(batch), share_inputs=True, share_outputs=True)
        return torch.from_numpy(out[0])


class Calibrated(OpenVino):
    """nncf's static quantization: scales from eight batches of text that no workload has."""

    name = "OpenVINO calibrated"
    precisions = ("int8",)

    def quantized(self, folder):
        import nncf
        import transformers
        from harness import real_batch

        from bertfast.bench.measure import natural_lengths

        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        longest = transformers.BertConfig.from_pretrained(folder).max_position_embeddings
        lengths = [natural_lengths(8, seed, longest=min(longest, 128)) for seed in range(100, 108)]
        batches = [feed(real_batch(tokenizer, drawn)) for drawn in lengths]
        return kept(
            folder,
            ".ptq.xml",
            lambda model: nncf.quantize(
                model,
                nncf.Dataset(batches),
                subset_size=len(batches),
                model_type=nncf.ModelType.TRANSFORMER,
            ),
        )
