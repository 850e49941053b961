"""Packaging of ernie5; `kernels/` installs as `ernie5_kernels` (DESIGN section 2 says why)."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
KERNEL_PACKAGES = ["ernie5_kernels"] + [
    f"ernie5_kernels.{path.parent.name}" for path in sorted(ROOT.glob("kernels/*/__init__.py"))
]

setup(
    name="ernie5",
    version="0.1.0",
    description="Pretraining of natively unified, ultra-sparse mixture-of-experts models over text, image, video, audio",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ernie5", "ernie5.*"]) + KERNEL_PACKAGES,
    package_dir={"ernie5_kernels": "kernels"},
    package_data={
        "ernie5.data": ["sample/*"],
        "ernie5_kernels.native": ["*.cpp", "*.h"],
        "ernie5.tokenizers": ["embedded/*", "embedded/*/*"],
    },
    install_requires=[
        "torch>=2.10",
        "deepspeed==0.19.8",
        "numpy",
        "pyyaml",
        "webdataset==1.0.2",
        "safetensors>=0.5",
        "tokenizers>=0.21",
        "av>=15",
        "pillow>=11",
        "soundfile>=0.12",
        "tensorboard>=2.19",
        "tqdm",
        "matplotlib",
        "ninja",
        "setuptools",
    ],
    extras_require={"test": ["pytest>=8", "pytest-timeout", "scipy", "tiktoken", "transformers>=5.10", "peft", "triton>=3.6"]},
    entry_points={"console_scripts": ["ernie5=ernie5.__main__:main"]},
)
