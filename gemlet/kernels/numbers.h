// Numbers in float32 and bfloat16, in code that any compiler makes vectors of.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

template <class To, class From>
inline To bits(From x) {
    To result;
    std::memcpy(&result, &x, sizeof result);
    return result;
}

typedef uint16_t Bfloat16;

inline float widened(float x) { return x; }
inline float widened(Bfloat16 x) { return bits<float>(uint32_t(x) << 16); }

inline void put(float x, float& into) { into = x; }
inline void put(float x, Bfloat16& into) {  // the nearest, an even one of two
    const uint32_t b = bits<uint32_t>(x);
    into = Bfloat16((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

// ---- sixteen at a time

constexpr int64_t WIDTH = 16;
typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t Words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t Halves __attribute__((vector_size(2 * WIDTH)));

inline Floats load(const float* x) {
    Floats result;
    std::memcpy(&result, x, sizeof result);
    return result;
}
inline Floats load(const Bfloat16* x) {
    Halves halves;
    std::memcpy(&halves, x, sizeof halves);
#ifdef __AVX512BF16__
    const Words words = (Words)_mm512_cvtepu16_epi32((__m256i)halves);
#else
    const Words words = __builtin_convertvector(halves, Words);
#endif
    return (Floats)(words << 16);
}

inline void store(Floats x, float* into) { std::memcpy(into, &x, sizeof x); }
inline void store(Floats x, Bfloat16* into) {
#ifdef __AVX512BF16__
    const Halves halves = (Halves)_mm512_cvtneps_pbh((__m512)x);
#else
    const Words b = (Words)x;
    const Halves halves = __builtin_convertvector((b + 0x7fff + (b >> 16 & 1)) >> 16, Halves);
#endif
    std::memcpy(into, &halves, sizeof halves);
}

inline float sum(Floats x) {
#ifdef __AVX512BF16__
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < WIDTH; i++) total += x[i];
    return total;
#endif
}

}  // namespace
