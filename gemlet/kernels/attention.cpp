// Attention in bf16 and its way back on a CPU with products in bf16, after FlashAttention (arXiv 2205.14135): scores
// exist for a few queries and keys at a time, and on the way back they are computed again.
//
// A query sees the keys from `first` up to its own position. The heads that share a key head lie side by side: a row
// is one query in one of them, and so many rows read the same keys while these are in the cache. Of a block of rows
// only squares of 32 rows and 32 keys that have something to see are computed.
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
    Index padded() const { return up(keys, SIDE); }
    // So many queries make about so many rows.
    Index queries_of(Index rows) const { return std::max<Index>(1, rows / group()); }
};

constexpr float NOTHING = -1e30f;  // the score of a key that is not seen

// 32 keys or values of a head, and of their width what begins at w; those beyond the last one are 0.
auto rows_of(const Problem& p, const Tensor<const Bfloat16>& x, Index batch, Index head, Index key, Index w) {
    return [=, &p, &x](Index i) { return key + i < p.keys ? x.at(batch, head, key + i) + w : ZEROS; };
}

void write(const float* x, float factor, Bfloat16* row, Index width) {
    for (Index w = 0; w < width; w += 16)
        _mm256_storeu_si256(
            (__m256i*)(row + w), narrowed(_mm512_mul_ps(_mm512_loadu_ps(x + w), _mm512_set1_ps(factor))));
}

// The rows of one key head for some queries, padded by rows of zeros that see nothing.
struct Block {
    const Problem& problem;
    Index batch, key_head, start, count, groups;
    std::vector<int32_t> from, to;  // a row sees the keys [from, to)
    std::vector<Index> low, high;   // a group of 32 rows sees something of the panels, 32 keys each, [low, high)

    Block(const Problem& p, Index batch, Index key_head, Index start, Index queries)
        : problem(p), batch(batch), key_head(key_head), start(start),
          count(std::min(queries, p.queries - start) * p.group()), groups(up(count, SIDE) / SIDE),
          from(groups * SIDE), to(groups * SIDE), low(groups), high(groups) {
        for (Index row = 0; row < count; row++) {
            from[row] = p.first[batch * p.first_stride + query(row)];
            to[row] = p.keys - p.queries + query(row) + 1;
            if (row % SIDE == 0) low[row / SIDE] = from[row] / SIDE;
            high[row / SIDE] = up(to[row], SIDE) / SIDE;
        }
    }
    Index query(Index row) const { return start + row / problem.group(); }
    Index head(Index row) const { return key_head * problem.group() + row % problem.group(); }
    bool sees(Index group, Index panel) const { return low[group] <= panel && panel < high[group]; }

    const Bfloat16* at(const Tensor<const Bfloat16>& x, Index row) const { return x.at(batch, head(row), query(row)); }
    // The rows of a group; pack(w, row) is to take of their width what begins at w.
    template <class Pack>
    void for_width(const Tensor<const Bfloat16>& x, Index group, const Pack& pack) const {
        const Bfloat16* begin[SIDE] = {};  // found once: it takes divisions
        for (Index i = 0; i < std::min(SIDE, count - group * SIDE); i++) begin[i] = at(x, group * SIDE + i);
        for (Index w = 0; w < problem.width; w += SIDE)
            pack(w, [&](Index i) { return begin[i] ? begin[i] + w : ZEROS; });
    }
    // Of the scores of a group and a panel makes nothing those of keys that are not seen.
    void hide(float* scores, Index group, Index panel) const {
        const int32_t key = panel * SIDE, *begin = &from[group * SIDE], *end = &to[group * SIDE];
        if (begin[SIDE - 1] <= key && key + SIDE <= end[0] && end[SIDE - 1]) return;  // all see all
        const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (Index i = 0; i < SIDE; i++)
            for (Index j = 0; j < SIDE; j += 16) {
                const __m512i at = _mm512_add_epi32(_mm512_set1_epi32(key + j), numbers);
                const __mmask16 hidden = _mm512_cmp_epi32_mask(at, _mm512_set1_epi32(begin[i]), _MM_CMPINT_LT) |
                                         _mm512_cmp_epi32_mask(at, _mm512_set1_epi32(end[i]), _MM_CMPINT_NLT);
                _mm512_mask_store_ps(scores + i * SIDE + j, hidden, _mm512_set1_ps(NOTHING));
            }
    }
};

// ---- forwards

constexpr Index KEYS = 256;  // so many at a time: the second cache holds them, their values and what becomes of a block
constexpr Index FORWARD_ROWS = 256;

// What a thread needs for a block of so many rows.
struct Softmax {
    const Index width;
    Array<float> scores, out, top, total;
    Array<Bfloat16> q, powers;  // as squares of left factors
    Softmax(Index rows, Index width)
        : width(width), scores(rows * KEYS), out(rows * width), top(rows), total(rows), q(rows * width),
          powers(rows * KEYS) {}

    // Scores of a row become powers, less the largest score so far. To it goes what was summed up before, too.
    void step(Index row, Index from, Index to, float scale) {
        const Index first = row / SIDE * SIDE * KEYS + row % SIDE * SIDE;
        const float* const s = scores + first;
        const auto for_all = [&](const auto& use) {
            for (Index panel = from * SQUARE; panel < to * SQUARE; panel += SQUARE)
                for (Index j = panel; j < panel + SIDE; j += 16) use(_mm512_load_ps(s + j), j);
        };
        __m512 largest = _mm512_set1_ps(top[row]), sum = _mm512_setzero_ps();
        for_all([&](__m512 x, Index) { largest = _mm512_max_ps(x, largest); });
        const float now = _mm512_reduce_max_ps(largest);
        const __m512 factor = _mm512_set1_ps(scale * LOG2_E);
        const float enough = std::max(now, NOTHING / 2);  // so that of nothing nothing remains
        const __m512 less = _mm512_mul_ps(_mm512_set1_ps(enough), factor);
        for_all([&](__m512 x, Index j) {
            const __m512 power = power_of_2(_mm512_fmsub_ps(x, factor, less));
            sum = _mm512_add_ps(sum, power);
            _mm256_store_si256((__m256i*)(powers + first + j), narrowed(power));
        });
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
    for (Index g = 0; g < block.groups; g++)
        block.for_width(p.q, g, [&](Index w, const auto& row) {
            as_left(row, s.q + g * SIDE * p.width + w * SIDE);
        });
    std::fill(s.top + 0, s.top + block.groups * SIDE, NOTHING);
    std::fill(s.total + 0, s.total + block.groups * SIDE, 0.0f);
    for (Index chunk = block.low[0], end = block.high.back(); chunk < end; chunk += KEYS / SIDE) {
        const Index chunk_end = std::min(end, chunk + KEYS / SIDE);
        for (Index panel = chunk; panel < chunk_end; panel++)  // which stays in the first cache
            for (Index g = 0; g < block.groups; g++) {
                if (!block.sees(g, panel)) continue;
                float* const scores = s.scores + g * SIDE * KEYS + (panel - chunk) * SQUARE;
                multiply(
                    s.q + g * SIDE * p.width, keys + panel * SIDE * p.width, p.width / SIDE, scores, SIDE, true);
                block.hide(scores, g, panel);
            }
        const auto low = [&](Index g) { return std::max(chunk, block.low[g]); };
        const auto high = [&](Index g) { return std::min(chunk_end, block.high[g]); };
        for (Index g = 0; g < block.groups; g++)
            for (Index i = 0; i < SIDE && low(g) < high(g); i++)
                s.step(g * SIDE + i, low(g) - chunk, high(g) - chunk, p.scale);
        for (Index w = 0; w < p.width; w += SIDE)
            for (Index g = 0; g < block.groups; g++)
                if (low(g) < high(g))
                    multiply(
                        s.powers + g * SIDE * KEYS + (low(g) - chunk) * SQUARE,
                        values + w * p.padded() + low(g) * SQUARE, high(g) - low(g), s.out + g * SIDE * p.width + w,
                        p.width, low(g) == block.low[g]);
    }
}

void forward(const Problem& p, const Tensor<Bfloat16>& out, float* logsumexp) {
    const Index panels = p.padded() / SIDE, size = p.padded() * p.width, heads = p.batch * p.key_heads;
    const Index queries = p.queries_of(FORWARD_ROWS), blocks = up(p.queries, queries) / queries;
    Array<Bfloat16> keys(heads * size), values(heads * size);
#pragma omp parallel num_threads(p.threads)
    {
        const Tiles tiles;
#pragma omp for
        for (Index i = 0; i < heads * panels; i++) {
            const Index head = i / panels, key = i % panels * SIDE;
            const Index batch = head / p.key_heads, h = head % p.key_heads;
            for (Index w = 0; w < p.width; w += SIDE) {
                turned_as_right(rows_of(p, p.k, batch, h, key, w), keys + head * size + key * p.width + w * SIDE);
                as_right(rows_of(p, p.v, batch, h, key, w), values + head * size + w * p.padded() + key * SIDE);
            }
        }
        Softmax softmax(up(queries * p.group(), SIDE), p.width);
#pragma omp for schedule(dynamic)
        for (Index i = heads * blocks - 1; i >= 0; i--) {  // the last queries see the most
            const Index head = i % heads;
            const Block block(p, head / p.key_heads, head % p.key_heads, i / heads * queries, queries);
            forward_block(block, keys + head * size, values + head * size, softmax);
            for (Index r = 0; r < block.count; r++) {
                const Index h = block.head(r), query = block.query(r);
                write(softmax.out + r * p.width, 1 / softmax.total[r], out.at(block.batch, h, query), p.width);
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
    const Index queries = p.queries_of(BACKWARD_ROWS), rows = up(queries * p.group(), SIDE);
    const Index size = p.padded() * p.width;
    // Right factors: for the scores, for the weights' gradients, for the queries' gradient
    Array<Bfloat16> keys_turned{size}, values_turned{size}, keys{size};
    Array<float> grad_k{size}, grad_v{size}, grad_q{rows * p.width};
    // Of a block, as left factors, and as right ones for the gradients of keys and values, which are sums over rows
    Array<Bfloat16> q{rows * p.width}, grad{rows * p.width}, q_right{rows * p.width}, grad_right{rows * p.width};
    // Left factors: a panel's keys by the rows that see them, and the rows by keys
    Array<Bfloat16> weights{rows * BACKWARD_KEYS}, grad_scores{rows * BACKWARD_KEYS}, grad_scores_by_row{rows * KEYS};
    Array<float> logsumexp{rows}, inner{rows};  // in units of ln 2; the products of a result and its gradient

    void run() {
#pragma omp parallel num_threads(threads)
        {
            const Tiles tiles;
            const Index me = omp_get_thread_num(), all = omp_get_num_threads();
#pragma omp for
            for (Index key = 0; key < p.padded(); key += SIDE) {
                for (Index w = 0; w < p.width; w += SIDE) {
                    const Index at = key * p.width + w * SIDE;
                    turned_as_right(rows_of(p, p.k, batch, key_head, key, w), keys_turned + at);
                    turned_as_right(rows_of(p, p.v, batch, key_head, key, w), values_turned + at);
                    as_right(rows_of(p, p.k, batch, key_head, key, w), keys + w * p.padded() + key * SIDE);
                }
                std::fill(grad_k + key * p.width, grad_k + (key + SIDE) * p.width, 0.0f);
                std::fill(grad_v + key * p.width, grad_v + (key + SIDE) * p.width, 0.0f);
            }
            for (Index start = 0; start < p.queries; start += queries) {
                const Block block(p, batch, key_head, start, queries);
                // A thread has the same places in every block, so that nobody writes what another one still reads.
                const auto share = [&](Index part) { return std::min(block.groups, rows / SIDE * part / all); };
                const Index first = share(me), last = share(me + 1);
                for (Index g = first; g < last; g++) pack(block, g);
                for (Index chunk = block.low[0], end = block.high.back(); chunk < end; chunk += BACKWARD_KEYS / SIDE) {
                    const Index chunk_end = std::min(end, chunk + BACKWARD_KEYS / SIDE);
                    by_rows(block, first, last, chunk, chunk_end);
#pragma omp barrier
                    for (Index panel = chunk + me; panel < chunk_end; panel += all) by_keys(block, panel, chunk);
#pragma omp barrier
                }
                for (Index r = first * SIDE; r < std::min(last * SIDE, block.count); r++)
                    write(grad_q + r * p.width, p.scale, of.q.at(batch, block.head(r), block.query(r)), p.width);
            }
#pragma omp for
            for (Index key = 0; key < p.keys; key++) {
                write(grad_k + key * p.width, p.scale, of.k.at(batch, key_head, key), p.width);
                write(grad_v + key * p.width, 1, of.v.at(batch, key_head, key), p.width);
            }
        }
    }

    // What is needed of a group's rows.
    void pack(const Block& block, Index g) {
        const auto both = [&](const Tensor<const Bfloat16>& x, Bfloat16* left, Bfloat16* right) {
            block.for_width(x, g, [&](Index w, const auto& row) {
                as_left(row, left + g * SIDE * p.width + w * SIDE);
                as_right(row, right + w * rows + g * SQUARE);
            });
        };
        both(p.q, q, q_right);
        both(of.grad, grad, grad_right);
        for (Index row = g * SIDE; row < (g + 1) * SIDE; row++) {
            const Index r = std::min(row, block.count - 1);
            const Bfloat16 *const x = block.at(of.out, r), *const y = block.at(of.grad, r);
            logsumexp[row] = of.logsumexp[(batch * p.heads + block.head(r)) * p.queries + block.query(r)] * LOG2_E;
            __m512 sum = _mm512_setzero_ps();
            for (Index w = 0; w < p.width; w += 16)
                sum = _mm512_fmadd_ps(widened(load(x + w)), widened(load(y + w)), sum);
            inner[row] = _mm512_reduce_add_ps(sum);
        }
    }

    // Weights and the scores' gradients of some groups of rows, and their part of the queries' gradient.
    void by_rows(const Block& block, Index first, Index last, Index chunk, Index chunk_end) {
        alignas(64) float scores[SQUARE], above[SQUARE];
        for (Index part = chunk; part < chunk_end; part += KEYS / SIDE) {
            const Index part_end = std::min(chunk_end, part + KEYS / SIDE);
            for (Index panel = part; panel < part_end; panel++)
                for (Index g = first; g < last; g++) {
                    if (!block.sees(g, panel)) continue;
                    const Index left = g * SIDE * p.width, right = panel * SIDE * p.width;
                    multiply(q + left, keys_turned + right, p.width / SIDE, scores, SIDE, true);
                    block.hide(scores, g, panel);
                    multiply(grad + left, values_turned + right, p.width / SIDE, above, SIDE, true);
                    const Index by_key = (panel - chunk) * rows * SIDE + g * SQUARE;
                    Bfloat16* const by_row = grad_scores_by_row + g * SIDE * KEYS + (panel - part) * SQUARE;
                    differentiate(scores, above, g * SIDE, weights + by_key, grad_scores + by_key, by_row);
                }
            for (Index w = 0; w < p.width; w += SIDE)
                for (Index g = first; g < last; g++) {
                    const Index low = std::max(part, block.low[g]), high = std::min(part_end, block.high[g]);
                    if (low < high)
                        multiply(
                            grad_scores_by_row + g * SIDE * KEYS + (low - part) * SQUARE,
                            keys + w * p.padded() + low * SQUARE, high - low, grad_q + g * SIDE * p.width + w,
                            p.width, low == block.low[g]);
                }
        }
    }

    // From a square of scores and of the weights' gradients, `above`: weights and the scores' gradients, turned; these
    // as they are, too.
    void differentiate(
        const float* scores, const float* above, Index row, Bfloat16* weights, Bfloat16* grad_scores,
        Bfloat16* grad_scores_by_row) const {
        const __m512 factor = _mm512_set1_ps(p.scale * LOG2_E);
        for (Index j = 0; j < SIDE; j += 16) {
            __m512i x[16], y[16];
            for (Index i = 0; i < SIDE; i += 2) {
                __m256i w[2], s[2];
                for (Index odd = 0; odd < 2; odd++) {
                    const Index at = (i + odd) * SIDE + j;
                    const __m512 less = _mm512_set1_ps(logsumexp[row + i + odd]);
                    const __m512 weight = power_of_2(_mm512_fmsub_ps(_mm512_load_ps(scores + at), factor, less));
                    const __m512 more = _mm512_sub_ps(_mm512_load_ps(above + at), _mm512_set1_ps(inner[row + i + odd]));
                    w[odd] = narrowed(weight);
                    s[odd] = narrowed(_mm512_mul_ps(weight, more));
                    _mm256_store_si256((__m256i*)(grad_scores_by_row + at), s[odd]);
                }
                x[i / 2] = pairs_of(w[0], w[1]);
                y[i / 2] = pairs_of(s[0], s[1]);
            }
            transpose(x);
            transpose(y);
            for (Index i = 0; i < 16; i++) {
                _mm512_store_si512(weights + (j + i) * SIDE, x[i]);
                _mm512_store_si512(grad_scores + (j + i) * SIDE, y[i]);
            }
        }
    }

    // What the rows of a block add to the gradients of a panel's keys and values.
    void by_keys(const Block& block, Index panel, Index chunk) {
        Index low = 0, high = block.groups;  // the groups that see something of it
        while (low < high && !block.sees(low, panel)) low++;
        while (low < high && !block.sees(high - 1, panel)) high--;
        const auto add = [&](const Bfloat16* by_key, const Bfloat16* by_row, float* gradient) {
            float* const sums = gradient + panel * SIDE * p.width;
            for (Index w = 0; w < p.width; w += SIDE) {
                const float* const next = sums + std::min(w + SIDE, p.width - SIDE);
                multiply(
                    by_key + (panel - chunk) * rows * SIDE + low * SQUARE, by_row + w * rows + low * SQUARE, high - low,
                    sums + w, p.width, false, RowByRow(high - low, fetch(next, p.width)));
            }
        };
        add(weights, grad_right, grad_v);
        add(grad_scores, q_right, grad_k);
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
int can_attend() { return CAN_MULTIPLY; }
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
