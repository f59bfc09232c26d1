"""Command line: import time of commands, passing of arguments, and error messages."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from commands import run_command
from startup import is_fast, run_script, start_command

import ddiff
from ddiff.cli import app
from ddiff.plugin.loader import find_installed_plugins, survey_plugins
from ddiff.plugin.registry import KINDS
from ddiff.recipe.files import find_shipped_recipes
from ddiff.recipe.resolve import read_recipe

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "datasets", "wandb", "torchmetrics", "faiss", "numpy")
PROBE_ALL = """
import json, sys
from ddiff.cli import main
answers = {}
for command in sys.argv[1:]:
    code = 0
    try:
        main([command, "--help"])
    except SystemExit as stop:
        code = stop.code or 0
    answers[command] = [code, sorted(sys.modules)]
print(json.dumps(answers), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["plugins", "--components"],
        ["recipes"],
        ["run", "--help"],
        ["data", "--help"],
        ["encode", "--help"],
    ],
)
def test_help_and_list_commands_start_fast_and_without_torch(arguments):
    start = start_command(*arguments)
    assert start.code == 0, start.stderr
    assert not set(HEAVY) & start.modules
    assert is_fast(start)


@pytest.mark.parametrize("command", ["clock", "eval", "sample"])
def test_missing_run_directory_is_refused_without_torch(command):
    start = start_command(command, "runs/missing")
    assert start.code == 2
    assert "runs/missing is not a run directory: there is no such folder" in start.stderr
    assert not set(HEAVY) & start.modules


def test_importing_ddiff_imports_no_submodule():
    heavy = ("ddiff", "torch", "pydantic")
    names = f"name for name in sys.modules if name.startswith({heavy})"
    code = f"import sys, ddiff; print(sorted({names}))"
    done = run_script(code)
    assert done.stdout.strip() == "['ddiff']"


def test_help_option_lists_every_command(capsys):
    code, out, _ = run_command(capsys, "--help")
    assert code == 0
    listed = {word for line in out.splitlines() for word in line.strip("│ ").split()[:1]}
    assert {command.name for command in app.registered_commands} <= listed


def test_help_of_every_command_needs_no_heavy_library():
    """One process prints the help of all commands, so that the test is fast."""
    names = [command.name for command in app.registered_commands]
    done = run_script(PROBE_ALL, *names)
    answers = json.loads(done.stderr.splitlines()[-1])
    assert list(answers) == names
    for name, (code, modules) in answers.items():
        assert code == 0, name
        assert f"Usage: -c {name} " in done.stdout
        assert not set(HEAVY) & set(modules), name


def test_every_command_is_documented_and_every_documented_command_exists():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"(?:^ {4,}|`)ddiff ([a-z][a-z-]*)", text, flags=re.MULTILINE))
    assert named == {command.name for command in app.registered_commands}


def test_version_option_prints_the_version_of_the_package(capsys):
    assert run_command(capsys, "--version")[1] == f"ddiff {ddiff.__version__}\n"
    assert {plugin.origin.version for plugin in find_installed_plugins()["core"]} == {
        ddiff.__version__
    }


def test_plugins_command_lists_all_plugins_and_components(capsys):
    code, out, _ = run_command(capsys, "plugins", "--components")
    registry, reports = survey_plugins()
    assert code == 0
    for report in reports:
        assert f"{report.plugin.name} " in out
        assert str(report.plugin.origin) in out
    assert [
        component.target for component in registry.components() if component.target not in out
    ] == []


@pytest.mark.parametrize("name", list(find_installed_plugins()))
def test_plugins_command_lists_every_key_of_a_plugin(capsys, name):
    code, out, _ = run_command(capsys, "plugins", name)
    assert code == 0
    blocks = {block.partition(": ")[0]: block for block in out.split("\n\n")}
    for component in survey_plugins().registry.components():
        if component.plugin == name:
            place = KINDS[component.kind].partition(":")[0]
            # an option of the command line takes the name, a table of a recipe has the key kind
            value = f'kind = "{component.name}"' if place.startswith("[") else component.name
            block = blocks[f"{place} {value}"]
            keys = [line.split()[0] for line in block.strip().splitlines()[1:]]
            assert keys == list(component.config_class().model_fields)


def test_plugins_command_prints_type_default_and_description_of_keys(capsys, distribution):
    parts = """
        from typing import Literal
        from ddiff import ComponentConfig, PositiveFloat, Share

        class Toy:
            '''A process to look at,
            in two lines.

            And more.'''

            class Config(ComponentConfig):
                rate: PositiveFloat
                '''How fast
                it goes.'''
                xi: Share | tuple[Share, ...] = 1.0
                mode: Literal["slow", "fast"] = "slow"
                note: str | None = None
                '''[bold] or not.'''
                even: bool = False

            @staticmethod
            def build(config, *, vocabulary):
                return None
    """
    register = """
        from ddiff import hookimpl

        @hookimpl
        def ddiff_register(registry):
            registry.add("process", "shown", "shown_parts:Toy")
    """
    distribution(
        "shown-dist", "1.0", {"shown": "shown_pkg"}, {"shown_pkg": register, "shown_parts": parts}
    )
    assert run_command(capsys, "plugins", "shown")[1].splitlines() == [
        '[process] kind = "shown": A process to look at, in two lines.',
        "    rate  number > 0, required. How fast it goes.",
        "    xi    number > 0 and <= 1 or list of number > 0 and <= 1; default 1.0.",
        '    mode  "slow" or "fast"; default "slow".',
        "    note  string, optional. [bold] or not.",
        "    even  true or false; default false.",
        "",
    ]


def test_plugins_command_suggests_a_name_for_an_unknown_plugin(capsys):
    code, out, err = run_command(capsys, "plugins", "hdml")
    assert (code, out) == (2, "")
    assert 'Did you mean "hdlm"?' in err


def test_help_of_the_run_command_states_what_a_dry_run_does_not_check(capsys):
    assert "Not checked" in run_command(capsys, "run", "--help")[1]


def test_plugins_command_reports_broken_plugin_and_lists_working_plugins(capsys, distribution):
    distribution(
        "broken-dist", "0.3", {"broken": "broken_pkg"}, {"broken_pkg": "import does_not_exist"}
    )
    code, out, err = run_command(capsys, "plugins")
    assert code == 2
    assert "broken_pkg, broken-dist 0.3" in out
    assert "core " in out
    assert "No module named 'does_not_exist'" in err


def test_recipes_command_lists_shipped_recipes_with_descriptions(capsys):
    _, out, _ = run_command(capsys, "recipes")
    lines = dict(line.split("  ", 1) for line in out.splitlines())
    names = [name.strip() for name in lines]
    assert names == list(find_shipped_recipes())
    assert names == sorted(names, key=lambda name: name.startswith("paper/"))  # small ones first
    assert all(text.strip().endswith(".") for text in lines.values())


def test_every_shipped_recipe_equals_the_recipe_read_from_its_dry_run_output(capsys, tmp_path):
    assert {"hdlm_small", "hdlm_three_level", "mdlm_small"} <= set(find_shipped_recipes())
    for name in find_shipped_recipes():
        code, out, err = run_command(capsys, "run", name, "--dry-run")
        if (
            name == "paper/hdlm_small_64_embeddings"
        ):  # this recipe needs the weights of another run, which does not exist here
            assert (code, "is not a trained run" in err) == (2, True)
            continue
        assert code == 0, err
        path = tmp_path / "resolved.toml"
        path.write_text(out)
        assert read_recipe(path) == read_recipe(name)
        assert tomllib.loads(out)["name"] == name.replace("/", "_")


def test_dry_run_writes_no_files(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_command(capsys, "run", sorted(find_shipped_recipes())[0], "--dry-run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "no_such_recipe"], "no_such_recipe: there is no such file and no shipped recipe"),
        (
            ["run", "hdlm_small", "--set", "process.gama=1"],
            '--set process.gama=1: [process] has no key "gama"',
        ),
        (
            ["run", "hdlm_small", "--set", "process.xi=1.5"],
            "--set process.xi=1.5: [process] xi must be",
        ),
        (["run", "hdlm_small", "--set", "plugins=[]"], 'Add "hdlm" to plugins'),
    ],
)
def test_user_error_is_one_paragraph_on_stderr_with_exit_code_2(capsys, arguments, expected):
    code, out, err = run_command(capsys, *arguments)
    assert (code, out) == (2, "")
    assert expected in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_unknown_option_exits_with_code_2(capsys):
    code, _, err = run_command(capsys, "run", "hdlm_small", "--freesh")
    assert code == 2
    assert "--fresh" in err


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list:
    """List of calls: the functions behind the commands only record their arguments there.

    Of the arguments of `sample_run`, only those with another value than the default are recorded.
    The working directory has an empty folder `runs/x`.
    """
    from ddiff.runs.run import Run
    from ddiff.runs.stages import sample_run

    monkeypatch.chdir(tmp_path)
    Path("runs/x").mkdir(parents=True)
    calls: list = []
    parameters = (
        inspect.signature(Run.sample).parameters,
        inspect.signature(sample_run).parameters,
    )
    unset = {key: found.default for part in parameters for key, found in part.items()}
    module = ModuleType("ddiff.runs.stages")
    module.run_recipe = lambda recipe, *, fresh: (
        calls.append(("run", recipe.name, recipe.train.steps, fresh)) or 130
    )  # type: ignore[attr-defined]
    module.sample_run = lambda run_dir, **options: calls.append(  # type: ignore[attr-defined]
        ("sample", run_dir, {key: options[key] for key in options if options[key] != unset[key]})
    )
    report = ModuleType("ddiff.runs.evaluation_report")
    report.evaluate_run = lambda run_dir, settings, out, options: calls.append(  # type: ignore[attr-defined]
        ("eval", run_dir, settings, options)
    )
    command = ModuleType("ddiff.testing.check_command")
    command.check_component = lambda name, settings: calls.append(("check", name, settings)) or 1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ddiff.runs.stages", module)
    monkeypatch.setitem(sys.modules, "ddiff.runs.evaluation_report", report)
    monkeypatch.setitem(sys.modules, "ddiff.testing.check_command", command)
    return calls


def test_commands_pass_arguments_to_functions_and_return_exit_code(capsys, runs):
    from ddiff.runs.kinds import EvaluationOptions

    assert run_command(capsys, "run", "mdlm_small", "--set", "train.steps=3", "--fresh")[0] == 130
    assert (
        run_command(capsys, "eval", "runs/x", "--set", "evaluate.draws=2", "--until", "0.1")[0] == 0
    )
    assert run_command(capsys, "sample", "runs/x", "--count", "4", "--seed", "1")[0] == 0
    asked = (
        "--prompt",
        "She",
        "--condition",
        "label=2",
        "--guidance",
        "1.5",
        "--sampler",
        "psi",
        "--set",
        "top_k=3",
    )
    assert run_command(capsys, "sample", "runs/x", *asked)[0] == 0
    assert (
        run_command(capsys, "sample", "runs/x", "--infill", "[MASK:2] a", "--infill", "b [MASK:1]")[
            0
        ]
        == 0
    )
    assert run_command(capsys, "check", "toy", "--set", "gamma=0.5", "--set", "xi=0.9")[0] == 1
    assert runs == [
        ("run", "mdlm_small", 3, True),
        ("eval", Path("runs/x"), ["evaluate.draws=2"], EvaluationOptions(until=0.1)),
        ("sample", Path("runs/x"), {"count": 4, "seed": 1}),
        (
            "sample",
            Path("runs/x"),
            {
                "prompt": "She",
                "conditions": {"label": 2},
                "guidance": 1.5,
                "sampler": "psi",
                "settings": ["top_k=3"],
            },
        ),
        ("sample", Path("runs/x"), {"infill": ["[MASK:2] a", "b [MASK:1]"]}),
        ("check", "toy", ["gamma=0.5", "xi=0.9"]),
    ]


ANSWERS = {
    ("run", "hdlm_small", "--dry-run"): "# fits: 2.1 M parameters, ",
    ("plugins", "core"): "[tracker] kind",
}
SLOW = (
    "datasets",
    "pandas",
    "transformers",
    "wandb",
    "faiss",
    "torch._dynamo",
    "torch.distributed.tensor",
    "sympy",
)
LOADED = """
import sys
from ddiff.cli import main
try:
    main({arguments})
finally:
    print([name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", list(ANSWERS))
def test_dry_run_and_plugins_commands_import_no_slow_library_but_torch(arguments, tmp_path):
    """Each of these libraries would add seconds to the two seconds that torch takes."""
    script = LOADED.format(arguments=list(arguments), heavy=SLOW)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stderr.splitlines()[-1] == "[]"
    assert ANSWERS[arguments] in done.stdout


def test_dry_run_output_ends_with_its_result_as_a_toml_comment(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = run_command(capsys, "run", "mdlm_small", "--dry-run")[1]
    assert out.splitlines()[-1].startswith("# fits: ")
    assert tomllib.loads(out)["name"] == "mdlm_small"
    unknown = run_command(
        capsys, "run", "mdlm_small", "--dry-run", "--set", 'tokenizer={kind="alphabet"}'
    )[1]
    assert unknown.splitlines()[-1].startswith(
        "# fits as far as is known before the tokens are counted: "
    )


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_importing_ddiff_lets_waiting_threads_sleep_unless_the_user_decided(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch reads the variable when it is imported, so it must be set before."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    done = run_script("import ddiff, os; print(os.environ['OMP_WAIT_POLICY'])")
    assert done.stdout.strip() == (given or "PASSIVE")
