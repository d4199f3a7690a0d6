"""A stand-in for vLLM behind Ray Data: transformers computes, whole prompts, one after the other.

`make test-vllm` runs vLLM itself (tests/ray/test_vllm.py).
"""

import torch

from pi_ray.models import load_model, load_tokenizer


class FakeVllm:
    """Takes the place of vllm_batches.answer_prompts; `asked` has the prompts of each start of the engine."""

    def __init__(self):
        self.asked = []

    def __call__(self, config, prompts, nodes, actors=0):
        self.asked.append(prompts)
        base, tokenizer = load_model(config.model, "cpu"), load_tokenizer(config.model)
        models = {"": base} | {folder: with_adapter(config, folder) for folder in {p.adapter for p in prompts} - {""}}
        for place in reversed(range(len(prompts))):  # they are not done in their order
            yield place, answer_prompt(models[prompts[place].adapter], prompts[place], tokenizer)


def with_adapter(config, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(load_model(config.model, "cpu"), folder).eval()


@torch.inference_mode()
def answer_prompt(model, prompt, tokenizer):
    """Greedy, with vLLM's fields: at each place the likeliest tokens, and the one that stands there as one more."""
    ids, wanted, written, noted = [*prompt.prefix, *prompt.ids], dict(prompt.sampling), [], []
    assert wanted.pop("temperature") == 0 and wanted.pop("detokenize") is False
    most = wanted.pop("logprobs", None)
    ends, limit = wanted.pop("stop_token_ids", []), wanted.pop("max_tokens")
    if not wanted.pop("ignore_eos", False):
        ends = [*ends, tokenizer.eos_token_id]
    assert not wanted, f"vLLM's SamplingParams may not have {wanted}"
    while len(written) < limit:
        row = torch.log_softmax(model(input_ids=torch.tensor([ids + written])).logits[0, -1].float(), -1)
        written.append(row.argmax().item())
        noted.append(likeliest(row, written[-1], most) if most else None)
        if written[-1] in ends:
            break
    return {"generated_tokens": written, **({"logprobs": noted} if most else {})}


def likeliest(row, token, most):
    values, ids = row.topk(most)
    found = dict(zip(ids.tolist(), values.tolist(), strict=True)) | {token: row[token].item()}
    ranks = {i: int((row > value).sum()) + 1 for i, value in found.items()}
    return {i: {"logprob": value, "rank": ranks[i], "decoded_token": None} for i, value in found.items()}
