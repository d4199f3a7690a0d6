"""The bench of LoRA layers."""

import json

from tests.bench import lora


def test_all_layers_have_the_same_gradients_in_fp32(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lora", "--model", str(tiny_model), "--dtype", "float32", "--rounds", "2"])
    lora.main()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["prompted_gradient_difference"] < 1e-4 > figures["query_only_gradient_difference"]
    assert all(figures[f"{case}_{key}"] > 0 for case in ("prompted", "query_only")
               for key in ("speedup", "speedup_rounded"))
