"""Package metadata; tool settings live in pyproject.toml.

Lower bounds are the versions tested; ruff and mypy are bounded above too, because a new release may find new faults.
"""

import runpy
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
# the web server of `pareto-merging serve`, and the engine that makes batches of its requests
SERVE = [
    "fastapi>=0.165",
    "uvicorn>=0.54",
    "prometheus-client>=0.26",
    "python-multipart>=0.0.34",
    "batched>=0.1.5",
    "pillow>=13.0",
]

setup(
    name="pareto-merging",
    version=runpy.run_path(str(HERE / "pareto_merging" / "version.py"))["VERSION"],
    description="Merge K fine-tuned models into one Pareto set: the best merged model for any preference, at once",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["pmkernels*", "pareto_merging*"]),
    package_data={
        "pmkernels": ["py.typed", "configs/*.json"],
        "pareto_merging": ["py.typed", "data/digits_suite/*"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "open_clip_torch>=3.3",
        "numpy>=2.4",
        "safetensors>=0.8",
        # open_clip has it too: checkpoints by hub id
        "huggingface_hub>=2.4",
        "pydantic>=2.14",
        "PyYAML>=6.0",
        "typer>=0.29",
        "rich>=15.0",
        "matplotlib>=3.11",
        "pymoo>=0.6.2",
        "moocore>=0.3",
        "scikit-learn>=1.9",
        "scipy>=1.17",
    ],
    extras_require={
        "hf": ["transformers>=5.23"],
        "serve": SERVE,
        # a method that the serving benchmark compares with
        "bench": ["peft>=0.21"],
        "test": [
            *SERVE,
            "httpx>=0.28",
            "pytest>=9.2",
            "pytest-benchmark>=5.3",
            # a limit for each GPU test: a kernel that hangs would hold the machine
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",
            "transformers>=5.23",
        ],
        "dev": ["ruff>=0.17,<0.18", "mypy>=2.4,<2.5", "types-PyYAML>=6.0", "import-linter>=2.17,<3"],
    },
    entry_points={"console_scripts": ["pareto-merging=pareto_merging.cli:main"]},
)
