# An image for training on NVIDIA GPUs; docs/serving.md says how to run it.
#
#   docker build -t qwen2-vl-finetune .
#   docker build -t qwen2-vl-finetune --build-arg REQUIREMENTS=requirements-dev.txt .     with what ./run_tests.sh needs
#
# torch brings CUDA's libraries with it. The base is there for what lets a container see the GPU, and of the same major
# version, so that one driver serves both.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# gcc and Python's headers: Triton compiles what starts its kernels (--compile). git: a run notes its commit.
# Versions are not pinned: Ubuntu keeps only the newest of each, and an image that cannot be built helps nobody.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc git libc6-dev python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# An active environment is used as it is by every script (util/setup.sh), and `python` is its Python
ENV VIRTUAL_ENV=/opt/venv
ENV PATH=/opt/venv/bin:$PATH

# The packages come before the sources, so that a change of the sources installs nothing again
WORKDIR /app
ARG REQUIREMENTS=requirements-chartqa.txt
COPY requirements*.txt ./
RUN python3 -m venv "$VIRTUAL_ENV" \
    && pip install --no-cache-dir --requirement "$REQUIREMENTS"

COPY . .

# Without a command: 2B on train_data/, or the demonstration where there is no GPU
CMD ["./finetune.sh"]
