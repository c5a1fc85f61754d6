// Products in bf16 on a CPU with AVX-512's instruction for them: a tile of sums, and how its factors are laid out.
//
// A factor has its numbers in pairs, since the instruction adds the products of two. PRODUCTS says whether it is there;
// with AMX torch's products are several times as fast, and nothing here is asked for.

#pragma once

#include <cstdint>

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
#define PRODUCTS

#include <immintrin.h>
#include <algorithm>
#include <cstring>
#include <memory>

namespace {

typedef uint16_t Bfloat16;
typedef int64_t Index;

constexpr Index ROWS = 8, COLUMNS = 32;  // of a tile: sixteen vectors of sums, enough to hide what a product takes

Index up(Index x, Index multiple) { return (x + multiple - 1) / multiple * multiple; }

template <class T>
class Array {  // aligned for vectors, and not set to 0, which would be a pass of its own
    std::unique_ptr<char[]> memory;

  public:
    T* begin;
    explicit Array(Index size) : memory(new char[size * sizeof(T) + 64]) {
        begin = reinterpret_cast<T*>(up(reinterpret_cast<uintptr_t>(memory.get()), 64));
    }
    operator T*() const { return begin; }
};

inline __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m256i narrowed(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline __m512i pairs_of(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}
inline __m256i load(const Bfloat16* x) { return _mm256_loadu_si256((const __m256i*)x); }

// Adds the product of ROWS `rows`, whose pairs are `step` numbers apart, and a panel [pairs, COLUMNS, 2] to sums, whose
// rows are `stride` apart; sets them if they are fresh.
__attribute__((noinline))  // where it is inlined, GCC runs out of registers
void multiply(
    const Bfloat16* const* rows, Index step, const Bfloat16* panel, Index pairs, float* sums, Index stride,
    bool fresh) {
    __m512 total[ROWS][2];
#pragma GCC unroll 8
    for (Index i = 0; i < ROWS; i++) {
        total[i][0] = fresh ? _mm512_setzero_ps() : _mm512_load_ps(sums + i * stride);
        total[i][1] = fresh ? _mm512_setzero_ps() : _mm512_load_ps(sums + i * stride + 16);
    }
    const Bfloat16* a[ROWS];
    std::copy(rows, rows + ROWS, a);
    for (Index p = 0; p < pairs; p++, panel += 2 * COLUMNS) {
        const __m512bh left = (__m512bh)_mm512_load_si512(panel), right = (__m512bh)_mm512_load_si512(panel + COLUMNS);
#pragma GCC unroll 8
        for (Index i = 0; i < ROWS; i++) {
            int32_t pair;
            std::memcpy(&pair, a[i] + p * step, sizeof pair);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            total[i][0] = _mm512_dpbf16_ps(total[i][0], both, left);
            total[i][1] = _mm512_dpbf16_ps(total[i][1], both, right);
        }
    }
#pragma GCC unroll 8
    for (Index i = 0; i < ROWS; i++) {
        _mm512_store_ps(sums + i * stride, total[i][0]);
        _mm512_store_ps(sums + i * stride + 16, total[i][1]);
    }
}

// Rows as the columns of a panel: [width / 2, COLUMNS, 2]; those from `count` on are 0.
void pack_as_columns(const Bfloat16* rows, Index stride, Index count, Index width, Bfloat16* panel) {
    if (count < COLUMNS) std::memset(panel, 0, width * COLUMNS * sizeof *panel);
    for (Index first = 0; first < width; first += 32)  // a line of the cache at a time
        for (Index j = 0; j < std::min(count, COLUMNS); j++)
            for (Index w = first; w < first + 32; w += 2)
                std::memcpy(panel + w * COLUMNS + 2 * j, rows + j * stride + w, 2 * sizeof *panel);
}

// Two rows as one pair of the panels that `width` is cut into, which are `size` numbers apart.
void pack_as_pair(const Bfloat16* even, const Bfloat16* odd, Index width, Bfloat16* panels, Index size) {
    for (Index w = 0; w < width; w += COLUMNS, panels += size)
        for (Index j = 0; j < COLUMNS; j += 16)
            _mm512_store_si512(panels + 2 * j, pairs_of(load(even + w + j), load(odd + w + j)));
}

// ---- e^x, or rather 2^y

constexpr float LOG2_E = 1.44269504f;

// To 3e-6; 0 below -96, so that nothing is so small that it is slow; a NaN remains one.
inline __m512 power_of_2(__m512 y) {
    const __m512 n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(y, n);
    __m512 p = _mm512_set1_ps(1.33335581e-3f);  // the Taylor series of 2^r
    for (float c : {9.61812911e-3f, 5.55041087e-2f, 0.240226507f, 0.693147181f, 1.0f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(y, _mm512_set1_ps(-96), _CMP_NLT_UQ), p, n);
}

}  // namespace

#endif
