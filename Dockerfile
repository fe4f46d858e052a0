# docker build -t megarlhf .        (docs/install.md; not built by this project yet)
# torch, Transformer Engine and flash-attn are the image's; all else goes into an environment that sees them.
ARG BASE=nvcr.io/nvidia/nemo:26.02
FROM ${BASE}

# The image's may put its own Megatron-Core in front of the environment's.
ENV PYTHONPATH=
RUN python -m venv --system-site-packages /opt/megarlhf
ENV PATH=/opt/megarlhf/bin:${PATH}

WORKDIR /opt/source
COPY setup.py pyproject.toml README.md LICENSE constraints.txt ./
COPY megarlhf megarlhf
COPY kernels kernels
COPY examples examples
RUN pip install --no-cache-dir '.[maths,wandb]'

WORKDIR /workspace
CMD ["megarlhf", "doctor"]
