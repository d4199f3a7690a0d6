"""Rows of any length in one batch compute what they compute alone, in models of several families."""

import pytest
import torch
import transformers

from pi_ray.serve.engine.kv_cache import Slots, cache_name, open_rows
from pi_ray.serve.engine.multi_lora import BASE, AdapterStack
from pi_ray.serve.engine.unbatched_cache import Apart

SIZES = {
    "vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
WINDOW = 6
BATCHED = [
    ("Llama", {}), ("Mixtral", {"num_local_experts": 4}), ("Qwen3", {"head_dim": 8}), ("Mistral", {"sliding_window": WINDOW}),
    ("Gemma2", {"head_dim": 8, "sliding_window": WINDOW}), ("GptOss", {"sliding_window": WINDOW, "num_local_experts": 4, "head_dim": 8}),
]  # fmt: skip
APART = [("Bloom", {"n_layer": 2, "n_head": 4}), ("Mamba", {"state_size": 4}), ("Qwen3Next", {"num_experts": 4, "num_experts_per_tok": 2, "layer_types": ["linear_attention", "full_attention"]})]
PROMPTS = [list(range(20, 42)), [7, 8, 9], list(range(100, 113))]
STEPS = 10


def tiny(family, settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings})
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


@torch.inference_mode()
def alone(model, prompt):
    """Logits after the prompt and after each of STEPS greedy tokens, without any cache."""
    ids, found = list(prompt), []
    for _ in range(STEPS):
        found.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1])
        ids.append(int(found[-1].argmax()))
    return torch.stack(found)


@torch.inference_mode()
def together(model, rows):
    """The same from `rows`: the first prompt begins, the second joins after 3 steps, the third after 5; the first is read in pieces where it may be."""
    found, order = {0: [], 1: [], 2: []}, []

    def note(first, logits):
        for i, row in enumerate(logits):
            found[order[first + i]].append(row)

    def step():
        live = [i for i in order if len(found[i]) < STEPS]
        note(0, rows.read(0, [[int(found[i][-1].argmax())] for i in order], [BASE] * len(order)))
        return live

    rows.add(1)
    order.append(0)
    if rows.splits:
        rows.read(0, [PROMPTS[0][:9]], [BASE])
    note(0, rows.read(0, [PROMPTS[0][rows.lengths[0] :]], [BASE]))
    for joining, steps in ((1, 3), (2, 2)):
        for _ in range(steps):
            step()
        rows.add(1)
        order.append(joining)
        note(len(order) - 1, rows.read(len(order) - 1, [PROMPTS[joining]], [BASE]))
    while order:
        for place in reversed([p for p, i in enumerate(order) if len(found[i]) >= STEPS]):
            rows.move(len(order) - 1, place)
            order[place] = order[-1]
            order.pop()
            rows.pop()
        if order:
            step()
    return [torch.stack(found[i][:STEPS]) for i in range(3)]


@pytest.mark.parametrize("family, settings", BATCHED, ids=[f for f, _ in BATCHED])
def test_rows_that_come_and_go_have_the_logits_that_they_have_alone(family, settings):
    model = tiny(family, settings)
    rows = open_rows(model, AdapterStack(model, 1))
    assert isinstance(rows, Slots)
    for found, prompt in zip(together(model, rows), PROMPTS, strict=True):
        torch.testing.assert_close(found, alone(model, prompt), atol=1e-4, rtol=1e-4)
    assert rows.nbytes == 0, "the last one to leave puts out the light"


@pytest.mark.parametrize("family, settings", APART, ids=[f for f, _ in APART])
def test_a_model_with_another_state_or_position_code_is_computed_row_by_row(family, settings, caplog):
    model = tiny(family, settings)
    rows = open_rows(model, AdapterStack(model, 1))
    assert isinstance(rows, Apart) and "cannot be batched token by token" in caplog.text
    for found, prompt in zip(together(model, rows), PROMPTS, strict=True):
        torch.testing.assert_close(found, alone(model, prompt), atol=1e-4, rtol=1e-4)


@pytest.fixture
def slots():
    model = tiny("Llama", {})
    return open_rows(model, AdapterStack(model, 1))


@torch.inference_mode()
def test_prompts_of_unequal_length_are_read_in_one_pass(slots):
    slots.add(3)
    together = []  # the last tokens, side by side: of a view torch would multiply each row with a copy of the output layer
    slots.model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: together.append(inputs[0].is_contiguous()))
    logits = slots.read(0, PROMPTS, [BASE] * 3)
    assert slots.lengths == [len(p) for p in PROMPTS] and together == [True]
    for row, prompt in zip(logits, PROMPTS, strict=True):
        torch.testing.assert_close(row, alone(slots.model, prompt)[0], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_what_was_copied_from_one_row_lets_another_begin_there(slots):
    slots.add(1)
    slots.read(0, [PROMPTS[0]], [BASE])
    blocks = [slots.copy(0, 0, 8), slots.copy(0, 8, 16)]
    slots.add(2)
    slots.paste(2, blocks)
    logits = slots.read(1, [PROMPTS[1], PROMPTS[0][16:]], [BASE] * 2)
    torch.testing.assert_close(logits[1], alone(slots.model, PROMPTS[0])[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits[0], alone(slots.model, PROMPTS[1])[0], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_what_a_row_leaves_behind_cannot_reach_the_next_one_in_its_slot(slots):
    """Keys of a hostile adapter may be so large that even a masked one would make NaN."""
    slots.add(3)
    slots.read(0, [PROMPTS[0], PROMPTS[2], PROMPTS[0]], [BASE] * 3)
    for store in (slots.keys, slots.values):
        store[:, [0, 2]] = torch.inf
    slots.pop()
    slots.move(1, 0)
    slots.pop()
    slots.add(1)
    slots.read(1, [PROMPTS[1]], [BASE])
    logits = slots.read(0, [[3], [3]], [BASE] * 2)
    for row, prompt in zip(logits, (PROMPTS[2], PROMPTS[1]), strict=True):
        torch.testing.assert_close(row, alone(slots.model, [*prompt, 3])[0], atol=1e-5, rtol=1e-4)


def test_the_argument_for_the_cache_has_the_name_that_the_model_knows(slots):
    assert cache_name(slots.model) in ("cache", "past_key_values")
    assert cache_name(type("Old", (), {"forward": lambda self, input_ids, past_key_values=None: None})()) == "past_key_values"
