"""A GPU that exists in software, for tests: memory.py and streams.py are the device, cudart.py and
tensorrt.py stand in for cuda.bindings.runtime and for tensorrt.

What it holds the shipping code to: memory of the device is apart from the host's and poisoned when
it is allocated and when it is freed; an address that is freed, off by one or too short is an error;
nothing runs before a synchronisation, then in the order of each stream and, between streams, in an
order drawn from a seed; a captured graph repeats exactly the recorded calls with their addresses;
two runs in one arena at once are an error; each thread has its current GPU; a context is captured
only after a run with its shapes; what may wait for the GPU breaks a capture of its thread, and
another library's capture in global mode in every thread whose mode does not allow it.
"""
