"""The gate of csrc/test_mutation.py for train/, data/ and model/: faults that a test must catch."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, file_of

# (name, file of bertfast, text that occurs once, its replacement, test file that must fail, which of
# its tests)
MUTANTS = [
    ("decay of biases and norms", "train/optimizer", '<= 1], "weight_decay": 0.0}', '<= 1], "weight_decay": weight_decay}', "optimizer", "decay"),
    ("warm-up one step ahead", "train/optimizer", "return config.lr * step / warmup", "return config.lr * (step + 1) / warmup", "train", "schedules"),
    ("decay from the first step", "train/optimizer", "(step - warmup) / max(1, steps - warmup)", "(step - warmup) / max(1, steps)", "train", "schedules"),
    ("AdamW with beta2 as it likes", "train/optimizer", '"betas": (0.9, config.beta2), "fused"', '"betas": (0.9, 0.999), "fused"', "optimizer", "beta2"),
    ("LAMB with beta2 as it likes", "train/optimizer", "Lamb(groups, lr=config.lr, betas=(0.9, config.beta2))", "Lamb(groups, lr=config.lr)", "optimizer", "beta2"),
    ("LAMB's mean not corrected", "train/lamb", "mean / (1 - beta1 ** step.double())", "mean", "optimizer", "lamb_follows"),
    ("LAMB scales vectors", "train/lamb", "if p.dim() > 1:", "if p.dim() > 0:", "optimizer", "lamb_follows"),
    ("clipped at 1.41 times the norm", "train/step", "clip_grad_norm_(self.trained, self.clip)", "clip_grad_norm_(self.trained, self.clip * 1.41)", "step", "clip"),
    ("an update after a broken one", "train/step", "torch.maximum(self.skip, broken.float())", "broken.float()", "step", "update_skips"),
    ("losses of micro-batches overwrite", "train/step", "self.losses += means.detach()", "self.losses.copy_(means.detach())", "loop", "losses_of_a_step"),
    ("micro-batches weigh alike", "train/loop", "self.objectives).sum(0)", "self.objectives).mean(0)", "loop", "losses_of_a_step"),
    ("the rate of the next step", "train/loop", "rate = learning_rate(self.step, ", "rate = learning_rate(self.step + 1, ", "loop", "losses_of_a_step"),
    ("the same dropout at every step", "train/loop", "_seed(self.config.seed, self.step, ", "_seed(self.config.seed, 0, ", "loop", "dropout_of_each_step"),
    ("no dropout after an evaluation", "train/loop", "            self.model.train()\n", "            pass\n", "loop", "dropout_of_each_step"),
    ("dropout in evaluations", "train/loop", "        self.model.eval()\n        try:", "        try:", "loop", "dropout_of_each_step"),
    ("patience of one more", "train/loop", '"bad_evaluations"] >= config.patience', '"bad_evaluations"] > config.patience', "loop", "patience"),
    ("the worst evaluation kept", "train/loop", "sign = -1 if config.metric in LOWER_IS_BETTER else 1", "sign = 1", "loop", "patience"),
    ("an equal evaluation is better", "train/loop", "or not sign * value <= sign *", "or not sign * value < sign *", "loop", "patience"),
    ("one checkpoint more", "train/loop", "self.config.keep, self.mine", "self.config.keep + 1, self.mine", "loop", "keep"),
    ("resumed at the start of the epoch", "train/loop", "{k: saved[k] for k in self.state}", '{k: saved[k] for k in self.state} | {"done": 0}', "loop", "goes_on"),
    ("Adam's step dropped under LAMB", "train/checkpoint", 'value.to(p.device) if field == "step"', 'value.to(p.device) * (type(optimizer).__name__ != "Lamb") if field == "step"', "loop", "goes_on"),
    ("Adam's moments dropped", "train/checkpoint", "like(value, p)\n", "like(value * (field == 'step'), p)\n", "loop", "goes_on"),
    ("the optimizer's checksum not read", "train/checkpoint", "_check(checkpoint / file, expected)", "_check(checkpoint / MODEL, body['sha256'][MODEL])", "train", "flipped_bit and optimizer"),
    ("weights of classes not in the mean", "train/tasks/classify", "float(self.class_weights[batch.targets].sum())", "float(batch.targets.numel())", "classify_loss", "class_weights_in_the_loss"),
    ("weights of other classes", "train/tasks/classify", "get(name, 1)) for name in own]", "get(name, 1)) for name in own[::-1]]", "classify_loss", "class_weights_in_the_loss"),
    ("no dropout before the classifier", "model/heads", "return self.classifier(self.dropout(self.bert.pooler(hidden)))", "return self.classifier(self.bert.pooler(hidden))", "classify_loss", "head_has_dropout"),
    ("a layer more frozen", "train/networks", "*own[:count])", "*own[: count + 1])", "train", "freezing"),
    ("fillers have a label", "train/packed", "self.labels.numpy(), IGNORED", "self.labels.numpy(), 0", "step", "fillers_of_masked"),
    ("positions run on over texts", "train/packed", "np.repeat(starts[:-1], lengths)", "np.repeat(starts[:1], sum(lengths))", "step", "packed_rows"),
    ("a mean over absent classes", "train/metrics", "return sorted(set(np.unique(targets)) | set(np.unique(y)))", "return list(range(classes))", "metrics", "macro"),
    ("macro for micro", "train/metrics", '"micro_f1": score("micro")', '"micro_f1": score("macro")', "metrics", "macro"),
    ("a label from a half on", "train/metrics", 'logits > 0 if task == "multi_label"', 'logits > 0.5 if task == "multi_label"', "metrics", "multi_label"),
    ("logits in order of length", "train/networks", "found |= zip(chosen, values", "found |= zip(sorted(chosen), values", "metrics", "order"),
    ("pairs weigh as tokens do", "train/pretrain", "return [targets, sequences] if", "return [targets, targets] if", "pretrain_data", "weights_of_the_losses"),
    ("next-sentence loss dropped", "train/pretrain", "losses.append(F.cross_entropy(relation, batch.targets, reduction=\"sum\"))", "losses.append(relation.sum() * 0)", "pretrain", "packed_loss"),
    ("validation by the run's seed", "train/pretrain", 'words, seed=0, **options)', 'words, seed=config.seed, **options)', "pretrain_data", "same_validation"),
    ("spans longer than half the budget", "data/masking", "np.clip(budget // 2, 1, _SPAN_WORDS)", "np.clip(budget, 1, _SPAN_WORDS)", "masking", "longest_span"),
    ("85% of the masked show it", "data/masking", "np.where(fate < 0.8,", "np.where(fate < 0.85,", "masking", "shares"),
    ("5% of the masked as they are", "data/masking", "np.where(fate < 0.9,", "np.where(fate < 0.95,", "masking", "shares"),
    ("special tokens in their place", "data/masking", "words.regular[(other * len(words.regular)).astype(np.int64)]", "(other * words.size).astype(np.int64)", "masking", "shares"),
    ("a token less of each sequence", "data/masking", "np.round(candidates * share)", "np.floor(candidates * share)", "masking", "shares"),
    ("labels of next sentences swapped", "data/sequences", "window.random_next[chosen].astype(np.int64)", "(~window.random_next[chosen]).astype(np.int64)", "sequences", "pairs"),
    ("[SEP] after A is of B", "data/sequences", "begin_b = offsets[:-1] + size_a + 2", "begin_b = offsets[:-1] + size_a + 1", "sequences", "pairs"),
    ("pairs cut at the end alone", "data/sequences", "front = int(rng.binomial(n, 0.5))", "front = 0", "sequences", "cut_pairs"),
    ("no short pairs", "data/sequences", "target = limit if rng.random() >= _SHORT", "target = limit if rng.random() >= 0", "sequences", "short_pairs"),
    ("the same order in every pass", "data/sequences", "order = np.random.default_rng([self.seed, epoch])", "order = np.random.default_rng([self.seed, 0])", "sequences", "windows"),
    ("the same batches in every epoch", "data/batching", "default_rng([seed, epoch])", "default_rng([seed, 0])", "data_batches", "test_batches"),
    ("padding seen", "data/batching", "< lengths[:, None])", "<= lengths[:, None])", "data_batches", "collate"),
    ("equal texts leak by parity", "data/splitting", "groups.setdefault(key, [])", "groups.setdefault((key, i % 2), [])", "splitting", "duplicates_on_one_side"),
    ("classes not stratified", "data/splitting", "classes.setdefault(strata[group[0]], [])", "classes.setdefault(0, [])", "splitting", "stratified"),
    ("the last of equal documents stays", "data/dedup", "yield first[~new], positions[~new]", "yield positions[~new], first[~new]", "prepare", "validation_files"),
    ("marks are no letters", "data/corpus", 'k[0] != "M" and k != "Cf"', "True", "corpus", "marks"),
    ("vowel signs stripped", "data/wordpiece", "accents = False if", "accents = None if", "wordpiece", "accents"),
    ("nothing for validation", "data/prepare", "max(config.valid_fraction, np.nextafter(first, 1))", "config.valid_fraction", "prepare", "both_parts"),
    ("steps of an epoch rounded down", "train/task", "math.ceil(len(self.batches(i)) / group)", "len(self.batches(i)) // group", "loop", "losses_of_a_step"),
    ("flags of a row weigh as one", "train/tasks/classify", "return float(batch.targets.numel())", "return float(len(batch.targets))", "classify_loss", "mean"),
    ("squares of all outputs", "train/tasks/classify", "F.mse_loss(logits[:, 0], targets", "2 * F.mse_loss(logits[:, 0], targets", "classify_loss", "mean"),
    ("pairs right per masked token", "train/pretrain", "sums[5] / sums[6]", "sums[5] / sums[3]", "pretrain_data", "figures_of_an_evaluation"),
    ("commonest token always right", "train/pretrain", "sums[2] / sums[3]", "sums[3] / sums[3]", "pretrain_data", "figures_of_an_evaluation"),
    ("a loss per sequence", "train/pretrain", "loss = sums[0] / sums[3]", "loss = sums[0] / len(batches)", "pretrain_data", "figures_of_an_evaluation"),
    ("pooled from the second token", "train/pretrain", "torch.cat([batch.first, rows])", "torch.cat([batch.first + 1, rows])", "pretrain", "packed_loss"),
    ("fate chooses the replacement", "data/masking", "place[positions], _REPLACEMENT)", "place[positions], _FATE)", "masking", "whole_vocabulary"),
    ("masks by the place in the batch", "data/masking", "uniform(keys[owner], place[first], _UNIT)", "uniform(keys[owner], first, _UNIT)", "masking", "batch_does_not_matter"),
    ("entities drawn later", "data/masking", "draw / _ENTITY_ODDS", "draw * _ENTITY_ODDS", "masking", "entities"),
    ("pairs with their own document", "data/sequences", "other += other >= document", "other += 0", "sequences", "pairs"),
    ("positions run on over sequences", "data/sequences", "np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)", "np.arange(offsets[-1]) % 512", "sequences", "runs_hold"),
    ("batches a text short", "data/batching", 'total[start] + tokens, side="right")', 'total[start] + tokens, side="left")', "data_batches", "batches_of_tokens"),
    ("case tells texts apart", "data/examples", "clean_text(s).casefold()", "clean_text(s)", "splitting", "duplicates_on_one_side"),
    ("labels sorted as text", "data/labels", "key=lambda n: (int(n), n)", "key=str", "data_examples", "numbers_sort"),
    ("hashes without their order", "data/dedup", "mix(hashes + mix(place.astype(np.uint64)))", "mix(hashes)", "prepare", "similarity_estimates"),
    ("one dropout mask in all places", "model/bert", "return ops.draw_seeds(n, device) if", "return ops.draw_seeds(1, device).expand(n, 2) if", "model", "dropout_of_each_place"),
    ("no padding at positions of their own", "model/bert", "positions = packing.columns()", "positions = packing.columns() * 0", "model", "heads"),
    ("tokens seen of a step alone", "train/loop", 'state["tokens"] += int(', 'state["tokens"] = int(', "loop", "losses_of_a_step"),
    ("bf16 in name alone", "train/loop", "enabled=self.low == torch.bfloat16", "enabled=False", "loop", "bf16"),
    ("a correlation without its sign", "train/metrics", "np.corrcoef(targets, y)[0, 1]", "abs(np.corrcoef(targets, y)[0, 1])", "metrics", "regression"),
    ("truth for prediction", "train/metrics", "sk.r2_score(targets, y)", "sk.r2_score(y, targets)", "metrics", "regression"),
    ("documents half alike dropped", "data/prepare", ">= config.similarity", ">= 0.5 * config.similarity", "prepare", "half_alike"),
    ("sentences in three documents dropped", "data/prepare", "limit = max(20, ", "limit = max(2, ", "prepare", "half_alike"),
    ("words of the validation part learnt", "data/prepare", 'if part == "train":', "if part:", "prepare", "vocabulary"),
    ("ids that wrap round", "data/shards", "np.uint16 if vocab_size <= 2**16", "np.uint16 if vocab_size <= 2**17", "prepare", "dtype"),
    ("a lone # goes on a word", "data/masking", 't.startswith("##")', 't.startswith("#")', "masking", "entities"),
    ("a third of the pairs random", "data/sequences", "rng.random() < 0.5", "rng.random() < 0.35", "sequences", "short_pairs"),
    ("text that B displaced lost", "data/sequences", "                i = cut\n", "                i = j\n", "sequences", "leave_nothing_out"),
    ("the same masks in all sequences", "data/sequences", "keys = mix(base + np.arange(len(first), dtype=np.uint64))", "keys = np.repeat(mix(base), len(first))", "sequences", "short_pairs"),
    ("pooler without its tanh", "model/encoder", "self.activation(self.dense(first))", "self.dense(first)", "model", "heads"),
    ("positions from 1", "model/bert", "device=input_ids.device) - starts", "device=input_ids.device) - starts + 1", "pretrain", "packed_encoder"),
    ("decoder not tied", "model/heads", "predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight", "pass", "model", "tied"),
    ("a norm less before the decoder", "model/heads", "return ops.add_layer_norm(x, None, norm.weight, norm.bias, norm.eps)", "return x", "model", "heads"),
    ("no dropout in the classifier", "model/heads", "self.classifier(self.dropout(found.pooled))", "self.classifier(found.pooled)", "model", "head_has_dropout"),
    ("next-sentence loss counts half", "model/heads", "loss = loss + F.cross_entropy(relation", "loss = loss + 0.5 * F.cross_entropy(relation", "model", "heads"),
    ("gamma is no weight", "model/tensors", '"LayerNorm.gamma": "LayerNorm.weight"', '"LayerNorm.gamma": "LayerNorm.bias"', "checkpoint", "old_names"),
    ("initialised at twice the range", "model/bert", "std=self.config.initializer_range", "std=2 * self.config.initializer_range", "model", "initial"),
    ("strides of the value's weights as the query's", "ops/linear_act", "for t in tensors):\n        return tuple", "for t in tensors[:2]):\n        return tuple", "linear_act", "different_strides"),
    ("seeds of the worst kept", "train/finetune", "sign = -1 if config.metric in LOWER_IS_BETTER else 1", "sign = -1", "seeds", "over_seeds"),
    ("thresholds between equal ones", "train/metrics", "f1[:-1][p[:-1] == p[1:]] = -1", "pass", "seeds", "beside_a_search"),
    ("a kept head is redrawn", "train/opening", "fresh = bool(lacking)", "fresh = True", "any_family", "heads_stay"),
    ("a base model gives classes", "train/opening", "if other or lacking:", "if False:", "any_family", "no_classifier"),
    ("padding read as tokens", "train/networks", "rows.index if batch.positions is None", "rows.index * 0 if batch.positions is None", "any_family", "padded_rows"),
    ("gain without its discount", "train/ranking", "labels[order][:at] @ discounts", "labels[order][:at].sum()", "pairs", "beside_scikit"),
    ("ranks from 0", "train/ranking", "1.0 / (hits[0] + 1)", "1.0 / max(1, hits[0])", "pairs", "beside_scikit"),
    ("relevances as they are", "train/tasks/pairs", "pos_weight=weight", "pos_weight=None", "pairs", "weight_of_relevant"),
    ("a query in two parts", "data/candidates", "(clean_text(text).casefold(),) for text in self.texts", "(text,) for text in map(str, range(len(self)))", "pairs", "one_part"),
    ("the least doubtful labels first", "data/noise", "np.argsort(-margin", "np.argsort(margin", "noise", "changed_labels"),
    ("context on the richer side", "data/aligned", "np.where(held, np.minimum(left, right), -1)", "np.where(held, np.maximum(left, right), -1)", "aligned", "context"),
    ("I- after O goes on", "data/tag_schemes", "begins = letter in _OPEN or closed or kind != before", "begins = letter in _OPEN or kind != before", "tagged", "plain_tags_and"),
    ("partial counts whole", "train/entities", 'n["correct"] + 0.5 * n["partial"]', 'n["correct"] + n["partial"]', "entities", "hand or brute"),
    ("weights of tags not in the mean", "train/tasks/tokens", "return float(self.class_weights[real].sum())", "return float(len(real))", "tokens", "loss_is"),
]  # fmt: skip
# "i/n": every n-th from the i-th on.
FIRST, STEP = map(int, os.environ.get("BERTFAST_SHARE", "0/1").split("/"))
CHOSEN = MUTANTS[FIRST::STEP]

# Tests of the package in a folder, whatever package is installed, each in a child of a process that
# has imported what takes seconds.
SERVER = """
import importlib.util, json, os, sys
sys.path.pop(0)
import accelerate, pytest, sklearn.metrics, torch, torch.utils.tensorboard
from transformers import AutoTokenizer, BertForPreTraining, BertTokenizer
while line := sys.stdin.readline():
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    folder, log, *arguments = json.loads(line)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    place = {"submodule_search_locations": [folder]}
    spec = importlib.util.spec_from_file_location("bertfast", folder + "/__init__.py", **place)
    sys.modules["bertfast"] = package = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    code = pytest.main(["-x", "-q", "-m", "", *arguments])
    sys.stdout.flush()
    os._exit(code)
"""


class Runner:
    """A copy of the package, and runs of the tests on it."""

    def __init__(self, folder):
        self.package, self.log = folder / "bertfast", folder / "log"
        shutil.copytree(ROOT / "bertfast", self.package)
        command = [sys.executable, "-B", "-c", SERVER]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=-1, stdout=-1, text=True)

    def run(self, files, which) -> tuple[int, str]:
        """pytest's exit code, and the end of what it says."""
        arguments = [str(self.package), str(self.log), *map(str, files), "-k", which]
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), self.log.read_text()[-2000:]


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    runner = Runner(tmp_path_factory.mktemp("mutants"))
    yield runner
    runner.process.stdin.close()
    runner.process.wait()


@pytest.mark.slow
def test_the_sources_pass(runner):
    which = " or ".join(sorted({f"({m[5]})" for m in CHOSEN}))
    code, said = runner.run({file_of(m[4]) for m in CHOSEN}, which)
    assert code == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("name, file, old, new, stem, which", CHOSEN, ids=[m[0] for m in CHOSEN])
def test_fault_is_caught(runner, name, file, old, new, stem, which):
    path = runner.package / f"{file}.py"
    source = path.read_text()
    path.write_text(source.replace(old, new))
    try:
        code, said = runner.run([file_of(stem)], which)
    finally:
        path.write_text(source)
    assert code == 1, f"{name} survived:\n{said}"
    assert "error during collection" not in said


def test_gate_is_complete():
    for name, file, old, new, stem, _ in MUTANTS:
        path = ROOT / "bertfast" / f"{file}.py"
        assert path.read_text().count(old) == 1, f"{name}: adapt the gate to {path.name}"
        assert old != new and file_of(stem)
