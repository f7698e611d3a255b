"""The training of Qwen2-VL, read from the ground up.

Ground floor: command_line config run_folder signals. Only the standard library, and asked by everyone.
The walk of a sample: dataset conversation vision collator loss.
The loop: model attention tensors optimizer steps checkpoint guard log plan tiny_model.
Rooms: data (where bytes come from), cost (what is known before training), formats (other people's data), parallel
(several ranks), adapters (LoRA), results (answers and scores), publish (what leaves). Each says in its docstring what
enters, what leaves, and what it may import. No import is circular, lazy ones included.
"""
