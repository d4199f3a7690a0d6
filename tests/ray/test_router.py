"""`serve.router: prefix` over two replicas: a prompt that is sent whole is read by one of them alone."""

import random

import httpx
import pytest

from pi_ray.config import RunConfig
from tests.bench.serve import _free_port as free_port
from tests.ray.test_serve import seen

pytestmark = pytest.mark.ray
PROMPTS = [f"Team {team}. {'What is blue, and what is grey? ' * 20}" for team in range(4)]
ROUNDS, BLOCK = 5, 16


def test_a_prompt_goes_to_the_replica_that_has_read_it(tiny_model, tmp_path, ray_local):
    from ray import serve

    from pi_ray.serve import app

    config = RunConfig(
        name="t", store=str(tmp_path), model={"base": str(tiny_model)}, prompt={"chat": "chatml"},
        serve={"port": free_port(), "min_replicas": 2, "max_replicas": 2, "router": "prefix", "prefix_cache_mb": 64},
    )
    url = app.run_server(config, blocking=False)
    try:
        asked, read = PROMPTS * ROUNDS, 0
        random.Random(0).shuffle(asked)
        for number, prompt in enumerate(asked):
            body = {
                "model": tiny_model.name, "max_tokens": 1,
                "messages": [{"role": "user", "content": f"{prompt} Request {number}?"}],
            }
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
            read += answer["usage"]["prompt_tokens"]
        each = read / len(asked)
        hit = "ray_pi_ray_prefix_hit_tokens_total"
        least = (ROUNDS - 1) * len(PROMPTS) * (each - 2 * BLOCK)  # each prompt but its first time, but for the query
        found = seen(ray_local, lambda found: sum(value for _, value in found.get(hit, [])) >= least)
        assert sum(value for _, value in found[hit]) < read
    finally:
        serve.shutdown()
