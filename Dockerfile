# kpsvd-tune in a container, for a CPU or for NVIDIA GPUs. It is linted by a test; whoever builds it
# needs a registry, which the tests do not have.
#
#   docker build --target cpu -t kpsvd-tune:cpu .
#   docker build --target cuda -t kpsvd-tune:cuda .
#   docker run --rm -v "$PWD":/work kpsvd-tune:cpu plan my.yaml
#   docker run --rm --gpus all -v "$PWD":/work kpsvd-tune:cuda train my.yaml
#
# Runs are written to /work, which is your folder; models and spectra are kept in /cache.

FROM python:3.12-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache
# bubblewrap is the sandbox of `eval --task mbpp`; it needs `docker run --privileged` or user
# namespaces. The pinned release of Debian decides its version.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 tuner \
    && mkdir -p /cache /work \
    && chown tuner /cache /work
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY kpsvd_tune kpsvd_tune
COPY recipes recipes

# torch without CUDA: 200 MB in place of some gigabytes.
FROM base AS cpu
RUN pip install torch -c constraints.txt --index-url https://download.pytorch.org/whl/cpu \
    && pip install ".[gguf,json,math,report,tensorboard,text]" -c constraints.txt
USER 1000
WORKDIR /work
ENTRYPOINT ["kpsvd-tune"]
CMD ["--help"]

# torch from PyPI brings the libraries of CUDA with it; the host gives the driver.
FROM base AS cuda
RUN pip install torch -c constraints.txt \
    && pip install ".[gguf,json,math,report,tensorboard,text]" nvidia-ml-py -c constraints.txt
USER 1000
WORKDIR /work
ENTRYPOINT ["kpsvd-tune"]
CMD ["--help"]
