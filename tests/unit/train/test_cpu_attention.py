"""The backward pass of attention in bfloat16 on CPUs, against torch's in fp32."""

import pytest
import torch
import torch.nn.functional as F

from pi_ray.train import cpu_attention
from pi_ray.train.shared_prefix import Layout, shared_prefix_attention

HEADS, KV_HEADS, WIDTH = 6, 2, 32


def tensors(queries, keys, spread=1.0, sink=0.0):
    """query, key, value and the output's gradient in bfloat16; `sink` is added to the first key along all queries."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, n, WIDTH) for h, n in ((HEADS, queries), (KV_HEADS, keys), (KV_HEADS, keys)))
    query[..., 0], key[:, :, 0, 0] = 10.0, key[:, :, 0, 0] + sink
    made = (query * spread, key * spread, value, torch.randn(1, HEADS, queries, WIDTH))
    return [x.to(torch.bfloat16) for x in made]


def gradients(attend, query, key, value, grad):
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    output = attend(*inputs)
    return output.detach().float(), [x.float() for x in torch.autograd.grad(output, inputs, grad.to(output.dtype))]


def torchs(given, scale, sees):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, sees, is_causal=sees is None, scale=scale, enable_gqa=True)

    return gradients(attend, *given)


def error(found, right):
    """As a share of what is right, or of 1 where that is next to nothing: a weight of 1 has no gradient."""
    return ((found - right).norm() / max(right.norm().item(), 1.0)).item()


@pytest.mark.parametrize("sees", [None, torch.ones(9, 30, dtype=torch.bool).tril(21)])
@pytest.mark.parametrize("scale", [WIDTH**-0.5, 0.3])
@pytest.mark.parametrize("sink", [0.0, 6.0, 60.0])
def test_gradients_are_as_near_to_fp32_as_torchs(sees, scale, sink, monkeypatch):
    """Also where the first token's scores are in the hundreds, of which bfloat16 knows no fractions."""
    monkeypatch.setattr(cpu_attention, "CAUSAL_BLOCK", 10)  # three blocks, the last one shorter
    given = tensors(*(sees.shape if sees is not None else (25, 25)), sink=sink)
    output, found = gradients(lambda *qkv: cpu_attention.attend(*qkv, scale, sees), *given[:3], given[3])
    _, right = torchs([x.float() for x in given], scale, sees)
    half_output, half = torchs(given, scale, sees)
    assert torch.equal(output, half_output)
    for mine, its, true in zip(found, half, right, strict=True):
        assert error(mine, true) < max(0.01, 2 * error(its, true))


@pytest.mark.parametrize("most", [1 << 25, 300])  # attention weights at once: all rows, or one
@pytest.mark.parametrize("visible", [11, 4, 0])
@pytest.mark.parametrize("sink", [0.0, 60.0])
def test_packed_rows_have_the_gradients_of_fp32(sink, visible, most, monkeypatch):
    layout, calls = Layout.build(11, [3, 3, 2, 5], visible), []
    monkeypatch.setattr(cpu_attention, "FEWEST", 1)
    for name in ("attend", "attend_behind"):
        own = getattr(cpu_attention, name)
        noted = lambda *args, name=name, own=own: calls.append((name, len(args[0]))) or own(*args)  # noqa: E731
        monkeypatch.setattr(cpu_attention, name, noted)
    *given, grad = tensors(24, 24, sink=sink)
    attend = lambda q, k, v: shared_prefix_attention(None, q, k, v, None, layout=layout)[0]  # noqa: E731
    monkeypatch.setattr(cpu_attention, "MOST", max(most, HEADS * 11 * 11))
    output, found = gradients(attend, *given, grad.transpose(1, 2))
    rows = "attend_behind" if visible else "attend"
    assert calls == [("attend", 1), (rows, 3), (rows, 1)]  # the prefix, a batch of three rows, a long row
    right_output, right = gradients(attend, *(x.float() for x in given), grad.transpose(1, 2))
    _, half = gradients(lambda *qkv: attend(*(x.bfloat16().float() for x in qkv)), *given, grad.transpose(1, 2))
    assert len(calls) == 3  # and no more: fp32 is torch's own
    assert error(output, right_output) < 0.01
    for mine, its, true in zip(found, half, right, strict=True):
        assert error(mine, true) < max(0.02, 2 * error(its, true))


def test_a_prefix_of_which_a_row_sees_the_end_alone_has_the_gradients_of_what_is_seen(monkeypatch):
    monkeypatch.setattr(cpu_attention, "FEWEST", 1)
    layout, (*given, grad) = Layout.build(11, [3, 5], visible=4), tensors(19, 19)
    attend = lambda q, k, v: shared_prefix_attention(None, q, k, v, None, layout=layout)[0][:, 11:]  # noqa: E731
    _, (_, key, value) = gradients(attend, *given, grad.transpose(1, 2)[:, 11:])
    assert not key[:, :, :7].any() and not value[:, :, :7].any() and key[:, :, 7:11].all() and value[:, :, 7:11].all()


def test_a_batch_that_would_take_much_memory_goes_in_parts(monkeypatch):
    """Of as many rows as `MOST` attention weights are; a part is a row at least."""
    queries, keys, values, grads = (torch.cat(parts) for parts in zip(*(tensors(9, 9) for _ in range(5)), strict=True))
    attend = lambda q, k, v: cpu_attention.attend(q, k, v, 0.2)  # noqa: E731
    whole, right = gradients(attend, queries, keys, values, grads)
    for rows in (2.5, 0.5):
        monkeypatch.setattr(cpu_attention, "MOST", int(rows * HEADS * 9 * 9))
        output, found = gradients(attend, queries, keys, values, grads)
        assert torch.equal(output, whole) and all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_it_is_for_training_on_cpus_in_bfloat16(monkeypatch):
    query, key, value, _ = tensors(8, 8)
    takes = cpu_attention.takes_matrix_products
    assert not takes(query, key, value, 0.0)  # which are few
    monkeypatch.setattr(cpu_attention, "FEWEST", HEADS * 8 * 8)
    assert takes(query, key, value, 0.0)
    assert not takes(query, key, value, 0.1) and not takes(query.float(), key.float(), value.float(), 0.0)
    assert not takes(query.to("meta"), key.to("meta"), value.to("meta"), 0.0)
    with torch.no_grad():
        assert not takes(query, key, value, 0.0)
    monkeypatch.setattr(cpu_attention, "MOST", HEADS * 8 * 8 - 1)
    assert not takes(query, key, value, 0.0)
    assert shared_prefix_attention(None, query, key, key, None)[0].shape == (1, 8, HEADS, WIDTH)


def test_values_of_another_width_are_left_to_sdpa(monkeypatch):
    """As in multi-head latent attention."""
    monkeypatch.setattr(cpu_attention, "FEWEST", 1)
    query, key, value, grad = tensors(24, 24)
    value, grad, layout = value[..., :8], grad[..., :8].transpose(1, 2), Layout.build(11, [5, 8])
    attend = lambda q, k, v: shared_prefix_attention(None, q, k, v, None, layout=layout)[0]  # noqa: E731
    output, found = gradients(attend, query, key, value, grad)
    right_output, right = gradients(attend, query.float(), key.float(), value.float(), grad)
    assert error(output, right_output) < 0.01 and all(error(a, b) < 0.02 for a, b in zip(found, right, strict=True))
