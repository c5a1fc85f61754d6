// The head and its cross-entropy for a chunk of tokens, with its gradients, on a CPU with products in bf16.
//
// Logits are computed for some rows of the head at a time, [rows, tokens], and become powers, less the largest logit
// of these rows, before they leave the cache. What these lack to a softmax, one factor for each token and part of the
// rows, is known in the end, and on the way back they are multiplied by it. Sums are in float32.
//
// No bit depends on the number of threads.
//
// gemlet/kernels/loss.py calls the functions at the end. Nothing is checked here.

#include "products.h"

#ifdef PRODUCTS

#include <cmath>
#include <vector>

namespace {

constexpr Index PART = 128;   // rows of the head that have a largest logit of their own
constexpr Index BLOCK = 512;  // rows of the head that add to the gradient of the hidden states at a time

constexpr int64_t NONE = -1;  // the target of what is not scored

struct Chunk {
    const Bfloat16 *const hidden, *const weight;  // [tokens, width], [vocabulary, width]
    Bfloat16* const powers;                       // [vocabulary, padded]
    const Index tokens, vocabulary, width;
    const int threads;
    const std::vector<int64_t> targets;  // [padded]

    const Index padded = up(tokens, SIDE), parts = up(vocabulary, PART) / PART;
    Array<float> factors{parts * padded};  // from powers to the softmax; 0 for what is not scored

    // From i and w on 32 x 32 numbers of the head, and of the hidden states; 0 beyond the last one.
    auto rows(Index i, Index w) const {
        return [=](Index j) { return i + j < vocabulary ? weight + (i + j) * width + w : ZEROS; };
    }
    auto states(Index t, Index w) const {
        return [=](Index j) { return t + j < tokens ? hidden + (t + j) * width + w : ZEROS; };
    }

    // The sum of -log p(target) over what is scored. Leaves powers and factors.
    double losses() {
        Array<Bfloat16> turned(padded * width);
        Array<float> totals(parts * padded), of_target(padded), results(padded);
#pragma omp parallel num_threads(threads)
        {
            const Tiles tiles;
#pragma omp for
            for (Index t = 0; t < padded; t += SIDE)
                for (Index w = 0; w < width; w += SIDE) turned_as_right(states(t, w), turned + t * width + w * SIDE);
            Array<float> logits(PART * padded);
            Array<Bfloat16> left(PART * width);
#pragma omp for schedule(dynamic)
            for (Index part = 0; part < parts; part++)
                exponentials(part, turned, left, logits, factors + part * padded, totals + part * padded, of_target);
#pragma omp for
            for (Index t = 0; t < padded; t += 16) finish(t, totals, of_target, results);
        }
        double sum = 0;
        for (Index t = 0; t < tokens; t++) sum += targets[t] == NONE ? 0 : results[t];
        return sum;
    }

    // The logits of a part become powers, less the largest ones, `tops`; `totals` are their sums.
    void exponentials(
        Index part, const Bfloat16* turned, Bfloat16* left, float* logits, float* tops, float* totals,
        float* of_target) {
        const Index first = part * PART, rows = std::min(PART, vocabulary - first);
        for (Index r = 0; r < rows; r += SIDE)
            for (Index w = 0; w < width; w += SIDE) as_left(this->rows(first + r, w), left + r * width + w * SIDE);
        for (Index t = 0; t < padded; t += SIDE)
            for (Index r = 0; r < rows; r += SIDE)
                multiply(
                    left + r * width, turned + t * width, width / SIDE, logits + r * padded + t, padded, true);
        std::fill(tops, tops + padded, -INFINITY);
        std::fill(totals, totals + padded, 0.0f);
        for (Index r = 0; r < rows; r++)
            for (Index t = 0; t < padded; t += 16)
                _mm512_store_ps(
                    tops + t, _mm512_max_ps(_mm512_load_ps(logits + r * padded + t), _mm512_load_ps(tops + t)));
        for (Index r = 0; r < rows; r++)
            for (Index t = 0; t < padded; t += 16) {
                const __m512 less = _mm512_sub_ps(_mm512_load_ps(logits + r * padded + t), _mm512_load_ps(tops + t));
                const __m512 power = power_of_2(_mm512_mul_ps(less, _mm512_set1_ps(LOG2_E)));
                __builtin_prefetch(powers + (first + r + 1) * padded + t, 1);
                _mm512_store_ps(totals + t, _mm512_add_ps(_mm512_load_ps(totals + t), power));
                _mm256_storeu_si256((__m256i*)(powers + (first + r) * padded + t), narrowed(power));
            }
        for (Index t = 0; t < tokens; t++)
            if (first <= targets[t] && targets[t] < first + rows)
                of_target[t] = logits[(targets[t] - first) * padded + t];
    }

    // Of sixteen tokens: the largest logit, the whole sum, the factor of each part, the loss.
    void finish(Index t, const float* totals, const float* of_target, float* results) {
        __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
        for (Index part = 0; part < parts; part++)
            top = _mm512_max_ps(_mm512_load_ps(factors + part * padded + t), top);
        const auto power = [&](Index part) {
            const __m512 less = _mm512_sub_ps(_mm512_load_ps(factors + part * padded + t), top);
            return power_of_2(_mm512_mul_ps(less, _mm512_set1_ps(LOG2_E)));
        };
        for (Index part = 0; part < parts; part++)
            total = _mm512_fmadd_ps(_mm512_load_ps(totals + part * padded + t), power(part), total);
        __mmask16 scored = 0;
        for (Index i = 0; i < 16; i++) scored |= (targets[t + i] != NONE) << i;
        const __m512 share = _mm512_maskz_div_ps(scored, _mm512_set1_ps(1), total);
        for (Index part = 0; part < parts; part++)
            _mm512_store_ps(factors + part * padded + t, _mm512_maskz_mul_ps(scored, power(part), share));
        alignas(64) float tops[16], sums[16];
        _mm512_store_ps(tops, top);
        _mm512_store_ps(sums, total);
        for (Index i = 0; i < 16; i++) results[t + i] = tops[i] - of_target[t + i] + std::log(sums[i]);
    }

    // grad_weight [vocabulary, width] is set if it is fresh, else added to.
    void gradients(Bfloat16* grad_hidden, float* grad_weight, bool fresh) {
        Array<Bfloat16> states_right(padded * width), rows_right(BLOCK * width), by_token(BLOCK * padded);
        Array<float> sums(padded * width);
#pragma omp parallel num_threads(threads)
        {
            const Tiles tiles;
            Array<Bfloat16> by_row(SIDE * padded);
#pragma omp for
            for (Index t = 0; t < padded; t += SIDE)
                for (Index w = 0; w < width; w += SIDE)
                    as_right(states(t, w), states_right + w * padded + t * SIDE);
            for (Index first = 0; first < vocabulary; first += BLOCK) {
                const Index count = std::min(BLOCK, vocabulary - first);
#pragma omp for
                for (Index r = 0; r < count; r += SIDE) {
                    for (Index w = 0; w < width; w += SIDE)
                        as_right(rows(first + r, w), rows_right + w * BLOCK + r * SIDE);
                    for (Index t = 0; t < padded; t += SIDE)
                        differences(first + r, t, by_row + t * SIDE, by_token + t * BLOCK + r * SIDE);
                    for_weight(first + r, by_row, states_right, grad_weight, fresh);
                }
#pragma omp for
                for (Index t = 0; t < padded; t += SIDE)
                    for (Index w = 0; w < width; w += SIDE)
                        add(by_token + t * BLOCK, rows_right + w * BLOCK, up(count, SIDE) / SIDE, sums + t * width, w,
                            first == 0);
            }
#pragma omp for
            for (Index t = 0; t < tokens; t++)
                for (Index w = 0; w < width; w += 16)
                    _mm256_storeu_si256(
                        (__m256i*)(grad_hidden + t * width + w), narrowed(_mm512_load_ps(sums + t * width + w)));
        }
    }

    // Adds a product to the square of 32 rows that begins at w, and brings near what comes behind it.
    void add(
        const Bfloat16* left, const Bfloat16* right, Index squares, float* rows, Index w, bool fresh) const {
        const float* const next = rows + (w + SIDE < width ? w + SIDE : SIDE * width);
        multiply(left, right, squares, rows + w, width, fresh, RowByRow(squares, fetch(next, width)));
    }

    // A square of softmax - one-hot, as it is and turned; 0 beyond the last row.
    void differences(Index row, Index token, Bfloat16* by_row, Bfloat16* by_token) const {
        for (Index t = 0; t < SIDE; t += 16) {
            const Index at = token + t;
            const __m512 factor = _mm512_load_ps(factors + row / PART * padded + at);
            const __m256i target = _mm512_cvtepi64_epi32(_mm512_loadu_si512(&targets[at]));
            const __m256i more = _mm512_cvtepi64_epi32(_mm512_loadu_si512(&targets[at + 8]));
            const __m512i of = _mm512_inserti64x4(_mm512_castsi256_si512(target), more, 1);
            for (Index i = 0; i < SIDE; i++) {
                const Index r = row + i;
                __m512 x = _mm512_setzero_ps();
                if (r < vocabulary) x = _mm512_mul_ps(widened(load(powers + r * padded + at)), factor);
                __builtin_prefetch(powers + r * padded + at + 8 * SIDE);  // each of the rows on a page of its own
                x = _mm512_mask_sub_ps(x, _mm512_cmpeq_epi32_mask(of, _mm512_set1_epi32(r)), x, _mm512_set1_ps(1));
                _mm256_store_si256((__m256i*)(by_row + i * SIDE + t), narrowed(x));
            }
        }
        turned_as_left([=](Index i) { return by_row + i * SIDE; }, by_token);
    }

    // What the tokens add to the gradients of 32 rows.
    void for_weight(
        Index row, const Bfloat16* by_row, const Bfloat16* states_right, float* grad_weight, bool fresh) const {
        alignas(64) float square[SQUARE];  // for the last rows, beyond which there is nothing
        const Index count = std::min(SIDE, vocabulary - row);
        for (Index w = 0; w < width; w += SIDE) {
            const Bfloat16* const right = states_right + w * padded;
            float* const sums = grad_weight + row * width + w;
            if (count == SIDE) {
                add(by_row, right, padded / SIDE, grad_weight + row * width, w, fresh);
                continue;
            }
            multiply(by_row, right, padded / SIDE, square, SIDE, true);
            for (Index i = 0; i < count; i++)
                for (Index j = 0; j < SIDE; j++)
                    sums[i * width + j] = square[i * SIDE + j] + (fresh ? 0 : sums[i * width + j]);
        }
    }
};

}  // namespace

extern "C" {
int can_multiply() { return CAN_MULTIPLY; }
// The sum of -log p(target) in nats over the tokens whose target is not `ignore`; their gradients, where asked for.
double cross_entropy(
    const Bfloat16* hidden, const Bfloat16* weight, const int64_t* targets, Bfloat16* powers, Bfloat16* grad_hidden,
    float* grad_weight, int64_t tokens, int64_t vocabulary, int64_t width, int64_t ignore, int64_t fresh, int threads) {
    std::vector<int64_t> scored(up(tokens, SIDE), NONE);
    std::replace_copy(targets, targets + tokens, scored.begin(), ignore, NONE);
    Chunk chunk{hidden, weight, powers, tokens, vocabulary, width, threads, std::move(scored)};
    const double loss = chunk.losses();
    if (grad_hidden) chunk.gradients(grad_hidden, grad_weight, fresh);
    return loss;
}
}

#else
extern "C" int can_multiply() { return 0; }
#endif
