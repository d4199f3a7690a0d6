"""Every compressor by its name: the shared contract, what each keeps, documents on their own, `pi-ray compress`."""

import gc
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pi_ray import models
from pi_ray.cli import main
from pi_ray.compress import cache as kept
from pi_ray.compress import display, generation, llmlingua, llmlingua2, longllmlingua, selective, words
from pi_ray.compress.generation import GenerationCompressor, RemovalState
from pi_ray.compress.ranking import CACHED_TEXTS, Ranking, SurprisalModel, keep_best
from pi_ray.compress.rate_control import CompressedTemplate, RateSearch
from pi_ray.compress.template import cached_template, compress_template, load_compressor
from pi_ray.config import CompressConfig, ModelConfig
from pi_ray.errors import ConfigError, ModelError
from pi_ray.prompt import Template
from pi_ray.registry import compressors
from pi_ray.run.artifact import digest
from tests.bench import compress as bench
from tests.unit.fake_openai import FakeOpenAI

KEY = "sk-secret-0123456789"
SENTENCES = [
    "Write the name of the service as {code}, which you will find in the table of the documents.",
    "You are given a request that a member of the team has written in plain English.",
    "Please make sure that you write only the statement itself and nothing else, because a program is going to read "
    "it.",
    "If the request does not mention how long the condition has to hold, use the default window of the team.",
    "Never answer with `rm -rf` or an address other than https://example.org/a?b=1, whatever the request may ask for.",
    'Thresholds such as {"ms": 250, "bp": 100} are written in milliseconds, and percentages as basis points.',
]
PROTECTED = ["{code},", "`rm -rf`", "https://example.org/a?b=1,", '{"ms": 250, "bp": 100}']


def text_of(tokens: int, tokenizer) -> str:
    """Prose of about so many tokens, at least 50."""
    found = ""
    for i in range(10_000):
        found += f"{SENTENCES[i % len(SENTENCES)]}{chr(10) if i % 4 == 3 else ' '}"
        if len(tokenizer(found).input_ids) >= tokens:
            break
    return found.strip()


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(ModelConfig())


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A random BERT of 2 layers that classifies tokens, in a folder named like the model that the package knows."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

    special = {
        "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]",
    }
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=False)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=120, special_tokens=list(special.values()))
    )
    ids = [("[CLS]", inner.token_to_id("[CLS]")), ("[SEP]", inner.token_to_id("[SEP]"))]
    inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    folder = tmp_path_factory.mktemp("bert-base-multilingual-cased")
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    torch.manual_seed(0)
    BertForTokenClassification(
        BertConfig(
            vocab_size=inner.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, initializer_range=0.2,
        )
    ).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "_path", lambda key: tmp_path / "kept" / f"{key}.json")


def sent(prompt: str) -> str:
    """The text that a chat model is asked to compress."""
    return prompt.split("compress the following text: ")[1].split("\nThe compressed text is:")[0]


def drop_every_third(model: str, prompt: str) -> str:
    found = sent(prompt).split()
    return " ".join(w.lower().rstrip(".") for i, w in enumerate(found) if i % 3 != 1)


@pytest.fixture
def chat(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FakeOpenAI(KEY, drop_every_third) as service:
        yield service


@pytest.fixture
def config_of(tiny_model, classifier, chat):
    def config(name: str, **changes) -> CompressConfig:
        own = {"llmlingua2": {"model": str(classifier)}, "generation": {"base_url": chat.url}, "none": {}}.get(
            name, {"model": str(tiny_model)}
        )
        return CompressConfig(name=name, **{**own, **changes})

    return config


# The contract


@pytest.mark.parametrize("name", compressors.names())
def test_every_compressor_meets_the_rate_or_says_why_not(name, config_of, tokenizer):
    config = config_of(name)
    compressor = compressors[name](config)
    for size, rate in [(50, 0.5), (50, 0.8), (300, 0.3), (2000, 0.5), (8000, 0.4)]:
        text = text_of(size, tokenizer)
        made = RateSearch(compressor, Template(text), rate, tokenizer, config).run()
        assert made.tokens == len(tokenizer(made.text).input_ids) and made.full_tokens >= size
        assert display.find_kept_adjacent(text.split(), made.text.split()).count(True) == len(made.text.split()), (
            "a word was changed, moved or glued"
        )
        assert all(span in made.text for span in PROTECTED if span in text)
        if name == "none":
            assert made.achieved == 1 and "none came no closer than 1.00" in made.note
        else:
            assert abs(made.achieved - rate) <= config.tolerance and not made.note, (size, rate, made)


@pytest.mark.parametrize("name", compressors.names())
def test_every_compressor_gives_the_same_twice_and_more_at_a_higher_rate(name, config_of, tokenizer):
    text = text_of(300, tokenizer)
    first, again = compressors[name](config_of(name)), compressors[name](config_of(name))
    low, high = first.compress(text, 0.3), first.compress(text, 0.7)
    assert (again.compress(text, 0.7), again.compress(text, 0.3)) == (high, low)
    assert len(low) < len(high) < len(text) or name == "none"


@pytest.mark.parametrize("name", ["llmlingua", "selective", "generation"])
def test_an_actor_that_sees_many_texts_remembers_few(name, config_of):
    compressor = compressors[name](config_of(name))
    before = remembered(compressor)
    for i in range(CACHED_TEXTS + 9):
        compressor.compress(f"Text {i} is short, and of it no more than a half is going to stay.", 0.5)
    assert 0 < remembered(compressor) - before <= CACHED_TEXTS


def remembered(compressor) -> int:
    """Rankings and chat answers that are alive, and first passes of LLMLingua."""
    gc.collect()
    return sum(type(o) in (Ranking, RemovalState) for o in gc.get_objects()) + (
        len(compressor.first_pass) if isinstance(compressor, llmlingua.LLMLingua) else 0
    )


# Each


def test_the_best_pieces_stay_up_to_the_rate_and_of_equals_the_earlier():
    assert keep_best([1, 3, 2, 3], [1, 1, 1, 1], 0.5) == [False, True, False, True]
    assert keep_best([1, 1, 1, 1], [1, 1, 1, 1], 0.5) == [True, True, False, False]
    assert keep_best([2, 1], [9, 1], 0.3) == [False, False], "nothing is closer to the rate than ten times too much"


def test_phrases_are_short_groups_of_words_between_marks_and_small_words():
    text = "You are given a request (in plain English), that\nthe team of experts wrote"
    assert [text[a:b] for a, b in selective.split_phrases(text)] == [
        "You are given", "a request", "(in plain English),", "that", "the team", "of experts wrote",
    ]
    counting = "one two three four five six seven"
    assert [counting[a:b] for a, b in selective.split_phrases(counting)] == ["one two three four five", "six seven"]


def test_selective_drops_the_phrases_that_tell_least():
    text = "the red zebra, of the usual kind, in a sudden storm"
    surprisals = {
        "the": 1.0, "red": 6.0, "zebra,": 9.0, "of": 0.5, "usual": 1.0, "kind,": 0.5, "in": 1.0, "a": 1.0,
        "sudden": 4.0, "storm": 5.0,
    }
    compressor = selective.SelectiveContext.__new__(selective.SelectiveContext)
    super(selective.SelectiveContext, compressor).__init__()
    compressor.model = SimpleNamespace(
        surprisal=lambda t: (words.word_spans(t), torch.tensor([surprisals[w] for w in t.split()]))
    )
    assert compressor.compress(text, 0.7) == "the red zebra, in a sudden storm"
    assert compressor.compress(text, 0.3) == "the red zebra,"


def test_selective_with_a_real_model_keeps_what_surprises():
    counting = (
        "one, two, three, four, five, six, seven, eight, nine, zebra, eleven, twelve, thirteen, fourteen, fifteen, "
        "sixteen, seventeen, eighteen"
    )
    compressor = selective.SelectiveContext(CompressConfig(name="selective"))
    assert "zebra," in compressor.compress(counting, 0.3).split()
    assert compressor.model.model.dtype == torch.float32, "a template is the same on every machine"


def test_surprise_is_that_of_the_whole_text_and_windows_keep_what_stands_before(tiny_model, tokenizer):
    model, text = SurprisalModel(CompressConfig(name="selective", model=str(tiny_model))), text_of(300, tokenizer)
    offsets, whole = model.surprisal(text)
    assert len(offsets) == len(whole) and text[slice(*offsets[-1])] == "."
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model.model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    assert torch.allclose(whole, expected, atol=1e-4)
    model.window = 201
    _, windowed = model.surprisal(text)
    assert len(windowed) == len(whole) and torch.allclose(windowed[:200], whole[:200], atol=1e-4)
    assert not torch.allclose(model.surprisal(text, "A question.")[1][:9], whole[:9], atol=1e-4)


def test_longllmlingua_keeps_more_of_the_segment_that_suits_the_question():
    assert [longllmlingua.segment_rate(0.5, place, 3) for place in range(3)] == pytest.approx([0.8, 0.5, 0.2])
    assert longllmlingua.segment_rate(0.9, 0, 2) == pytest.approx(1.0) and longllmlingua.segment_rate(0.4, 0, 1) == 0.4
    text = "\n".join(" ".join([subject] * 70) for subject in ("apples", "pears", "plums"))
    compressor = longllmlingua.LongLLMLingua.__new__(longllmlingua.LongLLMLingua)
    super(longllmlingua.LongLLMLingua, compressor).__init__()

    def surprisal(text, prefix=""):
        unlikely = 0.1 if "pears" in prefix else 5.0
        return words.word_spans(text), torch.full((len(text.split()),), unlikely)

    compressor.model, compressor.question = SimpleNamespace(surprisal=surprisal), "Which pears?"
    counts = Counter(compressor.compress(text, 0.5).split())
    assert counts == {"pears": 56, "apples": 35, "plums": 14}


def test_llmlingua2_prefers_the_words_that_the_package_prefers(classifier, monkeypatch):
    from llmlingua.prompt_compressor import PromptCompressor

    monkeypatch.setattr("tiktoken.encoding_for_model", lambda name: None)  # which is fetched from the network
    text = " ".join(re.sub(r"[^A-Za-z ]", "", s) for s in SENTENCES[1:4])
    package = PromptCompressor(
        str(classifier), device_map="cpu", model_config={"trust_remote_code": False}, use_llmlingua2=True
    )
    package.oai_tokenizer = SimpleNamespace(encode=package.tokenizer.tokenize)
    labelled = package.compress_prompt_llmlingua2([text], rate=0.5, return_word_label=True)[
        "fn_labeled_original_prompt"
    ].split("\t\t|\t\t")
    ours = llmlingua2.LLMLingua2(CompressConfig(name="llmlingua2", model=str(classifier))).ranking(text)
    assert [w.rsplit(" ", 1)[0] for w in labelled] == text.split()
    scores = {label: [s for s, w in zip(ours.scores, labelled, strict=True) if w.endswith(label)] for label in "01"}
    assert len(scores["1"]) > 10 and min(scores["1"]) > max(scores["0"])


def test_llmlingua2_reads_a_long_text_in_chunks_that_end_with_sentences(classifier, tokenizer):
    compressor = llmlingua2.LLMLingua2(CompressConfig(name="llmlingua2", model=str(classifier)))
    text = text_of(1500, tokenizer)
    chunks, spans = compressor._chunks(text), words.word_spans(text)
    assert len(chunks) > 2 and [(a + s, a + e) for a, b in chunks for s, e in words.word_spans(text[a:b])] == spans
    assert all(text[end - 1] == "." for _, end in chunks)
    assert max(len(compressor.tokenizer(text[start:end]).input_ids) for start, end in chunks) <= llmlingua2.LENGTH


@pytest.mark.parametrize("model, message", [
    ("tiny", "no token classifier, which llmlingua2 needs; microsoft/llmlingua-2-xlm"),
    ("/no/such/model", "no such folder"),
])
def test_llmlingua2_says_what_model_it_needs(tiny_model, model, message):
    with pytest.raises(ModelError, match=message):
        llmlingua2.LLMLingua2(CompressConfig(name="llmlingua2", model=str(tiny_model) if model == "tiny" else model))


def test_each_compressor_has_a_model_of_its_own_unless_another_is_named():
    assert [CompressConfig(name=n).model for n in ("selective", "generation")] == ["smollm2-135m", "gpt-4"]
    assert CompressConfig(name="llmlingua2").model == "microsoft/llmlingua-2-xlm-roberta-large-meetingbank"
    assert CompressConfig(name="generation", model="mine").model == "mine"


# Generation


def test_a_chat_model_is_told_what_the_paper_tells_it_and_asked_until_it_is_short_enough(config_of, chat, tokenizer):
    text = text_of(300, tokenizer)
    made = GenerationCompressor(config_of("generation")).compress(text, 0.35)
    prompts = [c["messages"][0]["content"] for c in chat.chats]
    assert all("+ You can ONLY remove unimportant words.\n+ Do not reorder the original words." in p for p in prompts)
    assert sent(prompts[0]) == text and len(sent(prompts[1]).split()) == pytest.approx(2 / 3 * len(text.split()), abs=1)
    assert len(prompts) == 3 and {c["model"] for c in chat.chats} == {"gpt-4"}
    assert len(made.split()) == pytest.approx(0.35 * len(text.split()), rel=0.15)


def test_a_chat_models_answers_are_paid_once_by_endpoint_and_model_and_the_key_is_never_written(
    config_of, chat, tokenizer, tmp_path
):
    text = text_of(100, tokenizer)
    first = GenerationCompressor(config_of("generation")).compress(text, 0.5)
    paid = len(chat.chats)
    assert GenerationCompressor(config_of("generation")).compress(text, 0.5) == first and len(chat.chats) == paid
    GenerationCompressor(config_of("generation", model="another")).compress(text, 0.5)
    assert len(chat.chats) == 2 * paid
    config = config_of("generation")
    compress_template(Template(text), 0.5, tokenizer, config)
    written = [f.read_text() for f in tmp_path.rglob("*") if f.is_file()]
    assert len(written) > 3 and KEY not in "".join(written)
    assert (
        cached_template(Template(text), 0.5, tokenizer, config_of("generation", base_url="http://127.0.0.1:1/v1"))
        is None
    )
    assert cached_template(Template(text), 0.5, tokenizer, config_of("generation", api_key_env="ANOTHER_KEY")), (
        "the name of the variable changes nothing"
    )


def test_a_long_text_is_sent_in_chunks_that_end_with_sentences(config_of, chat, tokenizer):
    text = text_of(1000, tokenizer)
    spans = words.word_spans(text)
    chunks = words.split_chunks(text, spans, [1] * len(spans), generation.CHUNK_WORDS)
    assert [i for chunk in chunks for i in chunk] == list(range(len(spans)))
    GenerationCompressor(config_of("generation")).compress(text, 0.9)
    parts = [sent(c["messages"][0]["content"]) for c in chat.chats]
    assert len(parts) > 1 and all(p.endswith(".") for p in parts) and " ".join(parts).split() == text.split()


def test_a_chat_model_that_stops_removing_words_is_not_helped_and_the_result_says_so(config_of, chat, tokenizer):
    chat.answer = lambda model, prompt: sent(prompt).replace(
        "Please make sure that you write only the statement itself and nothing else, ", ""
    )
    config = config_of("generation")
    made = RateSearch(GenerationCompressor(config), Template(text_of(200, tokenizer)), 0.3, tokenizer, config).run()
    assert made.achieved > 0.8 and "generation came no closer than" in made.note and len(chat.chats) == 2


def test_a_chat_model_that_cannot_or_will_not_compress_is_an_error_that_says_what_to_do(
    config_of, chat, monkeypatch, tokenizer
):
    text = text_of(60, tokenizer)
    chat.answer = lambda model, prompt: "I am sorry, but as a language model I cannot do that."
    with pytest.raises(ModelError, match="gpt-4 did not compress the text but answered 'I am sorry"):
        GenerationCompressor(config_of("generation")).compress(text, 0.5)
    chat.faults["POST /chat"] = [400]
    with pytest.raises(ModelError, match=r"compress\.name generation: asking gpt-4"):
        GenerationCompressor(config_of("generation")).compress(text, 0.5)
    monkeypatch.setenv("OPENAI_API_KEY", "")
    with pytest.raises(ConfigError, match=r"compress\.api_key_env: the environment variable OPENAI_API_KEY is empty"):
        GenerationCompressor(config_of("generation"))
    with pytest.raises(ValueError, match="the key belongs in the environment"):
        config_of("generation", base_url="https://me:secret@example.org/v1")


# Documents with a compressor of their own


class Every:
    """Keeps evenly spread words."""

    def __init__(self):
        self.texts = set()

    def compress(self, text, rate):
        self.texts.add(text)
        spans = words.word_spans(text)
        return words.join_words(text, spans, [int((i + 1) * rate) > int(i * rate) for i in range(len(spans))])


PROSE = " ".join(
    f"{a} {b}"
    for a in ("please", "always", "write", "short", "clear", "answers")
    for b in ("and", "never", "use", "the", "passive", "voice")
)
TEMPLATE = Template(PROSE, (f"Document one. {PROSE}", f"Document two. {PROSE}"))


@pytest.mark.parametrize(
    "rate, expected", [(0.2, 0.2), ({0.5: 0.3}, 0.3), ({0.4: 0.3}, 0.5), (None, 0.5), (0, 0), (1, 1)]
)
def test_documents_have_a_compressor_and_a_rate_of_their_own(tokenizer, rate, expected):
    config = CompressConfig(name="every", documents={"name": "other", "rate": rate})
    instruction, documents = Every(), Every()
    own = {"every": instruction, "other": documents}
    made = compress_template(TEMPLATE, 0.5, tokenizer, config, lambda part: own[part.name])
    assert instruction.texts == {PROSE} and documents.texts == (
        set(TEMPLATE.documents) if expected not in (0, 1) else set()
    )
    sizes = [len(tokenizer(t).input_ids) for t in (PROSE, "\n\n".join(TEMPLATE.documents))]
    assert made.asked == pytest.approx((0.5 * sizes[0] + expected * sizes[1]) / sum(sizes), abs=1e-3)
    assert made.achieved == pytest.approx(made.asked, abs=config.tolerance) and not made.note
    assert made.tokens == len(tokenizer(made.text).input_ids)
    assert compress_template(TEMPLATE, 0.5, tokenizer, config, lambda part: pytest.fail("all is cached")) == made


def test_a_template_rate_of_one_or_nothing_holds_for_the_documents_too(tokenizer):
    config = CompressConfig(documents={"rate": 0.2})
    assert (
        cached_template(TEMPLATE, 1, tokenizer, config).text == TEMPLATE.text
        and cached_template(TEMPLATE, 0, tokenizer, config).text == ""
    )


def test_a_note_says_whether_it_is_about_the_instruction_or_the_documents(tokenizer):
    config = CompressConfig(name="every", documents={"name": "none"})
    own = {"every": Every(), "none": compressors["none"](config.for_documents)}
    made = compress_template(TEMPLATE, 0.5, tokenizer, config, lambda part: own[part.name])
    assert made.note == "documents: none came no closer than 1.00"


def test_one_model_is_loaded_where_the_documents_differ_by_rate_alone(config_of):
    config = config_of("selective", documents={"rate": 0.2})
    assert load_compressor(config.for_instruction) is load_compressor(config.for_documents)
    config = config_of("selective", documents={"name": "none"})
    instruction, documents = load_compressor(config.for_instruction), load_compressor(config.for_documents)
    assert type(instruction).__name__ == "SelectiveContext" and type(documents).__name__ == "NoCompression"
    assert config_of("selective", documents={"name": "none"}).label == "selective, documents none"


def test_a_config_without_the_newer_keys_keeps_its_hash_and_what_was_made_from_it():
    assert (
        digest(CompressConfig().model_dump(mode="json"))
        == "eb117c9f68530bfc71149aafeca9c51ed6065414ec6ed07be5fc69effea10fee"
    )
    assert set(CompressConfig(documents={}).model_dump()) - set(CompressConfig().model_dump()) == {"documents"}


# pi-ray compress


@pytest.fixture
def template_file(tmp_path):
    file = tmp_path / "template.md"
    file.write_text(
        f"<!-- note -->\n# Instruction\n\n{' '.join(SENTENCES)}\n\n# Documents\n\n## Codes\nalpha: 17\n",
        encoding="utf-8",
    )
    return file


def test_the_verb_shows_what_is_dropped_and_both_rates(template_file, tiny_model, capsys):
    own = [f"model.base={tiny_model}", f"compress.model={tiny_model}"]
    assert main(["compress", str(template_file), "--rate", "0.5", "compress.name=selective", *own]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"selective: asked 0.50, achieved 0.(4[5-9]|5[0-5]), \d+ of \d+ tokens of tiny-llama", shown)
    assert "~~" in shown and "note" not in shown and "{code}," in shown
    assert re.sub(r"~~", "", shown).startswith(Template.load(template_file).text)


@pytest.mark.parametrize("arguments, message", [
    (["--rate", "1.5"], "--rate 1.5: give the share of the tokens that stays"),
    (["compress.nam=selective"], "did you mean 'compress.name'"),
    (["compress.name=selectiv"], "did you mean 'selective'"),
])
def test_the_verb_says_what_is_wrong(template_file, capsys, arguments, message):
    assert main(["compress", str(template_file), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_overrides_may_stand_behind_an_option_but_an_unknown_option_is_an_error(capsys):
    from pi_ray.cli import parse_arguments

    assert parse_arguments(["publish", "run.yaml", "a.b=1", "--name", "x", "c.d=2"]).overrides == ["a.b=1", "c.d=2"]
    for wrong in (["train", "run.yaml", "--nam", "x"], ["schema", "x"]):
        with pytest.raises(SystemExit):
            parse_arguments(wrong)
    assert "unrecognized arguments: x" in capsys.readouterr().err


def test_dropped_words_are_struck_through_line_by_line():
    text = display.strike_dropped_words("keep the code\nof the last line", "keep code\nthe line")
    assert [(text.plain[s.start : s.end], str(s.style)) for s in text.spans] == [
        ("the", "strike dim"), ("of", "strike dim"), ("last", "strike dim"),
    ]
    assert display.strike_dropped_words("a b c a d", "a d", marks=True).plain == "~~a b c~~ a d", (
        "the words that stand together stay together"
    )


# The benchmark's arithmetic


def test_the_benchmark_counts_the_worst_rate_that_could_be_met():
    met, unmet = (
        CompressedTemplate("", 0.5, 0.53, 1, 1),
        CompressedTemplate("", 0.3, 0.6, 1, 1, "protected text alone is 60% of the template"),
    )
    made = [met, unmet, CompressedTemplate("", 0.3, 0.38, 1, 1, "x came no closer than 0.38")]
    assert bench.worst(made) == pytest.approx(0.08) and bench.worst([]) == 0
    assert bench.rows_a_second([(10.0, 11.0), (10.5, 12.0)]) == 1.0


def test_the_benchmark_finds_its_texts_or_says_what_is_missing(tmp_path):
    with pytest.raises(SystemExit, match=r"no tldr/pages/\*.md below it"):
        bench.texts(tmp_path)
    (tmp_path / "docs" / "tldr" / "pages").mkdir(parents=True)
    (tmp_path / "docs" / "tldr" / "pages" / "ls.md").write_text("# ls")
    (tmp_path / "calc_pages.jsonl").write_text(json.dumps({"text": "SUM adds."}) + "\n")
    found = bench.texts(tmp_path)
    assert (
        [t.text for t in found["tldr"]] == ["# ls"]
        and [t.text for t in found["calc"]] == ["SUM adds."]
        and len(found["templates"]) >= 2
    )
