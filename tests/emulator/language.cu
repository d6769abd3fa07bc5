// What CUDA C++ compiles to beside arithmetic: calls, local and shared arrays, generic pointers, several chunks of
// blocks.
#include <cstdint>

struct Pair {
  float value;
  int64_t number;
};

__device__ __noinline__ Pair twice(float value, int64_t number) {
  if (number == 3) return {0.0f, -1};
  return {2 * value, number / 7};
}

extern "C" __global__ void calls(const float* in, float* out, int64_t* numbers) {
  const int i = threadIdx.x;
  const Pair first = twice(in[i], i * 1000000007LL), second = twice(first.value, i);
  out[i] = second.value;
  numbers[i] = first.number * 1000 + second.number;
}

extern "C" __global__ void local_array(const int* in, int* out) {
  int values[8];
  for (int k = 0; k < 8; ++k) values[k] = in[(threadIdx.x + k) % 32] * k;
  int* const chosen = values + in[threadIdx.x] % 8;
  *chosen += 100;
  int sum = 0;
  for (int k = 0; k < 8; ++k) sum += values[(k + in[threadIdx.x]) % 8] << k;
  out[threadIdx.x] = sum;
}

extern "C" __global__ void generic_pointers(const int* in, int* out) {
  __shared__ int mine[32];
  extern __shared__ int dynamic[];
  mine[threadIdx.x] = in[threadIdx.x] + 1;
  dynamic[threadIdx.x] = in[threadIdx.x] + 2;
  __syncwarp();
  const int other = threadIdx.x ^ 1;
  const int* const from = threadIdx.x % 3 == 0 ? &mine[other] : threadIdx.x % 3 == 1 ? &dynamic[other] : &in[other];
  out[threadIdx.x] = *from;
}

extern "C" __global__ void switches(const int* in, int* out) {
  switch (in[threadIdx.x]) {
    case 0: out[threadIdx.x] = 5; break;
    case 1: out[threadIdx.x] = in[31] * 3; break;
    case 2: __trap();
    case 3: out[threadIdx.x] = __clz(in[30]); break;
    case 4: out[threadIdx.x] = __popc(in[29]) + 7; break;
    case 5: out[threadIdx.x] = in[28] % 5; break;
    default: out[threadIdx.x] = -1;
  }
}

__device__ __forceinline__ uint64_t rotated(uint64_t value, int by) { return value << by | value >> (64 - by); }

extern "C" __global__ void rotations(const uint64_t* in, const int* cases, uint64_t* out) {
  const uint64_t value = in[threadIdx.x];
  uint64_t nested = value;
  switch (value % 3) {
    case 0: nested = rotated(value, 3); break;
    case 1: nested = rotated(rotated(value, 5), 11); break;
  }
  switch (cases[threadIdx.x]) {
    case 0: out[threadIdx.x] = rotated(value, 7); return;
    case 1: out[threadIdx.x] = rotated(value, 13) ^ rotated(value, 32); break;
    case 3: nested += rotated(value, 1);
    case 2: out[threadIdx.x] = nested; break;
    case 4: break;
    default: out[threadIdx.x] = value;
  }
}

extern "C" __global__ void counts_blocks(int* count, int* out) {
  if (threadIdx.x == 0) atomicAdd(count, 1);
  out[blockIdx.x * blockDim.x + threadIdx.x] = blockIdx.x;
}

extern "C" __global__ void last_block_races(int* out) {
  if (threadIdx.x == 0 && (blockIdx.x == 0 || blockIdx.x == gridDim.x - 1)) out[0] = blockIdx.x;
}
