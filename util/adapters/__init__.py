"""LoRA, DoRA and QLoRA through peft, and new tokens.

Enters: a model of transformers, and a Config. Leaves: the same model with adapters, of which alone the
parameters are trained, and with rows for new tokens; both are saved in peft's format.

May import: ground, walk.
"""
