"""The package's metadata is in settings.ini: edit it there, not here."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
ini = ConfigParser(delimiters=["="], interpolation=None)
ini.read_string((ROOT / "settings.ini").read_text(encoding="utf-8"))
cfg = ini["DEFAULT"]

words = lambda key: cfg.get(key, "").split()
extras = {name: words(f"{name}_requirements") for name in ("qlora", "deepspeed", "notebook", "data", "server", "grid", "real")}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license_expression=cfg["license"],
    license_files=["LICENSE"],
    keywords=words("keywords"),
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
                 "Programming Language :: Python :: 3", "Typing :: Typed"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    package_data={cfg["lib_path"]: ["py.typed"]},
    include_package_data=True,
    install_requires=words("requirements"),
    extras_require=extras | {"dev": sum(extras.values(), words("dev_requirements"))},
    entry_points={
        "console_scripts": words("console_scripts"),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],  # lets other nbdev projects link to our symbols
    },
)
