"""Holds two checkouts against each other: every result of both, byte by byte.

    python benchmarks/same_results.py --beside PYTHON [--isas avx2 ...] [--threads 1 2]

PYTHON: the interpreter of the other checkout's environment. Outputs, losses and gradients of the
native model and of accelerated ones, small and of odd sizes, forward and backward with dropout.
Exit 1 where something differs or only one has it. For changes that mean to keep all arithmetic.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys

LENGTHS = (37, 1, 20, 70)
FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "DistilBert", "MPNet")


def config(family, **options):
    import transformers

    sizes = {
        "vocab_size": 90,
        "hidden_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "intermediate_size": 104,
        "max_position_embeddings": 128,
        "type_vocab_size": 2,
        "initializer_range": 0.2,
    } | options
    if family == "Electra":
        sizes["embedding_size"] = 40
    if family == "DistilBert":
        names = {"hidden_size": "dim", "num_hidden_layers": "n_layers"}
        names |= {"intermediate_size": "hidden_dim", "num_attention_heads": "n_heads"}
        sizes.pop("type_vocab_size")
        sizes = {names.get(k, k): v for k, v in sizes.items()}
    c = getattr(transformers, f"{family}Config")(**sizes)
    c._attn_implementation = "eager" if family == "MPNet" else "sdpa"
    return c


def inputs(left=False):
    import torch

    g = torch.Generator().manual_seed(1)
    longest = max(LENGTHS)
    mask = (torch.arange(longest) < torch.tensor(LENGTHS)[:, None]).long()
    ids = torch.randint(5, 90, mask.shape, generator=g)
    if left:
        mask = mask.flip(1)
    return {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}


def results():
    """(name, tensor) of everything."""
    import torch

    import bertfast

    def native(cls="BertModel", **options):
        torch.manual_seed(0)
        return getattr(bertfast, cls)(config("Bert", **options)).eval()

    def tensors(name, output):
        for key, value in output.items():
            for i, t in enumerate(value if isinstance(value, tuple) else (value,)):
                yield f"{name}: {key} {i}", t

    def trained(name, model, given, **labels):
        torch.manual_seed(3)
        out = model.train()(**given, **labels)
        loss = out.loss if labels else out[0].float().square().mean()
        loss.backward()
        yield f"{name}: loss", loss
        for key, p in model.named_parameters():
            if p.grad is not None:
                yield f"{name}: gradient of {key}", p.grad

    def named(dtype):
        return str(dtype).removeprefix("torch.")

    batch, labels = inputs(), torch.tensor([0, 1, 1, 0])
    marked = torch.where(inputs()["attention_mask"] == 1, inputs()["input_ids"], -100)
    for dtype in (torch.float32, torch.bfloat16):
        for act in ("gelu", "relu", "gelu_new"):
            with torch.no_grad():
                model = native(hidden_act=act).to(dtype)
                yield from tensors(f"live {named(dtype)} {act}", model(**batch))
    with torch.no_grad():
        model = native()
        asked = {"output_hidden_states": True, "output_attentions": True}
        yield from tensors("states", model(**batch, **asked))
        yield from tensors("left", model(**inputs(True)))
        with torch.autocast("cpu", torch.bfloat16):
            yield from tensors("autocast", model(**batch))
        for head in ("BertForSequenceClassification", "BertForMaskedLM", "BertForPreTraining"):
            yield from tensors(head, native(head)(**batch))
        for precision in ("fp32", "bf16", "int8"):
            for head in ("BertModel", "BertForSequenceClassification"):
                model = bertfast.freeze(native(head), precision)
                yield from tensors(f"frozen {precision} {head}", model(**batch))
                yield from tensors(
                    f"frozen {precision} {head} states", model(**batch, output_hidden_states=True)
                )
    for head, given in (
        ("BertForSequenceClassification", {"labels": labels}),
        ("BertForMaskedLM", {"labels": marked}),
    ):
        yield from trained(f"train {head}", native(head), batch, **given)
        model = native(head)
        model.gradient_checkpointing_enable()
        yield from trained(f"checkpointing {head}", model, batch, **given)
        with torch.autocast("cpu", torch.bfloat16):
            yield from trained(f"autocast {head}", native(head), batch, **given)
        yield from trained(f"bf16 {head}", native(head).bfloat16(), batch, **given)
    small = {k: v[:3, :20] for k, v in batch.items()}
    for backend in ("reference", "triton"):
        with bertfast.backend(backend):
            model = native("BertForSequenceClassification", num_hidden_layers=1)
            yield from trained(f"{backend}", model, small, labels=labels[:3])
            with torch.no_grad():
                yield from tensors(f"{backend}", native(num_hidden_layers=1)(**small))
    import transformers

    for family in FAMILIES:
        for padding in ("stock", "zeros"):
            torch.manual_seed(0)
            model = getattr(transformers, f"{family}Model")(config(family)).eval()
            bertfast.accelerate(model, strict=True, padding=padding)
            with torch.no_grad():
                yield from tensors(f"{family} {padding}", model(**batch))
                yield from tensors(f"{family} {padding} left", model(**inputs(True)))
                with torch.autocast("cpu", torch.bfloat16):
                    yield from tensors(f"{family} {padding} autocast", model(**batch))
            yield from trained(f"{family} {padding}", model, batch)


def digests() -> dict[str, str]:
    import torch

    found = {}
    for name, t in results():
        t = t.detach().contiguous()
        raw = t.view(torch.uint8) if t.dim() else t[None].view(torch.uint8)
        digest = hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:16]
        found[name] = f"{t.dtype} {list(t.shape)} {digest}"
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beside", help="another checkout's python")
    parser.add_argument("--isas", nargs="*", default=[""], help="instruction sets (the best)")
    parser.add_argument("--threads", nargs="*", default=["1", "2"])
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.once:
        print(json.dumps(digests()))
        return None
    if not args.beside:
        parser.error("--beside is missing: the python of the checkout to hold this one against")
    different = 0
    for isa in args.isas:
        for threads in args.threads:
            settings = {"OMP_NUM_THREADS": threads, "TRITON_INTERPRET": "1"}
            settings |= {"BERTFAST_CPU_ISA": isa} if isa else {}
            here, there = (
                json.loads(
                    subprocess.run(
                        [python, __file__, "--once"],
                        check=True,
                        stdout=subprocess.PIPE,
                        text=True,
                        env=os.environ | settings,
                    ).stdout.splitlines()[-1]
                )
                for python in (sys.executable, args.beside)
            )
            names = [n for n in here | there if here.get(n) != there.get(n)]
            for name in names:
                print(f"{name}: {here.get(name)}, there {there.get(name)}")
            where = f"{isa or 'the best instruction set'}, {threads} threads"
            print(f"{where}: {len(here)} results, {len(names)} differ")
            different += len(names)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
