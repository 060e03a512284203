"""The engine of a worker group: continuous batching over a paged KV-cache.

One step goes one way: the iteration scheduler decides, the step builder lays it out as tensors, a
runner executes it, the sampler draws, and the engine applies what came out.
"""
