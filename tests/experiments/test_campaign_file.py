"""Plans as files: the shipped ones, and what is wrong with others."""
import pytest

from jetson_det.core import InputError
from jetson_det.experiments.campaign_file import find_campaign, read_campaign
from jetson_det.experiments.campaign_tree import draw_tree, tree_lines

SHIPPED = ("p2_small_objects", "jetson_nano", "rtdetr_1080p")
PLAN = """\
name: a plan
settings: {train: {epochs: 40, eval_every: 5}}
phases:
  whole:
    train: {model.name: yolox-s}
    watch: [no NaN, AP50 > 0.3 by epoch 20]
    then: light
    stopped: nothing
  light:
    train: {model.name: yolox-nano}
    gate: [AP >= whole - 0.01, time <= 0.9 * whole]
    yes: deploy light
    no: keep whole
ends:
  deploy light: {board: orin-nano}
  keep whole: {artifact: whole, board: orin-nano}
  nothing: {artifact: none}
"""


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("toy", [False, True])
def test_shipped_plans_are_right(name, toy):
    campaign = read_campaign(name, toy=toy)
    assert len(campaign.order()) == len(campaign.phases) >= 3
    assert all(phase.watches for phase in campaign.phases.values() if phase.kind == "train")
    lines = tree_lines(campaign)
    assert all(any(line.strip().startswith(name) for line in lines) for name in (*campaign.phases, *campaign.ends))
    for phase in campaign.phases.values():
        if phase.gate: assert not phase.cautious # the shipped ones say where `not shown` leads
    if not toy: return
    for phase in campaign.phases:
        cfg = campaign.config_of(phase)
        assert cfg.train.epochs <= 6 and max(cfg.data.input_size) <= 256 and cfg.model.weights is None


def test_the_plan_of_the_small_objects():
    campaign = read_campaign("p2_small_objects")
    first = campaign.config_of("accumulation")
    assert (first.train.batch_size, first.train.accumulate, first.train.lr) == (6, 3, .011)
    assert first.model.gains == {"box": 10, "dfl": 2}
    assert (first.augment.mosaic_scale, first.augment.translate) == ([.3, 1.7], .15)
    light = campaign.config_of("without_p5")
    assert (light.model.name, light.train.batch_size, light.train.accumulate) == ("yolo11n-p2-lite", 8, 2)
    assert len(campaign.sweep_of("grid").points) == 9
    assert campaign.config_of("grid").train.epochs == 100
    assert campaign.phases["accumulation"].next == {"yes": "deploy", "no": "without_p5", "not shown": "without_p5"}


@pytest.mark.parametrize("old, new, line, hint", [
    ("gate:", "gates:", 11, "phases.light.gates: unknown key: did you mean 'gate'?"),
    ("phases:", "phase:", 3, "phase: unknown key: did you mean 'phases'?"),
    ("epochs: 40", "epoch: 40", 2, "unknown key 'train.epoch': did you mean 'train.epochs'?"),
    ("epochs: 40", "epochs: many", 2, "train.epochs"),
    ("yolox-s", "yolox-sm", 5, "did you mean"),
    ("AP >= whole", "AP >= hole", 11, "no phase 'hole': did you mean 'whole'?"),
    ("AP >= whole", "AP >= light", 11, "which is the phase itself"),
    ("AP >= whole - 0.01", "AP => 0.9", 11, "not a condition"),
    ("no: keep whole", "no: whole", 3, "whole -> light -> whole"),
    ("no: keep whole", "no: keep", 13, "no phase or end 'keep': it is one of whole, light, deploy light"),
    ("then: light", "then: lite", 7, "did you mean 'light'?"),
    ("    no: keep whole\n", "", 11, "say where yes: and no: lead"),
    ("    then: light\n", "", 4, "say where then: leads"),
    ("    stopped: nothing\n", "", 6, "stopped: NAME"),
    ("by epoch 20", "by epoch 80", 6, "the phase has 40 epochs"),
    ("by epoch 20", "by epoch 2", 6, "first evaluation is in epoch 5"),
    ("artifact: whole", "artifact: light", None, ""),
    ("artifact: whole", "artifact: holes", 16, "no phase 'holes'"),
    ("artifact: none", "board: orin-nano", 17, "leads here when a watch stops it"),
    ("board: orin-nano}\n  keep", "board: orin-nanu}\n  keep", 15, "did you mean 'orin-nano'?"),
    ("deploy light: {board: orin-nano}", "deploy light: {bundle: true}", 15, "is for a board"),
    ("train: {model.name: yolox-nano}", "sweep: no_such_sweep", 10, "no_such_sweep"),
    ("train: {model.name: yolox-nano}", "checkpoint: 5", None, ""),
    ("train: {model.name: yolox-nano}", "train: {data.val: .3}", 10, "same images"),
    ("    train: {model.name: yolox-nano}\n", "", 9, "needs one of train, sweep and checkpoint"),
    ("name: a plan", "name: [a]", 1, "expected a text"),
    ("name: a plan", "start: light", 4, "nothing leads to it"),
    ("name: a plan", "measure: {level: 90}", 1, "from 0.5 to under 1"),
    ("name: a plan", "measure: {level: high}", 1, "a number"),
    ("name: a plan", "measure: {split: train}", 1, "unknown 'train'"),
    ("name: a plan", "toy: {phases: {lite: {}}}", 1, "did you mean 'light'?"),
    ("name: a plan", "config: yolox_tinny", 1, "did you mean 'yolox_tiny_jetson'?"),
    ("  light:", "  li ght:", 9, "one word"),
    ("  nothing: {artifact: none}", "  light: {artifact: none}", None, "names a phase and an end"),
    ("name: a plan", "name: [a", None, "not valid YAML"),
])
def test_mistakes_are_named_where_they_stand(tmp_path, old, new, line, hint):
    assert old in PLAN
    path = tmp_path/"plan.yaml"
    path.write_text(PLAN.replace(old, new, 1))
    if not hint: # not wrong
        read_campaign(path)
        return
    with pytest.raises(InputError) as e: read_campaign(path)
    assert hint in str(e.value) and "\n" not in str(e.value)
    if line: assert str(e.value).startswith(f"{path}, line {line}: ")


def test_a_gate_reads_only_what_has_run_on_every_way(tmp_path):
    third = "  third:\n    train: {}\n    gate: AP >= light\n    yes: keep whole\n    no: keep whole\nends:"
    plan = PLAN.replace("no: keep whole", "no: third").replace("ends:", third)
    path = tmp_path/"plan.yaml"
    path.write_text(plan)
    assert read_campaign(path).order() == ["whole", "light", "third"]
    # now third may come without light
    path.write_text(plan.replace("stopped: nothing", "stopped: third").replace("  nothing: {artifact: none}\n", ""))
    with pytest.raises(InputError, match="light, which has not run on every way that leads to third"):
        read_campaign(path)


def test_overrides_and_toy(tmp_path):
    path = tmp_path/"plan.yaml"
    toy = "toy: {settings: {train.epochs: 10, train.eval_every: 1}, phases: {light: {train.epochs: 8}}}\n"
    path.write_text(PLAN + toy)
    campaign = read_campaign(path, {"train.seed": 7}, toy=True)
    assert [campaign.config_of(name).train.epochs for name in ("whole", "light")] == [10, 8]
    assert campaign.config_of("light").train.seed == 7
    assert any("left out in the rehearsal" in note for note in campaign.notes)
    with pytest.raises(InputError, match="^override 'train.epoc=7': unknown key"):
        read_campaign(path, {"train.epoc": 7})
    path.write_text(PLAN)
    with pytest.raises(InputError, match="no section toy"): read_campaign(path, toy=True)


def test_names_of_shipped_plans():
    assert find_campaign("jetson_nano").is_file() and find_campaign("jetson_nano.yaml").is_file()
    with pytest.raises(InputError, match="did you mean 'jetson_nano'"): find_campaign("jetson_nan")


@pytest.mark.parametrize("text", ["", "5", "[]", "phases: {}", "phases: 3", "phases: {a: 3}", "phases: {a: {train: 3}}",
                                  "ends: {}", "{phases: {a: {train: {}, then: b}}, ends: {b: 4}}",
                                  "{phases: {a: {train: {}, then: [b]}}, ends: {b: {}}}", "phases: {1: {train: {}}}"])
def test_odd_files_give_a_line(tmp_path, text):
    path = tmp_path/"plan.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as e: read_campaign(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_a_drawing_of_each_way(tmp_path):
    campaign = read_campaign("p2_small_objects")
    records = {"baseline": {"status": "done", "AP": [.9, None, None]},
               "accumulation": {"status": "stopped", "reason": "$x^"}}
    decisions = [dict(phase="baseline", answer="then", text="", decide="", to="accumulation"),
                 dict(phase="accumulation", answer="stopped", text="epoch 3: $loss$ is", decide="", to="without_p5")]
    draw_tree(campaign, records, decisions).savefig(tmp_path/"tree.svg")
    lines = tree_lines(campaign, records, decisions)
    assert sum(line.startswith(">") for line in lines) == 4
