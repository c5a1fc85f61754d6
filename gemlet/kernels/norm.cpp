// RMSNorm (arXiv 1910.07467), alone and with RoPE (arXiv 2104.09864) behind it, and their way back, on a CPU. A row is
// read from memory once and what it becomes written once; all is computed in float32, whatever tensors hold.
//
// What becomes of a row depends on nothing beside it, and no bit on the number of threads.
//
// gemlet/kernels/norm.py calls the functions at the end. Nothing is checked here.

#include "numbers.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

typedef int64_t Index;

// ---- some rows

constexpr Index ROWS = 8;  // at a time, all in the first cache: what is long to wait for comes for all at once

// A row's sum of squares to what it is multiplied with, 1 / rms, for so many rows.
void invert(const float* squares, float* scale, Index size, float eps) {
#pragma omp simd
    for (Index k = 0; k < ROWS; k++) scale[k] = 1 / std::sqrt(squares[k] / size + eps);
}

template <class T>
void inverse_rms(const T* x, float* scale, Index rows, Index size, float eps) {
    float squares[ROWS] = {};
    for (Index k = 0; k < rows; k++, x += size) {
        Floats total = {};
        for (Index i = 0; i < size; i += WIDTH) total += load(x + i) * load(x + i);
        squares[k] = sum(total);
    }
    invert(squares, scale, size, eps);
}

template <class From, class To>
void norm(const From* x, const float* weight, const From* onto, To* out, Index rows, Index size, float eps) {
    float scale[ROWS];
    inverse_rms(x, scale, rows, size, eps);
    for (Index i = 0; i < size; i += WIDTH) {
        const Floats gain = 1 + load(weight + i);
        for (Index k = 0, at = i; k < rows; k++, at += size) {
            const Floats y = load(x + at) * scale[k] * gain;
            store(onto ? y + load(onto + at) : y, out + at);
        }
    }
}

// The gradients of rows from those of what they become, that of the weight being added to `sums`.
template <class G, class T>
void norm_back(
    const G* grad, const T* x, const float* weight, T* grad_x, float* sums, Index rows, Index size, float eps) {
    float squares[ROWS] = {}, along[ROWS] = {}, scale[ROWS];
    for (Index k = 0, at = 0; k < rows; k++, at += size) {
        Floats square = {}, product = {};
        for (Index i = 0; i < size; i += WIDTH) {
            const Floats of_x = load(x + at + i);
            square += of_x * of_x;
            product += load(grad + at + i) * (1 + load(weight + i)) * of_x;
        }
        squares[k] = sum(square), along[k] = sum(product);
    }
    invert(squares, scale, size, eps);
    for (Index k = 0; k < rows; k++) along[k] *= scale[k] * scale[k] * scale[k] / size;
    for (Index i = 0; i < size; i += WIDTH) {
        const Floats gain = 1 + load(weight + i);
        Floats total = load(sums + i);
        for (Index k = 0, at = i; k < rows; k++, at += size) {
            const Floats g = load(grad + at) * scale[k], of_x = load(x + at);
            total += g * of_x;
            store(g * gain - along[k] * of_x, grad_x + at);
        }
        store(total, sums + i);
    }
}

// ---- RoPE: the angle of a pair, two numbers half a row apart

template <class From, class To>
void turn(const From* x, const float* cosine, const float* sine, To* out, Index half, float direction) {
    for (Index i = 0; i < half; i += WIDTH) {
        const Floats left = load(x + i), right = load(x + half + i);
        const Floats c = load(cosine + i), s = load(sine + i) * direction;
        store(left * c - right * s, out + i);
        store(right * c + left * s, out + half + i);
    }
}

struct Angles {
    const float *cosine, *sine;  // [tokens, size], in which both numbers of a pair have theirs
    Index heads, tokens;

    // Of some rows, each of which is one of the heads of a token.
    template <class From, class To>
    void turn_rows(const From* x, To* out, Index first, Index rows, Index size, float direction) const {
        Index head = first % heads, token = first / heads % tokens;
        for (Index k = 0; k < rows; k++, x += size, out += size) {
            const Index at = token * size + size / 2;  // the sine of the right one has no sign
            turn(x, cosine + at, sine + at, out, size / 2, direction);
            if (++head == heads) head = 0, token = token + 1 == tokens ? 0 : token + 1;
        }
    }
};

// ---- all rows

// use(first, rows) for at most ROWS rows at a time.
template <class Use>
void for_rows(Index rows, int threads, const Use& use) {
#pragma omp parallel for num_threads(threads)
    for (Index first = 0; first < rows; first += ROWS) use(first, std::min(ROWS, rows - first));
}

// use(first, rows, sums) adds to `sums` [size], which are then summed up: in parts whose number is that of no machine.
template <class Use>
void sum_up(Index rows, Index size, float* total, int threads, const Use& use) {
    constexpr Index PARTS = 64;
    std::vector<float> sums(PARTS * size);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (Index i = 0; i < PARTS; i++)
            for (Index first = rows * i / PARTS, last = rows * (i + 1) / PARTS; first < last; first += ROWS)
                use(first, std::min(ROWS, last - first), &sums[i * size]);
#pragma omp for
        for (Index j = 0; j < size; j += WIDTH) {
            Floats column = {};
            for (Index i = 0; i < PARTS; i++) column += load(&sums[i * size + j]);
            store(column, total + j);
        }
    }
}

template <class T>
void rms_norm(const T* x, const float* weight, const T* onto, T* out, Index rows, Index size, float eps, int threads) {
    for_rows(rows, threads, [=](Index first, Index count) {
        const Index at = first * size;
        norm(x + at, weight, onto ? onto + at : onto, out + at, count, size, eps);
    });
}

template <class T>
void rms_norm_backward(
    const T* grad, const T* x, const float* weight, T* grad_x, float* grad_weight, Index rows, Index size, float eps,
    int threads) {
    sum_up(rows, size, grad_weight, threads, [=](Index first, Index count, float* sums) {
        const Index at = first * size;
        norm_back(grad + at, x + at, weight, grad_x + at, sums, count, size, eps);
    });
}

template <class T>
void norm_and_turn(
    const T* x, const float* weight, Angles angles, T* out, Index rows, Index size, float eps, int threads) {
    for_rows(rows, threads, [=](Index first, Index count) {
        thread_local std::vector<float> normed;
        normed.resize(ROWS * size);
        norm(x + first * size, weight, (const T*)nullptr, normed.data(), count, size, eps);
        angles.turn_rows(normed.data(), out + first * size, first, count, size, 1);
    });
}

template <class T>
void norm_and_turn_backward(
    const T* grad, const T* x, const float* weight, Angles angles, T* grad_x, float* grad_weight, Index rows,
    Index size, float eps, int threads) {
    sum_up(rows, size, grad_weight, threads, [=](Index first, Index count, float* sums) {
        thread_local std::vector<float> turned;
        turned.resize(ROWS * size);
        const Index at = first * size;
        angles.turn_rows(grad + at, turned.data(), first, count, size, -1);
        norm_back(turned.data(), x + at, weight, grad_x + at, sums, count, size, eps);
    });
}

}  // namespace

// ---- what Python calls, once for each type of number

#define FOR(T, name)                                                                                                   \
    /* x [rows, size] / rms(x) * (1 + weight), added to `onto` where that is not null. */                              \
    void rms_norm_##name(                                                                                              \
        const T* x, const float* weight, const T* onto, T* out, int64_t rows, int64_t size, float eps, int threads) {  \
        rms_norm(x, weight, onto, out, rows, size, eps, threads);                                                      \
    }                                                                                                                  \
    void rms_norm_backward_##name(                                                                                     \
        const T* grad, const T* x, const float* weight, T* grad_x, float* grad_weight, int64_t rows, int64_t size,     \
        float eps, int threads) {                                                                                      \
        rms_norm_backward(grad, x, weight, grad_x, grad_weight, rows, size, eps, threads);                             \
    }                                                                                                                  \
    /* The same of the `heads` of a token, each of `size`, which are then turned by cosine and sine [tokens, size]. */ \
    void norm_and_turn_##name(                                                                                         \
        const T* x, const float* weight, const float* cosine, const float* sine, T* out, int64_t rows, int64_t size,   \
        float eps, int64_t heads, int64_t tokens, int threads) {                                                       \
        norm_and_turn(x, weight, {cosine, sine, heads, tokens}, out, rows, size, eps, threads);                        \
    }                                                                                                                  \
    void norm_and_turn_backward_##name(                                                                                \
        const T* grad, const T* x, const float* weight, const float* cosine, const float* sine, T* grad_x,             \
        float* grad_weight, int64_t rows, int64_t size, float eps, int64_t heads, int64_t tokens, int threads) {       \
        const Angles angles = {cosine, sine, heads, tokens};                                                           \
        norm_and_turn_backward(grad, x, weight, angles, grad_x, grad_weight, rows, size, eps, threads);                \
    }

extern "C" {
FOR(float, float32)
FOR(Bfloat16, bfloat16)
}
