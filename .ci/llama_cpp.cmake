# Read by llama.cpp's own project() (CMAKE_PROJECT_llama.cpp_INCLUDE): what llama-cpp-python turns on by force, and olpack loads no part of.
set(LLAMA_BUILD_COMMON OFF)    # chat parsers, HTTP, command lines
set(LLAMA_ALL_WARNINGS OFF)
