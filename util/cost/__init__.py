"""What is known before training: the size of every sample, memory, work, and room on the disk.

Enters: samples, read from file headers alone, and the model's config. Leaves: `Sizes`, FLOPs, a forecast in bytes, and
UserError where it cannot fit.

May import: ground, walk, loop, data, adapters.
"""
