// The head and its cross-entropy for a chunk of tokens, with its gradients, on a CPU with AVX-512 and bf16 products.
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

    const Index padded = up(tokens, COLUMNS), parts = up(vocabulary, PART) / PART;
    Array<float> factors{parts * padded};  // from powers to the softmax; 0 for what is not scored
    std::vector<Bfloat16> zeros = std::vector<Bfloat16>(width);

    const Bfloat16* row(Index i) const { return i < vocabulary ? weight + i * width : zeros.data(); }
    const Bfloat16* state(Index i) const { return i < tokens ? hidden + i * width : zeros.data(); }

    // The sum of -log p(target) over what is scored. Leaves powers and factors.
    double losses() {
        Array<Bfloat16> columns(padded * width);
        Array<float> totals(parts * padded), of_target(padded), results(padded);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for
            for (Index t = 0; t < padded; t += COLUMNS)
                pack_as_columns(hidden + t * width, width, tokens - t, width, columns + t * width);
            Array<float> logits(PART * padded);
#pragma omp for schedule(dynamic)
            for (Index part = 0; part < parts; part++)
                exponentials(part, columns, logits, factors + part * padded, totals + part * padded, of_target);
#pragma omp for
            for (Index t = 0; t < padded; t += 16) finish(t, totals, of_target, results);
        }
        double sum = 0;
        for (Index t = 0; t < tokens; t++) sum += targets[t] == NONE ? 0 : results[t];
        return sum;
    }

    // The logits of a part become powers, less the largest ones, `tops`; `totals` are their sums.
    void exponentials(
        Index part, const Bfloat16* columns, float* logits, float* tops, float* totals, float* of_target) {
        const Index first = part * PART, rows = std::min(PART, vocabulary - first);
        for (Index t = 0; t < padded; t += COLUMNS)
            for (Index r = 0; r < rows; r += ROWS) {
                const Bfloat16* of[ROWS];
                for (Index i = 0; i < ROWS; i++) of[i] = row(first + r + i);
                multiply(of, 2, columns + t * width, width / 2, logits + r * padded + t, padded, true);
            }
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
        Array<Bfloat16> hidden_pairs(padded * width), weight_pairs(BLOCK * width);
        Array<Bfloat16> by_row(BLOCK * padded), by_token(BLOCK * padded);
        Array<float> sums(padded * width);
#pragma omp parallel num_threads(threads)
        {
#pragma omp for
            for (Index t = 0; t < padded; t += 2)
                pack_as_pair(state(t), state(t + 1), width, hidden_pairs + t * COLUMNS, padded * COLUMNS);
            for (Index first = 0; first < vocabulary; first += BLOCK) {
                const Index rows = std::min(BLOCK, vocabulary - first);
#pragma omp for
                for (Index r = 0; r < rows; r += COLUMNS) {
                    const Index end = std::min(r + COLUMNS, rows);
                    for (Index i = r; i < end; i += 2) {
                        pack_as_pair(
                            row(first + i), row(first + i + 1), width, weight_pairs + i * COLUMNS, BLOCK * COLUMNS);
                        differences(first + i, by_row + i * padded, by_token + i * COLUMNS);
                    }
                    for_weight(first + r, end - r, by_row + r * padded, hidden_pairs, grad_weight, fresh);
                }
#pragma omp for
                for (Index t = 0; t < padded; t += COLUMNS)
                    for (Index w = 0; w < width; w += COLUMNS)
                        for (Index i = t; i < t + COLUMNS; i += ROWS) {
                            const Bfloat16* of[ROWS];
                            for (Index j = 0; j < ROWS; j++) of[j] = by_token + t * BLOCK + 2 * (i - t + j);
                            multiply(
                                of, 2 * COLUMNS, weight_pairs + w * BLOCK, up(rows, 2) / 2, sums + i * width + w,
                                width, first == 0);
                        }
            }
#pragma omp for
            for (Index t = 0; t < tokens; t++)
                for (Index w = 0; w < width; w += 16)
                    _mm256_storeu_si256(
                        (__m256i*)(grad_hidden + t * width + w), narrowed(_mm512_load_ps(sums + t * width + w)));
        }
    }

    // softmax - one-hot of two rows: row by row, and as pairs in panels of tokens.
    void differences(Index even, Bfloat16* by_row, Bfloat16* by_token) {
        const bool both = even + 1 < vocabulary;
        Bfloat16* const p = powers + even * padded;
        const float* const factor = factors + even / PART * padded;
        const auto softmax = [&](Index at, Index t) {
            return _mm512_mul_ps(widened(load(p + at)), _mm512_load_ps(factor + t));
        };
        for (Index t = 0; t < padded; t += 16) {
            __m512 x = softmax(t, t), y = both ? softmax(padded + t, t) : _mm512_setzero_ps();
            __mmask16 of_x = 0, of_y = 0;
            for (Index half = 0; half < 16; half += 8) {
                const __m512i target = _mm512_loadu_si512(&targets[t + half]);
                of_x |= _mm512_cmpeq_epi64_mask(target, _mm512_set1_epi64(even)) << half;
                of_y |= _mm512_cmpeq_epi64_mask(target, _mm512_set1_epi64(even + 1)) << half;
            }
            x = _mm512_mask_sub_ps(x, of_x, x, _mm512_set1_ps(1));
            y = _mm512_mask_sub_ps(y, of_y, y, _mm512_set1_ps(1));
            const __m256i first = narrowed(x), second = narrowed(y);
            _mm256_store_si256((__m256i*)(by_row + t), first);
            _mm256_store_si256((__m256i*)(by_row + padded + t), second);
            _mm512_store_si512(by_token + t / COLUMNS * COLUMNS * BLOCK + 2 * (t % COLUMNS), pairs_of(first, second));
        }
    }

    // What the tokens add to the gradients of so many rows.
    void for_weight(
        Index first, Index count, const Bfloat16* by_row, const Bfloat16* hidden_pairs, float* grad_weight,
        bool fresh) {
        alignas(64) float tile[ROWS * COLUMNS];  // for the last rows, beyond which there is nothing
        for (Index w = 0; w < width; w += COLUMNS)
            for (Index r = 0; r < count; r += ROWS) {
                float* const sums = grad_weight + (first + r) * width + w;
                const Bfloat16* of[ROWS];
                for (Index i = 0; i < ROWS; i++) of[i] = by_row + std::min(r + i, count - 1) * padded;
                if (r + ROWS <= count) {
                    multiply(of, 2, hidden_pairs + w * padded, padded / 2, sums, width, fresh);
                    continue;
                }
                multiply(of, 2, hidden_pairs + w * padded, padded / 2, tile, COLUMNS, true);
                for (Index i = 0; r + i < count; i++)
                    for (Index j = 0; j < COLUMNS; j++)
                        sums[i * width + j] = tile[i * COLUMNS + j] + (fresh ? 0 : sums[i * width + j]);
            }
    }
};

}  // namespace

extern "C" {
int can_multiply() { return 1; }
// The sum of -log p(target) in nats over the tokens whose target is not `ignore`; their gradients, where asked for.
double cross_entropy(
    const Bfloat16* hidden, const Bfloat16* weight, const int64_t* targets, Bfloat16* powers, Bfloat16* grad_hidden,
    float* grad_weight, int64_t tokens, int64_t vocabulary, int64_t width, int64_t ignore, int fresh, int threads) {
    std::vector<int64_t> scored(up(tokens, COLUMNS), NONE);
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
