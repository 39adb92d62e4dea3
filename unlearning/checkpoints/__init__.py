"""Checkpoints: find them by name, check their files, load, hash and adapt them.

    locate              a name -> a directory with whole files
    hashing             content hash of weights
    keys                names of tensors on disk and in the model
    quantized           dequantize weights, or refuse them by name
    safetensors_files   single tensors, read from disk one by one
    lora                add, save, restore and merge LoRA adapters
    load                a directory -> a model and its tokenizer

Each module imports only from modules above it.
"""
