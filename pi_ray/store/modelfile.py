"""Ollama's Modelfile: the model, the text around a request, where an answer ends, and greedy answers as evaluated."""

from __future__ import annotations

from pi_ray.config import PromptConfig
from pi_ray.errors import AdapterError
from pi_ray.prompt import PromptEncoder
from pi_ray.store.adapters import Adapter

PROMPT = "{{ .Prompt }}"  # where Ollama puts the request


def modelfile_text(adapter: Adapter, encoder: PromptEncoder, model: str, weights: str = "") -> str:
    """The file's text. `model` and `weights`: the files of base and adapter as the Modelfile names them.

    Raises AdapterError for an adapter of conversations, whose turns a template of this kind does not frame as trained.
    """
    if PromptConfig(**adapter.card["prompt"]).conversation:
        raise AdapterError("--to ollama: it was trained on conversations; serve it with --to vllm or --to merged")
    tokenizer = encoder.tokenizer
    text = tokenizer.decode(encoder.encode(PROMPT, adapter.card["template"]))
    if text.count(PROMPT) != 1:
        raise AdapterError("--to ollama: the tokenizer does not give the place of the request back; take --to merged")
    if tokenizer("").input_ids == [tokenizer.bos_token_id]:  # then Ollama sends it first by itself
        text = text.removeprefix(tokenizer.bos_token)
    before, after = (part.replace("{{", '{{ "{{" }}') for part in text.split(PROMPT))
    if '"""' in text:
        raise AdapterError('--to ollama: the prompt holds """, which ends a text in a Modelfile; take --to merged')
    lines = [
        f"# {adapter.name} {adapter.version}; ollama create {adapter.name} -f Modelfile",
        f"FROM {model}",
        *([f"ADAPTER {weights}"] if weights else []),
        f'TEMPLATE """{before}{PROMPT}{after}"""',
        f'PARAMETER stop "{tokenizer.eos_token}"',
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",  # Ollama's own 1.1 would count against codes that an answer copies
        f"PARAMETER num_predict {adapter.card['max_answer_tokens']}",
    ]
    return "\n".join(lines) + "\n"
