"""LoRA, DoRA and QLoRA through peft.

Enters: a model of transformers, and a Config. Leaves: the same model with adapters, of which alone the
parameters are trained; they are saved in peft's format.

May import: ground.
"""
