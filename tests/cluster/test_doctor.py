"""`pi-ray doctor --address` at real heads, as typed: one that wants the token, and one that lets everyone in."""


from itertools import pairwise

import pytest

from tests.cluster.conftest import LOCAL, TINY, ended
from tests.faults.service import free_port
from tests.hosts import TOKEN, local_head

pytestmark = pytest.mark.cluster
WRONG = "the-wrong-token-0123456789abcdef"


def failed(process) -> list[str]:
    """What is in the way and how to mend it, a line each, of a visit that found something."""
    assert process.wait(timeout=120) == 1, process.said()
    said = process.said()
    assert TOKEN not in said and WRONG not in said and "Traceback" not in said
    lines = said.splitlines()
    return [f"{line} {cure.strip()}" for line, cure in pairwise(lines) if line.startswith("FAIL")]


def test_with_the_token_in_a_file_as_people_have_it_the_nodes_are_looked_at(head, task, shared, person, tmp_path):
    """RAY_AUTH_MODE is not set, the shell knows another cluster's address, and nothing is joined by RAY_ADDRESS."""
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    (tmp_path / "token").chmod(0o600)
    own = {
        "RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "RAY_ADDRESS": "127.0.0.1:1",
    }
    asked = [
        f"model.base={shared}/model", f"compress.model={shared}/model", *TINY, "cluster.serve_resources={nowhere: 1}",
    ]
    said = ended(person("http://127.0.0.1:1", "doctor", str(task / "run.yaml"), *asked, "--address", LOCAL, **own))
    assert f"ok    cluster       {LOCAL} asks for a token and takes yours" in said and "1 node, 2 CPUs, 0 GPUs" in said
    assert [line.split()[1] for line in said.splitlines() if line.startswith("note")] == [
        "nodes", "storage",
    ] and "{'nowhere': 1.0}" in said
    assert "nothing is in the way" in said and TOKEN not in said


@pytest.mark.fault
def test_without_the_token_with_a_wrong_one_and_at_a_wrong_port_each_is_told_with_its_cure(head, person):
    none, wrong, port = (
        person(LOCAL, "doctor", "--address", LOCAL, RAY_AUTH_MODE="", RAY_AUTH_TOKEN=""),
        person(LOCAL, "doctor", "--address", LOCAL, RAY_AUTH_TOKEN=WRONG),
        person(LOCAL, "doctor", "--address", "http://127.0.0.1:6389"),
    )  # fmt: skip
    (said,) = failed(none)
    assert "wants a token, and there is none here" in said and "RAY_AUTH_TOKEN_PATH to the cluster's token" in said
    (said,) = failed(wrong)
    assert (
        "does not take your token, from RAY_AUTH_TOKEN (403)" in said
        and "'ray get-auth-token' prints it on its head node" in said
    )
    (said,) = failed(port)
    assert "does not answer" in said


@pytest.mark.fault
def test_a_head_without_authentication_lets_everyone_in_and_that_is_a_fault(person, tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    with local_head(url, free_port(), {}, {"RAY_AUTH_MODE": "disabled"}):
        with_token, without = (
            person(url, "doctor", "--address", url),
            person(url, "doctor", "--address", url, RAY_AUTH_MODE="", RAY_AUTH_TOKEN=""),
        )
        for process in (with_token, without):
            (said,) = failed(process)
            assert (
                f"{url} lets everyone in, without a token" in said and "start its Ray with RAY_AUTH_MODE=token" in said
            )
