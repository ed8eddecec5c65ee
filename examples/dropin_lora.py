"""PEFT's LoRA on an accelerated model: PEFT's adapters, our kernels around them; merged, a plain
model again.

    python examples/dropin_lora.py
"""

import torch
from peft import LoraConfig, get_peft_model
from stdlib_text import docstrings, minilm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

import bertfast

MODULES = ("asyncio", "decimal", "ssl")


def main():
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=len(MODULES))
    model = get_peft_model(
        model,
        LoraConfig(
            task_type="SEQ_CLS",
            r=8,
            target_modules=["query", "value"],
        ),
    )
    print(bertfast.accelerate(model))  # the one line, before or after PEFT's

    texts = [(text, i) for i, module in enumerate(MODULES) for text in docstrings(module).values()]
    batches = torch.randperm(len(texts)).split(16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    model.train()
    for _ in range(2):
        losses = []
        for batch in batches:
            chosen = [texts[i] for i in batch]
            inputs = tokenizer(
                [text for text, _ in chosen],
                padding=True,
                truncation=True,
                max_length=64,
                return_tensors="pt",
            )
            loss = model(**inputs, labels=torch.tensor([label for _, label in chosen])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"mean loss of the epoch: {sum(losses) / len(losses):.2f}")

    model.eval()
    with torch.no_grad():
        before = model(**inputs).logits
        merged = model.merge_and_unload()
        print(f"merged: same logits within {(merged(**inputs).logits - before).abs().max():.1e}")
    print(bertfast.accelerate(merged))


if __name__ == "__main__":
    main()
