"""Imports what the networks of each family are made of: seconds that a process of the tests has behind it when it
begins."""
from jetson_det.core import InputError
from jetson_det.models.detr.network import detr_classes
from jetson_det.models.ultralytics.package import ultralytics_tasks

for bring in (*(lambda k=k: detr_classes(k) for k in ("rt_detr", "rt_detr_v2", "d_fine")), ultralytics_tasks):
    try: bring()
    except InputError: pass # not installed: its tests are skipped
