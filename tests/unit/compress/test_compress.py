"""Compression: what survives, how the rate is met, what is cached; and the real LLMLingua on a small template."""

import re

import pytest

from pi_ray import models
from pi_ray.compress import words
from pi_ray.compress.none import NoCompression
from pi_ray.compress.protection import Protection, split_spans
from pi_ray.compress.template import cached_template, compress_template
from pi_ray.config import CompressConfig, ModelConfig
from pi_ray.models import base_files
from pi_ray.prompt import Template

CONFIG = CompressConfig(name="every", protect=("Golden Rule",))
PROSE = " ".join(
    f"{a} {b}"
    for a in ("please", "always", "write", "short", "clear", "answers")
    for b in ("and", "never", "use", "the", "passive", "voice")
)
JSON, FENCE = '{"service": "web",\n "ids": [7, 8]}', "  ```sh\n  make  test\n  ```"
LINE = "Put {{name}} and {city} into <slot> with `ls -la` from https://example.org/a?b=1 in 250 ms."
TEXT = f"""Follow the Golden Rule. {LINE} {PROSE}.
Answer like this: {JSON}, or with one of ["all", "none"].
- Then test:
{FENCE}"""
PROTECTED = [
    "Golden Rule.", "{{name}}", "{city}", "<slot>", "`ls -la`", "https://example.org/a?b=1", "250", JSON,
    '["all", "none"]', FENCE,
]


class Every:
    """Keeps evenly spread words: a compressor that meets its rate in words, not in tokens."""

    def __init__(self, bias: float = 1.0):
        self.bias, self.calls = bias, 0

    def compress(self, text: str, rate: float) -> str:
        self.calls += 1
        spans, rate = words.word_spans(text), rate**self.bias
        return words.join_words(text, spans, [int((i + 1) * rate) > int(i * rate) for i in range(len(spans))])


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(ModelConfig())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(base_files, "cache_dir", lambda: tmp_path)


def is_subsequence(part, whole):
    rest = iter(whole)
    return all(any(word == other for other in rest) for word in part)


def test_protected_spans_survive_byte_for_byte(tokenizer):
    made = compress_template(Template(TEXT), 0.6, tokenizer, CONFIG, lambda _: Every())
    assert all(span in made.text for span in PROTECTED)


@pytest.mark.parametrize("bias", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("rate", [0.3, 0.5, 0.8])
def test_the_measured_rate_is_within_the_tolerance_of_a_biased_compressor(tokenizer, rate, bias):
    made = compress_template(Template(PROSE * 3, (PROSE, PROSE)), rate, tokenizer, CONFIG, lambda _: Every(bias))
    tokens = len(tokenizer(made.text).input_ids)
    assert made.tokens == tokens and made.achieved == pytest.approx(tokens / made.full_tokens, abs=1e-4)
    assert abs(made.achieved - rate) <= CONFIG.tolerance and not made.note


def test_a_compressor_that_knows_few_rates_is_met_between_two_of_them(tokenizer):
    class Quarters(Every):
        def compress(self, text, rate):
            return super().compress(text, int(4 * rate) / 4)

    made = compress_template(Template(PROSE), 0.4, tokenizer, CONFIG, lambda _: Quarters())
    assert (
        abs(made.achieved - 0.4) <= CONFIG.tolerance
        and not made.note
        and is_subsequence(made.text.split(), PROSE.split())
    )


def test_a_rate_that_whole_pieces_cannot_meet_is_said_with_the_reason(tokenizer):
    template = Template(f"Few words stand before a long line.\n| {' | '.join('abcdef')} | {PROSE[:200]} |")
    made = compress_template(template, 0.4, tokenizer, CONFIG, lambda _: Every())
    assert re.search(
        r"every came no closer than 0\.\d+: the largest piece that stays or goes as a whole \(such as a row of a "
        r"table\) is \d+%",
        made.note,
    )


def test_words_are_dropped_never_joined_or_changed(tokenizer):
    made = compress_template(Template(TEXT), 0.6, tokenizer, CONFIG, lambda _: Every())
    assert is_subsequence(made.text.split(), TEXT.split())


def test_rate_one_is_untouched_and_rate_zero_is_empty(tokenizer):
    compressor = Every()
    assert (
        compress_template(Template("  odd \n\n spacing  "), 1, tokenizer, CONFIG, lambda _: compressor).text
        == "  odd \n\n spacing  "
    )
    assert compress_template(Template(TEXT), 0, tokenizer, CONFIG, lambda _: compressor).text == ""
    assert compressor.calls == 0


def test_protected_text_above_the_rate_is_kept_and_said(tokenizer):
    code = "```\n" + "\n".join(f"line {i} = call({i})" for i in range(20)) + "\n```"
    made = compress_template(Template("Do as this shows.", (code,)), 0.2, tokenizer, CONFIG, lambda _: Every())
    assert code in made.text and made.achieved > 0.5
    assert re.search(r"protected text alone is \d+%", made.note)


def test_a_table_of_codes_keeps_whole_rows_near_the_rate_and_counts_its_numbers(tokenizer):
    table = "\n".join(f"service{chr(97 + i)}: {i}{i}7" for i in range(20))
    template = Template("Use the codes below and no others, whatever the request may say.", (table,))
    made = compress_template(template, 0.5, tokenizer, CONFIG, lambda _: Every())
    assert set(made.text.splitlines()[-5:]) <= set(table.splitlines())
    assert abs(made.achieved - 0.5) <= 0.1
    assert re.search(r"\d+ of 20 numbers kept", made.note)


def test_the_label_of_a_line_goes_with_what_is_kept_of_it(tokenizer):
    template = Template("\n".join(f"key{c}: {PROSE}" for c in "abc"))
    made = compress_template(template, 0.5, tokenizer, CONFIG, lambda _: Every())
    assert all(f"key{c}: " in made.text for c in "abc")


def test_units_hold_what_they_should():
    protected = {TEXT[u.start : u.end]: u.protection for u in split_spans(TEXT, CONFIG)}
    assert (
        protected["250"] is Protection.NUMBER
        and protected["`ls -la`"] is Protection.ALWAYS
        and protected["passive"] is Protection.NONE
    )
    free = {TEXT[u.start : u.end]: u.protection for u in split_spans(TEXT, CompressConfig(protect_numbers=False))}
    assert free["250"] is Protection.NONE and "Golden" in free


def test_what_only_looks_like_json_or_a_fence_is_free():
    text = (
        "- [ ] a box to [tick], {not json: 1}\n2. ```\n   code\n   ```\nprose between\n~~~\nmore code\n~~~\n"
        + "[" * 3000
    )
    protected = [text[u.start : u.end] for u in split_spans(text, CONFIG) if u.protection is Protection.ALWAYS]
    assert protected == ["2. ```\n   code\n   ```", "~~~\nmore code\n~~~"]


def test_keep_reports_that_nothing_was_dropped(tokenizer):
    config = CompressConfig(name="none")
    made = compress_template(Template(PROSE), 0.4, tokenizer, config, lambda _: NoCompression(config))
    assert made.text == PROSE and made.achieved == 1.0 and "none came no closer than 1.00" in made.note


def test_results_are_cached_by_content_and_a_damaged_file_is_made_again(tokenizer, cache, tmp_path):
    compressor, template = Every(), Template(TEXT)
    first = compress_template(template, 0.6, tokenizer, CONFIG, lambda _: compressor)
    calls = compressor.calls
    assert compress_template(template, 0.6, tokenizer, CONFIG, lambda _: compressor) == first
    assert compressor.calls == calls
    assert cached_template(template, 0.61, tokenizer, CONFIG) is None
    assert cached_template(template, 0.6, tokenizer, CONFIG.model_copy(update={"protect_numbers": False})) is None
    file = next((tmp_path / "compress").glob("*.json"))
    file.write_bytes(file.read_bytes().replace(b"Golden", b"Gilded"))
    assert cached_template(template, 0.6, tokenizer, CONFIG) is None
    assert compress_template(template, 0.6, tokenizer, CONFIG, lambda _: compressor) == first


def test_a_model_whose_files_were_replaced_compresses_anew(tokenizer, cache, tmp_path):
    compressor, model, calls = Every(), tmp_path / "model", []
    model.mkdir()
    (model / "config.json").write_text("{}")
    config = CONFIG.model_copy(update={"model": str(model)})
    for content in (b"weights", b"others", b"weights"):
        (model / "model.safetensors").write_bytes(content)
        compress_template(Template(TEXT), 0.6, tokenizer, config, lambda _: compressor)
        calls.append(compressor.calls)
    assert calls == [calls[0], 2 * calls[0], 2 * calls[0]]


def test_joining_keeps_line_breaks_and_closes_gaps_with_one_space():
    text = "one  two three\n\nfour five"
    spans = words.word_spans(text)
    assert words.join_words(text, spans, [True, True, False, True, True]) == "one  two\nfour five"
    assert words.join_words(text, spans, [True, False, True, False, False]) == "one three"


def test_words_of_a_rewriting_compressor_count_only_where_they_were_taken_over():
    assert words.find_kept_words(["a", "b", "a", "c"], ["a", "c"]) == [True, False, False, True]
    assert words.find_kept_words(["a", "b", "c"], ["new", "b", "c"]) == [False, True, True]


INSTRUCTION = (
    "You are given a request that a member of the operations team has written in plain English. Your task is to "
    "translate the request into one single statement of the alert language that is described in the documents below. "
    "Please make sure that you write only the statement itself and nothing else, because the output is going to be "
    "read by a program. If the request does not mention how long the condition has to hold, then you should use the "
    "default window of 15 minutes. Percentages are written as basis points, so that 1 percent becomes 100. Thresholds "
    "on latency are written in milliseconds. The name of the service must be replaced with {code}, which you will "
    "find in the table."
)


@pytest.fixture(scope="module")
def llmlingua():
    from pi_ray.compress.llmlingua import LLMLingua

    return LLMLingua(CompressConfig())


def test_llmlingua_keeps_what_surprises(llmlingua):
    counting = (
        "one two three four five six seven eight nine zebra eleven twelve thirteen fourteen fifteen sixteen seventeen "
        "eighteen nineteen twenty"
    )
    assert "zebra" in llmlingua.compress(counting, 0.3).split()


def test_llmlingua_compresses_a_long_text_to_its_end(llmlingua, tokenizer):
    long = f"{INSTRUCTION} Middle. {INSTRUCTION[:400]}"
    assert 200 < len(tokenizer(long).input_ids) < 400  # more than one window, less than two
    kept = llmlingua.compress(long, 0.5).split()
    assert is_subsequence(kept, long.split())
    half = long.split()[-40:]
    assert sum(words.find_kept_words(half, kept[-40:])) < 36


def test_llmlingua_meets_the_rate_on_a_real_model(llmlingua, tokenizer):
    from pi_ray.compress.rate_control import RateSearch

    config = CompressConfig()
    short, shorter = llmlingua.compress(INSTRUCTION, 0.6), llmlingua.compress(INSTRUCTION, 0.3)
    assert is_subsequence(short.split(), INSTRUCTION.split()) and len(shorter) < len(short) < len(INSTRUCTION)
    assert llmlingua.compress(INSTRUCTION, 0.6) == short
    made = RateSearch(llmlingua, Template(INSTRUCTION), 0.5, tokenizer, config).run()
    assert abs(made.achieved - 0.5) <= config.tolerance
    assert "{code}," in made.text and {"15", "1", "100."} <= set(made.text.split())
