// What the stand-in for the CUDA runtime calls back.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

// `fat_binary` holds the PTX of `kernel`; returns 0, or anything else where the launch failed.
using LaunchCallback = int (*)(const void* fat_binary, const char* kernel, const unsigned* grid, const unsigned* block,
                               size_t dynamic_shared, void** arguments);

// Torch's current stream; not the default stream, which a launcher must not fall back to.
inline const cudaStream_t kTorchStream = reinterpret_cast<cudaStream_t>(2);

// How many pieces of work were put on streams, and how many of them the host has waited for.
int64_t& work_launched();
int64_t& work_finished();

// False for addresses that the device's memory is reserved at, and not mapped.
bool has_memory(const void* address);
