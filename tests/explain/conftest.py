import random

import pytest
import tiny

from bertfast.train import ClassifyConfig, finetune


@pytest.fixture(scope="session")
def colours(tmp_path_factory):
    """The folder of a BERT that learnt which colour is in a text, one word that decides, or none:
    without that class one colour's would be told by the absence of the others."""
    folder = tmp_path_factory.mktemp("colours")
    given = tiny.settings(folder, epochs=10)
    for name, n in (("train", 90), ("valid", 30)):
        r = random.Random(n)
        plain = [" ".join(r.choices(tiny.WORDS[3:], k=r.randint(2, 12))) for _ in range(n // 3)]
        rows = tiny.rows(n, n) + [{"text": text, "label": "none"} for text in plain]
        tiny.write(folder / f"{name}.jsonl", rows)
    finetune(ClassifyConfig(**given))
    return given["out"]
