// Attention in bf16 and its way back on a CPU with AVX-512 and bf16 products, after FlashAttention (arXiv 2205.14135):
// scores exist for a few queries and keys at a time, and on the way back they are computed again.
//
// A query sees the keys from `first` up to its own position. The heads that share a key head lie side by side: a row
// is one query in one of them, and so many rows read the same keys while these are in the cache. Of a block of rows
// only tiles of 8 rows and 32 keys that have something to see are computed.
//
// What becomes of a row depends neither on the number of threads nor on which of them computes it.
//
// gemlet/kernels/attention.py calls the functions at the end. Nothing is checked here.

#include "products.h"

#ifdef PRODUCTS

#include <omp.h>
#include <cmath>
#include <vector>

namespace {

template <class T>
struct Tensor {  // [batch, heads, tokens, head_dim], the last of which lie side by side
    T* begin;
    const int64_t* strides;
    T* at(Index batch, Index head, Index token) const {
        return begin + batch * strides[0] + head * strides[1] + token * strides[2];
    }
};

// ---- what is computed

struct Problem {
    Index batch, heads, key_heads, queries, keys, width;
    float scale;
    int threads;
    Tensor<const Bfloat16> q, k, v;
    const int64_t* first;  // [batch, queries]
    Index first_stride;    // 0 where all texts of the batch share it

    Index group() const { return heads / key_heads; }
    Index padded() const { return up(keys, COLUMNS); }
    // So many queries make about so many rows.
    Index queries_of(Index rows) const { return std::max<Index>(1, rows / group()); }
};

const Bfloat16 ZEROS[1024] = {};
constexpr float NOTHING = -1e30f;  // the score of a key that is not seen

// The rows of one key head for some queries, padded by rows of zeros that see nothing.
struct Block {
    const Problem& problem;
    Index batch, key_head, start, count, groups;
    std::vector<int32_t> from, to;  // a row sees the keys [from, to)
    std::vector<Index> low, high;   // a group of ROWS sees something of the panels [low, high)

    Block(const Problem& p, Index batch, Index key_head, Index start, Index queries)
        : problem(p), batch(batch), key_head(key_head), start(start),
          count(std::min(queries, p.queries - start) * p.group()), groups(up(count, ROWS) / ROWS),
          from(groups * ROWS), to(groups * ROWS), low(groups), high(groups) {
        for (Index row = 0; row < count; row++) {
            from[row] = p.first[batch * p.first_stride + query(row)];
            to[row] = p.keys - p.queries + query(row) + 1;
            if (row % ROWS == 0) low[row / ROWS] = from[row] / COLUMNS;
            high[row / ROWS] = up(to[row], COLUMNS) / COLUMNS;
        }
    }
    Index query(Index row) const { return start + row / problem.group(); }
    Index head(Index row) const { return key_head * problem.group() + row % problem.group(); }
    bool sees(Index group, Index panel) const { return low[group] <= panel && panel < high[group]; }

    // Where the rows are.
    std::vector<const Bfloat16*> rows(const Tensor<const Bfloat16>& x) const {
        std::vector<const Bfloat16*> found(groups * ROWS, ZEROS);
        for (Index row = 0; row < count; row++) found[row] = x.at(batch, head(row), query(row));
        return found;
    }
    // Of the scores of a group and a panel, rows `stride` apart, makes nothing those of keys that are not seen.
    void hide(float* scores, Index stride, Index group, Index panel) const {
        const int32_t key = panel * COLUMNS, *begin = &from[group * ROWS], *end = &to[group * ROWS];
        if (begin[ROWS - 1] <= key && key + COLUMNS <= end[0] && end[ROWS - 1]) return;  // all see all
        const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (Index i = 0; i < ROWS; i++)
            for (Index j = 0; j < COLUMNS; j += 16) {
                const __m512i at = _mm512_add_epi32(_mm512_set1_epi32(key + j), numbers);
                const __mmask16 hidden = _mm512_cmp_epi32_mask(at, _mm512_set1_epi32(begin[i]), _MM_CMPINT_LT) |
                                         _mm512_cmp_epi32_mask(at, _mm512_set1_epi32(end[i]), _MM_CMPINT_NLT);
                _mm512_mask_store_ps(scores + i * stride + j, hidden, _mm512_set1_ps(NOTHING));
            }
    }
    void write(const float* x, float factor, Bfloat16* row) const {
        for (Index w = 0; w < problem.width; w += 16)
            _mm256_storeu_si256(
                (__m256i*)(row + w), narrowed(_mm512_mul_ps(_mm512_loadu_ps(x + w), _mm512_set1_ps(factor))));
    }
};

// ---- forwards

constexpr Index KEYS = 256;  // so many at a time: the second cache holds them, their values and what becomes of a block
constexpr Index FORWARD_ROWS = 128;

// What a thread needs for a block of so many rows.
struct Softmax {
    const Index width;
    Array<float> scores, out, top, total;
    Array<Bfloat16> powers;
    Softmax(Index rows, Index width)
        : width(width), scores(rows * KEYS), out(rows * width), top(rows), total(rows), powers(rows * KEYS) {}

    // Scores of a row become powers, less the largest score so far. To it goes what was summed up before, too.
    void step(Index row, Index from, Index to, float scale) {
        const float* const s = scores + row * KEYS;
        __m512 largest = _mm512_set1_ps(top[row]), sum = _mm512_setzero_ps();
        for (Index j = from; j < to; j += 16) largest = _mm512_max_ps(_mm512_load_ps(s + j), largest);
        const float now = _mm512_reduce_max_ps(largest);
        const __m512 factor = _mm512_set1_ps(scale * LOG2_E);
        const float enough = std::max(now, NOTHING / 2);  // so that of nothing nothing remains
        const __m512 less = _mm512_mul_ps(_mm512_set1_ps(enough), factor);
        for (Index j = from; j < to; j += 16) {
            const __m512 power = power_of_2(_mm512_fmsub_ps(_mm512_load_ps(s + j), factor, less));
            sum = _mm512_add_ps(sum, power);
            _mm256_store_si256((__m256i*)(powers + row * KEYS + j), narrowed(power));
        }
        const __m512 before = power_of_2(_mm512_mul_ps(_mm512_set1_ps(top[row] - now), factor));
        if (top[row] < now && total[row] > 0)
            for (Index w = 0; w < width; w += 16)
                _mm512_store_ps(out + row * width + w, _mm512_mul_ps(_mm512_load_ps(out + row * width + w), before));
        total[row] = total[row] * _mm512_cvtss_f32(before) + _mm512_reduce_add_ps(sum);
        top[row] = now;
    }
};

// Leaves the sums of `values`, and what they are to be divided by.
void forward_block(const Block& block, const Bfloat16* keys, const Bfloat16* values, Softmax& s) {
    const Problem& p = block.problem;
    const auto q = block.rows(p.q);
    std::fill(s.top + 0, s.top + block.groups * ROWS, NOTHING);
    std::fill(s.total + 0, s.total + block.groups * ROWS, 0.0f);
    for (Index chunk = block.low[0], end = block.high.back(); chunk < end; chunk += KEYS / COLUMNS) {
        const Index chunk_end = std::min(end, chunk + KEYS / COLUMNS);
        for (Index panel = chunk; panel < chunk_end; panel++)  // which stays in the first cache
            for (Index g = 0; g < block.groups; g++) {
                if (!block.sees(g, panel)) continue;
                float* const scores = s.scores + g * ROWS * KEYS + (panel - chunk) * COLUMNS;
                multiply(&q[g * ROWS], 2, keys + panel * COLUMNS * p.width, p.width / 2, scores, KEYS, true);
                block.hide(scores, KEYS, g, panel);
            }
        const auto low = [&](Index g) { return std::max(chunk, block.low[g]); };
        const auto high = [&](Index g) { return std::min(chunk_end, block.high[g]); };
        for (Index g = 0; g < block.groups; g++)
            for (Index i = 0; i < ROWS && low(g) < high(g); i++)
                s.step(g * ROWS + i, (low(g) - chunk) * COLUMNS, (high(g) - chunk) * COLUMNS, p.scale);
        for (Index w = 0; w < p.width; w += COLUMNS)
            for (Index g = 0; g < block.groups; g++) {
                if (low(g) >= high(g)) continue;
                const Bfloat16* by[ROWS];
                for (Index i = 0; i < ROWS; i++) by[i] = s.powers + (g * ROWS + i) * KEYS + (low(g) - chunk) * COLUMNS;
                multiply(
                    by, 2, values + w * p.padded() + low(g) * COLUMNS * COLUMNS, (high(g) - low(g)) * COLUMNS / 2,
                    s.out + g * ROWS * p.width + w, p.width, low(g) == block.low[g]);
            }
    }
}

// Keys or values of a panel, [COLUMNS, width], as pairs; those beyond the last one are 0.
void pack_panel_as_pairs(
    const Problem& p, const Tensor<const Bfloat16>& x, Index batch, Index head, Index key, Bfloat16* to) {
    const auto row = [&](Index j) { return j < p.keys ? x.at(batch, head, j) : ZEROS; };
    for (Index j = key; j < key + COLUMNS; j += 2)
        pack_as_pair(row(j), row(j + 1), p.width, to + j * COLUMNS, p.padded() * COLUMNS);
}

void forward(const Problem& p, const Tensor<Bfloat16>& out, float* logsumexp) {
    const Index panels = p.padded() / COLUMNS, size = p.padded() * p.width, heads = p.batch * p.key_heads;
    const Index queries = p.queries_of(FORWARD_ROWS), blocks = up(p.queries, queries) / queries;
    Array<Bfloat16> keys(heads * size), values(heads * size);
#pragma omp parallel num_threads(p.threads)
    {
#pragma omp for
        for (Index i = 0; i < heads * panels; i++) {
            const Index head = i / panels, key = i % panels * COLUMNS;
            const Index batch = head / p.key_heads, h = head % p.key_heads;
            pack_as_columns(
                p.k.at(batch, h, key), p.k.strides[2], p.keys - key, p.width, keys + head * size + key * p.width);
            pack_panel_as_pairs(p, p.v, batch, h, key, values + head * size);
        }
        Softmax softmax(up(queries * p.group(), ROWS), p.width);
#pragma omp for schedule(dynamic)
        for (Index i = heads * blocks - 1; i >= 0; i--) {  // the last queries see the most
            const Index head = i % heads;
            const Block block(p, head / p.key_heads, head % p.key_heads, i / heads * queries, queries);
            forward_block(block, keys + head * size, values + head * size, softmax);
            for (Index r = 0; r < block.count; r++) {
                const Index h = block.head(r), query = block.query(r);
                block.write(softmax.out + r * p.width, 1 / softmax.total[r], out.at(block.batch, h, query));
                logsumexp[(block.batch * p.heads + h) * p.queries + query] =
                    softmax.top[r] * p.scale + std::log(softmax.total[r]);
            }
        }
    }
}

// ---- backwards

constexpr Index BACKWARD_ROWS = 256, BACKWARD_KEYS = 1024;

struct Gradients {
    Tensor<const Bfloat16> out, grad;
    const float* logsumexp;  // [batch, heads, queries]
    Tensor<Bfloat16> q, k, v;
};

// One key head, and the heads of queries that share it, by so many threads.
struct Backward {
    const Problem& p;
    const Gradients& of;
    const Index batch, key_head;
    const int threads;
    const Index queries = p.queries_of(BACKWARD_ROWS), rows = up(queries * p.group(), ROWS);
    const Index size = p.padded() * p.width;
    // As columns for the scores and for the weights' gradients, as pairs for the queries' gradient
    Array<Bfloat16> key_columns{size}, value_columns{size}, key_pairs{size};
    Array<float> grad_k{size}, grad_v{size}, grad_q{rows * p.width};
    // Of a block, as pairs of rows, over which the gradients of keys and values are sums
    Array<Bfloat16> q_pairs{rows * p.width}, grad_pairs{rows * p.width};
    Array<Bfloat16> weights{rows * BACKWARD_KEYS}, grad_scores{rows * BACKWARD_KEYS};
    Array<Bfloat16> grad_scores_by_row{rows * KEYS};
    Array<float> logsumexp{rows}, inner{rows};  // in units of ln 2; the products of a result and its gradient

    void run() {
#pragma omp parallel for num_threads(threads)
        for (Index key = 0; key < p.padded(); key += COLUMNS) {
            const Index at = key * p.width, count = p.keys - key;
            pack_as_columns(p.k.at(batch, key_head, key), p.k.strides[2], count, p.width, key_columns + at);
            pack_as_columns(p.v.at(batch, key_head, key), p.v.strides[2], count, p.width, value_columns + at);
            pack_panel_as_pairs(p, p.k, batch, key_head, key, key_pairs);
            std::fill(grad_k + at, grad_k + (at + COLUMNS * p.width), 0.0f);
            std::fill(grad_v + at, grad_v + (at + COLUMNS * p.width), 0.0f);
        }
        for (Index start = 0; start < p.queries; start += queries) {
            const Block block(p, batch, key_head, start, queries);
            const auto q = block.rows(p.q), grad = block.rows(of.grad), out = block.rows(of.out);
            for (Index chunk = block.low[0], end = block.high.back(); chunk < end; chunk += BACKWARD_KEYS / COLUMNS) {
                const Index chunk_end = std::min(end, chunk + BACKWARD_KEYS / COLUMNS);
#pragma omp parallel num_threads(threads)
                {
                    const Index me = omp_get_thread_num(), all = omp_get_num_threads();
                    const Index first = block.groups * me / all, last = block.groups * (me + 1) / all;
                    if (chunk == block.low[0])
                        for (Index row = first * ROWS; row < last * ROWS; row += 2)
                            for_a_pair(block, row, &q[row], &grad[row], &out[row]);
                    by_rows(block, first, last, chunk, chunk_end, q.data(), grad.data());
#pragma omp barrier
                    for (Index panel = chunk + me; panel < chunk_end; panel += all) by_keys(block, panel, chunk);
                }
            }
            for (Index r = 0; r < block.count; r++)
                block.write(grad_q + r * p.width, p.scale, of.q.at(batch, block.head(r), block.query(r)));
            if (start + queries < p.queries) continue;
            for (Index key = 0; key < p.keys; key++) {
                block.write(grad_k + key * p.width, p.scale, of.k.at(batch, key_head, key));
                block.write(grad_v + key * p.width, 1, of.v.at(batch, key_head, key));
            }
        }
    }

    // What is needed of two rows besides.
    void for_a_pair(
        const Block& block, Index row, const Bfloat16* const* q, const Bfloat16* const* grad,
        const Bfloat16* const* out) {
        pack_as_pair(q[0], q[1], p.width, q_pairs + row * COLUMNS, rows * COLUMNS);
        pack_as_pair(grad[0], grad[1], p.width, grad_pairs + row * COLUMNS, rows * COLUMNS);
        for (Index odd = 0; odd < 2; odd++) {
            const Index r = std::min(row + odd, block.count - 1);
            const float x = of.logsumexp[(batch * p.heads + block.head(r)) * p.queries + block.query(r)];
            logsumexp[row + odd] = x * LOG2_E;
            __m512 sum = _mm512_setzero_ps();
            for (Index w = 0; w < p.width; w += 16)
                sum = _mm512_fmadd_ps(widened(load(out[odd] + w)), widened(load(grad[odd] + w)), sum);
            inner[row + odd] = _mm512_reduce_add_ps(sum);
        }
    }

    // Weights and the scores' gradients of some groups of rows, and their part of the queries' gradient.
    void by_rows(
        const Block& block, Index first, Index last, Index chunk, Index chunk_end, const Bfloat16* const* q,
        const Bfloat16* const* grad) {
        alignas(64) float scores[ROWS * COLUMNS], above[ROWS * COLUMNS];
        const __m512 factor = _mm512_set1_ps(p.scale * LOG2_E);
        for (Index part = chunk; part < chunk_end; part += KEYS / COLUMNS) {
            const Index part_end = std::min(chunk_end, part + KEYS / COLUMNS);
            for (Index panel = part; panel < part_end; panel++)
                for (Index g = first; g < last; g++) {
                    if (!block.sees(g, panel)) continue;
                    const Index row = g * ROWS, at = ((panel - chunk) * rows + row) * COLUMNS;
                    const Index panel_at = panel * COLUMNS * p.width;
                    multiply(q + row, 2, key_columns + panel_at, p.width / 2, scores, COLUMNS, true);
                    block.hide(scores, COLUMNS, g, panel);
                    multiply(grad + row, 2, value_columns + panel_at, p.width / 2, above, COLUMNS, true);
                    for (Index i = 0; i < ROWS; i += 2)
                        for (Index j = 0; j < COLUMNS; j += 16) {
                            __m256i w[2], s[2];
                            for (Index odd = 0; odd < 2; odd++) {
                                const Index r = row + i + odd, from = (i + odd) * COLUMNS + j;
                                const __m512 x = power_of_2(_mm512_fmsub_ps(
                                    _mm512_load_ps(scores + from), factor, _mm512_set1_ps(logsumexp[r])));
                                const __m512 y = _mm512_sub_ps(_mm512_load_ps(above + from), _mm512_set1_ps(inner[r]));
                                w[odd] = narrowed(x);
                                s[odd] = narrowed(_mm512_mul_ps(x, y));
                                _mm256_store_si256(
                                    (__m256i*)(grad_scores_by_row + r * KEYS + (panel - part) * COLUMNS + j), s[odd]);
                            }
                            _mm512_store_si512(weights + at + i * COLUMNS + 2 * j, pairs_of(w[0], w[1]));
                            _mm512_store_si512(grad_scores + at + i * COLUMNS + 2 * j, pairs_of(s[0], s[1]));
                        }
                }
            for (Index w = 0; w < p.width; w += COLUMNS)
                for (Index g = first; g < last; g++) {
                    const Index low = std::max(part, block.low[g]), high = std::min(part_end, block.high[g]);
                    if (low >= high) continue;
                    const Bfloat16* by[ROWS];
                    for (Index i = 0; i < ROWS; i++)
                        by[i] = grad_scores_by_row + (g * ROWS + i) * KEYS + (low - part) * COLUMNS;
                    multiply(
                        by, 2, key_pairs + w * p.padded() + low * COLUMNS * COLUMNS, (high - low) * COLUMNS / 2,
                        grad_q + g * ROWS * p.width + w, p.width, low == block.low[g]);
                }
        }
    }

    // What the rows of a block add to the gradients of a panel's keys and values.
    void by_keys(const Block& block, Index panel, Index chunk) {
        Index low = 0, high = block.groups;  // the groups that see something of it
        while (low < high && !block.sees(low, panel)) low++;
        while (low < high && !block.sees(high - 1, panel)) high--;
        const Index pairs = (high - low) * ROWS / 2, skipped = low * ROWS * COLUMNS;
        const auto add = [&](const Bfloat16* by_key, const Bfloat16* by_row, float* gradient) {
            for (Index w = 0; w < p.width; w += COLUMNS)
                for (Index key = 0; key < COLUMNS; key += ROWS) {
                    float* const sum = gradient + (panel * COLUMNS + key) * p.width + w;
                    const Bfloat16* by[ROWS];
                    for (Index i = 0; i < ROWS; i++)
                        by[i] = by_key + (panel - chunk) * rows * COLUMNS + skipped + 2 * (key + i);
                    multiply(by, 2 * COLUMNS, by_row + w * rows + skipped, pairs, sum, p.width, false);
                }
        };
        add(weights, grad_pairs, grad_v);
        add(grad_scores, q_pairs, grad_k);
    }
};

void backward(const Problem& p, const Gradients& of) {
    const Index heads = p.batch * p.key_heads;
    const auto run = [&](Index i, int threads) { Backward{p, of, i / p.key_heads, i % p.key_heads, threads}.run(); };
    if (heads % p.threads == 0 || heads >= 4 * p.threads) {
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
        for (Index i = 0; i < heads; i++) run(i, 1);
    } else {  // all threads share each head
        for (Index i = 0; i < heads; i++) run(i, p.threads);
    }
}

Problem problem(
    const int64_t* shape, float scale, const Bfloat16* q, const Bfloat16* k, const Bfloat16* v, const int64_t* strides,
    const int64_t* first, int threads) {
    return {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], scale, threads,
            {q, strides}, {k, strides + 3}, {v, strides + 6}, first, shape[6]};
}

}  // namespace

extern "C" {
int can_attend() { return 1; }
void attention(
    const int64_t* shape, const int64_t* strides, float scale, const Bfloat16* q, const Bfloat16* k, const Bfloat16* v,
    const int64_t* first, float* logsumexp, Bfloat16* out, int threads) {
    forward(problem(shape, scale, q, k, v, strides, first, threads), {out, strides + 9}, logsumexp);
}
void attention_backward(
    const int64_t* shape, const int64_t* strides, float scale, const Bfloat16* q, const Bfloat16* k, const Bfloat16* v,
    const int64_t* first, const float* logsumexp, const Bfloat16* out, const Bfloat16* grad, Bfloat16* grad_q,
    Bfloat16* grad_k, Bfloat16* grad_v, int threads) {
    backward(
        problem(shape, scale, q, k, v, strides, first, threads),
        {{out, strides + 9}, {grad, strides + 12}, logsumexp, {grad_q, strides + 15}, {grad_k, strides + 18},
         {grad_v, strides + 21}});
}
}

#else
extern "C" int can_attend() { return 0; }
#endif
