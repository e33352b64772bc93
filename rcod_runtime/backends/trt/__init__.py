"""TensorRT 10, TensorRT 11 and TensorRT-RTX through one adapter.

No engine has been executed on a GPU yet: none was at hand. The code is proven on a simulated device
(tests/runtime/simulated) that keeps device memory apart and works only at synchronisation.
"""
