"""transformers' Trainer on an accelerated model: which module does a docstring come from?

python examples/dropin_trainer.py
"""

import tempfile

from stdlib_text import docstrings, minilm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import bertfast

MODULES = ("asyncio", "decimal", "ssl", "statistics")


def main():
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=len(MODULES))
    print(bertfast.accelerate(model))  # the one line

    rows = [
        tokenizer(text, truncation=True, max_length=64) | {"labels": label}
        for label, module in enumerate(MODULES)
        for text in docstrings(module).values()
    ]
    test, train = rows[::4], [row for i, row in enumerate(rows) if i % 4]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                num_train_epochs=2,
                per_device_train_batch_size=16,
                learning_rate=2e-4,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=train,
            eval_dataset=test,
            compute_metrics=lambda p: {"accuracy": (p.predictions.argmax(1) == p.label_ids).mean()},
        )
        trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"]
    print(f"trained on {len(train)} docstrings; accuracy on {len(test)} others: {accuracy:.2f}")


if __name__ == "__main__":
    main()
