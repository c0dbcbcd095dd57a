# Two images from one file: `--target router` holds neither torch nor Ray, `--target worker` is a Ray node that runs prefill or
# decode workers, and the cluster's head. docs/kubernetes.md tells how they are built.
#
#   PYTHON_IMAGE   Debian with Python 3.11, venv and bash; for CUDA a base of the same with the driver's libraries
#   TORCH_INDEX    where torch comes from, e.g. the CPU-only wheels; empty: the default index
#
# Everything else is in the versions of constraints.txt, with which the tests ran.
#
# A pip.conf for a private index is passed as the build secret `pip`, and stays in no layer.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:65a93d69fa75478d554f4ad27c85c1e69fa184956261b4301ebaf6dbb0a3543d

FROM ${PYTHON_IMAGE} AS dependencies
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN ["python3.11", "-c", "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; extra = p['optional-dependencies']; \
write = lambda name, lines: open(name, 'w').write('\\n'.join(lines) + '\\n'); \
write('router.txt', p['dependencies'] + extra['otel']); \
write('worker.txt', [line for line in extra['worker'] if not line.startswith('torch==')]); \
write('torch.txt', [line for line in extra['worker'] if line.startswith('torch==')])"]
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3.11 -m venv /opt/baton && /opt/baton/bin/pip install -c constraints.txt -r router.txt

FROM dependencies AS worker-dependencies
ARG TORCH_INDEX=
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    if [ -n "${TORCH_INDEX}" ]; then /opt/baton/bin/pip install --no-deps --index-url "${TORCH_INDEX}" -r torch.txt; fi \
    && /opt/baton/bin/pip install -c constraints.txt -r torch.txt -r worker.txt

FROM dependencies AS wheel
# Compiles the native kernels; stays in no image. Any version does.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY LICENSE README.md ./
COPY baton baton
COPY router router
COPY prefill_worker prefill_worker
COPY decode_worker decode_worker
COPY flex_worker flex_worker
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/baton/bin/pip wheel --no-deps --wheel-dir /wheels .

FROM dependencies AS router-environment
COPY --from=wheel /wheels /wheels
RUN /opt/baton/bin/pip install --no-deps --no-index /wheels/*.whl

FROM worker-dependencies AS worker-environment
COPY --from=wheel /wheels /wheels
RUN /opt/baton/bin/pip install --no-deps --no-index /wheels/*.whl

FROM ${PYTHON_IMAGE} AS runtime
LABEL org.opencontainers.image.title="Baton" \
      org.opencontainers.image.description="Serves language models over gRPC with prefill and decode on different workers" \
      org.opencontainers.image.licenses="Apache-2.0"
# KubeRay starts Ray from a login shell, which forgets the image's PATH.
RUN useradd --uid 10001 --user-group --create-home --shell /usr/sbin/nologin baton \
    && echo "PATH=/opt/baton/bin:\$PATH" > /etc/profile.d/baton.sh \
    && ln -s /opt/baton/lib/python3.11/site-packages/baton/models/tales /opt/tales
ENV PATH=/opt/baton/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /home/baton
STOPSIGNAL SIGTERM
USER 10001:10001

FROM runtime AS router
COPY --from=router-environment /opt/baton /opt/baton
EXPOSE 8000 50051 50052 50053 9090
ENTRYPOINT ["python", "-m", "router"]

FROM runtime AS worker
COPY --from=worker-environment /opt/baton /opt/baton
EXPOSE 50061 50063 9090
ENTRYPOINT ["python", "-m"]
CMD ["decode_worker", "--help"]
