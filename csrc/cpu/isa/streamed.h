// Stores that go past the caches.
#pragma once

#include "../vec.h"

namespace paged::PAGED_ISA {
namespace {

PAGED_INLINE void store_streamed(float* to, Vec v) {
#if defined(__clang__)
  __builtin_nontemporal_store(v, reinterpret_cast<Vec*>(to));
#elif defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)v);
#elif defined(__AVX2__)
  __builtin_ia32_movntps256(to, v);
#elif defined(__x86_64__)
  __builtin_ia32_movntps(to, v);
#else
  store_as(to, v);
#endif
}

// memcpy for data that nobody reads before it would have left the caches: where it fills whole lines of them, these are
// not read before they are written. Other threads see it after `end_streamed`.
PAGED_INLINE void copy_streamed(void* to, const void* from, int64_t size) {
  constexpr int64_t kLine = 64;
  if ((reinterpret_cast<uintptr_t>(to) | uintptr_t(size)) % kLine) {
    std::memcpy(to, from, size);
    return;
  }
  float* const out = static_cast<float*>(to);
  const char* const in = static_cast<const char*>(from);
  for (int64_t i = 0; i < size; i += sizeof(Vec)) store_streamed(out + i / sizeof(float), load_as<Vec>(in + i));
}

PAGED_INLINE void end_streamed() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();
#endif
}

}  // namespace
}  // namespace paged::PAGED_ISA
