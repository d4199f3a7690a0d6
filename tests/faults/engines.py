"""An engine whose answers are known and whose faults are files in a folder, which a test plants from outside.

    hold          while it is there, requests whose query holds the word "hold" stop after their first token
    sick          the health check raises in replicas that were there before it
    broken        the constructor raises
    replicas/PID  one for each replica: requests in its engine, as a number

The answer to a query is "<adapter> <query>": no other request's answer can be taken for it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

from pi_ray.config import ModelConfig, ServeConfig
from pi_ray.models import load_tokenizer
from pi_ray.protocols import Engine, GenerationRequest, Token

FOLDER = "PI_RAY_TEST_FOLDER"
STEP_S = 0.01  # how often a held request looks whether it may go on


class ScriptedEngine:
    def __init__(self, model: ModelConfig, serve: ServeConfig):
        self.folder = Path(os.environ[FOLDER])
        if (self.folder / "broken").exists():
            raise RuntimeError("the constructor fails, as the test wants it")
        self.tokenizer = load_tokenizer(model)
        self.own = self.folder / "replicas" / str(os.getpid())
        self.own.parent.mkdir(exist_ok=True)
        self.active = 0
        self._count(0)

    def _count(self, change: int) -> None:
        self.active += change
        self.own.write_text(str(self.active))

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Token]:
        self._count(1)
        try:
            prompt = self.tokenizer.decode(request.prompt_ids)
            query = prompt.partition("Q: ")[2].partition("<|im_end|>")[0]
            name = Path(request.adapter).parent.name or "base"
            ids = [*self.tokenizer(f"{name} {query}").input_ids, self.tokenizer.eos_token_id]
            for number, token in enumerate(ids[: request.max_new_tokens]):
                while number and "hold" in query and (self.folder / "hold").exists():
                    await asyncio.sleep(STEP_S)
                await asyncio.sleep(0)
                yield Token(token)
        finally:
            self._count(-1)

    def stats(self) -> dict[str, int]:
        return {"active": self.active}

    def check(self) -> None:
        sick = self.folder / "sick"
        if sick.exists() and str(os.getpid()) in sick.read_text().split():
            raise RuntimeError("the health check fails, as the test wants it")


def watched(model: ModelConfig, serve: ServeConfig) -> Engine:
    """The transformers engine, in a replica that can be found as ScriptedEngine's."""
    from pi_ray.serve.engine.engine import TransformersEngine

    own = Path(os.environ[FOLDER]) / "replicas" / str(os.getpid())
    own.parent.mkdir(exist_ok=True)
    own.write_text("0")
    return TransformersEngine(model, serve)
