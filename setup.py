"""Packaging: everything comes from settings.ini; the job notebooks, the configs and the parts of the data page travel
inside the wheel."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(str(here / "settings.ini"), encoding="utf-8")
cfg = ini["DEFAULT"]


def listed(name):
    "The requirements of one settings.ini key: a line each."
    return [line.strip() for line in cfg.get(name, "").splitlines() if line.strip()]


class BuildWithNotebooks(build_py):
    "Copies nbs/jobs, configs and docker into the package, so that jobs run after a plain `pip install`."

    def run(self):
        super().run()
        for folder, pattern, to in (("nbs/jobs", "*.ipynb", "jobs"), ("configs", "*.yaml", "configs"),
                                    ("configs/sweeps", "*.yaml", "configs/sweeps"),
                                    ("configs/campaigns", "*.yaml", "configs/campaigns"), ("docker", "*", "docker")):
            target = Path(self.build_lib) / "jetson_det" / to
            target.mkdir(parents=True, exist_ok=True)
            for f in sorted((here / folder).glob(pattern)):
                shutil.copy2(str(f), str(target / f.name))


extras = {k[: -len("_requirements")]: listed(k) for k in cfg if k.endswith("_requirements")}
extras["all"] = sorted({r for name in ("train", "wandb", "mlflow") for r in extras[name]})
extras["dev"] = sorted({r for name in ("train", "mobile", "fleet", "docs", "dev") for r in extras[name]})

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    packages=find_packages(include=["jetson_det", "jetson_det.*"]),
    package_data={
        "jetson_det": ["py.typed"],
        "jetson_det.data.quality": ["page.html", "page.css", "page.js"],
        "jetson_det.evaluate": ["page.html", "page.css"],
        "jetson_det.export": ["latency_rows.json", "latency_layers.json", "latency_model.json",
                              "bundle_files/*"],
    },
    python_requires=">=" + cfg["min_python"],
    install_requires=listed("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": listed("console_scripts"),
                  "nbdev": ["{0}={0}._modidx:d".format(cfg["lib_name"])]},
    cmdclass={"build_py": BuildWithNotebooks},
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Developers"]
    + ["Programming Language :: Python :: " + v for v in ("3.6", "3.10", "3.11", "3.12", "3.13")],
)
