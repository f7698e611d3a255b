"""What is known before training: the size of every sample, the steps' memory, work and room on the disk.

Enters: samples, read from file headers alone, and the model's config. Leaves: `Sizes`, FLOPs, a forecast in bytes, and
UserError where it cannot fit.

May import: the ground floor, the walk, the loop's model, steps and tensors, data, adapters, parallel.
"""
