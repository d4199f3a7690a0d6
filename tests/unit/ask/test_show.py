"""What `pi-ray ask` says about the queries."""

from pi_ray.ask.show import summarise_asking

MANIFEST = {
    "queries": 3, "written": 9, "writer": "adapter", "seconds": 12.3, "filters": {"kept": 5, "duplicate": 4},
    "units": ["be kind", "red: k4", "blue: z9"], "touched_before": [0, 2, 0],
    "coverage": {"kinds": ["direct", "two"], "target": 2, "matrix": [[None, None], [1, 0], [2, 0]]},
}


def test_what_was_left_out_and_which_units_are_silent_is_said():
    assert summarise_asking(MANIFEST) == [
        "3 queries kept of 9 that the writer (adapter) wrote in 12 s; left out: 4 duplicate, 2 more than ask.queries.",
        "Units: 3, 2 of them in no labelled row or logged query; 1 of these have queries now.",
        "No query about 1: be kind",
    ]
