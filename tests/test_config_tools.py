"""The schema against the reader of the configuration: what one accepts the other does; every shipped recipe is
valid."""
import copy
import re
from pathlib import Path

import pytest
import yaml

from jetson_det.config import Config, load_config, save_config
from jetson_det.config_tools import _LISTS, Change, allowed, config_schema, diff_configs, explain, find_keys, known_keys
from jetson_det.runtime.files import InputError

jsonschema = pytest.importorskip("jsonschema")
RECIPES = sorted((Path(__file__).parents[1]/"configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def valid():
    schema = config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    checker = jsonschema.Draft202012Validator(schema)
    return lambda values: not list(checker.iter_errors(values))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_valid(recipe, valid):
    values = yaml.safe_load(recipe.read_text())
    assert valid(values)
    load_config(recipe)


def test_every_saved_config_is_valid(valid, tmp_path):
    save_config(Config(), tmp_path/"c.yaml")
    values = yaml.safe_load((tmp_path/"c.yaml").read_text())
    assert valid(values) and valid({}) and valid({"base": "other.yaml"}) and valid(
        {"base": "other.yaml", "train": {"epochs": 3}})
    assert list(known_keys()) == [f"{s}.{k}" for s, section in values.items() for k in section]


def accepted(values):
    try: Config.model_validate(values)
    except ValueError: return False
    return True


def probes():
    "Values at and beyond the edges of every key, from the schema itself, and of other types."
    for key, prop in known_keys().items():
        for part in prop.get("anyOf", [prop]):
            for edge, step in (("minimum", -1), ("exclusiveMinimum", 0), ("maximum", 1), ("exclusiveMaximum", 0)):
                if edge in part:
                    yield from ((key, part[edge]), (key, part[edge] + step), (key, part[edge] + .5 * (step or 1)))
            yield from ((key, w) for w in part.get("enum", ()))
        yield from ((key, v) for v in (None, "certainly not this one", [], [1], {"a": 1}, -5))


def test_schema_and_reader_agree_on_every_key(valid):
    seen = {True: 0, False: 0}
    for key, value in probes():
        section, leaf = key.split(".")
        values = {section: {leaf: value}}
        ok = accepted(values)
        assert valid(values) == ok, (key, value, ok)
        seen[ok] += 1
    assert seen[True] > 80 and seen[False] > 300, seen


@pytest.mark.parametrize("key, value, ok", [
    ("data.input_size", [416, 672], True),
    ("data.input_size", [400, 416], False),
    ("data.input_size", [0, 416], False),
    ("data.input_size", [416], False),
    ("data.input_size", [416, 416, 3], False),
    ("augment.mosaic_scale", [.1, 2], True),
    ("augment.crop_scale", [0, 1], False),
    ("augment.hsv", [0, 255, 3], True),
    ("augment.hsv", [0, 256, 3], False),
    ("augment.hsv", [1, 2], False),
    ("augment.zoom_out_scale", [1, 2, 3], False),
])
def test_lists_that_a_function_checks(valid, key, value, ok):
    section, leaf = key.split(".")
    assert valid({section: {leaf: value}}) == accepted({section: {leaf: value}}) == ok


def test_lists_named_here_are_there(): assert set(_LISTS) <= set(known_keys())


def test_unknown_keys_are_underlined(valid):
    for wrong in ({"trian": {}}, {"train": {"epoks": 3}}, {"train": 3}, {"train": [1]}):
        assert not valid(wrong) and not accepted(wrong)


def test_each_key_says_what_it_means():
    for key, prop in known_keys().items(): assert prop.get("description") and "anything" not in allowed(prop), key


def test_explain_names_the_place(tmp_path):
    (tmp_path/"a.yaml").write_text("train:\n  epochs: 20\ndata:\n  path: x\n")
    (tmp_path/"b.yaml").write_text("base: a.yaml\ntrain:\n  seed: 1\n  epochs: 30\n")
    (tmp_path/"c.yaml").write_text("base: b.yaml\n")
    get = lambda key, *words: explain(key, tmp_path/"c.yaml", words)[0]
    epochs = get("epochs")
    assert epochs.place == f"{tmp_path/'b.yaml'}, line 4" and epochs.value == 30 and epochs.default == 100
    assert get("data.path").place == f"{tmp_path/'a.yaml'}, line 4"
    rest = (7, 100, "whole number from 1 to 100000", epochs.description, "override 'train.epochs=7'", False)
    assert get("train.epochs", "train.epochs=7")[1:] == rest
    assert get("momentum").place == "" and "(the default)" in str(get("momentum"))
    for key, recipe, text in (("train.momentum", ["train.momentum"], "(the default; a recipe may fill it in)"),
                              ("train.precision", ["train.momentum"], "(the default)"),
                              ("train.epochs", ["train.epochs"], "b.yaml")):
        assert text in str(explain(key, tmp_path/"c.yaml", (), recipe)[0]).split("\n")[0]
    assert get("train.clip", "train={clip: 3}").place == "override 'train={clip: 3}'"
    assert len(explain()) == len(known_keys()) and not any(e.place for e in explain())
    assert [e.key for e in explain("evaluate")] == find_keys("evaluate")
    save_config(load_config(tmp_path/"c.yaml"), tmp_path/"config.yaml")
    assert explain("epochs", tmp_path)[0].value == 30


@pytest.mark.parametrize("text, part", [
    ("train.epoks", "did you mean 'train.epochs'"),
    ("epoks", "did you mean 'epochs'"),
    ("trian", "did you mean 'train'"),
    ("seed", "data.seed, train.seed"),
    ("zzz", "lists them all"),
])
def test_a_misspelled_key_is_one_line(text, part):
    with pytest.raises(InputError, match=part) as e: explain(text)
    assert "\n" not in str(e.value)


def test_diff(tmp_path):
    assert diff_configs(Config(), Config()) == []
    changed = Config()
    changed.train.epochs = 3
    changed.data.classes = ["no", "Sack"]
    assert diff_configs(Config(),
                        changed) == [Change("data.classes", None, ["no", "Sack"]),
                                     Change("train.epochs", 100, 3)]
    assert [str(c) for c in diff_configs(Config(), changed)
            ] == ["data.classes: null -> ['no', Sack]", "train.epochs: 100 -> 3"]
    assert diff_configs(*RECIPES[:2]) == [Change(c.key, c.b, c.a) for c in diff_configs(*RECIPES[1::-1])] != []
    with pytest.raises(InputError, match="no such file"): diff_configs("nowhere.yaml", Config())


def test_the_schema_is_not_shared():
    one = config_schema()
    before = copy.deepcopy(one)
    one["properties"].clear()
    assert config_schema() == before


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_each_number_of_a_recipe_says_why(path):
    bare = [f"{n}: {line.strip()}" for n, line in enumerate(path.read_text().splitlines(), 1)
            if re.match(r"\s*[\w.]+:\s*[^#]*\d", line) and not re.search(r"#\s*\w+", line)]
    assert not bare, bare
