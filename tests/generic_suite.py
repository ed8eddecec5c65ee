"""transformers' own generic suite (its tests/test_modeling_common.py) over small models.

test_dropin_generic.py runs this file by pytest in a process of its own, with SUITE the path of
that file, ACCELERATE 1 to accelerate every model as it is built, and SEED a number.
"""

import importlib.util
import os
import sys
import types
import unittest

import torch
import transformers

import bertfast

torch.set_num_threads(1)


def load():
    """The suite as a module, without the two mixins of it that its source distribution lacks."""
    path = os.environ["SUITE"]
    for name, missing in (
        ("suite", None),
        ("suite.exporters", None),
        ("suite.exporters.test_export", "ExportTesterMixin"),
        ("suite.generation", None),
        ("suite.generation.test_utils", "GenerationTesterMixin"),
    ):
        module = types.ModuleType(name)
        module.__path__ = [os.path.dirname(path)]
        if missing:
            setattr(module, missing, type(missing, (), {}))
        sys.modules[name] = module
    spec = importlib.util.spec_from_file_location("suite.test_modeling_common", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if os.environ["ACCELERATE"] == "1":
    post_init = transformers.PreTrainedModel.post_init

    def accelerated_post_init(self):
        post_init(self)
        assert bertfast.accelerate(self).layers

    transformers.PreTrainedModel.post_init = accelerated_post_init


# With more, stock's eager and SDPA are further apart than the suite's bounds.
GATED = dict(initializer_range=0.2)
TOKENS = dict(pad_token_id=0, bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2)
OWN = {
    "deberta-v2": dict(relative_attention=True, position_buckets=4, pos_att_type=["c2p", "p2c"]),
    # its second layer sees 2 tokens to either side
    "modernbert": GATED | TOKENS | dict(local_attention=4, global_attn_every_n_layers=2),
    "nomic_bert": GATED,
    "gte": GATED,
    "eurobert": GATED | TOKENS | dict(num_key_value_heads=2),
}


class Tester:
    """What the suite asks of a model's tester: sizes, a configuration and inputs."""

    batch_size, seq_length, num_hidden_layers, hidden_size = 7, 9, 2, 32
    num_attention_heads, num_choices, num_labels, type_sequence_label_size = 4, 4, 3, 2
    is_training = True

    def __init__(self, config_class):
        self.config_class = config_class

    def get_config(self):
        kind = self.config_class.model_type
        inner = "hidden_dim" if kind == "distilbert" else "intermediate_size"
        options = dict(
            vocab_size=99,
            max_position_embeddings=64,
            initializer_range=0.5,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
        return self.config_class(**options | {inner: 37} | OWN.get(kind, {}))

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, 99, (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids)
        mask[1::2, -3:] = 0
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


common = load()


def suite(family, *heads):
    classes = tuple(getattr(transformers, family + head) for head in ("Model", *heads))

    class Suite(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = classes
        has_attentions = True

        def setUp(self):
            transformers.set_seed(int(os.environ["SEED"]))
            self.model_tester = Tester(classes[0].config_class)

    return Suite


HEADS = (
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
TestBert = suite("Bert", *HEADS, "ForPreTraining", "ForMultipleChoice")
TestRoberta = suite("Roberta", *HEADS, "ForMultipleChoice")
TestDistilBert = suite("DistilBert", *HEADS, "ForMultipleChoice")
TestDebertaV2 = suite("DebertaV2", *HEADS, "ForMultipleChoice")
TestModernBert = suite("ModernBert", *HEADS, "ForMultipleChoice")
for family in ("NomicBert", "Gte", "EuroBert"):
    if hasattr(transformers, f"{family}Model"):  # transformers 5.17 has not all of them
        globals()[f"Test{family}"] = suite(family, *HEADS[:3])
