"""llama.cpp, through its Python package xllamacpp, reads an exported adapter, so that its answers can be compared."""

from __future__ import annotations

from pathlib import Path


def next_token_logprobs(
    model: Path, adapter: Path | None, rows: list[list[int]], top: int = 20
) -> list[dict[int, float]]:
    """For each row of token ids, its likeliest next tokens with their log probabilities, at most `top` of them."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.ui, params.warmup, params.verbosity = str(model), False, False, 0
    params.n_ctx, params.n_parallel = max(map(len, rows)) + 16, 1
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server, found = xllamacpp.Server(params), []
    for row in rows:
        asked = {"prompt": row, "n_predict": 1, "n_probs": top, "temperature": 0, "cache_prompt": False}
        answer = server.handle_completions(asked)
        tokens = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found.append({token["id"]: token["logprob"] for token in tokens})
    return found
