"""The training of the Qwen-VL line: three groups of files and nine rooms. No import is circular, lazy ones included.

ground: command_line, config, run_folder, signals, ranks, family: what everyone asks.
walk: dataset, conversation, vision, collator, loss: one sample, from a data file to its loss.
loop: model, attention, packed_layers, compilation, recompute, head: the model, and how its layers run.
loop: tensors, frozen, mixed_adamw, small_adamw, optimizer: what is trained, and how.
loop: passes, steps, checkpoint, guard, log, plan, tiny_model: what else the scripts call.
rooms: data (where bytes come from), formats (other people's data), adapters (LoRA and its kin), cost (what is known
before training), publish (what leaves), results (answers and scores), agent (a model that acts), parallel (several
ranks), kernels (what attention runs on). Each says in its docstring what enters, what leaves, and what it may import.
"""
