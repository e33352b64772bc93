"""PSNR, SSIM and NIQE in numpy and scipy, for the validation and for the benchmarks.

Nothing here imports torch: the benchmarks judge finished images where it is not installed.
"""
