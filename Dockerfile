# rcod-serve on NVIDIA GPUs. Unverified: it was linted, not built, because no GPU was at hand.
#
#   docker build -t rcod .
#   docker run --gpus all -p 8000:8000 -v "$PWD/my_bundle:/bundle:ro" rcod
#
# Engines in the bundle must be for this GPU: rcod-export engines my_bundle (--sm for RTX engines). Other
# options of rcod-serve go behind the image's name: rcod --queue 32.
# The CUDA libraries come with the packages; the driver comes from the host.
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY rcod_runtime rcod_runtime
COPY rcod_train rcod_train
COPY rcod_export rcod_export
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
COPY --from=build /wheels /wheels
# The ranges of all dependencies are in pyproject.toml.
# hadolint ignore=DL3013
RUN wheel=$(ls /wheels/rcod-*.whl) \
    && pip install --no-cache-dir "${wheel}[tensorrt-rtx,serve]" \
    && useradd --system --create-home --uid 10001 rcod
USER 10001
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz')"]
# cuda:0 is never replaced by the CPU: a bundle without engines that fit is an error, not a slow server.
ENTRYPOINT ["rcod-serve", "--host", "0.0.0.0", "--port", "8000", "--bundle", "/bundle", "--device", "cuda:0"]
