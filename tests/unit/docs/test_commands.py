"""Every command and every block of the documents is executed, parsed by what would execute it, or listed with a reason.

- Cheap commands of `pi-ray` (EXECUTED) run in a folder that `pi-ray init` has filled.
- The others go through the real command line parser and the real reader of run files; TESTED_BY names a test that runs
  the verb.
- Commands of other programs stand in OTHER_PROGRAMS with the reason why nothing here can run them. An entry that no
  page uses is an error, and so is a command that is in no list.
- YAML blocks are parts of run files, Python blocks are executed, TOML and Markdown blocks are read.
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import yaml

from pi_ray import cli
from pi_ray.config import RunConfig, run_file
from pi_ray.experiments import sweep
from pi_ray.prompt import Template
from pi_ray.protocols import Row
from tests.unit.docs.pages import NAMES, REPO, code_blocks, commands, inline_code

GENERATED = ("docs/architecture.md", "docs/configuration.md")  # its inline code is that of docstrings
LANGUAGES = {"bash", "yaml", "python", "toml", "markdown", "text"}  # "text" holds drawings
EXECUTED = {
    "pi-ray show my-task/run.yaml", "pi-ray show my-task/run.yaml train.lr=0.0003 schedule.shots=4", "pi-ray schema",
    "pi-ray plan my-task/run.yaml", "pi-ray plan my-task/run.yaml --scale",
    "pi-ray compress my-task/template.md --rate 0.5",
    "pi-ray render k8s my-task/run.yaml --out my-cluster/k8s",
    "pi-ray render launcher my-task/run.yaml --out my-cluster/launcher",
    "pi-ray render launcher my-task/run.yaml 'cluster.launcher={provider: gcp, project: my-id}' --out my-cluster/gcp",
    "pi-ray render slurm my-task/run.yaml --out my-cluster/slurm",
    "pi-ray key team-a --adapters my-task other-task",
}  # fmt: skip
TESTED_BY = {  # verb -> test file that runs it, which must hold this text
    "init": ("tests/unit/docs/test_commands.py", "pi-ray init my-task/"),
    "demo": ("tests/ray/test_main_job.py", "pi-ray demo"),
    "ask": ("tests/ray/test_ask.py", 'main(["ask"'),
    "knows": ("tests/unit/store/test_publish.py", 'main(["knows"'),
    "export": ("tests/unit/store/test_export.py", 'main(["export"'),
    "bake": ("tests/ray/test_bake.py", 'main(["bake"'),
    "run": ("tests/ray/test_main_job.py", "pi-ray run my-task/run.yaml"),
    "prepare": ("tests/ray/test_main_job.py", "pi-ray prepare my-task/run.yaml"),
    "neighbours": ("tests/ray/test_main_job.py", "pi-ray neighbours my-task/run.yaml --row train-4"),
    "train": ("tests/ray/test_main_job.py", "pi-ray train my-task/run.yaml"),
    "evaluate": ("tests/ray/test_main_job.py", "pi-ray evaluate my-task/run.yaml"),
    "report": ("tests/ray/test_main_job.py", "pi-ray report my-task/run.yaml"),
    "publish": ("tests/ray/test_main_job.py", "pi-ray publish my-task/run.yaml"),
    "plan": ("tests/unit/docs/test_commands.py", "pi-ray plan my-task/run.yaml"),
    "refresh": ("tests/unit/store/test_refresh.py", 'main("refresh"'),
    "table": ("tests/ray/test_paper.py", "pi-ray table"),
    "serve": ("tests/ray/test_main_job.py", "pi-ray serve runs/my-task"),
    "chat": ("tests/unit/serve/test_chat.py", "chat"),
    "release": ("tests/unit/store/test_release.py", "release"),
    "doctor": ("tests/cluster/test_doctor.py", "doctor"),
    "submit": ("tests/cluster/test_jobs.py", "submit"),
    "status": ("tests/cluster/test_hosts.py", "status"),
    "logs": ("tests/cluster/test_hosts.py", "logs"),
    "stop": ("tests/cluster/test_hosts.py", "stop"),
}
OTHER_PROGRAMS = {  # how a command begins -> why it is not run here
    "curl http://127.0.0.1:8000/v1/chat/completions": "tests/ray/test_main_job.py runs it against a server",
    "pip install": "test_project.py installs the package; extras are looked up below",
    "make ": "tests/ray/test_main_job.py runs `make demo`, and `make test` is what runs this",
    "mkdocs build": "test_pages.py builds the site",
    "python docs/site/generate.py": "test_pages.py runs it",
    "serve deploy serve/app.yaml": "tests/ray/test_serve_deploy.py deploys that file on a cluster of its own",
    "export OPENAI_API_KEY": "a service's key; the service is a stand-in in tests/ray/test_paper.py",
    "docker build": "needs Docker; tests/unit/cluster/test_cluster_files.py reads the Dockerfile",
    "helm install": "needs a Kubernetes cluster",
    "kubectl apply": "needs a Kubernetes cluster; its files are checked against schemas",
    "kubectl -n pi-ray create secret": "needs a Kubernetes cluster",
    "kubectl -n pi-ray port-forward": "needs a Kubernetes cluster",
    "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=": "names the token that the next command fetches",
    "(umask 077; kubectl -n pi-ray get secret": "needs a Kubernetes cluster",
    "ray get-auth-token": "writes a token into the user's home",
    "chmod 600 ~/.ray/auth_token": "changes the user's home",
    "ray up": "makes machines of a cloud",
    "ray dashboard": "needs such machines",
    "ray down": "needs such machines",
    "RAY_AUTH_MODE=token pi-ray submit": "needs such machines; the command behind the variable is parsed below",
    "sbatch": "needs Slurm",
}


def documented(pages=NAMES) -> list[tuple[str, str]]:
    """(page, command) of every bash block, and of every inline code that is a whole command."""
    found = [(page, command) for page in pages for block in code_blocks(page, "bash") for command in commands(block)]
    for page in (p for p in pages if p not in GENERATED):
        found += [(page, code) for code in inline_code(page) if re.match(r"(pi-ray|make|pip|python|mkdocs) \S", code)]
    return list(dict.fromkeys(found))


COMMANDS = documented()
PI_RAY = [(page, command) for page, command in COMMANDS if re.match(r"([A-Z_]+=\S+ )?pi-ray ", command)]
BENCHES = [(page, command) for page, command in COMMANDS if command.startswith("python -m tests.bench.")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that the pages take for granted: my-task from `pi-ray init my-task/`, a run of it, the repository."""
    folder = tmp_path_factory.mktemp("reader")
    init = [sys.executable, "-m", "pi_ray.cli", "init", "my-task/"]
    subprocess.run(init, cwd=folder, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(REPO)})
    (folder / "runs" / "my-task").mkdir(parents=True)
    (folder / "runs" / "my-task" / "run.yaml").write_text((folder / "my-task" / "run.yaml").read_text())
    for name in ("jobs", "pi_ray", "cluster"):
        (folder / name).symlink_to(REPO / name)
    return folder


@pytest.mark.parametrize("page", NAMES)
def test_blocks_have_a_language_that_is_checked(page):
    assert {block.language for block in code_blocks(page)} <= LANGUAGES


@pytest.mark.parametrize("page", NAMES)
def test_shell_blocks_are_valid_shell(page):
    for block in code_blocks(page, "bash"):
        done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
        assert done.returncode == 0, f"{page}\n{block.text}\n{done.stderr}"


def test_no_command_is_left_out():
    """A command is one of pi-ray's, a benchmark, or in the list of other programs; a new kind needs a place here."""
    known = {command for _, command in (*PI_RAY, *BENCHES)}
    left = {(page, c) for page, c in COMMANDS if c not in known and not c.startswith(tuple(OTHER_PROGRAMS))}
    assert not left, left


@pytest.mark.parametrize("begin", OTHER_PROGRAMS)
def test_listed_programs_occur_on_a_page(begin):
    assert any(command.startswith(begin) for _, command in COMMANDS), f"no page has {begin!r} any more: take it out"


def test_executed_commands_occur_on_a_page():
    assert EXECUTED - {command for _, command in PI_RAY} == set(), "take them out of EXECUTED"


@pytest.mark.parametrize("command", sorted(EXECUTED))
def test_cheap_commands_do_what_they_say(folder, monkeypatch, capsys, command):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code = cli.main(shlex.split(command)[1:])
    out, err = capsys.readouterr()
    assert code == 0, err
    if " show " in command:
        shown = RunConfig.model_validate(yaml.safe_load(out))
        assert shown.name == "my-task" and ("lr=0.0003" not in command or shown.train.lr == 0.0003)
    elif command == "pi-ray schema":
        assert set(RunConfig.model_fields) == set(json.loads(out)["properties"])
    elif " render " in command:
        out_folder = folder / command.rpartition(" ")[2]
        assert any(path.is_file() and path.stat().st_size for path in out_folder.rglob("*"))
    else:
        assert len(out.splitlines()) > 2, out


@pytest.mark.parametrize(("page", "command"), PI_RAY, ids=[f"{page}: {command[:60]}" for page, command in PI_RAY])
def test_commands_are_parsed_and_their_run_files_read(folder, monkeypatch, page, command):
    words = shlex.split(re.sub(r"^[A-Z_]+=\S+ ", "", command))[1:]
    assert words[0] in cli.VERBS, f"{page}: no such verb"
    assert command in EXECUTED or words[0] in TESTED_BY or words[0] in {c.split()[1] for c in EXECUTED}
    if len(words) == 1 and words[0] not in ("demo", "schema"):
        return  # a verb that the text talks about
    monkeypatch.chdir(folder)
    args = cli.parse_arguments(words)
    if words[0] == "table" or (words[0] == "plan" and sweep.is_table(args.config)):
        sweep.load_sweep(args.config, args.overrides)
    elif words[0] == "demo":
        text = (REPO / "pi_ray" / "cli" / "demo.yaml").read_text()
        run_file.parse_run_file(text, "demo.yaml", args.overrides)
    elif hasattr(args, "config") and args.config:
        path = args.config / "run.yaml" if args.config.is_dir() else args.config
        run_file.load_run_file(path, args.overrides)


@pytest.mark.parametrize("verb", TESTED_BY)
def test_a_test_runs_each_verb_that_is_only_parsed_here(verb):
    path, text = TESTED_BY[verb]
    assert verb in cli.VERBS
    found = text in (REPO / path).read_text()
    assert found, f"{path} does not run pi-ray {verb} any more"


@pytest.mark.parametrize(("page", "command"), BENCHES, ids=[command for _, command in BENCHES])
def test_benchmarks_are_there_with_their_options(page, command):
    module, *options = shlex.split(command)[2:]
    source = importlib.util.find_spec(module)
    assert source, f"{page}: {module} is not there"
    text = (REPO / (module.replace(".", "/") + ".py")).read_text()
    for option in (o for o in options if o.startswith("--")):
        assert f'"{option}"' in text, f"{page}: {module} takes no {option}"


def test_extras_that_pip_installs_exist():
    extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [e for _, command in COMMANDS for e in re.findall(r"pi-ray\[([\w,]+)\]", command)]
    assert named and set(named) <= set(extras)


def test_the_curl_line_asks_as_the_server_wants_it():
    (line,) = {command for _, command in COMMANDS if command.startswith("curl ")}
    body = json.loads(shlex.split(line)[-1])
    assert body["model"] == "my-task" and body["messages"][-1]["role"] == "user"


@pytest.mark.parametrize("page", NAMES)
def test_files_of_the_repository_that_commands_name_exist(page):
    for command in (c for p, c in COMMANDS if p == page):
        for path in re.findall(r"(?<![\w/.])(?:jobs|cluster|serve|docs|tests)/[\w./-]+\.\w+", command):
            assert (REPO / path).is_file(), f"{page}: {command}: there is no {path}"


YAML = [block for page in NAMES for block in code_blocks(page, "yaml")]


@pytest.mark.parametrize("block", YAML, ids=[f"{block.page}: {block.text.split()[0]}" for block in YAML])
def test_yaml_blocks_are_parts_of_a_run_file(block):
    """The real reader says what is wrong with a key or a value, with its line."""
    part = run_file.parse_run_file(f"name: x\n{block.text}", block.page)
    assert part.name == "x" and part != run_file.parse_run_file("name: x", "nothing"), "it says nothing but defaults"


def test_a_wrong_key_of_a_page_would_be_seen():
    with pytest.raises(Exception, match="unknown key"):
        run_file.parse_run_file("name: x\ntrain:\n  phase_transitions: rewarm\n", "page")


PYTHON = [(block, i) for page in NAMES for i, block in enumerate(code_blocks(page, "python"))]


@pytest.mark.parametrize(("block", "i"), PYTHON, ids=[f"{block.page} {i}" for block, i in PYTHON])
def test_python_blocks_run(block, i):
    names: dict[str, object] = {"__name__": "page"}
    exec(compile(block.text, block.page, "exec"), names)


def test_the_parts_of_the_extending_page_work():
    from pi_ray.config import CompressConfig, MetricConfig, ScheduleConfig, TaskConfig

    names: dict[str, object] = {"__name__": "page"}
    for block in code_blocks("docs/extending.md", "python"):
        exec(compile(block.text, block.page, "exec"), names)
    task = names["CapitalsTask"](TaskConfig())
    rows = [row for split in ("train", "dev", "test") for row in task.rows(split)]
    assert len(rows) == 4 and all(isinstance(row, Row) for row in rows) and task.template().text
    assert task.score(rows[0], "Paris")["exact_match"] == 1.0 and task.fingerprint()
    compressed = names["EveryOther"](CompressConfig()).compress("one two three four five six", 0.5)
    assert len(compressed.split()) == 3
    metric = names["SameLength"](MetricConfig(name="number", tolerance=1), TaskConfig())
    assert [metric.score(rows[0], output) for output in ("Rome", "Oslo !")] == [1.0, 1.0]
    phases = names["two_steps"](ScheduleConfig(shots=3))
    assert [(p.rate, p.shots) for p in phases] == [(1.0, 3), (0.0, 0)]


def test_toml_blocks_name_entry_points_of_kinds_that_exist():
    from pi_ray.registry import KINDS

    for page in NAMES:
        for block in code_blocks(page, "toml"):
            groups = tomllib.loads(block.text)["project"]["entry-points"]
            assert {group.removeprefix("pi_ray.") for group in groups} <= set(KINDS)


def test_the_template_of_the_data_page_has_the_parts_that_the_page_says():
    (block,) = code_blocks("docs/your-data.md", "markdown")
    template = Template.parse(block.text)
    assert template.instruction.startswith("You sort support messages for {{team}}.")
    assert [document.splitlines()[0] for document in template.documents] == ["## Queues", "## Priorities"]
    assert "never sent" not in template.text
