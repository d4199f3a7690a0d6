"""The bundled task: the language, the template's facts, the groups of rows, and the score."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest

from pi_ray.config import ModelConfig, TaskConfig
from pi_ray.models import load_tokenizer
from pi_ray.protocols import SPLITS
from pi_ray.tasks.opsql.generate import (
    DEFAULT_ROUTE,
    DEFAULT_WINDOW,
    GROUPS,
    MEASURES,
    SEVERITIES,
    generate_rows,
    main,
)
from pi_ray.tasks.opsql.language import (
    LONGEST,
    MAX_CHARACTERS,
    METRICS,
    ROUTES,
    SERVICES,
    SHORTEST,
    OpsqlError,
    Statement,
    _series,
    execute_statement,
    parse_statement,
)
from pi_ray.tasks.opsql.task import OpsqlTask

REFERENCE = "from r9 | lat > 2000 | for 60m | to fern"
NAMES = {code: name for name, code in SERVICES.items()}


@pytest.fixture
def task():
    return OpsqlTask(TaskConfig(name="opsql"))


def pair(row):
    statement = parse_statement(row.answer)
    return statement.service, statement.metric


def test_the_canonical_wording_of_a_statement_parses_back_to_it():
    for row in [row for split in SPLITS for row in generate_rows()[split]]:
        assert str(parse_statement(row.answer)) == row.answer


@pytest.mark.parametrize("text", [
    "from r9 | lat > 2000 | for 1h | to fern",
    "from r9 | to fern | for 60m | lat > 2000",
    "  from  r9|lat>2000|for 60m|to fern\n",
])
def test_what_the_language_lets_vary_runs_the_same_without_matching_exactly(task, text):
    row = replace(next(task.rows("test")), answer=REFERENCE)
    assert task.score(row, text) == {"exact_match": 0.0, "execution": 1.0}


@pytest.mark.parametrize(
    "text",
    [
        "", "|||", "hello", "from zz | lat > 2000 | for 60m | to fern", "from a9 | lat > 2000 | for 60m | to fern",
        "from r9 | lax > 2000 | for 60m | to fern", "from r9 | lat > 2000 | for 60m | to nobody",
        "from r9 | lat > 2000 | to fern", "from r9 | lat > 2000 | for 60m | for 60m | to fern",
        "from r9 | lat > 2000 | for 120m | to fern", "from r9 | lat > 2000 | for 4m | to fern",
        "from r9 | lat > ٢٠٠٠ | for 60m | to fern", "from r9 | lat > 2 | for 60m | to fern | to kite",
        "lat > 2000 | from r9 | for 60m | to fern", "from r9 | lat > 99999999999999999999999 | for 60m | to fern",
        "from r9 | lat > -1 | for 60m | to fern", REFERENCE + " | " + REFERENCE,
        "from r9 | __import__('os') | for 60m | to fern", "\0" * 50, REFERENCE + " |" * MAX_CHARACTERS,
        "from " * 100_000, "|" * 1_000_000,
    ],
)
def test_what_is_not_opsql_raises_and_scores_nothing(task, text):
    with pytest.raises(OpsqlError):
        parse_statement(text)
    row = replace(next(task.rows("test")), answer=REFERENCE)
    assert task.score(row, text) == {"exact_match": 0.0, "execution": 0.0}


@pytest.mark.parametrize(
    "text",
    [
        "from r9 | lat > 3000 | for 10m | to fern", "from g5 | req < 40 | for 60m | to kite",
        "from a8 | cpu > 900 | for 5m | to moss",
    ],
)
def test_an_alert_fires_when_its_condition_held_in_every_minute_of_the_window(text):
    s = parse_statement(text)
    holds = [v > s.value if s.above else v < s.value for v in _series(s.service, s.metric)]
    expected = tuple(t for t in range(s.window - 1, len(holds)) if all(holds[t - s.window + 1 : t + 1]))
    assert execute_statement(s) == (expected, s.route) and 0 < len(expected) < len(holds)


def test_every_alert_that_rows_can_ask_for_fires_and_differs_from_every_other_of_its_service():
    for code in list(SERVICES.values())[::4]:
        seen = {}
        for metric, window in product(MEASURES, (5, 10, 15, 20, 30, 45, 60)):
            for amount in MEASURES[metric].amounts:
                statement = Statement(
                    code, metric, MEASURES[metric].above, amount * MEASURES[metric].scale, window, "moss"
                )
                minutes, _ = execute_statement(statement)
                assert minutes, f"{statement} never fires, so wrong outputs would count as right"
                assert minutes not in seen, f"{statement} and {seen.get(minutes)} fire in the same minutes"
                seen[minutes] = statement


def test_one_wrong_fact_changes_the_result():
    for row in generate_rows()["test"]:
        s = parse_statement(row.answer)
        other = next(c for c in SERVICES.values() if c != s.service)
        wrong = [
            replace(s, service=other), replace(s, route=next(r for r in ROUTES if r != s.route)),
            replace(s, above=not s.above), replace(s, metric=next(m for m in METRICS if m != s.metric)),
            replace(s, value=s.value // 2), replace(s, window=20 if s.window != 20 else 30),
        ]
        assert all(execute_statement(w) != execute_statement(s) for w in wrong), row.answer


def test_services_and_codes_are_distinct_and_no_code_follows_from_its_name():
    assert len(SERVICES) == 40 and len(set(SERVICES.values())) == 40
    assert not [name for name, code in SERVICES.items() if code[0] == name[0]]


def test_the_template_has_an_instruction_and_names_every_fact(task):
    template = task.template()
    assert template.instruction and len(template.documents) == 5
    for name, code in SERVICES.items():
        assert f"\n{name}: {code}" in template.text
    for metric, measure in MEASURES.items():
        line = next(line for line in template.text.splitlines() if line.startswith(f"{metric}: "))
        assert all(name in line for name in measure.names) and (
            measure.scale == 1 or line.endswith(f"is {measure.scale}")
        )
    for severity, route in SEVERITIES.items():
        assert severity in next(line for line in template.text.splitlines() if line.startswith(f"{route}: "))
    default = next(line for line in template.text.splitlines() if "names no severity" in line)
    assert default.startswith(DEFAULT_ROUTE) and f"names no window, write {DEFAULT_WINDOW}m" in template.text
    assert f"shorter than {SHORTEST}m or longer than {LONGEST}m" in template.text


def test_the_template_is_long_enough_to_be_worth_internalising(task):
    tokenizer = load_tokenizer(ModelConfig())
    assert 450 <= len(tokenizer(task.template().text, add_special_tokens=False).input_ids) <= 560


def test_there_are_enough_rows_and_they_are_the_same_each_time(task):
    assert (
        len(list(task.rows("train"))) >= 480
        and len(list(task.rows("dev"))) >= 80
        and len(list(task.rows("test"))) >= 150
    )
    before = generate_rows()
    generate_rows.cache_clear()
    assert generate_rows() == before and generate_rows(seed=1) != before


def test_no_query_and_no_id_stands_twice_in_all_splits():
    rows = [row for rows in generate_rows().values() for row in rows]
    assert len({" ".join(row.query.casefold().split()) for row in rows}) == len(rows) == len({row.id for row in rows})


@pytest.mark.parametrize("split", ["dev", "test"])
@pytest.mark.parametrize("used", [120, 240, 600])
def test_groups_mean_what_they_say_for_any_number_of_training_rows(split, used):
    pairs = {pair(row) for row in generate_rows()["train"][:used]}
    services, metrics = {s for s, _ in pairs}, {m for _, m in pairs}
    everything = {pair(row) for row in generate_rows()["train"]}
    for row in generate_rows()[split]:
        service, metric = pair(row)
        assert metric in metrics
        expected = {"like train": (True, True), "new combinations": (True, False), "template only": (False, False)}[
            row.group
        ]
        assert (service in services, (service, metric) in pairs) == expected, row
        assert ((service, metric) in everything) == expected[1]


def test_the_first_120_training_rows_hold_each_trained_service_three_times_and_each_route():
    statements = [parse_statement(row.answer) for row in generate_rows()["train"]]
    first = statements[:120]
    times = Counter(s.service for s in first)
    assert set(times) == {s.service for s in statements} and len(times) == 30 and min(times.values()) >= 3
    assert {s.route for s in first} == set(ROUTES) and {s.metric for s in first} == set(METRICS)


@pytest.mark.parametrize("n", [3, 30, 60, 150])
def test_every_beginning_of_the_test_rows_is_balanced(n):
    task = OpsqlTask(TaskConfig(name="opsql", rows={"test": n}))
    assert Counter(row.group for row in task.rows("test")) == dict.fromkeys(GROUPS, n // 3)


def test_training_rows_carry_no_group(task):
    assert {row.group for row in task.rows("train")} == {""}


def test_every_answer_is_what_the_query_says(task):
    """Read from the words of the query, independently of the generator."""
    for row in [*task.rows("train"), *task.rows("test")]:
        s, words = (
            parse_statement(row.answer),
            row.query.lower().replace(":", " ").replace(",", " ").replace(".", " ").split(),
        )
        assert NAMES[s.service] in words and s.above == bool({"above", "over"} & set(words))
        amount = next(int(w) for w in words if w.isdigit())
        assert s.value == amount * {"lat": 1000, "err": 100, "ram": 1000, "cpu": 10, "lag": 1, "req": 1}[s.metric]
        if "for" not in words:
            assert s.window == 15
        severity = next((w for w in ("critical", "urgent", "serious", "minor", "low") if w in words), "")
        assert (
            s.route
            == {"critical": "fern", "urgent": "fern", "serious": "kite", "minor": "moss", "low": "cobalt", "": "moss"}[
                severity
            ]
        )


def test_the_generator_prints_counts_and_rows(capsys):
    main()
    assert "train: 600 rows" in capsys.readouterr().out


def test_unlabelled_queries_use_every_service_and_tell_no_answer():
    rows = generate_rows()["unlabelled"]
    assert {row.answer for row in rows} == {""}
    used = Counter(
        name
        for row in rows[:480]
        for name in SERVICES
        if name in row.query.replace(":", " ").split() + row.query.rstrip(".").split()
    )
    assert used.keys() == SERVICES.keys() and min(used.values()) >= 10
