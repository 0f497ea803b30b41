# The environment, and in it the quick start: sample text, two models trained on it, a report.
#
#   docker build --tag ebwm_scale --build-arg COMMIT="$(git describe --always --dirty)" .
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD/out:/workspace" ebwm_scale
#
# The report is then in out/runs/quickstart; make the folder out first, or Docker makes it for root.
# For GPUs, and a training of one's own on data in the current folder:
#
#   docker build --tag ebwm_scale --build-arg BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04 .
#   docker run --rm --gpus all --shm-size 8g --volume "$PWD:/workspace" ebwm_scale \
#       ebwm train --config nlp/anchored.yaml --set data.manifest=data/mine/manifest.json
#
# podman and buildah do the same.
# BASE: an image with apt, and a Python of 3.11 or later in it or in its distribution. GPU images
# need the CUDA toolkit (-devel): DeepSpeed and Triton compile. TORCH_INDEX: a page of PyTorch
# builds, if not the one that pip takes by itself.
ARG BASE=python:3.11-slim-bookworm
FROM ${BASE}

ARG TORCH_INDEX=
ARG DEBIAN_FRONTEND=noninteractive
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 PATH=/opt/venv/bin:$PATH

# A Python image brings its own Python, with all it takes to make an environment and to compile
# against; other images get the distribution's. g++ and make are what DeepSpeed and Triton build
# with, git says which commit a mounted checkout is.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential ca-certificates git \
    && if ! python3 -c 'import ensurepip, sysconfig; open(sysconfig.get_path("include") + "/Python.h")' 2> /dev/null; then \
         apt-get install --yes --no-install-recommends python3 python3-dev python3-venv; \
       fi \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv

WORKDIR /opt/ebwm_scale
# What is installed first changes least: a change of the code does not install PyTorch again.
COPY constraints.txt ./
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -c constraints.txt torch \
    && pip install -c constraints.txt setuptools wheel numpy ninja deepspeed
COPY setup.py pyproject.toml LICENSE ./
COPY ebwm_scale ebwm_scale
COPY kernels kernels
COPY configs configs
COPY tools tools
COPY slurm slurm
RUN pip install -c constraints.txt --editable ".[video,cluster]"
# The repository's history is not in the image: runs and results name what the builder says.
# HOME: any user of the host may run the image, and libraries keep small files at home.
ARG COMMIT=
ENV EBWM_COMMIT=${COMMIT} HOME=/tmp
RUN ebwm version

WORKDIR /workspace
CMD ["python", "/opt/ebwm_scale/tools/quickstart.py", "text", \
     "--runs", "/workspace/runs", "--data", "/workspace/data"]
