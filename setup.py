"""Packaging of d2_mgd. Everything that Detectron2 itself needs is left to Detectron2."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "d2_mgd" / "__init__.py"))["__version__"]
DETECTRON2_URL = runpy.run_path(str(ROOT / "d2_mgd" / "_install.py"))["DETECTRON2_URL"]

EXTRAS = {
    "timm": ["timm>=1.0"],
    "export": ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.1"],
    "wandb": ["wandb>=0.31"],
    "mlflow": ["mlflow>=2.14"],
}

setup(
    name="d2-mgd",
    version=VERSION,
    description="Matching Guided Distillation for Detectron2 and for any two PyTorch networks",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="MGD Detectron2 contributors",
    license="MIT",
    python_requires=">=3.10",
    packages=[*find_packages(include=["d2_mgd", "d2_mgd.*", "classification"]), "d2_mgd._configs", "d2_mgd_tools"],
    # A package "tools" would be Detectron2's.
    package_dir={"d2_mgd._configs": "configs", "d2_mgd_tools": "tools"},
    package_data={"d2_mgd": ["py.typed"], "d2_mgd._configs": ["*.yaml", "*/*.yaml", "lazy/*.py"]},
    entry_points={
        "console_scripts": [
            "d2-mgd-train = d2_mgd.commands:train",
            "d2-mgd-classify = classification.main_mgd:main",
            "d2-mgd-compare = d2_mgd.commands:compare",
            "d2-mgd-check = d2_mgd.commands:check",
            "d2-mgd-export = d2_mgd.commands:export",
        ]
    },
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "numpy>=1.24",
        "ortools>=9.8",
        "fvcore>=0.1.5.post20221221",
        "pycocotools>=2.0.7",
        "matplotlib>=3.7",
        "tensorboard>=2.12",
        "pillow>=10.4",
        "PyYAML>=6.0",
        "tqdm>=4.65",
        "safetensors>=0.4",
    ],
    extras_require={
        **EXTRAS,
        # Without Detectron2, which cannot be built in isolation.
        "all": [requirement for requirements in EXTRAS.values() for requirement in requirements],
        # Needs torch and setuptools beforehand and no build isolation: see DETECTRON2_INSTALL in d2_mgd/_install.py.
        # It imports pkg_resources, which setuptools 82 dropped, and draws with OpenCV without asking for it.
        "detectron2": [f"detectron2 @ {DETECTRON2_URL}", "setuptools<82", "opencv-python-headless>=4.8"],
        "test": [
            "pytest>=8.0",
            "pytest-cov>=5.0",
            "pytest-timeout>=2.2",
            "pytest-xdist>=3.5",
            "hypothesis>=6.90",
            "scipy>=1.10",
            "nbclient>=0.10",
            "ipykernel>=6.29",
            *EXTRAS["timm"],
            *EXTRAS["export"],
            *EXTRAS["wandb"],
        ],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings-python>=1.19", "markdown>=3.6"],
        "dev": [
            "ruff>=0.6",
            "mypy>=1.10",
            "pre-commit>=3.5",
            "types-PyYAML>=6.0",
            "types-tqdm>=4.65",
            "pip-audit>=2.7",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
