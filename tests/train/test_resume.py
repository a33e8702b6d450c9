"""Train = train + kill -9 + resume, bit for bit, whenever the kill comes."""
import random
import shutil
import time

import pytest
from train_helpers import EACH_STEP, config, forkserver, in_a_save, killed_when, result_of, scenes, train_in_child

from jetson_det.runtime.files import InputError
from jetson_det.models.checkpoint import list_checkpoints, newest_whole, verify_checkpoint
from jetson_det.train.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory): return scenes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    "A training that was never interrupted: its folder, and the seconds it took."
    out = tmp_path_factory.mktemp("runs")/"whole"
    start = time.monotonic()
    train(config(data, *EACH_STEP), out)
    return out, time.monotonic() - start


@pytest.fixture(scope="module")
def child():
    "Starts a training in a process of its own; the modules are imported once."
    context = forkserver()
    def start(*args, **kw):
        process = context.Process(target=train_in_child, args=args, kwargs=kw)
        process.start()
        return process
    return start


def after_steps(out, n):
    return lambda: len(list(out.glob("checkpoints/step-*"))) and int(list_checkpoints(out)[-1].name[5:]) >= n
def after_seconds(s):
    end = time.monotonic() + s
    return lambda: time.monotonic() > end


def resumable(out):
    "Can the run in the folder be resumed? One without a checkpoint makes room for a new one."
    if list_checkpoints(out): return True
    shutil.rmtree(out, ignore_errors=True)
    return False


def finish(child, data, out, more=EACH_STEP):
    process = child(data, out, more, resume=resumable(out))
    process.join(120)
    assert process.exitcode == 0, open(f"{out}.txt").read()[-2000:]


def test_killed_again_and_again_at_every_kind_of_moment(tmp_path, data, whole, child):
    "As soon as the folder is there, after a step, in a save, in the middle of an epoch, in a save; then to the end."
    out = tmp_path/"run"
    moments = [lambda: out.exists(), after_steps(out, 1), in_a_save(out), after_steps(out, 4), in_a_save(out)]
    hits = sum(killed_when(child(data, out, EACH_STEP, resume=resumable(out)), moment) for moment in moments)
    assert hits == 5 and all(verify_checkpoint(p) for p in list_checkpoints(out))
    finish(child, data, out)
    assert result_of(out) == result_of(whole[0])
    words = open(f"{out}.txt").read()
    assert words.count("resumed after") == 4 and len(list_checkpoints(out)) <= 3
    assert not [p for p in out.rglob("*") if p.name.endswith((".part", ".old", ".gone"))]


def test_killed_at_random_between_checkpoints_an_epoch_apart(tmp_path, data, whole, child):
    "Steps since the last checkpoint are taken again."
    out = tmp_path/"run"
    rng = random.Random(7)
    more = ["data.workers=1"]
    for _ in range(2):
        killed_when(child(data, out, more, resume=resumable(out)), after_seconds(rng.uniform(.2, .8) * whole[1]))
    finish(child, data, out, more)
    assert result_of(out) == result_of(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_random(tmp_path, data, whole, child, seed):
    out = tmp_path/"run"
    rng = random.Random(seed)
    for _ in range(rng.randint(2, 8)):
        killed_when(child(data, out, EACH_STEP, resume=resumable(out)), after_seconds(rng.uniform(.05, 1.)*whole[1]))
    finish(child, data, out)
    assert result_of(out) == result_of(whole[0])


def cut_at(whole, out, step=8):
    "A copy of the finished run with no checkpoint after `step`."
    shutil.copytree(whole[0], out)
    for name in ("best", "last"): shutil.rmtree(out/name)
    for p in list_checkpoints(out):
        if int(p.name[5:]) > step: shutil.rmtree(p)
    return out


def test_a_torn_checkpoint_is_passed_over_and_said(tmp_path, data, whole, capsys):
    out = tmp_path/"run"
    shutil.copytree(whole[0], out)
    newest = list_checkpoints(out)[-1]
    (newest/"optimizer.safetensors").write_bytes((newest/"optimizer.safetensors").read_bytes()[:-1])
    train(config(data), out, resume=True)
    said = capsys.readouterr().out
    assert (
        "step-00000009 is passed over" in said
        and "optimizer.safetensors: torn" in said
        and "resumed after epoch 2" in said
    )
    assert result_of(out) == result_of(whole[0]) and newest_whole(out).name == "step-00000009"


def test_none_whole_is_an_error_and_not_a_new_start(tmp_path, data, whole):
    out = tmp_path/"run"
    shutil.copytree(whole[0], out)
    for p in list_checkpoints(out): (p/"state.json").write_text("{}")
    with pytest.raises(InputError, match="no whole checkpoint"): train(config(data), out, resume=True)


def test_a_finished_run_resumes_to_the_same_figures(tmp_path, data, whole):
    out = tmp_path/"run"
    shutil.copytree(whole[0], out)
    figures = train(config(data), out, resume=True)
    assert result_of(out) == result_of(whole[0]) and figures["steps"] == 9


def test_another_setting_or_other_data_is_refused_by_name(tmp_path, data, whole):
    out = cut_at(whole, tmp_path/"run")
    before = sorted(p.name for p in out.rglob("*"))
    for word in ("train.epochs=4", "model.name=yolox-tiny", "augment.flip=0.1", "train.seed=1", "train.batch_size=4",
                 "data.classes=[Person,Sack]"):
        with pytest.raises(InputError, match=word.split("=")[0]): train(config(data, word), out, resume=True)
    other = tmp_path/"data"
    shutil.copytree(data, other)
    labels = next((other/"annotations").glob("train.json"))
    labels.write_text(labels.read_text().replace('"category_id": 1', '"category_id": 2', 1))
    with pytest.raises(InputError, match=r"\.jpg: has other labels"): train(config(other), out, resume=True)
    assert sorted(p.name for p in out.rglob("*")) == before


def test_the_same_data_elsewhere_is_the_same_training(tmp_path, data, whole):
    out = cut_at(whole, tmp_path/"run")
    other = tmp_path/"moved"
    shutil.copytree(data, other)
    train(config(other, "data.workers=1", "train.keep=1"), out, resume=True)
    assert result_of(out) == result_of(whole[0])


def test_a_checkpoint_of_other_classes_is_refused(tmp_path, data, whole):
    from jetson_det.models.checkpoint import load_checkpoint
    from jetson_det.train.data import training_data
    from jetson_det.train.loop import Trainer
    ckpt = load_checkpoint(newest_whole(whole[0]))
    cfg = config(data)
    for change, words in (({"classes": ("Sack", )}, "classes is"), ({"name": "yolox-s"}, "name is"),
                          ({"input_size": (64, 64)}, "input_size is")):
        with pytest.raises(InputError, match=words):
            Trainer(cfg, training_data(cfg, tmp_path), tmp_path,
                    ckpt._replace(contract=ckpt.contract._replace(**change)))
    with pytest.raises(InputError, match="without the optimizer"):
        Trainer(cfg, training_data(cfg, tmp_path), tmp_path, load_checkpoint(whole[0]/"last"))
