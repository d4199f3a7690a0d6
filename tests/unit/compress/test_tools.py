"""Tools shrink as tools: valid at every rate, descriptions before functions, the least used function first."""

import json
from functools import cache
from io import StringIO

import jsonschema
import pytest
from rich.console import Console

from pi_ray.compress.display import show_compression
from pi_ray.compress.template import combine_parts, compress_template, split_template
from pi_ray.compress.tools import ToolsSearch
from pi_ray.config import CompressConfig, ModelConfig, RunConfig
from pi_ray.conversation import check_tools, split_tools
from pi_ray.models import load_tokenizer
from pi_ray.prompt import Template

CONFIG = CompressConfig(name="selective")
RATES = [0.95, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.03]
LONG = "such as the one that stands in the letter which the customer was sent when the booking was made or changed"


def tool(name, uses_enum=False):
    parameters = {
        "type": "object", "required": ["id", "kind"],
        "properties": {
            "id": {"type": "string", "description": f"The number of the booking to {name}, {LONG}."},
            "kind": {"type": "string", "enum": ["flight", "hotel"]} if uses_enum else {"type": "integer"},
            "note": {"type": "string", "description": f"Words of the customer about why to {name}, {LONG}."},
            "people": {"type": "array", "description": "Who comes along.", "items": {
                "type": "object", "required": ["name"], "properties": {
                    "name": {"type": "string", "description": f"A full name, {LONG}."},
                    "description": {"type": "string", "description": "How they look."},
                },
            }},
        },
    }  # fmt: skip
    text = f"Use this function to {name} a booking once the customer has agreed, and never before that. {LONG.upper()}"
    function = {"name": f"{name}_booking", "description": text, "parameters": parameters}
    return json.dumps({"type": "function", "function": function})


TOOLS = tuple(tool(name, name == "cancel") for name in ("find", "cancel", "change", "pay"))
USES = (40, 7, 1, 12)


class FirstWords:
    """A compressor that keeps the first words of each text."""

    def __init__(self, config):
        pass

    def compress(self, text, rate):
        words = text.split()
        return " ".join(words[: round(rate * len(words))])


@cache
def tokenizer():
    return load_tokenizer(ModelConfig())


@cache
def shrink(rate, tools=TOOLS, uses=USES, name="selective"):
    config = CompressConfig(name=name)
    return ToolsSearch(FirstWords(config), Template("", (), tools, uses), rate, tokenizer(), config).run()


def functions(result):
    return {f["function"]["name"]: f["function"] for f in split_tools(result.text)[1]}


def bare(schema):
    """A schema without descriptions."""
    if not isinstance(schema, dict):
        return schema
    inner = {name: bare(found) for name, found in schema.get("properties", {}).items()}
    return {key: inner if key == "properties" else bare(value) for key, value in schema.items() if key != "description"}


@pytest.mark.parametrize("rate", RATES)
def test_json_is_valid_at_every_rate_and_names_types_required_and_enums_stay_as_long_as_their_function(rate):
    kept = functions(shrink(rate))
    check_tools([{"type": "function", "function": function} for function in kept.values()])
    whole = {json.loads(t)["function"]["name"]: json.loads(t)["function"]["parameters"] for t in TOOLS}
    for name, function in kept.items():
        jsonschema.Draft202012Validator.check_schema(function["parameters"])
        assert bare(function["parameters"]) == bare(whole[name])


@pytest.mark.parametrize("rate", RATES[:-1])
def test_the_rate_is_met_in_tokens_as_far_as_whole_functions_allow(rate):
    result = shrink(rate)
    assert abs(result.achieved - rate) <= CONFIG.tolerance or "comes closest" in result.note
    assert result.tokens == len(tokenizer()(result.text, add_special_tokens=False).input_ids)
    assert abs(result.achieved - rate) < 0.15


def test_descriptions_are_compressed_before_anything_else_goes():
    result = shrink(0.8)
    assert list(functions(result)) == [json.loads(t)["function"]["name"] for t in TOOLS] and not result.note
    before, after = (
        function["parameters"]["properties"]["note"]["description"].split()
        for function in (json.loads(TOOLS[0])["function"], functions(result)["find_booking"])
    )
    assert 0 < len(after) < len(before) and after == before[: len(after)]


def stages():
    """(optional descriptions left, required ones left, functions left) at falling rates."""
    for rate in (n / 50 for n in range(44, 0, -1)):
        found = functions(shrink(rate)).values()
        properties = [f["parameters"]["properties"] for f in found]
        optional = sum("description" in p[name] for p in properties for name in ("note", "people"))
        yield optional, sum("description" in p["id"] for p in properties), len(properties)


def test_optional_descriptions_go_before_functions_and_required_ones_stay_with_theirs():
    seen = list(stages())
    assert {(required, count) for _, required, count in seen} <= {(n, n) for n in range(5)}
    assert all(optional == 0 for optional, _, count in seen if count < 4)
    assert any(0 < optional < 8 for optional, _, _ in seen), "one by one"
    assert {count for *_, count in seen} == {0, 1, 2, 3, 4}


def test_the_function_that_labels_use_least_goes_first():
    kept = [set(functions(shrink(rate))) for rate in RATES]
    order = ["find_booking", "pay_booking", "cancel_booking", "change_booking"]
    assert all(names == set(order[: len(names)]) for names in kept)
    gone = next(shrink(rate) for rate in RATES if len(functions(shrink(rate))) == 3)
    assert gone.note.startswith("1 of 4 functions left out: change_booking")


def test_without_counted_uses_the_later_function_goes_first():
    order = ["find_booking", "cancel_booking", "change_booking", "pay_booking"]
    names = [list(functions(shrink(rate, uses=()))) for rate in RATES]
    assert all(found == order[: len(found)] for found in names)


def test_a_parameter_called_description_is_a_parameter():
    people = functions(shrink(0.5))["find_booking"]["parameters"]["properties"]["people"]["items"]["properties"]
    assert people["description"]["type"] == "string"


def test_compression_none_leaves_tools_whole():
    result = compress_template(Template("", (), TOOLS), 0.5, tokenizer(), CompressConfig(name="none"))
    assert (result.text, result.achieved) == (Template("", (), TOOLS).text, 1)


def test_text_and_tools_are_parts_of_one_template(monkeypatch, tmp_path):
    monkeypatch.setattr("pi_ray.compress.cache._path", tmp_path.joinpath)
    template = Template("Answer as the policy below says, and never in any other way than that.", ("## A\n\nb",), TOOLS)
    assert compress_template(template, 1, tokenizer(), CONFIG).text == template.text
    assert compress_template(template, 0, tokenizer(), CONFIG).text == ""
    parts = split_template(template, 0.5, CONFIG)
    assert [(part.name, part.rate) for part in parts] == [("template", 0.5), ("tools", 0.5)]
    result = compress_template(template, 0.5, tokenizer(), CONFIG, FirstWords)
    text, tools = split_tools(result.text)
    assert text and tools and abs(result.achieved - 0.5) <= 0.1
    made = [compress_template(part.template, part.rate, tokenizer(), part.config, FirstWords) for part in parts]
    assert combine_parts(template, tokenizer(), parts, made) == result


def test_with_a_compressor_for_documents_tools_are_compressed_as_these():
    config = CompressConfig.model_validate({"name": "selective", "documents": {"name": "llmlingua", "rate": 0.25}})
    parts = split_template(Template("a", ("## B\n\nb",), TOOLS), 0.5, config)
    found = [(part.name, part.rate, part.config.name) for part in parts]
    assert found == [("instruction", 0.5, "selective"), ("documents", 0.25, "llmlingua"), ("tools", 0.25, "llmlingua")]


def test_the_command_shows_tools_as_any_document(monkeypatch, tmp_path):
    monkeypatch.setattr("pi_ray.compress.template.load_compressor", FirstWords)
    monkeypatch.setattr("pi_ray.compress.display.compress_template", lambda template, rate, tokenizer, config:
                        compress_template(template, rate, tokenizer, config, FirstWords))
    monkeypatch.setattr("pi_ray.compress.cache._path", tmp_path.joinpath)
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([json.loads(t) for t in TOOLS]))
    console = Console(record=True, width=200, file=StringIO())
    show_compression(path, 0.3, RunConfig.model_validate({"name": "a", "compress": {"name": "selective"}}), console)
    told = console.export_text()
    assert "~~" in told and "asked 0.30" in told and "functions left out" in told
