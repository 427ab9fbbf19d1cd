FROM docker.io/library/python:3.11-slim-bookworm
RUN apt-get -qq update && apt-get -qq install --yes --no-install-recommends redis-server && rm -rf /var/lib/apt/lists/*
USER 999:999
CMD ["redis-server"]
