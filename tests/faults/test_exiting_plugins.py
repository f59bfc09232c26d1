"""Plugins that end the process, for example by sys.exit, are reported like broken plugins."""

from __future__ import annotations

import importlib.metadata
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
from commands import Command, is_refusal

from ddiff.errors import PluginError
from ddiff.plugin.loader import load_plugins, survey_plugins
from ddiff.plugin.registry import convert_errors

Distribution = Callable[..., Path]

ENDINGS = {
    "SystemExit(0)": "raise SystemExit(0)",
    "SystemExit()": "raise SystemExit",
    "sys.exit with words": "import sys; sys.exit('bye')",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "GeneratorExit": "raise GeneratorExit",
    "its own BaseException": "raise type('Odd', (BaseException,), {})('odd')",
    "an error without words": "raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})()",
    "recursion": "f = lambda: f(); f()",
}

HOOK = """
from ddiff import hookimpl

@hookimpl
def ddiff_register(registry):
    {body}
"""


def at_import(ending: str) -> dict[str, str]:
    return {"bad_mod": ending + "\n"}


def in_the_hook(ending: str) -> dict[str, str]:
    return {"bad_mod": HOOK.format(body=ending)}


ATTRIBUTE = """
def __dir__():
    return ["ddiff_register"]

def __getattr__(name):
    if name == "ddiff_register":
        {body}
    raise AttributeError(name)
"""


def at_an_attribute(ending: str) -> dict[str, str]:
    """Return the code of a plugin module that runs `ending` when an attribute is read.

    pluggy reads every attribute of a plugin.
    """
    return {"bad_mod": ATTRIBUTE.format(body=ending)}


def in_a_component(ending: str) -> dict[str, str]:
    body = "registry.add('time_rule', 'bad_rule', 'bad_parts:Rule')"
    return {"bad_mod": HOOK.format(body=body), "bad_parts": ending + "\n"}


PLACES = {"import": at_import, "hook": in_the_hook, "attribute": at_an_attribute}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("place", PLACES)
def test_plugins_command_reports_a_plugin_that_exits_and_lists_the_rest(
    place: str, ending: str, distribution: Distribution, ddiff: Command
) -> None:
    distribution("bad-dist", "1.0", {"bad": "bad_mod"}, PLACES[place](ENDINGS[ending]))
    answer = ddiff("plugins")
    assert answer.code == 2
    assert '"bad" (bad_mod, bad-dist 1.0)' in answer.err
    assert "Traceback" not in answer.err
    for name in ("core", "hdlm", "mdlm"):
        assert f"\n{name} " in answer.out
    broken = [report.plugin.name for report in survey_plugins().reports if report.error is not None]
    assert broken == ["bad"]


@pytest.mark.parametrize("ending", ["SystemExit(0)", "KeyboardInterrupt"])
@pytest.mark.parametrize("place", PLACES)
def test_plugin_that_exits_on_import_does_not_affect_other_commands(
    place: str, ending: str, distribution: Distribution, folder: Path, ddiff: Command
) -> None:
    distribution("bad-dist", "1.0", {"bad": "bad_mod"}, PLACES[place](ENDINGS[ending]))
    answer = ddiff("check", "flat")
    assert answer.code == 0
    assert "0 broken" in answer.out
    assert is_refusal(
        ddiff("run", "tiny.toml", "--dry-run", "--set", 'process.kind="hdml"'), "hdml", '"hdlm"'
    )
    assert is_refusal(ddiff("run", "tiny.toml", "--dry-run", "--set", 'plugins=["bad"]'), '"bad"')
    assert is_refusal(ddiff("check", "bad"), '"bad"')
    with pytest.raises(PluginError, match="bad"):
        load_plugins(["bad"])


@pytest.mark.parametrize("ending", ENDINGS)
def test_commands_report_a_component_that_exits_on_import(
    ending: str, distribution: Distribution, ddiff: Command
) -> None:
    distribution("bad-dist", "1.0", {"bad": "bad_mod"}, in_a_component(ENDINGS[ending]))
    with pytest.raises(PluginError, match="bad_rule"):
        load_plugins(["bad"]).component("time_rule", "bad_rule").load()
    assert is_refusal(ddiff("check", "bad_rule"), "bad_rule", "bad_parts")


RULE = """
import sys
from ddiff import ComponentConfig

class Good:
    class Config(ComponentConfig):
        size: int = 1

    @staticmethod
    def build(config):
        {body}
"""


def test_plugins_command_lists_valid_components_next_to_a_broken_one(
    distribution: Distribution, ddiff: Command
) -> None:
    body = (
        "registry.add('time_rule', 'a_bad', 'no_such_module:X'); "
        "registry.add('time_rule', 'good', 'good_parts:Good')"
    )
    modules = {"bad_mod": HOOK.format(body=body), "good_parts": RULE.format(body="return None")}
    distribution("half-dist", "1.0", {"half": "bad_mod"}, modules)
    answer = ddiff("plugins", "half")
    assert answer.code == 2
    assert "size" in answer.out
    assert "a_bad" in answer.err


@pytest.mark.parametrize("ending", ["sys.exit(0)", "sys.exit('bye')", "raise SystemExit(3)"])
def test_command_fails_if_a_component_exits(
    ending: str, distribution: Distribution, folder: Path, ddiff: Command
) -> None:
    """The recipe is valid and the import succeeds, but `build` exits."""
    body = "registry.add('time_rule', 'leaver', 'leaver_parts:Good')"
    modules = {"bad_mod": HOOK.format(body=body), "leaver_parts": RULE.format(body=ending)}
    distribution("leaver-dist", "1.0", {"leaver": "bad_mod"}, modules)
    assert is_refusal(ddiff("check", "leaver"), "ended the command", "leaver_parts")
    plugins = 'plugins=["hdlm", "mdlm", "dit", "leaver"]'
    settings = ("--set", plugins, "--set", 'objective.times="leaver"')
    assert is_refusal(ddiff("run", "tiny.toml", *settings), "ended the command", "leaver_parts")


def test_plugins_command_ignores_unreadable_package_metadata(
    distribution: Distribution, ddiff: Command
) -> None:
    folder = distribution(
        "odd-dist", "1.0", {"odd": "odd_mod"}, {"odd_mod": HOOK.format(body="pass")}
    )
    next(folder.glob("*.dist-info/METADATA")).unlink()
    answer = ddiff("plugins")
    assert "Traceback" not in answer.err
    assert "\nhdlm " in answer.out
    importlib.metadata.entry_points(group="ddiff")


def refusal(error: BaseException) -> PluginError:
    return PluginError(type(error).__name__)


def test_convert_errors_does_not_convert_a_real_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), convert_errors(refusal):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(PluginError, match="KeyboardInterrupt"), convert_errors(refusal):
        raise KeyboardInterrupt
    assert signal.getsignal(signal.SIGINT) is before


def test_convert_errors_does_not_convert_the_exit_on_sigterm() -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(SystemExit), convert_errors(refusal):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(PluginError, match="SystemExit"), convert_errors(refusal):
        raise SystemExit(1)


def test_convert_errors_converts_system_exit_outside_the_main_thread() -> None:
    told: list[str] = []

    def load() -> None:
        try:
            with convert_errors(refusal):
                raise SystemExit(0)
        except PluginError as error:
            told.append(str(error))

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    assert told == ["SystemExit"]
