"""The template at each rate: which texts are compressed, by how many actors, and with how many threads each."""

import json

import pytest

from pi_ray.compress.rate_control import CompressedTemplate
from pi_ray.compress.template import compress_template
from pi_ray.config import RunConfig
from pi_ray.conversation import split_tools
from pi_ray.data import templates
from pi_ray.models import load_tokenizer
from pi_ray.prompt import Template
from pi_ray.run.directory import RunDir

TEMPLATE = Template("Say what the codes mean.", ("red is k4", "blue is z9"))


@pytest.mark.parametrize("nodes, asked, threads, cpus", [
    ([2], {}, 1, 1), ([16], {}, 4, 4), ([2, 2, 2, 2], {}, 2, 2), ([1], {}, 1, 1), ([16], {"CPU": 3}, 3, 3),
])  # fmt: skip
def test_distinct_texts_and_rates_are_compressed_side_by_side(nodes, asked, threads, cpus, tmp_path, monkeypatch):
    config = RunConfig.model_validate({
        "name": "a", "run_dir": str(tmp_path), "schedule": {"phases": 4}, "cluster": {"prepare_resources": asked},
        "compress": {"name": "selective", "documents": {"name": "llmlingua", "rate": 0.5}},
    })
    jobs = []

    def fan_out(items, make, config, parts, threads, **options):
        jobs.append(([(p.template.text, round(p.rate, 2), p.config.name) for p in parts], threads, options))
        return [vars(CompressedTemplate(f"<{parts[i['part']].template.text}>", 0.5, 0.5, 5, 10)) for i in items]

    monkeypatch.setattr(templates, "fan_out", fan_out)
    monkeypatch.setattr(templates, "cached_template", lambda t, rate, *_: TEMPLATE_AS_IT_IS if rate == 1 else None)
    monkeypatch.setattr("pi_ray.cluster.session.connect", lambda: None)
    monkeypatch.setattr("pi_ray.cluster.placement.cluster_nodes", lambda: [{"CPU": n} for n in nodes])
    run = RunDir(config.root)
    templates.compress_templates(config, TEMPLATE, load_tokenizer(config.model), run, "f", lambda line: None)
    (parts, given, options), = jobs
    instruction, documents = TEMPLATE.instruction, "\n\n".join(TEMPLATE.documents)
    wanted = {(instruction, 0.67, "selective"), (instruction, 0.33, "selective"), (documents, 0.5, "llmlingua")}
    assert len(parts) == 3 and set(parts) == wanted, "the documents, at one rate in both phases, once"
    assert options["actors"] == 3 and given == threads and options["num_cpus"] == cpus
    made = {entry["rate"]: entry["text"] for entry in json.loads((run.templates / "templates.json").read_text())}
    assert list(made.values()) == [TEMPLATE.text, *[f"<{instruction}>\n\n<{documents}>"] * 2]


TEMPLATE_AS_IT_IS = CompressedTemplate(TEMPLATE.text, 1.0, 1.0, 20, 20)


def test_tools_are_a_part_of_the_template_at_each_rate(tmp_path, monkeypatch):
    tools = [json.dumps({"type": "function", "function": {
        "name": name, "parameters": {"type": "object", "properties": {"id": {"type": "string"}}},
    }}) for name in ("find", "book", "pay")]
    template = Template("Help.", (), tuple(tools), tool_uses=(1, 4, 2))
    config = RunConfig.model_validate({"name": "a", "run_dir": str(tmp_path), "compress": {"name": "selective"}})

    def fan_out(items, make, config, parts, threads, **options):
        chosen, tokenizer = [parts[item["part"]] for item in items], load_tokenizer(config.model)
        return [vars(compress_template(p.template, p.rate, tokenizer, p.config, lambda _: KeepAll())) for p in chosen]

    monkeypatch.setattr("pi_ray.compress.cache._path", tmp_path.joinpath)
    monkeypatch.setattr(templates, "fan_out", fan_out)
    monkeypatch.setattr("pi_ray.cluster.session.connect", lambda: None)
    monkeypatch.setattr("pi_ray.cluster.placement.cluster_nodes", lambda: [{"CPU": 1}])
    run = RunDir(config.root)
    templates.compress_templates(config, template, load_tokenizer(config.model), run, "f", lambda line: None)
    made = {entry["rate"]: entry for entry in json.loads((run.templates / "templates.json").read_text())}
    assert made[1.0]["text"] == template.text
    assert "tools: 2 of 3 functions left out: find, pay" in made[0.5]["note"]
    assert [tool["function"]["name"] for tool in split_tools(made[0.5]["text"])[1]] == ["book"]


class KeepAll:
    """A compressor that drops nothing."""

    def compress(self, text, rate):
        return text
