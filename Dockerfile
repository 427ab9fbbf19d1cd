# Four images from one file: `--build-arg EXTRA=operator | registry | trainer | inference`; docs/images.md tells more.
# Keep to what buildah 1.28 knows: no heredocs, no COPY --link, no digests in FROM.
#
# PYTHON must name a digest (python:3.11-slim-bookworm@sha256:...), or UNPINNED be "yes": a tag may mean another image tomorrow.
# There is no default digest: it would age, and the machine on which this was written reaches no registry to look one up.
#
# What changes seldom comes first. torch is one layer, the same in trainer and inference, that changes only with torch's
# own pins; then come the other packages; then our code.
ARG PYTHON=python:3.11-slim-bookworm
ARG EXTRA=operator

# A virtual environment without pip: the base's pip installs into it from outside. The official image has no bytecode of
# the standard library and a read-only root could keep none, so that is made here; pip makes that of what it installs.
FROM ${PYTHON} AS base
RUN groupadd --gid 65532 updraft \
    && useradd --uid 65532 --gid 65532 --home-dir /tmp --no-create-home --no-log-init --shell /usr/sbin/nologin updraft \
    && python -m compileall -q -j 0 -x '/(test|tests|idlelib|lib2to3)/' \
        "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
    && python -m venv --without-pip /opt/venv
# USER and LOGNAME are for libraries that ask who they are: OpenShift runs images as a user without a name, of group 0.
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp USER=updraft LOGNAME=updraft PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

# Our wheel. g++ compiles the C++ kernels in this stage only; the images have no compiler. Here is no npm, so the wheel has none
# of the libraries that update the pages of `updraft ui`: these are complete, but static. No image serves them.
FROM ${PYTHON} AS wheels
RUN apt-get -qq update && apt-get -qq install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY requirements/build.lock requirements/
ARG PYTHON
ARG UNPINNED=no
RUN case "$PYTHON" in \
      *@sha256:*) ;; \
      *) if [ "$UNPINNED" != yes ]; then \
           echo "the base image $PYTHON has no digest, so this build could not be repeated. Look it up with" \
             "skopeo inspect --format '{{.Name}}@{{.Digest}}' docker://$PYTHON and build with --build-arg PYTHON=IMAGE@DIGEST," \
             "or take whatever the tag means today with --build-arg UNPINNED=yes" >&2; \
           exit 1; \
         fi ;; \
    esac
RUN python -m venv /build && /build/bin/pip install --quiet --no-deps --require-hashes --requirement requirements/build.lock
COPY pyproject.toml README.md LICENSE hatch_build.py ./
COPY proto proto
COPY libs libs
COPY services services
COPY operator operator
COPY cli cli
RUN /build/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheels .

FROM base AS code
COPY --from=wheels /wheels /wheels
RUN pip --python /opt/venv/bin/python install --quiet --no-cache-dir --no-deps /wheels/*.whl

# What torch.lock names, with its hashes. A build of torch from TORCH_INDEX, such as one for CPUs, is another file, so nothing
# here knows its hash: it is installed first, and satisfies the lock.
FROM base AS torch
ARG TORCH=torch
ARG TORCH_INDEX=
COPY requirements/torch.lock /opt/venv/requirements/
RUN install="pip --python /opt/venv/bin/python install --quiet --no-cache-dir --no-deps --only-binary :all:" \
    && if [ -n "$TORCH_INDEX" ]; then $install --index-url "$TORCH_INDEX" "$TORCH"; fi \
    && $install --require-hashes --requirement /opt/venv/requirements/torch.lock

FROM torch AS inference
ENTRYPOINT ["updraft-inference"]

FROM torch AS trainer
ENTRYPOINT ["updraft-trainer"]

FROM base AS registry
ENTRYPOINT ["updraft-registry"]

# It also downloads models and imports drafts, as `updraft`.
FROM base AS operator
ENV HF_HUB_DISABLE_TELEMETRY=1
ENTRYPOINT ["updraft-operator"]

FROM ${EXTRA} AS image
ARG EXTRA
COPY requirements/${EXTRA}.lock /opt/venv/requirements/
RUN pip --python /opt/venv/bin/python install --quiet --no-cache-dir --no-deps --only-binary :all: --require-hashes \
        --requirement "/opt/venv/requirements/$EXTRA.lock"
COPY --from=code /opt/venv /opt/venv
USER 65532:65532
ARG VERSION=unreleased
ARG REVISION=unknown
LABEL org.opencontainers.image.title="updraft-${EXTRA}" \
      org.opencontainers.image.description="The ${EXTRA} of Updraft: a draft model that learns from the traffic it serves" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
