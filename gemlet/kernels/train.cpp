// What a training step computes between its matrix products on a CPU. Exponentials are what takes the time in GeGLU and
// its way back, in the softmax of attention and in that of the loss with its gradient, all in float32 from and to what
// tensors hold; in the norm of the gradients it is memory.
//
// What a place or a row becomes depends on nothing beside it, nor on the number of threads.
//
// gemlet/kernels/train.py calls the functions at the end. Nothing is checked here.

#include "numbers.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

namespace {

// ---- e^x

// The coefficients of the Taylor series of 2^x.
constexpr float series(int k) {
    double c = 1;
    for (int i = 1; i <= k; i++) c *= 0.69314718055994531 / i;
    return float(c);
}

// e^x = 2^n 2^r with n = round(x / ln 2), to 2e-7 and 1e-7 |x|. Beyond 64 it stays there: no such number matters to a
// sum with 1, and what follows from it is never so small that computing with it is slow. A NaN remains one.
inline float exponential(float x) {
    x = x < -64 ? -64 : x > 64 ? 64 : x;
    const float y = x * 1.44269504f, n = y + 12582912.0f - 12582912.0f;  // 1.5 * 2^23 has no room for a fraction
    const float r = y - n;
    float p = series(6);
    for (float c : {series(5), series(4), series(3), series(2), series(1), series(0)}) p = p * r + c;
    return bits<float>(bits<uint32_t>(p) + (uint32_t(int32_t(n)) << 23));
}

// ---- GeGLU: x sigmoid(u) with u = 2 sqrt(2 / pi) (x + 0.044715 x^3) is GELU (arXiv 1606.08415) in its tanh form

constexpr float LINEAR = 1.5957691216f, CUBIC = 0.044715f * LINEAR;

inline float sigmoid_of_u(float x) { return 1 / (1 + exponential(x * (-LINEAR - CUBIC * (x * x)))); }

template <class T>
void geglu(const T* gate, const T* up, T* out, int64_t size, int threads) {
#pragma omp parallel for simd num_threads(threads)
    for (int64_t i = 0; i < size; i++) {
        const float x = widened(gate[i]);
        put(x * sigmoid_of_u(x) * widened(up[i]), out[i]);
    }
}

template <class T>
void geglu_backward(const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t size, int threads) {
#pragma omp parallel for simd num_threads(threads)
    for (int64_t i = 0; i < size; i++) {
        const float upstream = widened(grad[i]), x = widened(gate[i]), s = sigmoid_of_u(x);
        put(upstream * x * s, grad_up[i]);
        // s + x s (1 - s) du/dx
        put(upstream * widened(up[i]) * s * (1 + (1 - s) * x * (LINEAR + 3 * CUBIC * (x * x))), grad_gate[i]);
    }
}

// ---- softmax: a row is read once from memory, and the result written in its place

// e^(x - top) of n numbers, of which `top` is the largest, to `powers`; their sum.
template <class T>
float exponentials(const T* x, int64_t n, float& top, float* powers) {
    float largest = -INFINITY, total = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < n; i++) largest = std::max(largest, widened(x[i]));
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; i++) total += powers[i] = exponential(widened(x[i]) - largest);
    top = largest;
    return total;
}

template <class T>
void put_scaled(const float* powers, float scale, T* x, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) put(powers[i] * scale, x[i]);
}

template <class T>
double softmax_to_gradient(
    T* logits, const int64_t* targets, int64_t rows, int64_t width, int64_t vocabulary, int64_t ignore, int threads) {
    std::vector<double> losses(rows);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> powers(vocabulary);
#pragma omp for
        for (int64_t row = 0; row < rows; row++) {
            T* const x = logits + row * width;
            const int64_t target = targets[row];
            std::fill(target == ignore ? x : x + vocabulary, x + width, T(0));
            if (target == ignore) continue;
            float top;
            const float total = exponentials(x, vocabulary, top, powers.data()), scale = 1 / total;
            losses[row] = top - widened(x[target]) + std::log(total);
            put_scaled(powers.data(), scale, x, vocabulary);
            put(powers[target] * scale - 1, x[target]);
        }
    }
    double sum = 0;
    for (double loss : losses) sum += loss;
    return sum;
}

template <class T>
void softmax_between(
    T* scores, const int64_t* first, int64_t stride, int64_t rows, int64_t heads, int64_t queries, int64_t keys,
    int64_t seen, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> powers(keys);
#pragma omp for
        for (int64_t i = 0; i < rows * heads * queries; i++) {
            const int64_t query = i % queries, row = i / (heads * queries);
            const int64_t begin = std::max<int64_t>(0, first[row * stride + query]), end = seen + query;
            T* const x = scores + i * keys;
            float top;
            const float total = exponentials(x + begin, end - begin, top, powers.data());
            std::fill(x, x + begin, T(0));
            put_scaled(powers.data(), 1 / total, x + begin, end - begin);
            std::fill(x + end, x + keys, T(0));
        }
    }
}

// ---- the norm of the gradients

constexpr int64_t PIECE = 1 << 14;  // numbers that are summed up in float32

float squares(const float* x, int64_t size) {
    Floats sums[4] = {};  // enough to hide how long an addition takes
    int64_t i = 0;
    for (; i + 4 * WIDTH <= size; i += 4 * WIDTH)
        for (int part = 0; part < 4; part++) {
            const Floats y = load(x + i + part * WIDTH);
            sums[part] += y * y;
        }
    float total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < size; i++) total += x[i] * x[i];
    return total;
}

double norm(const float* const* tensors, const int64_t* sizes, int64_t count, int threads) {
    std::vector<std::pair<const float*, int64_t>> pieces;
    for (int64_t i = 0; i < count; i++)
        for (int64_t at = 0; at < sizes[i]; at += PIECE)
            pieces.push_back({tensors[i] + at, std::min(PIECE, sizes[i] - at)});
    std::vector<double> parts(pieces.size());
#pragma omp parallel for num_threads(threads)
    for (size_t i = 0; i < pieces.size(); i++) parts[i] = squares(pieces[i].first, pieces[i].second);
    double sum = 0;
    for (double part : parts) sum += part;
    return std::sqrt(sum);
}

}  // namespace

// ---- what Python calls, once for each type of number

#define FOR(T, name)                                                                                                   \
    void geglu_##name(const T* gate, const T* up, T* out, int64_t size, int threads) {                                 \
        geglu(gate, up, out, size, threads);                                                                           \
    }                                                                                                                  \
    void geglu_backward_##name(                                                                                        \
        const T* grad, const T* gate, const T* up, T* grad_gate, T* grad_up, int64_t size, int threads) {              \
        geglu_backward(grad, gate, up, grad_gate, grad_up, size, threads);                                             \
    }                                                                                                                  \
    /* The sum of -log p(target) in nats over the rows whose target is not `ignore`; the first `vocabulary` columns */ \
    /* of logits [rows, width] become softmax - one-hot, the others and the rows that are not scored 0. */             \
    double softmax_to_gradient_##name(                                                                                 \
        T* logits, const int64_t* targets, int64_t rows, int64_t width, int64_t vocabulary, int64_t ignore,            \
        int threads) {                                                                                                 \
        return softmax_to_gradient(logits, targets, rows, width, vocabulary, ignore, threads);                         \
    }                                                                                                                  \
    /* Scores [rows, heads, queries, keys] become their softmax over the keys that a query sees, and 0 elsewhere: */   \
    /* the first query of a row the `seen` first ones, each next query one more, and none before first[query], */      \
    /* which is found at `stride` times the row. */                                                                    \
    void softmax_between_##name(                                                                                       \
        T* scores, const int64_t* first, int64_t stride, int64_t rows, int64_t heads, int64_t queries, int64_t keys,   \
        int64_t seen, int threads) {                                                                                   \
        softmax_between(scores, first, stride, rows, heads, queries, keys, seen, threads);                             \
    }

extern "C" {
FOR(float, float32)
FOR(Bfloat16, bfloat16)
double norm_float32(const float* const* tensors, const int64_t* sizes, int64_t count, int threads) {
    return norm(tensors, sizes, count, threads);
}
}
