"""Settings are written down once: flags, arguments, prompts lines, records and printed commands have the same ones."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner

from ltxpack.cli.plan import plan
from ltxpack.cli.run import given, run, settings_options
from ltxpack.errors import UsageError
from ltxpack.manifest import load_schema
from ltxpack.runtime import prompts_file, record, settings
from ltxpack.runtime.prompts_file import read_lines
from ltxpack.runtime.request import Request
from ltxpack.runtime.sampling import recipes
from ltxpack.runtime.settings import SessionGiven, SessionSettings, Settings, SettingsGiven, planned_by, type_of, words

SCHEMA_TYPES = {int: "integer", float: "number", str: "string"}
LINES: dict[str, Any] = json.loads(load_schema("prompts"))["properties"]
FLAGS = {command: {option.name: option for option in command.params} for command in (run, plan)}


@pytest.mark.parametrize(("table", "arguments"), [(Settings, SettingsGiven), (SessionSettings, SessionGiven)])
def test_arguments_from_python_are_the_settings(table: Any, arguments: Any) -> None:
    types = {one.name: one.type for one in fields(table)} | {
        name: f"str | torch.{name}" for name in ("dtype", "device")
    }
    assert {name: value.__forward_arg__ for name, value in arguments.__annotations__.items()} == {
        one.name: types[one.name] for one in fields(table)
    }


@pytest.mark.parametrize("table", [Settings, SessionSettings])
def test_flags_are_the_settings_with_their_defaults(table: Any) -> None:
    for one in fields(table):
        option = FLAGS[run][one.name]
        assert isinstance(option, click.Option) and option.default == one.default, one.name
    for one in planned_by(table):
        assert FLAGS[plan][one.name].default == one.default, one.name


def test_lines_of_a_prompts_file_are_the_settings_with_their_limits() -> None:
    said = {one.name: one for one in fields(Settings) if "line" in one.metadata}
    assert set(LINES) == {"prompt", "output", "images", *said}
    for name, one in said.items():
        assert LINES[name] == {"type": SCHEMA_TYPES[type_of(one)], **one.metadata["line"]}, name  # type: ignore[index]


@dataclass(frozen=True)
class More(Settings):
    """The settings, and a new one."""

    grain: int = field(default=3, metadata={"help": "How grainy.", "plan": True, "line": {"minimum": 0}})


def test_a_new_setting_is_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {}

    @click.command()
    @settings_options(*fields(More))
    def command(**_: object) -> None:
        found.update(given(fields(More)))

    told = CliRunner().invoke(command, ["--help"]).output
    assert re.search(r"--grain INTEGER +How grainy.  \[default: 3\]", told)
    assert CliRunner().invoke(command, ["--grain", "5", "--fps", "24"]).exit_code == 0
    assert found == {"grain": 5, "fps": 24.0}, "what was given, a default too"

    assert More.of({"grain": 5}) == More(grain=5)
    assert [one.name for one in planned_by(More)][-1] == "grain"
    assert list(words(More(grain=5, fps=12.5), More())) == ["--fps 12.5", "--grain 5"]
    overlay: Any = SimpleNamespace(manifest=SimpleNamespace(image_crf=33), text="")
    described = record.described(Request("x", More(grain=5)), overlay, ("base", "base"), "float32")
    assert described["grain"] == 5

    for module in (prompts_file, settings):
        monkeypatch.setattr(module, "Settings", More)
    monkeypatch.setattr("ltxpack.runtime.request.Settings", More)
    monkeypatch.setattr(prompts_file, "load_schema", lambda _: json.dumps({"properties": {}}))
    prompts_file._validator.cache_clear()
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "grain": 7.0}')
    (line,) = read_lines(tmp_path / "p.jsonl", {})
    prompts_file._validator.cache_clear()
    assert line.request.settings == More(grain=7)


def test_a_recipe_sets_the_defaults_and_refuses_what_it_has_no_use_for(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = recipes.Recipe("quick", recipes.HQ.stages, 1, {"height": 1024}, frozenset({"steps"}))
    monkeypatch.setitem(recipes.RECIPES, "quick", quick)
    assert Settings.of({"recipe": "quick"}).height == 1024
    assert Settings.of({"recipe": "quick", "height": 512}).height == 512
    with pytest.raises(UsageError, match="--steps has no use in the recipe quick"):
        Settings.of({"recipe": "quick", "steps": 8})
    with pytest.raises(UsageError, match="unknown recipe"):
        Settings.of({"recipe": "slow"})
    same = Settings.of({"fps": 24, "video_cfg": 3, "video_stg_blocks": [1]}), Settings.of({"video_stg_blocks": (1,)})
    assert repr(same[0]) == repr(same[1]), "whole numbers and lists are no other settings, in a record neither"
