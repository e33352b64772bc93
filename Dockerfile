# rcod-serve on NVIDIA GPUs. Unverified: it was linted, not built, because no GPU was at hand.
#
#   docker build -t rcod --build-arg TENSORRT_RTX=1.7.1.116 .
#   docker run --gpus all -p 8000:8000 -v "$PWD/my_bundle:/bundle:ro" -v rcod-cache:/home/rcod/.cache rcod
#
# Engines in the bundle must be for this GPU: rcod-export engines my_bundle (--sm for RTX engines), and of the
# TensorRT-RTX of the image: the build argument is the version that built them. What it compiles for the GPU at the
# first start is in the volume at the next ones. Other options of rcod-serve go behind the image's name: rcod --queue 32.
# The CUDA libraries come with the packages; the driver comes from the host.
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY rcod_runtime rcod_runtime
COPY rcod_train rcod_train
COPY rcod_export rcod_export
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim
ARG TENSORRT_RTX=1.7.1.116
COPY --from=build /wheels /wheels
# The ranges of all dependencies are in pyproject.toml.
# hadolint ignore=DL3013
RUN wheel=$(ls /wheels/rcod-*.whl) \
    && pip install --no-cache-dir "${wheel}[tensorrt-rtx,serve]" "tensorrt-rtx-cu13==${TENSORRT_RTX}" \
    && useradd --system --create-home --uid 10001 rcod \
    && mkdir /home/rcod/.cache && chown 10001 /home/rcod/.cache
USER 10001
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=300s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/healthz')"]
# cuda:0 is never replaced by the CPU: a bundle without engines that fit is an error, not a slow server.
ENTRYPOINT ["rcod-serve", "--host", "0.0.0.0", "--port", "8000", "--bundle", "/bundle", "--device", "cuda:0"]
