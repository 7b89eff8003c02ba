"""Package metadata; tool settings live in pyproject.toml. Lower bounds are versions that were tested."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="pareto-merging",
    version="0.1.0",
    description="Merge K fine-tuned models into one Pareto set: the best merged model for any preference, at once",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["pmkernels*", "pareto_merging*"]),
    package_data={
        "pmkernels": ["py.typed"],
        "pareto_merging": ["py.typed", "data/digits_suite/*"],
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "open_clip_torch>=3.3",
        "numpy>=2.0",
        "safetensors>=0.5",
        "pydantic>=2.10",
        "PyYAML>=6.0",
        "typer>=0.15",
        "rich>=13.9",
        "matplotlib>=3.9",
        "pymoo>=0.6.1",
        "moocore>=0.1.7",
        "scikit-learn>=1.5",
        "scipy>=1.13",
    ],
    extras_require={
        "hf": ["transformers>=5.0"],
        "test": ["pytest>=8.3", "pytest-benchmark>=5.1", "transformers>=5.0"],
        "dev": ["ruff>=0.14", "mypy>=1.18", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["pareto-merging=pareto_merging.cli:main"]},
)
