"""What is known before training: the size of every sample, memory, work, room on the disk, the fastest
attention kernel, and the fastest layout of many GPUs.

Enters: samples, read from file headers alone, and the model's config. Leaves: `Sizes`, FLOPs, a forecast in bytes, and
UserError where it cannot fit.

May import: ground, walk, loop, data, adapters, kernels.
"""
