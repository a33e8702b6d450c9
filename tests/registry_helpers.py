"""Run folders of trainings that are done, for the registry: sealed checkpoints whose weights are any bytes."""
import json

from jetson_det.config import Config, save_config
from jetson_det.runtime.contract import preset
from jetson_det.runtime.files import write_json_atomic
from jetson_det.train.run_folder import flat_config, journal


def write_checkpoint(path, content):
    "A sealed checkpoint whose weights are any bytes: nothing here opens them."
    from jetson_det.models.checkpoint import _write_sealed
    contract = preset("yolox", ("Sack", ), (416, 416))
    state = {"optimizer": None, "training": {"epoch": 2, "step": 20}}
    return _write_sealed(path, [("weights.safetensors", content), ("state.json", json.dumps(state).encode()),
                                ("contract.json", contract.to_json().encode())])


def make_run(run, ap=.3, weights=None, data="docks", **train):
    "A training that is done."
    write_checkpoint(run / "best", weights or run.name.encode())
    cfg = Config()
    cfg.data.path = data
    for key, value in train.items(): setattr(cfg.train, key, value)
    save_config(cfg, run / "config.yaml")
    about = {"started": "2026-11-28T10:00:00+0000", "settings": flat_config(cfg), "torch": "2.13.0", "host": run.name,
             "data": {"path": data, "fingerprint": f"f-{data}", "images": 9, "boxes": 30}}
    write_json_atomic(run / "environment.json", about)
    (run / "metrics.csv").write_text(f"epoch,step,seconds,AP,loss\n1,10,5.0,,3.5\n2,20,9.5,{ap},inf\n")
    journal(run, "began")
    stats = {"AP": ap, "AP_small": None}
    write_json_atomic(run / "metrics.json", {"seconds": 9.5, "steps": 20, "val": {"stats": stats}})
    return run
