"""What a model needs of a machine's memory, before anything is downloaded, trained or loaded.

Nothing here repeats llama.cpp's rules. A model without a file becomes a GGUF with a real header and a hole in place of the weights;
llama.cpp chooses the types of its tensors, loads it without allocating, lays out the KV cache, reserves the compute graph, and reports the
bytes of each.
"""
