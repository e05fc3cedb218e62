# slime with SGLang on GPUs: a public CUDA base and packages from the package index, nothing patched.
#
#   docker build --tag slime .
#   docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 \
#     --mount type=bind,src="$PWD/models",dst=/slime/models --mount type=bind,src="$PWD/data",dst=/slime/data \
#     --mount type=bind,src="$PWD/outputs",dst=/slime/outputs slime bash scripts/run-qwen3-0.6B-1gpu.sh
#
# docs/placement.md says more. The devel image has nvcc, with which SGLang compiles kernels at its first start.
ARG BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04
FROM ${BASE}

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ git libnuma1 ninja-build procps python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --shell /bin/bash slime \
    && mkdir /slime /opt/venv \
    && chown slime:slime /slime /opt/venv

USER slime
WORKDIR /slime
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
RUN python3 -m venv /opt/venv

# What the packages depend on comes first, so that a change of slime itself installs nothing again.
COPY --chown=slime:slime LICENSE README.md pyproject.toml ./
COPY --chown=slime:slime slime/__init__.py slime/
# The version that ran on an H200, with the torch that it pins. `.[gpu]` alone takes the newest that fits.
ARG SGLANG=0.5.16
RUN pip install --no-cache-dir --editable '.[gpu]' "sglang==${SGLANG}"

COPY --chown=slime:slime . .
RUN mkdir -p models data outputs

CMD ["bash"]
