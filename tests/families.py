"""Imports the packages that the networks are made of: seconds that a process of the tests then need not spend."""
from jetson_det.core import InputError
from jetson_det.models.detr.network import detr_classes
from jetson_det.models.ultralytics.package import ultralytics_tasks

for kind in ("rt_detr", "rt_detr_v2", "d_fine"):
    try: detr_classes(kind)
    except InputError: pass # not installed: its tests are skipped
try: ultralytics_tasks()
except InputError: pass
