"""YAML in, frozen config out; every mistake ends in one line that names key, rule, file and line."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from ernie5.config.load import config_from_dict, config_to_dict, config_to_yaml, load_config, peek_keys
from ernie5.errors import ConfigError, LayoutError


def error_of(call: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_defaults_file_base_and_overrides_take_precedence_in_that_order(write: Callable, schema: type) -> None:
    write("steps: 10\ntitle: low\nexperts: {count: 16, top_k: 2}\nsizes: [7, 8, 9]\n", "low.yaml")
    write("title: middle\nexperts: {top_k: 3}\n", "middle.yaml")
    path = write("base: [low.yaml, middle.yaml]\nsizes: [4]\nexperts:\n  balance: {speed: 2}\n")
    loaded = load_config(path, schema=schema, overrides=("experts.top_k=5", "share=1"))
    assert (loaded.steps, loaded.title, loaded.sizes, loaded.share) == (10, "middle", (4,), 1.0)
    assert (loaded.experts.count, loaded.experts.top_k, loaded.experts.balance.speed) == (16, 5, 2.0)
    assert isinstance(loaded.experts.balance.speed, float)


def test_the_default_instance_of_a_section_fills_keys_that_are_left_out(write: Callable, schema: type) -> None:
    assert load_config(write("steps: 1\nexperts: {count: 9}\n"), schema=schema).experts.balance.speed == 0.5
    assert load_config(write("steps: 1\nexperts: {balance: {}}\n"), schema=schema).experts.balance.speed == 0.5
    assert load_config(write("steps: 1\nexperts:\n  balance:\n"), schema=schema).experts.balance.speed == 0.5


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1", 1.0), (".5", 0.5), ("1_0.5e-1", 1.05), ("0.0", 0.0), ("+1E-2", 0.01)],
)
def test_numbers_are_read_as_a_person_writes_them(write: Callable, schema: type, text: str, value: float) -> None:
    loaded = load_config(write(f"steps: 1\nstages: [{{name: a, rate: {text}}}]\n") if value > 0 else write(
        f"steps: 1\nshare: {text}\n"), schema=schema)
    assert (loaded.stages[0].rate if value > 0 else loaded.share) == value


def test_whole_floats_count_as_whole_numbers_and_words_of_old_yaml_stay_texts(write: Callable, schema: type) -> None:
    loaded = load_config(write("steps: 1e3\ntitle: no\nstages: [{name: 1:30}]\n"), schema=schema)
    assert (loaded.steps, loaded.title, loaded.stages[0].name) == (1000, "no", "1:30")


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        ("steps: 1\nexperts:\n  cuont: 3\n", 3, ["experts.cuont: unknown key", "experts.count"]),
        ("steps: 1\ntop_k: 3\n", 2, ["top_k: unknown key", "experts.top_k"]),
        ("steps: 1\nzzz: 3\n", 2, ["zzz: unknown key", "Known keys here: steps, title"]),
        ("steps: 1\nexperts:\n\n  count: many\n", 4, ["experts.count = 'many'", "a whole number"]),
        ("steps: 1\nexperts:\n  count: 1.5\n", 3, ["experts.count = 1.5", "fractional part"]),
        ("steps: true\n", 1, ["steps = true", "a whole number"]),
        ("steps: 1\ntitle: 12\n", 2, ["title = 12", "a text", "'12' in quotes"]),
        ("steps: 1\nstrict: yes\n", 2, ["strict = 'yes'", "true or false", "no yes, no, on, off"]),
        ("steps: 1\nsizes: 3\n", 2, ["sizes = 3", "a list of whole numbers", "write [3]"]),
        ("steps: 1\nsizes: [1, -2]\n", 2, ["sizes = [1, -2]", "must be positive"]),
        ("steps: 1\nsizes:\n- 1\n- x\n", 4, ["sizes[1] = 'x'"]),
        ("steps: 1\nexperts: 3\n", 2, ["experts = 3", "a section with keys"]),
        ("steps: 1\nexperts: [3]\n", 2, ["experts = [3]", "a section with keys"]),
        ("steps: 1\nmode: medium\n", 2, ["mode = 'medium'", "one of 'fast', 'slow'"]),
        ("steps: 1\nshare: .nan\n", 2, ["share = '.nan'", "a number"]),
        ("steps: 1\nshare: .inf\n", 2, ["share = inf", "between 0 and 1"]),
        ("steps: null\n", 1, ["steps = null", "a whole number"]),
        ("steps: 1\nstages:\n- name: a\n- rate: 2\n", 4, ["stages[1].name is missing", "a text"]),
        ("steps: 1\nstages:\n- name: a\n  rate: 0\n", 4, ["stages[0].rate = 0.0", "must be positive"]),
        ("steps: 1\nstages:\n- name: a\n  rate: 1.0e+999\n", 4, ["stages[0].rate = inf", "must be finite"]),
        ("steps: 3\nsteps: 4\n", 2, ["steps: written twice", ":1"]),
        ("steps: 1\nexperts:\n  count: 4\n  top_k: 5\n", 4, ["experts.top_k = 5", "exceeds count = 4"]),
        ("steps: 1\n1: 2\n", 2, ["1: unknown key"]),
        ("steps: 1\n? [a]\n: 2\n", 2, ["keys must be plain words"]),
        ("steps: 1\nexperts: &a\n  balance: *a\n", 3, ["alias contains itself"]),
    ],
)
def test_a_mistake_names_key_rule_file_and_line(
    write: Callable, schema: type, text: str, line: int, parts: list[str]
) -> None:
    path = write(text)
    message = error_of(lambda: load_config(path, schema=schema))
    for part in parts:
        assert part in message
    place = f"({path}:{line})"
    assert message.endswith(place) or "alias" in message, message


def test_a_missing_required_key_is_named_with_its_type_and_doc(write: Callable, schema: type) -> None:
    path = write("title: x\n")
    message = error_of(lambda: load_config(path, schema=schema))
    assert message == f"steps is missing. It needs a whole number: length of the run ({path}:1)"
    assert "steps is missing" in error_of(lambda: load_config(write(""), schema=schema))
    assert "steps is missing" in error_of(lambda: load_config(write("# nothing\n---\n"), schema=schema))


def test_a_rule_across_sections_blames_the_line_of_the_key_in_the_base_file(write: Callable, schema: type) -> None:
    base = write("title: b\nexperts:\n  count: 7\n", "parts/base.yaml")
    path = write("base: parts/base.yaml\nsteps: 8\nexperts:\n  top_k: 1\nstrict: true\n")
    with pytest.raises(LayoutError) as caught:
        load_config(path, schema=schema)
    assert str(caught.value) == f"experts.count = 7: does not divide steps = 8 ({base}:3)"


def test_a_rule_broken_by_defaults_alone_blames_the_nearest_section_that_was_written(
    write: Callable, schema: type
) -> None:
    path = write("steps: 1\nexperts:\n  count: 2\n")
    assert f"experts.top_k = 8: exceeds count = 2. Lower it ({path}:2)" == error_of(
        lambda: load_config(path, schema=schema)
    )


def test_a_bad_override_names_the_override(write: Callable, schema: type) -> None:
    path = write("steps: 1\n")

    def message(*overrides: str) -> str:
        return error_of(lambda: load_config(path, schema=schema, overrides=overrides))

    assert "(override experts.top_k=99)" in message("experts.top_k=99")
    assert "Did you mean experts.count?" in message("experts.coumt=9")
    assert "does not have the form" in message("steps")
    assert "does not have the form" in message("a..b=3")
    assert "does not have the form" in message("=3")
    assert "is not a section" in message("steps.x=3")
    assert "sizes = {0}: expected a list" in message("sizes.0=3")
    assert "base cannot be overridden" in message("base=x.yaml")
    assert "not valid YAML" in message("sizes=[1,")
    assert "expected a whole number" in message("steps=")


def test_overrides_read_yaml_values(write: Callable, schema: type) -> None:
    path = write("steps: 1\n")
    loaded = load_config(
        path, schema=schema,
        overrides=("sizes=[3, 4]", "either=[a, b]", "experts={count: 5, top_k: 1}", "title=a=b", "strict=false"),
    )
    assert (loaded.sizes, loaded.either, loaded.experts.count, loaded.title) == ((3, 4), ("a", "b"), 5, "a=b")
    assert load_config(path, schema=schema, overrides=("either=a",)).either == "a"


@pytest.mark.parametrize(
    "text",
    ["steps: [1\n", "steps: 1\n  title: x\n", "a: 'x\n", "\tsteps: 1\n", "steps: 1\n}\n", "a: @x\n", "a: *nothing\n"],
)
def test_broken_yaml_is_one_line_with_the_place(write: Callable, schema: type, text: str) -> None:
    path = write(text)
    message = error_of(lambda: load_config(path, schema=schema))
    assert "not valid YAML" in message and f"({path}:" in message


def test_control_characters_two_documents_lists_and_bytes_are_refused(write: Callable, schema: type) -> None:
    assert "not valid YAML" in error_of(lambda: load_config(write("steps: \x00\n"), schema=schema))
    assert "not valid YAML" in error_of(lambda: load_config(write("steps: 1\n---\nsteps: 2\n"), schema=schema))
    assert "at the top level" in error_of(lambda: load_config(write("- steps\n"), schema=schema))
    assert "at the top level" in error_of(lambda: load_config(write("steps\n"), schema=schema))
    path = write("")
    path.write_bytes(b"steps: \xff\xfe")
    assert "not UTF-8" in error_of(lambda: load_config(path, schema=schema))


def test_yaml_never_runs_or_names_python(write: Callable, schema: type) -> None:
    for tag in ("!!python/object/apply:os.system", "!Custom"):
        assert "is not allowed" in error_of(lambda: load_config(write(f"steps: {tag} [ls]\n"), schema=schema))


def test_a_missing_file_lists_its_neighbours(write: Callable, schema: type, tmp_path: Path) -> None:
    write("steps: 1\n", "other.yaml")
    message = error_of(lambda: load_config(tmp_path / "run.yaml", schema=schema))
    assert "there is no config file" in message and "other.yaml" in message
    assert "is a folder" in error_of(lambda: load_config(tmp_path, schema=schema))
    assert "there is no config file" in error_of(lambda: load_config("/nowhere/at/all.yaml", schema=schema))


def test_bases_may_be_missing_cyclic_deep_or_of_a_wrong_type_only_with_an_error(write: Callable, schema: type) -> None:
    def message(base: str) -> str:
        path = write(f"base: {base}\nsteps: 1\n")
        return error_of(lambda: load_config(path, schema=schema))

    assert "cannot be its own base" in message("run.yaml")
    assert "there is no file" in message("gone.yaml")
    assert "expected a path" in message("[{a: 1}]")
    assert "expected a path" in message("7")
    write("base: run.yaml\n", "deep.yaml")
    assert "One level is allowed" in message("deep.yaml")


def test_a_config_survives_dict_and_yaml_round_trips(write: Callable, schema: type) -> None:
    text = "steps: 3\ntitle: '12'\neither: [a, 'null', '1e3', 'yes', 'ü: {', '']\nshare: 1e-7\nstages: [{name: a}]\n"
    loaded = load_config(write(text), schema=schema)
    assert config_from_dict(config_to_dict(loaded), schema=schema) == loaded
    assert load_config(write(config_to_yaml(loaded), "again.yaml"), schema=schema) == loaded
    assert hash(loaded) == hash(config_from_dict(config_to_dict(loaded), schema=schema))


def test_errors_of_plain_values_name_their_source(schema: type) -> None:
    message = error_of(lambda: config_from_dict({"steps": 0}, schema=schema, name="state.json"))
    assert message.startswith("steps = 0: must be positive") and message.endswith("(state.json)")


def test_a_config_is_frozen_and_checked_when_made_in_python(schema: type) -> None:
    made = schema(steps=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.steps = 4
    assert "Root.steps = 0: must be positive [steps]" in error_of(lambda: schema(steps=0))
    assert "Root.steps = '3': expected a whole number, got str" in error_of(lambda: schema(steps="3"))
    assert "must be positive" in error_of(lambda: dataclasses.replace(made, steps=-1))
    assert "between 0 and 1" in error_of(lambda: schema(steps=1, share=math.nan))
    with pytest.raises(TypeError):
        schema(3)


def test_a_loaded_config_knows_where_its_values_were_written_also_later(write: Callable, schema: type) -> None:
    path = write("steps: 1\nexperts:\n  count: 9\n")
    loaded = load_config(path, schema=schema)
    assert loaded.experts.where("count") == f"{path}:3"
    assert loaded.experts.where("top_k") == f"{path}:2"
    assert loaded.was_given("experts.count") and not loaded.experts.was_given("top_k")
    assert error_of(lambda: loaded.experts.fail("count", "too many here")).endswith(f"too many here ({path}:3)")


def test_the_kind_of_a_file_can_be_told_from_its_keys(write: Callable) -> None:
    write("tokenizer: {kind: text}\n", "low.yaml")
    assert peek_keys(write("base: low.yaml\ntrain: {}\n")) == ("tokenizer", "train")
