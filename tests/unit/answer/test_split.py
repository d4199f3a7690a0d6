"""The split of queries: every unit of the prompt is in it, it is the same in any order, and near copies keep out."""

from pi_ray.answer.split import DEV_ONE_IN, MOST_TEST, TEST_ONE_IN, split_queries
from pi_ray.protocols import Row

NAMES = ("anchor", "beacon", "copper", "dahlia", "ember", "falcon")
TEMPLATE = "Answer with the code.\n\n## Codes\n\n" + "\n".join(f"{name}: k{i}" for i, name in enumerate(NAMES))
WAYS = (
    "what is {}", "code of {} please", "which one has {}", "{}?", "tell me about {} now", "I need {}",
    "how is {} coded", "give {}", "look up {} for me", "{} it is", "and what would {} be", "say the code that {} has",
)
ROWS = [Row(f"q{i}", way.format(name), "") for i, (name, way) in enumerate((n, w) for n in NAMES for w in WAYS)]


def names_in(rows):
    return {name for row in rows for name in NAMES if name in row.query}


def test_each_split_has_its_share_and_every_unit_is_in_train_and_test():
    splits, copies = split_queries(ROWS, TEMPLATE)
    assert copies == 0 and sorted(r.id for rows in splits.values() for r in rows) == sorted(r.id for r in ROWS)
    assert len(splits["test"]) == round(len(ROWS) / TEST_ONE_IN) and len(splits["dev"]) == len(ROWS) // DEV_ONE_IN
    assert names_in(splits["test"]) == names_in(splits["train"]) == set(NAMES)


def test_the_split_depends_on_the_texts_alone():
    ids = {split: {r.id for r in rows} for split, rows in split_queries(ROWS, TEMPLATE)[0].items()}
    again = {split: {r.id for r in rows} for split, rows in split_queries(ROWS[::-1], TEMPLATE)[0].items()}
    assert ids == again


def test_a_near_copy_of_a_held_out_query_is_in_no_split():
    held_out = split_queries(ROWS, TEMPLATE)[0]["test"][0]
    copied = [*ROWS, *(Row(f"copy{i}", held_out.query.upper() + "!" * i, "") for i in range(1, 9))]
    splits, copies = split_queries(copied, TEMPLATE)
    texts = {split: {" ".join(r.query.lower().strip("!?").split()) for r in rows} for split, rows in splits.items()}
    assert copies and not texts["train"] & (texts["test"] | texts["dev"]) and not texts["dev"] & texts["test"]


def test_of_very_many_queries_no_more_are_held_out_than_a_test_needs():
    many = [Row(f"q{i}", f"{i} questions about {NAMES[i % 6]} and number {i * 7}", "") for i in range(3000)]
    splits, _ = split_queries(many, TEMPLATE)
    assert len(splits["test"]) <= MOST_TEST and len(splits["train"]) > 2700


def test_where_people_labelled_what_is_held_out_all_queries_teach_but_near_copies_of_that():
    held_out = {"dev": [Row("d", "dahlia in dev", "k3")], "test": [Row("t", ROWS[0].query.upper() + "!", "k0")]}
    splits, copies = split_queries(ROWS, TEMPLATE, held_out)
    assert set(splits) == {"train"} and len(splits["train"]) == len(ROWS) - copies
    assert copies == 1 and ROWS[0] not in splits["train"]
