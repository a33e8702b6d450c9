"""What tests of trials and sweeps have in common: a job of one cell, and waiting for a moment."""
import time

import nbformat
import psutil


def wait_for(moment, seconds=60):
    end = time.monotonic() + seconds
    while not moment():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(.02)


def is_gone(pid):
    try: return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess: return True


def job(folder, source):
    "A job of one cell."
    parameters = 'out:str = "." # folder\noverrides:list = [] # settings\nresume:bool = False # go on'
    tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    cells = [tagged, nbformat.v4.new_code_cell(source)]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder/"j.ipynb")
    return str(folder/"j.ipynb")
