"""llama.cpp, as far as olpack uses it: its converter's source, its shared libraries, and whether they run on this machine."""
