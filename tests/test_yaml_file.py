"One reader for all YAML: every hostile file is one line that names its place; what we write is read back the same."
import os

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jetson_det.cli import main
from jetson_det.config import Config, load_config, parse_override
from jetson_det.config_tools import explain, known_keys
from jetson_det.data.augment.albumentations import load_transforms
from jetson_det.data.formats.registry import read_dataset
from jetson_det.runtime.files import InputError
from jetson_det.runtime.yaml_file import _MOST_VALUES, dump_yaml, parse_yaml, read_yaml


def laughs(kind, wide=9, deep=9):
    "Aliases of aliases: lists, mappings or merged mappings."
    lines = ["a0: &a0 [1]" if kind == "list" else "a0: &a0 {x: 1}"]
    for k in range(1, deep + 1):
        parts = [f"*a{k - 1}"] * wide
        if kind == "list": body = f"[{', '.join(parts)}]"
        elif kind == "map": body = "{" + ", ".join(f"k{i}: {part}" for i, part in enumerate(parts)) + "}"
        else: body = "{" + ", ".join(f"k{i}: {{<<: {part}}}" for i, part in enumerate(parts)) + "}"
        lines.append(f"a{k}: &a{k} {body}")
    return "\n".join(lines)


HOSTILE = [ # text, line, words
    ("train:\n  epochs: 3\ntrain:\n  seed: 1\n", 3, "'train' stands here and in line 1"),
    ("train:\n  epochs: 3\n  seed: 1\n  'epochs': 4\n", 4, "'epochs' stands here and in line 2"),
    ("train: {epochs: 3,\n  epochs: 4}\n", 2, "'epochs' stands here and in line 1"),
    ("data:\n  classes: [{a: 1,\n a: 2}]\n", 3, "'a' stands here and in line 2"),
    ("train: {unfreeze: {5: [a], 5: [b]}}", 1, "'5' stands here"),
    ("train: {unfreeze: {5: [a],\n '5': [b]}}", 2, "'5' stands here and in line 1"),
    ("names:\n  0: a\n  00: b\n", 3, "'00' stands here and in line 2"),
    (laughs("list"), 7, "aliases written out"),
    (laughs("map"), 6, "aliases written out"),
    (laughs("merge"), 6, "aliases written out"),
    ("train: &t\n  epochs: *t\n", 2, "inside of &t"),
    ("train: &t [1, [2,\n *t]]\n", 2, "inside of &t"),
    ("train: *nowhere\n", 1, "repeats nothing"),
    ("train:\n  epochs: " + "9" * 5000, 2, "a number of 5000 digits"),
    ("train:\n  lr: 1." + "0" * 5000, 2, "a number of 5002 digits"),
    ("train: {" + "9" * 5000 + ": 1}", 1, "a number of 5000 digits"),
    ("train:\n  epochs: 0x" + "f" * 5000, 2, "digits"),
    ("train:\n  epochs: 2001-99-99\n", 2, "2001-99-99"),
    ("2001-99-99: 1\n", 1, "2001-99-99"),
    ("train:\n  project: 2026-02-30T10:00:00Z\n", 2, "no date"),
    ("x: " + "[" * 100_000, 1, "deep|depth"),
    ("x:\n" + "\n".join(" " * k + "a:" for k in range(1, 200)), "5[0-9]", "nested over"),
    ("- " * 5000 + "x", 1, "nested over"),
    ("? " * 5000 + "x", 1, "a key must be"),
    ("x: !!python/object/apply:os.system [ls]\n", 1, "tag"),
    ("x: !!binary aGk=\n", 1, "!!binary"),
    ("x: !!int y\n", 1, "'y' is no int"),
    ("x: !!timestamp 2001-99-99\n", 1, "tag"),
    ("x: !other {}\n", 1, "tag"),
    ("a: 1\n---\nb: 2\n", 2, "second document"),
    ("a: [1, 2\nb: 3\n", "[23]", "not valid YAML"),
    ("a:\n\t- 1\n", 2, "not valid YAML"),
    ("a: b\0c\n", 1, "not valid YAML"),
    ("a: 1\nb: \x1b[31m\n", 2, "not valid YAML"),
    ("%YAML x\n---\na: 1\n", 1, "not valid YAML"),
    ("[a, b]: 1\n", 1, "a key must be"),
    ("a: x\n" * 300_000, 1, "too large"),
    ("<<: 5\n", 1, "takes a mapping"),
]


@pytest.mark.parametrize("text, line, words", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_one_line_for_every_reader(tmp_path, text, line, words, capsys):
    (tmp_path/"images").mkdir()
    files = [tmp_path/"mine.yaml", tmp_path/"data.yaml"]
    for file in files: file.write_text(text, newline="")
    with pytest.raises(InputError, match=rf"mine\.yaml, line {line}: .*{words}") as e: read_yaml(files[0])
    assert "\n" not in str(e.value) and len(str(e.value)) < 300
    for read in (lambda: load_config(files[0]), lambda: load_transforms("mine.yaml", base=tmp_path),
                 lambda: read_dataset(files[1])):
        with pytest.raises(InputError, match=r"\.yaml, line \d+: ") as e: read()
        assert "\n" not in str(e.value) and len(str(e.value)) < 400
    assert main(["config", "explain", "-c", str(files[0])]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("word", ["train.epochs=" + "9" * 5000, "train.epochs=2001-99-99", "data={a: 1, a: 2}",
                                  "train.lr=[", "model=&a [*a]", "data=" + "[" * 5000, "train..epochs=3", "=3", "x",
                                  "train.project=\udcff"])
def test_overrides_are_read_by_the_same_reader(word):
    with pytest.raises(InputError) as e: load_config(None, [word])
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path/"pipe.yaml")
    os.symlink("/dev/zero", tmp_path/"zero.yaml")
    (tmp_path/"folder.yaml").mkdir()
    for name in ("pipe", "zero", "folder", "none"):
        for read in (read_yaml, load_config):
            with pytest.raises(InputError, match=name): read(tmp_path/f"{name}.yaml")
    (tmp_path/"a.yaml").write_text(f"base: {tmp_path/'pipe.yaml'}\n")
    with pytest.raises(InputError, match="pipe or device"): load_config(tmp_path/"a.yaml")
    (tmp_path/"a.yaml").write_bytes(b"train:\n  project: caf\xe9\n")
    with pytest.raises(InputError, match="line 2: not UTF-8"): load_config(tmp_path/"a.yaml")


def test_bases_that_lead_on_and_on(tmp_path):
    for k in range(2000): (tmp_path/f"{k}.yaml").write_text(f"base: {k + 1}.yaml\n")
    with pytest.raises(InputError, match="over 20 files build on one another"): load_config(tmp_path/"0.yaml")
    for base in ("[a]", "5", "{a: 1}"):
        (tmp_path/"0.yaml").write_text(f"train:\n  seed: 1\nbase: {base}\n")
        with pytest.raises(InputError, match=r"0\.yaml, line 3: base: expected a file's name"):
            load_config(tmp_path/"0.yaml")


def test_an_ordinary_alias_and_a_merge_are_read(tmp_path):
    (tmp_path/"a.yaml").write_text("train: &t\n  epochs: 3\n  seed: 4\nmore:\n  <<: *t\n  seed: 5\nlist: [*t, *t]\n")
    values, lines = read_yaml(tmp_path/"a.yaml")
    assert values["more"] == {"epochs": 3, "seed": 5} and values["list"] == [{"epochs": 3, "seed": 4}] * 2
    assert values["list"][0] is not values["train"] and lines["more", "seed"] == 6 and lines["more", "epochs"] == 5
    assert parse_yaml("") == (None, {(): 1}) == parse_yaml("# nothing\n")
    with pytest.raises(InputError, match=r"\*t repeats another part"): read_yaml(tmp_path/"a.yaml", aliases=False)


def test_as_many_values_as_a_large_data_set_has_classes():
    names = [f"class {k}" for k in range(20_000)]
    assert len(names) < _MOST_VALUES
    assert parse_yaml(dump_yaml({"names": names}))[0]["names"] == names


WORDS = ["no", "Yes", "on", "OFF", "y", "true", "null", "~", "007", "0o7", "0x1F", "1_000", "12:30", "1e3", "1.50",
         "+7", ".5", "2026-11-26", "2001-99-99", "<<", "=", "", " a", "a: b", "- a", "# a", "ü", "a\tb",
         "99999999999999999999"]
BREAKS = ["a\x85b", "\x85", " \u2028", "a\u2029\u2029b", "a\r\n\tb", "\ufeffa", "\x00\x1b"]


@pytest.mark.parametrize("word", WORDS + BREAKS)
def test_what_is_written_is_read_back_by_both_versions_of_yaml(word):
    values = {"names": [word], word: None, "last": word}
    text = dump_yaml(values)
    assert parse_yaml(text)[0] == yaml.safe_load(text) == values


@pytest.mark.parametrize("word", [w for w in WORDS if w.strip() == w and w and not set(w) & set(":#") and w != "- a"])
def test_a_list_of_names_keeps_each_text(word):
    assert parse_yaml(f"names:\n- {word}\n", texts=[("names",)])[0] == {"names": [word]}
    assert parse_yaml(f"names: {{0: '{word}'}}\n", texts=[("names",)])[0] == {"names": {0: word}}
    if word not in ("true", "null", "~"): assert Config(data={"classes": [word]}).data.classes == [word]
    assert parse_override(f"data.classes=[{word}]") == (("data", "classes"), [word])


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), lambda inner:
                    st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(), inner, max_size=4),
                    max_leaves=12))
def test_any_value_survives(value):
    try: text = dump_yaml(value)
    except UnicodeEncodeError: return # half a character
    assert parse_yaml(text)[0] == value


def test_settings_that_are_booleans_take_yes_and_no(tmp_path):
    (tmp_path/"a.yaml").write_text("train:\n  ema: no\n  compile: yes\n")
    cfg = load_config(tmp_path/"a.yaml", ["train.deterministic=on"])
    assert (cfg.train.ema, cfg.train.compile, cfg.train.deterministic) == (False, True, True)


def numbers():
    "(key, whether it is a whole number) of every setting that takes one."
    for key, prop in known_keys().items():
        for part in prop.get("anyOf", [prop]):
            if part.get("type") in ("integer", "number"): yield key, part["type"] == "integer"


@pytest.mark.parametrize("key, whole", numbers())
def test_every_number_has_both_bounds(key, whole):
    fractions = [] if whole else [".inf", "-.inf", ".nan", "inf", "nan", "1e400"]
    for value in ["1" + "0" * 30, "-1" + "0" * 30, *fractions]:
        with pytest.raises(InputError, match=key) as e: load_config(None, [f"{key}={value}"])
        assert "\n" not in str(e.value) and len(str(e.value)) < 300


@pytest.mark.parametrize("word, parts", [
    ("data.workers=99999", ["256", "each is a process"]),
    ("train.batch_size=1000000", ["4096", "in memory"]),
    ("train.epochs=10000000", ["100000", "learning rate falls"]),
    ("train.lr=1000", ["100", "usual"]),
    ("train.lr=inf", ["finite", "usual"]),
    ("data.input_size=[99968,64]", ["8192", "gigabytes"]),
    ("data.input_size=[.inf,64]", ["finite"]),
    ("augment.mosaic_scale=[1,1000]", ["at most 100"]),
])
def test_a_bound_says_why(word, parts):
    with pytest.raises(InputError) as e: load_config(None, [word])
    for part in parts: assert part in str(e.value), e.value


@pytest.mark.parametrize("word, hint", [
    ("epochs=3", "did you mean 'train.epochs=3'?"),
    ("epoch=3", "override 'epoch=3': unknown key 'epoch': did you mean 'train.epochs=3'?"),
    ("train.epoch=3", "unknown key 'train.epoch': did you mean 'train.epochs=3'?"),
    ("trian.epochs=3", "override 'trian.epochs=3': unknown key 'trian': did you mean 'train.epochs=3'?"),
    ("train.flipp=.3", "did you mean 'augment.flip=.3'?"),
    ("evaluate.sed=4", "did you mean 'data.seed=4' or 'train.seed=4'?"),
    ("train.sed=4", "did you mean 'train.seed=4'?"),
    ("evaluate.iuo=.5", "did you mean 'evaluate.iou=.5'?"),
    ("dat=x", "did you mean 'data'?"),
    ("xyzzy=3", "it is one of data, model, augment"),
    ("seed=3", "'data.seed=3' or 'train.seed=3'"),
    ("imgsz=640", "'data.input_size=640'"),
    ("batch=4", "'train.batch_size=4'"),
    ("data=x", "'data.path'"),
    ("model=yolox-s", "'model.name'"),
    ("data.input_size=320", "such as [320, 320]"),
    ("data.input_size=400", "such as [416, 416]"),
    ("data.input_size=[400,600]", "the nearest is 416x608"),
    ("data.input_size=[31,0]", "the nearest is 32x32"),
    ("data.cache=rma", "did you mean 'ram'?"),
    ("data.split_by=randm", "did you mean 'random'?"),
    ("data.path=2024", "put it in quotes"),
])
def test_the_hint_names_what_was_meant(word, hint):
    with pytest.raises(InputError) as e: load_config(None, [word])
    assert hint in str(e.value), e.value


def test_explain_never_names_a_value_that_is_not_used(tmp_path):
    (tmp_path/"a.yaml").write_text("train:\n  epochs: 300\ntrain:\n  lr: 0.01\n")
    with pytest.raises(InputError, match="line 3: the key 'train' stands here and in line 1"):
        explain("epochs", tmp_path/"a.yaml")


def test_the_description_of_models_follows_the_table():
    zoo = pytest.importorskip("jetson_det.models.zoo")
    text = known_keys()["model.name"]["description"]
    firsts = {} # family's part of a name -> its first model
    for name in zoo.MODELS: firsts.setdefault(name.split("-")[0].rstrip("nsmlx"), name)
    assert len(firsts) >= 7
    for name in firsts.values(): assert name in text, name
