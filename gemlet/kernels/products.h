// Products in bf16 on a CPU that has instructions for them: AMX, or those of AVX-512. PRODUCTS says whether it does.
//
// Factors are made of squares of 32 x 32 numbers. Those of the left factor have their rows one after the other, those
// of the right one their numbers in pairs of rows, since the instructions add up the products of pairs:
// [SIDE / 2, SIDE, 2]. In units of a pair, a square of either is the transpose of what a square of the other would be
// that holds the transposed numbers.

#pragma once

#include <cstdint>

#ifdef __AVX512BF16__
#define PRODUCTS

#include <immintrin.h>
#include <algorithm>
#include <cstring>
#include <memory>

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

typedef uint16_t Bfloat16;
typedef int64_t Index;

constexpr Index SIDE = 32, SQUARE = SIDE * SIDE;

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

// ---- numbers

inline __m512 widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m256i narrowed(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline __m512i pairs_of(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}
inline __m256i load(const Bfloat16* x) { return _mm256_loadu_si256((const __m256i*)x); }
inline __m256i load(const float* x) { return narrowed(_mm512_loadu_ps(x)); }

// ---- sums of products

inline void nothing() {}

#ifdef __AMX_BF16__

// Linux lets a process use its tiles once it has asked (arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA).
const bool CAN_MULTIPLY = syscall(SYS_arch_prctl, 0x1023, 18) == 0;

// What a thread has while it multiplies: eight tiles of 16 x 64 bytes.
class Tiles {
  public:
    Tiles() {
        // Static, since GCC knows of the first eight bytes alone that they are read, and may leave others unwritten.
        static constexpr struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shapes;
        _tile_loadconfig(&shapes);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
};

// Adds the products of so many squares of a left and a right factor to the square `sums`, whose rows are `stride`
// apart; sets it if it is fresh. For each square something is done `meanwhile`: tiles leave room for vectors.
template <class Meanwhile = void (&)()>
inline void multiply(
    const Bfloat16* left, const Bfloat16* right, Index squares, float* sums, Index stride, bool fresh,
    Meanwhile&& meanwhile = nothing) {
    const Index bytes = stride * sizeof *sums;
    asm volatile("" ::: "memory");  // what is loaded is written: GCC does not know that a tile reads memory
    if (fresh) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, bytes);
        _tile_loadd(1, sums + 16, bytes);
        _tile_loadd(2, sums + 16 * stride, bytes);
        _tile_loadd(3, sums + 16 * stride + 16, bytes);
    }
    // The second cache reads at two thirds of the rate of the first: squares are brought nearer two turns ahead.
    const auto fetch = [&](Index quarter) {
#pragma GCC unroll 8
        for (Index i = 0; i < SQUARE / 4; i += 32)
            _mm_prefetch(right + 2 * SQUARE + quarter * SQUARE / 4 + i, _MM_HINT_T0);
    };
    for (Index i = 0; i < squares; i++, left += SQUARE, right += SQUARE) {
        _tile_loadd(4, left, 2 * SIDE);
        _tile_loadd(6, right, 4 * SIDE);
        _tile_loadd(7, right + SIDE, 4 * SIDE);
        _tile_loadd(5, left + SQUARE / 2, 2 * SIDE);
        _tile_dpbf16ps(0, 4, 6);
        fetch(0);
        _tile_dpbf16ps(1, 4, 7);
        fetch(1);
        _tile_dpbf16ps(2, 5, 6);
        fetch(2);
        _tile_dpbf16ps(3, 5, 7);
        fetch(3);
        meanwhile();
    }
    _tile_stored(0, sums, bytes);
    _tile_stored(1, sums + 16, bytes);
    _tile_stored(2, sums + 16 * stride, bytes);
    _tile_stored(3, sums + 16 * stride + 16, bytes);
}

#else

const bool CAN_MULTIPLY = true;

struct Tiles {
    ~Tiles() {}  // so that one that is only there is not called unused
};

constexpr Index ROWS = 8;  // at a time: sixteen vectors of sums, enough to hide what a product takes

__attribute__((noinline))  // where it is inlined, GCC runs out of registers
void multiply_rows(const Bfloat16* left, const Bfloat16* right, Index squares, float* sums, Index stride, bool fresh) {
    __m512 total[ROWS][2];
#pragma GCC unroll 8
    for (Index i = 0; i < ROWS; i++) {
        total[i][0] = fresh ? _mm512_setzero_ps() : _mm512_load_ps(sums + i * stride);
        total[i][1] = fresh ? _mm512_setzero_ps() : _mm512_load_ps(sums + i * stride + 16);
    }
    for (Index s = 0; s < squares; s++, left += SQUARE - SIDE)
        for (Index p = 0; p < SIDE; p += 2, left += 2, right += 2 * SIDE) {
            const __m512bh first = (__m512bh)_mm512_load_si512(right);
            const __m512bh second = (__m512bh)_mm512_load_si512(right + SIDE);
#pragma GCC unroll 8
            for (Index i = 0; i < ROWS; i++) {
                int32_t pair;
                std::memcpy(&pair, left + i * SIDE, sizeof pair);
                const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
                total[i][0] = _mm512_dpbf16_ps(total[i][0], both, first);
                total[i][1] = _mm512_dpbf16_ps(total[i][1], both, second);
            }
        }
#pragma GCC unroll 8
    for (Index i = 0; i < ROWS; i++) {
        _mm512_store_ps(sums + i * stride, total[i][0]);
        _mm512_store_ps(sums + i * stride + 16, total[i][1]);
    }
}

// The same as above; vectors leave no room, so that what is to be done meanwhile is done between some rows.
template <class Meanwhile = void (&)()>
inline void multiply(
    const Bfloat16* left, const Bfloat16* right, Index squares, float* sums, Index stride, bool fresh,
    Meanwhile&& meanwhile = nothing) {
    for (Index i = 0; i < SIDE; i += ROWS) {
        multiply_rows(left + i * SIDE, right, squares, sums + i * stride, stride, fresh);
        for (Index k = squares * i / SIDE; k < squares * (i + ROWS) / SIDE; k++) meanwhile();
    }
}

#endif

// For 32 rows something that is small is done while so many squares are multiplied. What it asks memory for comes
// sooner than if it asked for all at once, since a core has no more than some lines underway.
template <class Use>
class RowByRow {
    const Use use;
    const Index at_a_time;
    Index row = 0;

  public:
    RowByRow(Index squares, const Use& use) : use(use), at_a_time(up(SIDE, squares) / std::max<Index>(1, squares)) {}
    void operator()() {
        for (const Index end = std::min(SIDE, row + at_a_time); row < end; row++) use(row);
    }
};

// Brings the rows of a square of sums near, one by one.
inline auto fetch(const float* sums, Index stride) {
    return [=](Index row) {
        __builtin_prefetch(sums + row * stride, 1);
        __builtin_prefetch(sums + row * stride + 16, 1);
    };
}

// ---- rows of numbers as squares

// 16 x 16 pairs.
inline void transpose(__m512i (&x)[16]) {
    __m512i y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
    }
}

// Each takes 32 rows of 32 numbers, row(i) being where the i-th begins, in bf16 or float32.

const Bfloat16 ZEROS[2 * SIDE] = {};  // a row beyond the last one, in either type

template <class Row>
void as_left(const Row& row, Bfloat16* square) {
    for (Index i = 0; i < SIDE; i++, square += SIDE)
        for (Index j = 0; j < SIDE; j += 16) _mm256_storeu_si256((__m256i*)(square + j), load(row(i) + j));
}

template <class Row>
void as_right(const Row& row, Bfloat16* square) {
    for (Index i = 0; i < SIDE; i += 2, square += 2 * SIDE)
        for (Index j = 0; j < SIDE; j += 16)
            _mm512_store_si512(square + 2 * j, pairs_of(load(row(i) + j), load(row(i + 1) + j)));
}

// The transpose of the rows, the same for the next two.
template <class Row>
void turned_as_left(const Row& row, Bfloat16* square) {
    for (Index j = 0; j < SIDE; j += 16) {
        __m512i x[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) x[i] = pairs_of(load(row(2 * i) + j), load(row(2 * i + 1) + j));
        transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) _mm512_store_si512(square + (j + i) * SIDE, x[i]);
    }
}

template <class Row>
void turned_as_right(const Row& row, Bfloat16* square) {
    for (Index j = 0; j < SIDE; j += 16) {
        __m512i x[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            x[i] = _mm512_inserti64x4(_mm512_castsi256_si512(load(row(j + i))), load(row(j + i) + 16), 1);
        transpose(x);
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++) _mm512_store_si512(square + i * 2 * SIDE + 2 * j, x[i]);
    }
}

// ---- e^x, or rather 2^y

constexpr float LOG2_E = 1.44269504f;

// To 1e-7; 0 below -96, so that nothing is so small that it is slow; a NaN remains one.
inline __m512 power_of_2(__m512 y) {
    const __m512 r = _mm512_reduce_ps(y, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // y - floor(y)
    __m512 p = _mm512_set1_ps(1.87757670e-3f);  // the polynomial of its degree that is nearest to 2^r
    for (float c : {8.98933969e-3f, 5.58263175e-2f, 0.240153611f, 0.693153083f, 0.99999994f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(y, _mm512_set1_ps(-96), _CMP_NLT_UQ), p, y);
}

}  // namespace

#endif
