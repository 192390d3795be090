"""The raw ``@triton.jit`` kernels. Importing them needs triton."""
