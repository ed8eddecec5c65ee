"""An embedding service that batches concurrent requests and speaks OpenAI's embeddings format.

    bertfast quantize --model MODEL --precision int8 --out small
    python examples/serve_fastapi.py --model small --port 8000
    curl localhost:8000/v1/embeddings -H 'Content-Type: application/json' \
        -d '{"model": "small", "input": ["a text", "another"]}'

Texts of all requests wait in one queue. One thread takes as many of them as a budget of tokens
holds, after a few milliseconds in which others may come, and runs the frozen model. An example, not
a product: keys, TLS and limits of a body's size are a proxy's.
"""

import argparse
import asyncio
import base64
import copy
import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Literal, NamedTuple

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

import bertfast


class ApiError(Exception):
    """What becomes OpenAI's error; param is the field that is at fault."""

    def __init__(self, status: int, message: str, param: str | None = None):
        kind = "invalid_request_error" if status < 500 else "server_error"
        code = "model_not_found" if param == "model" else None
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.response = JSONResponse({"error": error}, status)


class Text(NamedTuple):
    text: str
    tokens: int
    vector: asyncio.Future


class Batcher:
    def __init__(self, model, budget: int, wait: float, most_waiting: int, threads: int):
        self.model, self.budget, self.wait, self.most_waiting = model, budget, wait, most_waiting
        self.tokenizer = copy.deepcopy(model.tokenizer)  # the model's own is its thread's
        self.prompt = model.prompts.get(model.default_prompt_name) or ""
        self.waiting, self.arrived = deque(), asyncio.Event()
        self.texts = self.batches = 0
        self.counting = ThreadPoolExecutor(1)
        self.running = ThreadPoolExecutor(1, "model", torch.set_num_threads, (threads,))

    def _count(self, texts: list[str]) -> list[int]:
        texts = [self.prompt + text for text in texts]
        return [len(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]

    async def count(self, texts: list[str]) -> list[int]:
        """Tokens of each text, special ones included, before anything is cut off."""
        return await asyncio.get_running_loop().run_in_executor(self.counting, self._count, texts)

    async def embed(self, texts: list[str], tokens: list[int]) -> list[np.ndarray]:
        if len(self.waiting) >= self.most_waiting:
            raise ApiError(503, f"{len(self.waiting)} texts are waiting: try again later")
        futures = [asyncio.get_running_loop().create_future() for _ in texts]
        self.waiting.extend(map(Text, texts, tokens, futures))
        self.arrived.set()
        return await asyncio.gather(*futures)

    async def run(self):
        """Answers until it is cancelled."""
        while True:
            await self.arrived.wait()
            if sum(text.tokens for text in self.waiting) < self.budget:
                await asyncio.sleep(self.wait)
            batch, tokens = [], 0
            while self.waiting and (not batch or tokens + self.waiting[0].tokens <= self.budget):
                batch.append(self.waiting.popleft())
                tokens += batch[-1].tokens
            if not self.waiting:
                self.arrived.clear()
            self.texts, self.batches = self.texts + len(batch), self.batches + 1
            await self._answer(batch)

    async def _answer(self, batch: list[Text]):
        encode = lambda texts: self.model.encode(texts, batch_size=len(texts))
        given = [text.text for text in batch]
        try:
            found = await asyncio.get_running_loop().run_in_executor(self.running, encode, given)
        except Exception as error:  # of this batch: the next may go well
            logging.getLogger("uvicorn.error").exception("a batch failed")
            found = [ApiError(500, f"the model failed: {error}")] * len(batch)
        for text, vector in zip(batch, found, strict=True):
            if not text.vector.done():  # its client may have gone
                failed = isinstance(vector, ApiError)
                (text.vector.set_exception if failed else text.vector.set_result)(vector)


class EmbeddingsRequest(BaseModel):
    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)


def shortened(vector: np.ndarray, dimensions: int | None) -> np.ndarray:
    """Its first dimensions, as long as the whole was."""
    cut = vector[:dimensions]
    return cut * (np.linalg.norm(vector) / max(np.linalg.norm(cut), 1e-12))


def create_app(model, name: str, args) -> FastAPI:
    longest, size = model.max_seq_length, model.get_embedding_dimension()
    batcher = None

    @asynccontextmanager
    async def lifespan(app):
        nonlocal batcher
        batcher = Batcher(model, args.tokens, args.wait, args.most_waiting, args.threads)
        task = asyncio.create_task(batcher.run())
        yield  # uvicorn has answered what it accepted before it goes on here
        task.cancel()
        batcher.running.shutdown()
        batcher.counting.shutdown()

    app = FastAPI(lifespan=lifespan)

    async def counted(texts) -> list[int]:
        """Tokens of each, or what is wrong with the input."""
        if not 0 < len(texts) <= args.most_inputs:
            raise ApiError(400, f"{len(texts)} inputs, expected 1 to {args.most_inputs}", "input")
        if not isinstance(texts[0], str):
            raise ApiError(400, "input is token ids, of another tokenizer: send text", "input")
        if not all(texts):
            raise ApiError(400, f"input {texts.index('')} is an empty text", "input")
        tokens = await batcher.count(texts)
        for i, n in enumerate(tokens):
            if n > longest:
                raise ApiError(400, f"input {i} has {n} tokens, the model takes {longest}", "input")
        return tokens

    @app.post("/v1/embeddings")
    async def embeddings(request: EmbeddingsRequest):
        texts = [request.input] if isinstance(request.input, str) else request.input
        if request.model != name:
            raise ApiError(404, f"no model {request.model!r} here, only {name!r}", "model")
        if (request.dimensions or 0) > size:
            raise ApiError(400, f"{request.dimensions} of {size} dimensions", "dimensions")
        tokens = await counted(texts)
        data = []
        for i, vector in enumerate(await batcher.embed(texts, tokens)):
            vector = shortened(vector, request.dimensions)
            if request.encoding_format == "base64":
                vector = base64.b64encode(vector.astype("<f4").tobytes()).decode()
            else:
                vector = vector.tolist()
            data.append({"object": "embedding", "index": i, "embedding": vector})
        usage = {"prompt_tokens": sum(tokens), "total_tokens": sum(tokens)}
        return JSONResponse({"object": "list", "data": data, "model": name, "usage": usage})

    @app.get("/v1/models")
    async def models():
        only = {"id": name, "object": "model", "created": 0, "owned_by": "local"}
        return {"object": "list", "data": [only]}

    @app.get("/health")
    async def health():
        waiting, texts, batches = len(batcher.waiting), batcher.texts, batcher.batches
        return {"status": "ok", "waiting": waiting, "texts": texts, "batches": batches}

    @app.exception_handler(ApiError)
    async def refused(_, error):
        return error.response

    @app.exception_handler(HTTPException)
    async def unknown(_, error):
        return ApiError(error.status_code, error.detail).response

    @app.exception_handler(RequestValidationError)
    async def invalid(_, error):
        first = error.errors()[0]
        where = [str(part) for part in first["loc"] if part != "body"]
        return ApiError(400, f"{'.'.join(where)}: {first['msg']}", *where[:1]).response

    return app


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a frozen SentenceTransformer's folder")
    parser.add_argument("--name", help="what clients call it (the folder)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=4096, help="of a batch")
    parser.add_argument("--wait", type=float, default=0.003, help="seconds for others to come")
    parser.add_argument("--most-inputs", type=int, default=256, help="of a request; else 400")
    parser.add_argument("--most-waiting", type=int, default=4096, help="texts; else 503")
    args = parser.parse_args()
    app = create_app(bertfast.load_frozen(args.model), args.name or args.model, args)
    uvicorn.run(app, host=args.host, port=args.port, access_log=False)


if __name__ == "__main__":
    main()
