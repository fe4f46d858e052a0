"""Package metadata: the bounds the code needs. The exact versions it is tested with are in constraints.txt."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent

# Megatron-Core declares neither einops nor psutil, and fails late and obscurely without them (a checkpoint save hangs
# without psutil), so both are named here.
REQUIRES = [
    "torch>=2.10.0a0",  # the first with torchrun's --signals_to_handle; a0: images of NVIDIA carry pre-releases
    # Tested with the oldest and the newest: make test, make test-newest. Of 0.17: megarlhf/parallel/releases.py.
    "megatron-core>=0.16.1,!=0.17.*,<0.20",
    "einops>=0.8",
    "psutil>=6",
    "numpy>=2",
    "packaging>=24.2",
    "transformers>=5",
    "tokenizers>=0.22",
    "safetensors>=0.6",
    "datasets>=4",
    "pydantic>=2.12",
    "PyYAML>=6",
    "rich>=14.1",
    "matplotlib>=3.9",
    "tensorboard>=2.18",
    "scipy>=1.13",
    "regex>=2024.4",  # patterns of judges, stopped where they take too long
    "httpx>=0.28",  # a judge that is a service
    "tenacity>=9",  # asks it again
]

# Transformer Engine's torch part and flash-attn are compiled against the torch and CUDA of the machine, which pip's
# isolated builds cannot see: docs/install.md installs them, constraints.txt has their versions. NVIDIA Apex is used
# when it can be imported and is never listed: the package of that name on PyPI is another project.
EXTRAS = {
    "gpu": ["nvidia-ml-py>=12", "triton>=3.6"],
    "maths": ["math-verify>=0.8"],
    # One version, because its verifiers were read: megarlhf/data/reasoning_gym.py.
    "tasks": ["reasoning-gym==0.1.25"],
    "wandb": ["wandb>=0.19"],
    # What benchmarks compare with; cutedsl is Liger's fastest path on an H100. tests/ops/test_trl_peers.py and
    # tools/step_bench/trl_peer.py call what TRL does not promise to keep: one minor version.
    "bench": [
        "nvidia-ml-py>=12",
        "liger-kernel[cutedsl]>=0.8.5",
        "cut-cross-entropy>=25.1",
        "quack-kernels>=0.6",
        "trl>=1.16,<1.17",
    ],
    "dev": [
        "llama-models>=0.3",  # Llama 3's tokenizer, and Meta's own code for its format: tests/helpers/llama3.py
        "kubeflow-trainer-api>=2.3",  # JobSet's types, which examples/launch/jobset.yaml is read with
        "math-verify>=0.8",
        "peft>=0.17",  # loads the adapters that a run leaves: tests/checkpoint/test_adapters.py
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",  # make test shares the files among processes
        "ruff>=0.12",
        "selenium>=4.40,<4.52",  # looks at pages in Debian's Chromium; 4.52 wants a certifi newer than the pinned one
        "pyright[nodejs]>=1.1.400",
        "import-linter>=2.3",
        "typos>=1.30",
        "uv>=0.9",  # resolves the sets of other Pythons: make resolve
        "triton>=3.6; platform_system == 'Linux'",  # its interpreter runs the kernels' tests without a GPU
    ],
}

setup(
    name="megarlhf",
    version="0.1.0",
    description="RLHF for Llama 3 on Megatron-Core: one code path for a laptop CPU and for GPU clusters",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # `megarlhf examples` copies run files and launch scripts, which lie beside the package.
    packages=[*find_packages(include=["megarlhf", "megarlhf.*"]), "megarlhf.examples", "megarlhf_kernels"],
    package_dir={"megarlhf_kernels": "kernels/megarlhf_kernels", "megarlhf.examples": "examples"},
    package_data={
        "megarlhf": ["py.typed", "observe/page.css", "observe/page.js"],
        "megarlhf.examples": ["*.yaml", "launch/*"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megarlhf = megarlhf.cli:main"]},
)
