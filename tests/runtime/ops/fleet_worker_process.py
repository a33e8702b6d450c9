"""A worker of the tests: `python fleet_worker_process.py URL QUEUE LOG CLAIM_SECONDS FRAME_SECONDS`. Its detector takes
a while, and writes a line for each inference."""
import os
import sys
import time

from jetson_det.runtime.ops.fleet_queue import FleetQueue, FleetRules
from jetson_det.runtime.ops.fleet_worker import FleetWorker

if __name__ == "__main__":
    url, name, log, claim, pause = sys.argv[1:]

    def infer(image):
        time.sleep(float(pause))
        with open(log, "a") as f: f.write("{} {}\n".format(os.getpid(), int(image[0, 0, 0])))
        return int(image[0, 0, 0])
    rules = FleetRules(claim_seconds=float(claim), backlog=500, deliveries=50)
    worker = FleetWorker(FleetQueue(url, name, rules=rules), infer)
    worker.run()
