"""A bi-encoder for search, trained by sentence-transformers' own trainer with three of its losses:
the accelerated model's losses are stock's, step for step.

python examples/dropin_bi_encoder.py
"""

import tempfile
import time

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from stdlib_text import docstrings, minilm

import bertfast

MODULES = ("asyncio", "json", "math", "os", "random", "socket")
STEPS = 3
LOSSES = {
    "MultipleNegativesRankingLoss": MultipleNegativesRankingLoss,
    "CachedMultipleNegativesRankingLoss": lambda model: CachedMultipleNegativesRankingLoss(
        model, mini_batch_size=8
    ),
    "MatryoshkaLoss": lambda model: MatryoshkaLoss(
        model, MultipleNegativesRankingLoss(model), [384, 128, 32]
    ),
}


def train(model, make_loss, pairs) -> tuple[list[float], float]:
    """Losses of the steps, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = SentenceTransformerTrainer(
            model,
            SentenceTransformerTrainingArguments(
                folder,
                max_steps=STEPS,
                per_device_train_batch_size=16,
                learning_rate=2e-5,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=Dataset.from_dict(
                dict(zip(("anchor", "positive"), map(list, zip(*pairs, strict=True)), strict=True))
            ),
            loss=make_loss(model),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], seconds


def without_dropout():
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return SentenceTransformer(minilm(), device="cpu", config_kwargs=off)


def main():
    pairs = [
        (f"{module} {name}".replace("_", " "), text)
        for module in MODULES
        for name, text in docstrings(module).items()
    ]
    for i, (name, make_loss) in enumerate(LOSSES.items()):
        stock, ours = without_dropout(), without_dropout()
        report = bertfast.accelerate(ours)  # the one line
        if i == 0:
            print(report)
        (expected, theirs), (found, seconds) = (
            train(model, make_loss, pairs) for model in (stock, ours)
        )
        error = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
        print(f"{name}: {len(found)} losses within {error:.1e}; {theirs / seconds:.2f}x as fast")


if __name__ == "__main__":
    main()
