// Products with weights and their way back, on a CPU with AMX: linear layers, and the feed-forward part of a block.
// Weights are packed from what they are kept in, so that no copy of them in bf16 is made, and their gradients come in
// float32, as they are summed up.
//
// What becomes of a row depends on nothing beside it, and no bit on the number of threads.
//
// gemlet/kernels/linear.py calls the functions at the end. Nothing is checked here.

#include "products.h"

#if defined(PRODUCTS) && defined(__AMX_BF16__)

#include <cmath>
#include <vector>

namespace {

// ---- numbers by rows

template <class T>
struct Matrix {
    T* begin;
    Index rows, columns;
    // From there 32 x 32 numbers; 0 beyond the last row.
    auto at(Index row, Index column) const {
        return [=, *this](Index i) {
            return row + i < rows ? begin + (row + i) * columns + column : reinterpret_cast<const T*>(ZEROS);
        };
    }
};

template <class T>
struct Stacked {  // matrices as one: of weights the rows follow one another, of states the columns
    std::vector<Matrix<T>> parts;

    Stacked(T* const* begin, Index rows, const int64_t* columns, Index count) {
        for (Index i = 0; i < count; i++) parts.push_back({begin[i], rows, columns[i]});
    }
    Stacked(T* const* begin, const int64_t* rows, Index columns, Index count) {
        for (Index i = 0; i < count; i++) parts.push_back({begin[i], rows[i], columns});
    }
    Index rows() const {
        Index sum = 0;
        for (const auto& part : parts) sum += part.rows;
        return sum;
    }
    const Matrix<T>& with_row(Index& row) const {  // becomes that of the part
        const Matrix<T>* part = &parts[0];
        for (; row >= part->rows; part++) row -= part->rows;
        return *part;
    }
    const Matrix<T>& with_column(Index& column) const {
        const Matrix<T>* part = &parts[0];
        for (; column >= part->columns; part++) column -= part->columns;
        return *part;
    }
};

void write(const float* sums, const Matrix<Bfloat16>& out, Index row, Index column) {
    for (Index i = 0; i < std::min(SIDE, out.rows - row); i++)
        for (Index j = 0; j < SIDE; j += 16)
            _mm256_storeu_si256(
                (__m256i*)(out.begin + (row + i) * out.columns + column + j), load(sums + i * SIDE + j));
}

void prefetch(const Matrix<Bfloat16>& x, Index row, Index column) {
    for (Index i = 0; i < std::min(SIDE, x.rows - row); i++)
        __builtin_prefetch(x.begin + (row + i) * x.columns + column, 1);
}

// ---- products of whole matrices

constexpr Index MOST = 1 << 19;        // numbers of left factors that a thread has at a time: half of the second cache
constexpr Index MOST_RIGHT = 1 << 18;  // of a right one
constexpr Index MOST_ROWS = 256;

// Of a left factor with so many numbers a row, blocks of rows that are shared out among threads.
template <class Use>
void for_blocks(Index rows, Index numbers, int threads, const Use& use) {
    const Index fitting = std::max(SIDE, std::min(MOST_ROWS, MOST / numbers / SIDE * SIDE));
    const Index all = up(rows, SIDE) / SIDE, least = up(up(rows, fitting) / fitting, threads);
    const Index size = up(all, least) / least * SIDE;
    Array<Bfloat16> memory(size * numbers);
#pragma omp for schedule(dynamic)
    for (Index first = 0; first < all * SIDE; first += size) use(first, std::min(first + size, all * SIDE), memory);
}

// Goes through the squares of a product of some rows: left [rows, depth] @ right [depth, columns], of which the squares
// of a row and of a column follow one another. Columns come in strips that the second cache holds.
template <class Use>
void multiply_all(
    Index first, Index last, Index depth, Index columns, const Bfloat16* left, const Bfloat16* right, const Use& use) {
    const Index strip = std::max(SIDE, MOST_RIGHT / depth / SIDE * SIDE);
    for (Index begin = 0; begin < columns; begin += strip)
        for (Index row = first; row < last; row += SIDE)
            for (Index column = begin; column < std::min(begin + strip, columns); column += SIDE)
                use(row, column, left + (row - first) * depth, right + column * depth);
}

template <class T>
void pack_left(const Matrix<T>& x, Index first, Index last, Bfloat16* left) {
    for (Index row = first; row < last; row += SIDE)
        for (Index k = 0; k < x.columns; k += SIDE, left += SQUARE) as_left(x.at(row, k), left);
}

// x as the right factor of what is a sum over its rows.
template <class T>
void pack_right(const Matrix<T>& x, Bfloat16* right) {
    const Index rows = up(x.rows, SIDE);
#pragma omp for nowait
    for (Index row = 0; row < rows; row += SIDE)
        for (Index k = 0; k < x.columns; k += SIDE) as_right(x.at(row, k), right + k * rows + row * SIDE);
}

// x's transpose as a right factor.
template <class T>
void pack_turned(const Matrix<T>& x, Bfloat16* right) {
#pragma omp for nowait
    for (Index row = 0; row < x.rows; row += SIDE)
        for (Index k = 0; k < x.columns; k += SIDE) turned_as_right(x.at(row, k), right + row * x.columns + k * SIDE);
}

// ---- linear layers that read the same

template <class T>
void linear(const Matrix<const Bfloat16>& x, const Stacked<const T>& weights, const Stacked<Bfloat16>& out, int threads) {
    const Index inputs = x.columns, outputs = weights.rows();
    Array<Bfloat16> right(outputs * inputs);
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        alignas(64) float sums[SQUARE];
        Index done = 0;
        for (const auto& weight : weights.parts) {
            pack_turned(weight, right + done * inputs);
            done += weight.rows;
        }
#pragma omp barrier
        for_blocks(x.rows, inputs, threads, [&](Index first, Index last, Bfloat16* left) {
            pack_left(x, first, last, left);
            multiply_all(
                first, last, inputs, outputs, left, right,
                [&](Index row, Index column, const Bfloat16* left, const Bfloat16* right) {
                    const Matrix<Bfloat16>& to = out.with_column(column);
                    prefetch(to, row, column);
                    multiply(left, right, inputs / SIDE, sums, SIDE, true);
                    write(sums, to, row, column);
                });
        });
    }
}

template <class T>
void linear_backward(
    const Stacked<const Bfloat16>& grad, const Matrix<const Bfloat16>& x, const Stacked<const T>& weights,
    const Matrix<Bfloat16>& grad_x, const Stacked<float>& grad_weights, int threads) {
    const Index inputs = x.columns, outputs = weights.rows(), tokens = up(x.rows, SIDE);
    Array<Bfloat16> right(outputs * inputs), states(tokens * inputs);
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        alignas(64) float sums[SQUARE];
        pack_right(x, states);
#pragma omp for
        for (Index output = 0; output < outputs; output += SIDE) {
            Index row = output;
            const auto& weight = weights.with_row(row);
            for (Index i = 0; i < inputs; i += SIDE) as_right(weight.at(row, i), right + i * outputs + output * SIDE);
        }
        for_blocks(x.rows, outputs, threads, [&](Index first, Index last, Bfloat16* left) {
            for (Index row = first; row < last; row += SIDE)
                for (Index output = 0; output < outputs; output += SIDE) {
                    Index column = output;
                    const auto& part = grad.with_column(column);
                    as_left(part.at(row, column), left + (row - first) * outputs + output * SIDE);
                }
            multiply_all(
                first, last, outputs, inputs, left, right,
                [&](Index row, Index column, const Bfloat16* left, const Bfloat16* right) {
                    prefetch(grad_x, row, column);
                    multiply(left, right, outputs / SIDE, sums, SIDE, true);
                    write(sums, grad_x, row, column);
                });
        });
        for_blocks(outputs, tokens, threads, [&](Index first, Index last, Bfloat16* left) {
            for (Index output = first; output < last; output += SIDE) {
                Index column = output;
                const auto& part = grad.with_column(column);
                for (Index t = 0; t < tokens; t += SIDE)
                    turned_as_left(part.at(t, column), left + (output - first) * tokens + t * SIDE);
            }
            multiply_all(
                first, last, tokens, inputs, left, states,
                [&](Index row, Index column, const Bfloat16* left, const Bfloat16* right) {
                    const Matrix<float>& to = grad_weights.with_row(row);
                    multiply(left, right, tokens / SIDE, to.begin + row * inputs + column, inputs, true);
                });
        });
    }
}

// ---- the feed-forward part: down(gelu(gate(x)) * up(x)), with the tanh form of GELU (arXiv 1606.08415)

// GELU is x sigmoid(u) with u = 2 sqrt(2 / pi) (x + 0.044715 x^3).
constexpr float LINEAR = 1.5957691216f, CUBIC = 0.044715f * LINEAR;

inline __m512 sigmoid_of_u(__m512 x) {
    const __m512 slope = _mm512_fnmsub_ps(
        _mm512_mul_ps(x, x), _mm512_set1_ps(LOG2_E * CUBIC), _mm512_set1_ps(LOG2_E * LINEAR));
    const __m512 below = _mm512_add_ps(_mm512_set1_ps(1), power_of_2(_mm512_mul_ps(x, slope)));
    const __m512 r = _mm512_rcp14_ps(below), error = _mm512_fnmadd_ps(below, r, _mm512_set1_ps(1));
    // of infinity the inverse is 0, and the error no number
    return _mm512_mask_fmadd_ps(r, _mm512_cmp_ps_mask(below, _mm512_set1_ps(INFINITY), _CMP_NEQ_UQ), error, r);
}

// The rows of some states; beyond the last one numbers are 0.
struct Row {
    Bfloat16* begin;  // or none
    __m512 read(Index j) const { return begin ? widened(load(begin + j)) : _mm512_setzero_ps(); }
    void write(Index j, __m256i x) const {
        if (begin) _mm256_storeu_si256((__m256i*)(begin + j), x);
    }
};
Row row_of(const Matrix<Bfloat16>& x, Index row, Index column) {
    return {row < x.rows ? x.begin + row * x.columns + column : nullptr};
}

// `gate` and `up`, [tokens, inner], are kept for the way back.
template <class T>
void feed_forward(
    const Matrix<const Bfloat16>& x, const Matrix<const T>& gate_weight, const Matrix<const T>& up_weight,
    const Matrix<const T>& down_weight, const Matrix<Bfloat16>& gate, const Matrix<Bfloat16>& up,
    const Matrix<Bfloat16>& out, int threads) {
    const Index width = x.columns, inner = gate.columns;
    Array<Bfloat16> gate_right(inner * width), up_right(inner * width), down_right(inner * width);
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        alignas(64) float of_gate[SQUARE], of_up[SQUARE];
        pack_turned(gate_weight, gate_right);
        pack_turned(up_weight, up_right);
        pack_turned(down_weight, down_right);
#pragma omp barrier
        for_blocks(x.rows, width + inner, threads, [&](Index first, Index last, Bfloat16* left) {
            Bfloat16* const product = left + (last - first) * width;
            pack_left(x, first, last, left);
            multiply_all(
                first, last, width, inner, left, gate_right,
                [&](Index row, Index column, const Bfloat16* left, const Bfloat16* right) {
                    prefetch(gate, row, column);
                    prefetch(up, row, column);
                    multiply(left, right, width / SIDE, of_gate, SIDE, true);
                    multiply(left, up_right + column * width, width / SIDE, of_up, SIDE, true);
                    Bfloat16* const square = product + (row - first) * inner + column * SIDE;
                    for (Index i = 0; i < SIDE; i++) {
                        const Row gates = row_of(gate, row + i, column), ups = row_of(up, row + i, column);
                        for (Index j = 0; j < SIDE; j += 16) {
                            const __m256i g = load(of_gate + i * SIDE + j), u = load(of_up + i * SIDE + j);
                            gates.write(j, g);
                            ups.write(j, u);
                            const __m512 x = widened(g), gelu = _mm512_mul_ps(x, sigmoid_of_u(x));
                            _mm256_store_si256(
                                (__m256i*)(square + i * SIDE + j), narrowed(_mm512_mul_ps(gelu, widened(u))));
                        }
                    }
                });
            multiply_all(
                first, last, inner, width, product, down_right,
                [&](Index row, Index column, const Bfloat16* left, const Bfloat16* right) {
                    prefetch(out, row, column);
                    multiply(left, right, inner / SIDE, of_up, SIDE, true);
                    write(of_up, out, row, column);
                });
        });
    }
}

template <class T>
void feed_forward_backward(
    const Matrix<const Bfloat16>& grad, const Matrix<const Bfloat16>& x, const Matrix<Bfloat16>& gate,
    const Matrix<Bfloat16>& up_states, const Matrix<const T>& gate_weight, const Matrix<const T>& up_weight,
    const Matrix<const T>& down_weight, const Matrix<Bfloat16>& grad_x, float* grad_gate_weight, float* grad_up_weight,
    float* grad_down_weight, int threads) {
    const Index width = x.columns, inner = gate.columns, tokens = up(x.rows, SIDE);
    Array<Bfloat16> down_right(inner * width), both_right(2 * inner * width), states(tokens * width);
    // Left factors [inner, tokens] for the weights' gradients, and a right one [tokens, inner]
    Array<Bfloat16> grad_gate(inner * tokens), grad_up(inner * tokens), product(inner * tokens);
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        alignas(64) float sums[SQUARE];
        alignas(64) Bfloat16 of_product[SQUARE];
        pack_right(x, states);
        pack_right(down_weight, down_right);
#pragma omp for
        for (Index i = 0; i < inner; i += SIDE)
            for (Index w = 0; w < width; w += SIDE) {
                as_right(gate_weight.at(i, w), both_right + w * 2 * inner + i * SIDE);
                as_right(up_weight.at(i, w), both_right + w * 2 * inner + (inner + i) * SIDE);
            }
        for_blocks(x.rows, width + 2 * inner, threads, [&](Index first, Index last, Bfloat16* left) {
            Bfloat16* const both = left + (last - first) * width;  // [rows, 2 inner]
            pack_left(grad, first, last, left);
            multiply_all(
                first, last, width, inner, left, down_right,
                [&](Index row, Index column, const Bfloat16* left, const Bfloat16* right) {
                    multiply(left, right, width / SIDE, sums, SIDE, true);
                    Bfloat16* const of_gate = both + (row - first) * 2 * inner + column * SIDE;
                    Bfloat16* const of_up = of_gate + inner * SIDE;
                    for (Index i = 0; i < SIDE; i++) {
                        const Row gates = row_of(gate, row + i, column), ups = row_of(up_states, row + i, column);
                        for (Index j = 0; j < SIDE; j += 16) {
                            const __m512 above = _mm512_load_ps(sums + i * SIDE + j), x = gates.read(j);
                            const __m512 s = sigmoid_of_u(x), gelu = _mm512_mul_ps(x, s), y = ups.read(j);
                            // d gelu / dx = s + x s (1 - s) du/dx
                            const __m512 slope = _mm512_fmadd_ps(
                                _mm512_mul_ps(x, x), _mm512_set1_ps(3 * CUBIC), _mm512_set1_ps(LINEAR));
                            const __m512 rest = _mm512_mul_ps(gelu, _mm512_sub_ps(_mm512_set1_ps(1), s));
                            const __m512 derivative = _mm512_fmadd_ps(rest, slope, s);
                            const auto put = [&](Bfloat16* square, __m512 value) {
                                _mm256_store_si256((__m256i*)(square + i * SIDE + j), narrowed(value));
                            };
                            put(of_gate, _mm512_mul_ps(_mm512_mul_ps(above, y), derivative));
                            put(of_up, _mm512_mul_ps(above, gelu));
                            put(of_product, _mm512_mul_ps(gelu, y));
                        }
                    }
                    const Index at = column * tokens + row * SIDE;
                    const auto rows = [](const Bfloat16* square) { return [=](Index i) { return square + i * SIDE; }; };
                    turned_as_left(rows(of_gate), grad_gate + at);
                    turned_as_left(rows(of_up), grad_up + at);
                    as_right(rows(of_product), product + at);
                });
            multiply_all(
                first, last, 2 * inner, width, both, both_right,
                [&](Index row, Index column, const Bfloat16* left, const Bfloat16* right) {
                    prefetch(grad_x, row, column);
                    multiply(left, right, 2 * inner / SIDE, sums, SIDE, true);
                    write(sums, grad_x, row, column);
                });
        });
        const auto sum_over_tokens = [&](Index rows, Index columns, const Bfloat16* right, float* to, const auto& left) {
            for_blocks(rows, tokens, threads, [&](Index first, Index last, Bfloat16* memory) {
                multiply_all(
                    first, last, tokens, columns, left(first, last, memory), right,
                    [&](Index row, Index column, const Bfloat16* left, const Bfloat16* right) {
                        multiply(left, right, tokens / SIDE, to + row * columns + column, columns, true);
                    });
            });
        };
        const auto there = [&](const Bfloat16* left) {
            return [&, left](Index first, Index, Bfloat16*) { return left + first * tokens; };
        };
        sum_over_tokens(inner, width, states, grad_gate_weight, there(grad_gate));
        sum_over_tokens(inner, width, states, grad_up_weight, there(grad_up));
        sum_over_tokens(width, inner, product, grad_down_weight, [&](Index first, Index last, Bfloat16* memory) {
            for (Index output = first; output < last; output += SIDE)
                for (Index t = 0; t < tokens; t += SIDE)
                    turned_as_left(grad.at(t, output), memory + (output - first) * tokens + t * SIDE);
            return memory;
        });
    }
}

}  // namespace

extern "C" {
int can_multiply() { return CAN_MULTIPLY; }
#define FOR(T, name)                                                                                                   \
    /* x [tokens, inputs] @ weight [outputs, inputs].T for each of `count` weights */                                  \
    void linear_##name(                                                                                                \
        const Bfloat16* x, const T* const* weights, Bfloat16* const* out, const int64_t* outputs, int64_t count,       \
        int64_t tokens, int64_t inputs, int threads) {                                                                 \
        linear<T>({x, tokens, inputs}, {weights, outputs, inputs, count}, {out, tokens, outputs, count}, threads);     \
    }                                                                                                                  \
    void linear_backward_##name(                                                                                       \
        const Bfloat16* const* grad, const Bfloat16* x, const T* const* weights, Bfloat16* grad_x,                     \
        float* const* grad_weights, const int64_t* outputs, int64_t count, int64_t tokens, int64_t inputs,             \
        int threads) {                                                                                                 \
        linear_backward<T>(                                                                                            \
            {grad, tokens, outputs, count}, {x, tokens, inputs}, {weights, outputs, inputs, count},                    \
            {grad_x, tokens, inputs}, {grad_weights, outputs, inputs, count}, threads);                                \
    }                                                                                                                  \
    void feed_forward_##name(                                                                                          \
        const Bfloat16* x, const T* gate_weight, const T* up_weight, const T* down_weight, Bfloat16* gate,             \
        Bfloat16* up, Bfloat16* out, int64_t tokens, int64_t width, int64_t inner, int threads) {                      \
        feed_forward<T>(                                                                                               \
            {x, tokens, width}, {gate_weight, inner, width}, {up_weight, inner, width}, {down_weight, width, inner},   \
            {gate, tokens, inner}, {up, tokens, inner}, {out, tokens, width}, threads);                                \
    }                                                                                                                  \
    void feed_forward_backward_##name(                                                                                 \
        const Bfloat16* grad, const Bfloat16* x, Bfloat16* gate, Bfloat16* up, const T* gate_weight,                   \
        const T* up_weight, const T* down_weight, Bfloat16* grad_x, float* grad_gate, float* grad_up,                  \
        float* grad_down, int64_t tokens, int64_t width, int64_t inner, int threads) {                                 \
        feed_forward_backward<T>(                                                                                      \
            {grad, tokens, width}, {x, tokens, width}, {gate, tokens, inner}, {up, tokens, inner},                     \
            {gate_weight, inner, width}, {up_weight, inner, width}, {down_weight, width, inner},                       \
            {grad_x, tokens, width}, grad_gate, grad_up, grad_down, threads);                                          \
    }
FOR(float, float32)
FOR(Bfloat16, bfloat16)
}

#else
extern "C" int can_multiply() { return 0; }
#endif
