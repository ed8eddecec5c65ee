"""examples/serve_fastapi.py in a process of its own, and clients here."""

import asyncio
import base64
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import bertfast

httpx = pytest.importorskip("httpx")
for name in ("fastapi", "uvicorn"):
    pytest.importorskip(name)
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
pytestmark = pytest.mark.slow
LIMITS = ["--most-inputs", "40", "--most-waiting", "100", "--tokens", "600", "--threads", "1"]


def start(folder, log) -> tuple[subprocess.Popen, str]:
    """The service, and where it answers."""
    command = [sys.executable, str(EXAMPLES / "serve_fastapi.py"), "--model", str(folder)]
    command += ["--name", "minilm", "--port", "0", *LIMITS]
    server = subprocess.Popen(command, stderr=open(log, "w"))  # noqa: SIM115
    for _ in range(600):
        if found := re.search(r"running on (http://\S+)", log.read_text()):
            return server, found[1]
        assert server.poll() is None, log.read_text()
        time.sleep(0.2)
    raise TimeoutError(log.read_text())


def ended(server, log):
    assert server.wait(30) == -signal.SIGTERM  # which uvicorn sends itself once it is done
    said = log.read_text()
    assert "Finished server process" in said and "Traceback" not in said, said


@pytest.fixture(scope="module")
def service(tmp_path_factory, frozen_minilm):
    log = tmp_path_factory.mktemp("serve") / "log"
    server, url = start(frozen_minilm, log)
    yield url
    server.send_signal(signal.SIGTERM)
    ended(server, log)


@pytest.fixture(scope="module")
def model(frozen_minilm):
    return bertfast.load_frozen(frozen_minilm)


@pytest.fixture(scope="module")
def texts():
    sys.path.insert(0, str(EXAMPLES))
    from stdlib_text import docstrings

    return [t for name in ("os", "math", "random") for t in docstrings(name).values()][:120]


def post(url, text, **options):
    given = {"model": "minilm", "input": text} | options
    return httpx.post(f"{url}/v1/embeddings", json=given, timeout=60)


def vectors(answer):
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [row["index"] for row in data] == list(range(len(data)))
    return np.array([row["embedding"] for row in data], np.float32)


def close(found, expected):
    """int8's scales are a token's: what else is in the batch changes rounding alone."""
    return np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_answers_are_encodes(service, model, texts):
    few = texts[:12]
    expected = model.encode(few)
    answer = post(service, few)
    assert close(vectors(answer), expected)
    tokens = sum(len(ids) for ids in model.tokenizer(few)["input_ids"])
    assert answer.json()["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert answer.json()["model"] == "minilm" and answer.json()["object"] == "list"
    assert close(vectors(post(service, few[0])), expected[:1])
    coded = post(service, few, encoding_format="base64").json()["data"]
    coded = [np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in coded]
    assert close(np.stack(coded), expected)
    short = model.encode(few, truncate_dim=64, normalize_embeddings=True)
    assert close(vectors(post(service, few, dimensions=64)), short)
    assert httpx.get(f"{service}/v1/models").json()["data"][0]["id"] == "minilm"


@pytest.mark.parametrize(
    "given, status, param, says",
    [
        ({"input": []}, 400, "input", "0 inputs"),
        ({"input": ["a"] * 41}, 400, "input", "41 inputs, expected 1 to 40"),
        ({"input": ["a", ""]}, 400, "input", "input 1 is an empty text"),
        (
            {"input": ["a", "word " * 300]},
            400,
            "input",
            "input 1 has 302 tokens, the model takes 256",
        ),
        ({"input": [5, 6]}, 400, "input", "token ids"),
        ({"input": [[5, 6]]}, 400, "input", "token ids"),
        ({"input": {"a": 1}}, 400, "input", "input"),
        ({}, 400, "input", "Field required"),
        ({"input": "a", "model": "ada"}, 404, "model", "no model 'ada'"),
        ({"input": "a", "dimensions": 385}, 400, "dimensions", "385 of 384 dimensions"),
        ({"input": "a", "dimensions": 0}, 400, "dimensions", "greater than"),
        ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format", "float"),
    ],
)
def test_errors_are_openais(service, given, status, param, says):
    answer = httpx.post(f"{service}/v1/embeddings", json={"model": "minilm"} | given)
    error = answer.json()["error"]
    assert answer.status_code == status and set(error) == {"message", "type", "param", "code"}
    assert says in error["message"] and error["type"] == "invalid_request_error", error
    assert error["param"] == param


@pytest.mark.parametrize("body", [b"{", b'{"model": "minilm", "input": "\\ud800"}'])
def test_a_body_that_is_no_text_is_refused(service, body):
    answer = httpx.post(f"{service}/v1/embeddings", content=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert httpx.get(f"{service}/nowhere").json()["error"]["type"] == "invalid_request_error"


async def load(url, texts, clients):
    """Each text in a request of its own, from so many clients; seconds, and the answers."""
    found, left = [None] * len(texts), list(range(len(texts)))

    async def client():
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            while left:
                i = left.pop()
                given = {"model": "minilm", "input": texts[i]}
                found[i] = await http.post("/v1/embeddings", json=given)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - start, found


def test_concurrent_requests_share_batches(service, model, texts):
    health = lambda: httpx.get(f"{service}/health").json()
    alone = min(asyncio.run(load(service, texts, 1))[0] for _ in range(2))
    before = health()
    together, answers = asyncio.run(load(service, texts, 24))
    after = health()
    together = min(together, asyncio.run(load(service, texts, 24))[0])
    assert close(np.concatenate([vectors(a) for a in answers]), model.encode(texts))
    assert after["texts"] - before["texts"] == len(texts)
    batches = after["batches"] - before["batches"]
    assert batches <= len(texts) / 4 and after["waiting"] == 0
    assert together < alone, (together, alone)
    print(
        f"{len(texts)} texts: {len(texts) / alone:.0f} a second alone, {len(texts) / together:.0f} in {batches} batches"
    )


def test_a_full_queue_refuses_and_recovers(service, texts):
    async def flood():
        async with httpx.AsyncClient(base_url=service, timeout=60) as http:
            given = {"model": "minilm", "input": texts[:40]}
            return await asyncio.gather(
                *(http.post("/v1/embeddings", json=given) for _ in range(12))
            )

    answers = asyncio.run(flood())
    assert {a.status_code for a in answers} == {200, 503}
    refused = next(a for a in answers if a.status_code == 503)
    assert refused.json()["error"]["type"] == "server_error"
    assert post(service, "a text").status_code == 200


def test_what_was_accepted_is_answered_before_the_end(tmp_path, texts, frozen_minilm):
    server, url = start(frozen_minilm, tmp_path / "log")

    async def stopped():
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            given = {"model": "minilm", "input": texts[:40]}
            answers = [
                asyncio.create_task(http.post("/v1/embeddings", json=given)) for _ in range(2)
            ]
            while not (await http.get("/health")).json()["batches"]:
                await asyncio.sleep(0.001)
            server.send_signal(signal.SIGTERM)
            return await asyncio.gather(*answers)

    assert [a.status_code for a in asyncio.run(stopped())] == [200, 200]
    ended(server, tmp_path / "log")
