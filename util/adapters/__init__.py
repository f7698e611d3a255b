"""LoRA and its kin, through peft, over weights of 4 bits if asked.

Enters: a model of transformers, and a Config. Leaves: the same model with adapters that alone are trained, and these in
peft's format.

May import: ground.
"""
