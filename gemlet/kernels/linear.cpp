// Products with weights and their way back, on a CPU with AMX: linear layers, and the feed-forward part of a block.
// Weights are packed from what they are kept in, so that no copy of them in bf16 is made, and their gradients come in
// float32, as they are summed up.
//
// What becomes of a row depends on nothing beside it, and no bit on the number of threads.
//
// gemlet/kernels/linear.py calls the functions at the end. Nothing is checked here.

#include "products.h"

#if defined(PRODUCTS) && defined(__AMX_BF16__)

#include <numeric>
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

// Brings the rows of a square near that will be written, or read, one by one.
auto fetch(const Matrix<Bfloat16>& x, Index row, Index column) {
    return [=, &x](Index i) {
        if (row + i < x.rows) __builtin_prefetch(x.begin + (row + i) * x.columns + column, 1);
    };
}

// ---- products of whole matrices

constexpr Index MOST = 1 << 19;        // numbers of left factors that a thread has at a time: half of the second cache
constexpr Index MOST_RIGHT = 1 << 17;  // of a right one
constexpr Index MOST_ROWS = 256;
constexpr Index MOST_DEPTH = 1024;  // of what is a sum over all tokens, at a time

constexpr Index fitting(Index numbers) { return std::max(SIDE, std::min(MOST_ROWS, MOST / numbers / SIDE * SIDE)); }

// Of a left factor with so many numbers a row, blocks of rows that are shared out among threads.
template <class Use>
void for_rows(Index rows, Index numbers, int threads, const Use& use) {
    const Index all = up(rows, SIDE) / SIDE, most = fitting(numbers);
    const Index blocks = up(up(rows, most) / most, threads), size = up(all, blocks) / blocks * SIDE;
    Array<Bfloat16> left(size * numbers);
#pragma omp for schedule(dynamic)
    for (Index first = 0; first < all * SIDE; first += size) use(first, std::min(first + size, all * SIDE), left);
}

// Goes through the squares of a product of some rows and columns. Columns come in strips, of which the second cache
// holds so much of the right factor.
template <class Use>
void for_squares(Index first, Index last, Index from, Index to, Index depth, const Use& use) {
    const Index strip = std::max(SIDE, MOST_RIGHT / depth / SIDE * SIDE);
    for (Index begin = from; begin < to; begin += strip)
        for (Index row = first; row < last; row += SIDE)
            for (Index column = begin; column < std::min(begin + strip, to); column += SIDE) use(row, column);
}

// The product of some rows: left [rows, depth] @ right [depth, columns], of which the squares of a row and of a column
// follow one another.
template <class Use>
void multiply_all(
    Index first, Index last, Index depth, Index columns, const Bfloat16* left, const Bfloat16* right, const Use& use,
    Index from = 0) {
    for_squares(first, last, from, columns, depth, [&](Index row, Index column) {
        use(row, column, left + (row - first) * depth, right + column * depth);
    });
}

// Shares out a product in blocks of rows and as many parts of the columns as give each thread the same: for each
// use(first, last, from, to, memory), with room for the left factor.
template <class Use>
void for_blocks(Index rows, Index depth, Index columns, int threads, const Use& use) {
    const Index all = up(rows, SIDE) / SIDE, most = fitting(depth) / SIDE, blocks = up(all, most) / most;
    const Index size = up(all, blocks) / blocks * SIDE, panels = columns / SIDE;
    const Index parts = std::min<Index>(panels, threads / std::gcd<Index>(blocks, threads));
    Array<Bfloat16> memory(size * depth);
#pragma omp for schedule(dynamic)
    for (Index i = 0; i < blocks * parts; i++) {
        const Index first = i / parts * size, part = i % parts;
        use(first, std::min(first + size, all * SIDE), panels * part / parts * SIDE,
            panels * (part + 1) / parts * SIDE, memory.begin);
    }
}

// The product of all rows. pack(first, last, memory) packs the left factor of some.
template <class Pack, class Use>
void multiply_all(
    Index rows, Index depth, Index columns, const Bfloat16* right, int threads, const Pack& pack, const Use& use) {
    for_blocks(rows, depth, columns, threads, [&](Index first, Index last, Index from, Index to, Bfloat16* memory) {
        multiply_all(first, last, depth, to, pack(first, last, memory), right, use, from);
    });
}

// Makes squares one after the other: at(row, k, square) makes one.
template <class At>
const Bfloat16* pack_left(Index first, Index last, Index depth, Bfloat16* squares, const At& at) {
    Bfloat16* square = squares;
    for (Index row = first; row < last; row += SIDE)
        for (Index k = 0; k < depth; k += SIDE, square += SQUARE) at(row, k, square);
    return squares;
}

template <class T>
const Bfloat16* pack_left(const Matrix<T>& x, Index first, Index last, Bfloat16* squares) {
    return pack_left(first, last, x.columns, squares, [&](Index row, Index k, Bfloat16* square) {
        as_left(x.at(row, k), square);
    });
}

// Where the squares of some rows of a left factor begin, and how many numbers a row has there.
struct Left {
    const Bfloat16* begin;
    Index depth;
};

// A product whose depth is all tokens, in float32. Its sums go on from part to part of the tokens: of these the caches
// hold what a block reads again and again. left_of(first, last, t, part, memory) is the left factor of some rows and
// tokens, which it may pack; at(row, column) is where one of the sums begins.
template <class LeftOf, class At>
void sum_over_tokens(
    Index rows, Index tokens, Index columns, const Bfloat16* right, int threads, const LeftOf& left_of,
    const At& at) {
    const Index depth = std::min(tokens, MOST_DEPTH);
    for_blocks(rows, depth, columns, threads, [&](Index first, Index last, Index from, Index to, Bfloat16* memory) {
        for (Index t = 0; t < tokens; t += depth) {
            const Index part = std::min(depth, tokens - t);
            const Left left = left_of(first, last, t, part, memory);
            for_squares(first, last, from, to, part, [&](Index row, Index column) {
                float* const sums = at(row, column);
                const float* const next = t > 0 && column + SIDE < to ? sums + SIDE : sums;
                multiply(
                    left.begin + (row - first) * left.depth, right + column * tokens + t * SIDE, part / SIDE, sums,
                    columns, t == 0, RowByRow(part / SIDE, fetch(next, columns)));
            });
        }
    });
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
void linear(
    const Matrix<const Bfloat16>& x, const Stacked<const T>& weights, const Stacked<Bfloat16>& out, int threads) {
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
        multiply_all(
            x.rows, inputs, outputs, right, threads,
            [&](Index first, Index last, Bfloat16* memory) { return pack_left(x, first, last, memory); },
            [&](Index row, Index column, const Bfloat16* left, const Bfloat16* right) {
                const Matrix<Bfloat16>& to = out.with_column(column);
                multiply(
                    left, right, inputs / SIDE, sums, SIDE, true, RowByRow(inputs / SIDE, fetch(to, row, column)));
                write(sums, to, row, column);
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
        multiply_all(
            x.rows, outputs, inputs, right, threads,
            [&](Index first, Index last, Bfloat16* memory) {
                return pack_left(first, last, outputs, memory, [&](Index row, Index output, Bfloat16* square) {
                    const auto& part = grad.with_column(output);
                    as_left(part.at(row, output), square);
                });
            },
            [&](Index row, Index column, const Bfloat16* left, const Bfloat16* right) {
                multiply(
                    left, right, outputs / SIDE, sums, SIDE, true,
                    RowByRow(outputs / SIDE, fetch(grad_x, row, column)));
                write(sums, grad_x, row, column);
            });
        sum_over_tokens(
            outputs, tokens, inputs, states, threads,
            [&](Index first, Index last, Index t, Index part, Bfloat16* memory) -> Left {
                return {pack_left(first, last, part, memory, [&](Index output, Index k, Bfloat16* square) {
                    const auto& of = grad.with_column(output);
                    turned_as_left(of.at(t + k, output), square);
                }), part};
            },
            [&](Index row, Index column) {
                const Matrix<float>& to = grad_weights.with_row(row);
                return to.begin + row * inputs + column;
            });
    }
}

// ---- the feed-forward part: down(gelu(gate(x)) * up(x)), with the tanh form of GELU (arXiv 1606.08415)

// GELU is x sigmoid(u) with u = 2 sqrt(2 / pi) (x + 0.044715 x^3).
constexpr float LINEAR = 1.5957691216f, CUBIC = 0.044715f * LINEAR;

// To 1e-4, a twentieth of what bf16 can tell.
inline __m512 sigmoid_of_u(__m512 x) {
    const __m512 slope = _mm512_fnmsub_ps(
        _mm512_mul_ps(x, x), _mm512_set1_ps(LOG2_E * CUBIC), _mm512_set1_ps(LOG2_E * LINEAR));
    return _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1), power_of_2(_mm512_mul_ps(x, slope))));
}

// Does with each row of a square what there is to do while the next square is multiplied.
template <class Square, class Use>
class Behind {
    const Use& use;
    Square square{};
    bool waits = false;

  public:
    explicit Behind(const Use& use) : use(use) {}
    void operator()(Index row) const {
        if (waits) use(square, row);
    }
    void next(const Square& following) {  // when all rows are done
        square = following;
        waits = true;
    }
    ~Behind() {
        for (Index row = 0; row < SIDE; row++) (*this)(row);
    }
};

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

struct Sums {  // of a square: its place; gate and up in float32; where their product goes
    Index row, column;
    const float *gate, *up;
    Bfloat16* product;
};

// The results of gate and up, [tokens, inner], are kept for the way back.
template <class T>
void feed_forward(
    const Matrix<const Bfloat16>& x, const Matrix<const T>& gate_weight, const Matrix<const T>& up_weight,
    const Matrix<const T>& down_weight, const Matrix<Bfloat16>& gate_states, const Matrix<Bfloat16>& up_states,
    const Matrix<Bfloat16>& out, int threads) {
    const Index width = x.columns, inner = gate_states.columns;
    Array<Bfloat16> gate_right(inner * width), up_right(inner * width), down_right(inner * width);
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        alignas(64) float of_gate[2 * SQUARE], of_up[2 * SQUARE];
        bool turn = false;
        const auto activate = [&](const Sums& square, Index i) {
            const Row gates = row_of(gate_states, square.row + i, square.column);
            const Row ups = row_of(up_states, square.row + i, square.column);
            for (Index j = 0; j < SIDE; j += 16) {
                const Index at = i * SIDE + j;
                const __m256i g = load(square.gate + at), u = load(square.up + at);
                gates.write(j, g);
                ups.write(j, u);
                const __m512 x = widened(g), gelu = _mm512_mul_ps(x, sigmoid_of_u(x));
                _mm256_store_si256((__m256i*)(square.product + at), narrowed(_mm512_mul_ps(gelu, widened(u))));
            }
        };
        pack_turned(gate_weight, gate_right);
        pack_turned(up_weight, up_right);
        pack_turned(down_weight, down_right);
#pragma omp barrier
        for_rows(x.rows, width + inner, threads, [&](Index first, Index last, Bfloat16* left) {
            Bfloat16* const product = left + (last - first) * width;
            pack_left(x, first, last, left);
            {
                Behind<Sums, decltype(activate)> behind(activate);
                multiply_all(
                    first, last, width, inner, left, gate_right,
                    [&](Index row, Index column, const Bfloat16* left, const Bfloat16* right) {
                        const auto fetch_gates = fetch(gate_states, row, column);
                        const auto fetch_ups = fetch(up_states, row, column);
                        RowByRow meanwhile(2 * width / SIDE, [&](Index i) {
                            fetch_gates(i);
                            fetch_ups(i);
                            behind(i);
                        });
                        float *const gates = of_gate + turn * SQUARE, *const ups = of_up + turn * SQUARE;
                        multiply(left, right, width / SIDE, gates, SIDE, true, meanwhile);
                        multiply(left, up_right + column * width, width / SIDE, ups, SIDE, true, meanwhile);
                        behind.next({row, column, gates, ups, product + (row - first) * inner + column * SIDE});
                        turn = !turn;
                    });
            }
            multiply_all(
                first, last, inner, width, product, down_right,
                [&](Index row, Index column, const Bfloat16* left, const Bfloat16* right) {
                    multiply(
                        left, right, inner / SIDE, of_up, SIDE, true, RowByRow(inner / SIDE, fetch(out, row, column)));
                    write(of_up, out, row, column);
                });
        });
    }
}

struct Gradients {  // of a square: its place; that of the product in float32; where those of gate and up go
    Index row, column;
    const float* above;
    Bfloat16* both;
};

template <class T>
void feed_forward_backward(
    const Matrix<const Bfloat16>& grad, const Matrix<const Bfloat16>& x, const Matrix<Bfloat16>& gate_states,
    const Matrix<Bfloat16>& up_states, const Matrix<const T>& gate_weight, const Matrix<const T>& up_weight,
    const Matrix<const T>& down_weight, const Matrix<Bfloat16>& grad_x, float* grad_gate_weight, float* grad_up_weight,
    float* grad_down_weight, int threads) {
    const Index width = x.columns, inner = gate_states.columns, tokens = up(x.rows, SIDE);
    Array<Bfloat16> down_right(inner * width), both_right(2 * inner * width), states(tokens * width);
    // Left factors [inner, tokens] for the weights' gradients, and a right one [tokens, inner]
    Array<Bfloat16> grad_gate(inner * tokens), grad_up(inner * tokens), product(inner * tokens);
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        alignas(64) float sums[2 * SQUARE];
        alignas(64) Bfloat16 of_product[SQUARE];
        bool turn = false;
        const auto differentiate = [&](const Gradients& square, Index i) {
            const Row gates = row_of(gate_states, square.row + i, square.column);
            const Row ups = row_of(up_states, square.row + i, square.column);
            Bfloat16 *const of_gate = square.both, *const of_up = of_gate + inner * SIDE;
            for (Index j = 0; j < SIDE; j += 16) {
                const __m512 above = _mm512_load_ps(square.above + i * SIDE + j), x = gates.read(j);
                const __m512 s = sigmoid_of_u(x), gelu = _mm512_mul_ps(x, s), y = ups.read(j);
                // d gelu / dx = s + x s (1 - s) du/dx
                const __m512 slope =
                    _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(3 * CUBIC), _mm512_set1_ps(LINEAR));
                const __m512 rest = _mm512_mul_ps(gelu, _mm512_sub_ps(_mm512_set1_ps(1), s));
                const __m512 derivative = _mm512_fmadd_ps(rest, slope, s);
                const auto put = [&](Bfloat16* to, __m512 value) {
                    _mm256_store_si256((__m256i*)(to + i * SIDE + j), narrowed(value));
                };
                put(of_gate, _mm512_mul_ps(_mm512_mul_ps(above, y), derivative));
                put(of_up, _mm512_mul_ps(above, gelu));
                put(of_product, _mm512_mul_ps(gelu, y));
            }
            if (i < SIDE - 1) return;
            const Index at = square.column * tokens + square.row * SIDE;
            const auto rows = [](const Bfloat16* of) { return [=](Index i) { return of + i * SIDE; }; };
            turned_as_left(rows(of_gate), grad_gate + at);
            turned_as_left(rows(of_up), grad_up + at);
            as_right(rows(of_product), product + at);
        };
        pack_right(x, states);
        pack_right(down_weight, down_right);
#pragma omp for
        for (Index i = 0; i < inner; i += SIDE)
            for (Index w = 0; w < width; w += SIDE) {
                as_right(gate_weight.at(i, w), both_right + w * 2 * inner + i * SIDE);
                as_right(up_weight.at(i, w), both_right + w * 2 * inner + (inner + i) * SIDE);
            }
        for_rows(x.rows, width + 2 * inner, threads, [&](Index first, Index last, Bfloat16* left) {
            Bfloat16* const both = left + (last - first) * width;  // [rows, 2 inner]
            pack_left(grad, first, last, left);
            {
                Behind<Gradients, decltype(differentiate)> behind(differentiate);
                multiply_all(
                    first, last, width, inner, left, down_right,
                    [&](Index row, Index column, const Bfloat16* left, const Bfloat16* right) {
                        float* const above = sums + turn * SQUARE;
                        const auto fetch_gates = fetch(gate_states, row, column);
                        const auto fetch_ups = fetch(up_states, row, column);
                        const Index at = column * tokens + row * SIDE;
                        RowByRow meanwhile(width / SIDE, [&](Index i) {
                            fetch_gates(i);
                            fetch_ups(i);
                            for (Bfloat16* const x : {grad_gate + at, grad_up + at, product + at})
                                __builtin_prefetch(x + i * SIDE, 1);
                            behind(i);
                        });
                        multiply(left, right, width / SIDE, above, SIDE, true, meanwhile);
                        behind.next({row, column, above, both + (row - first) * 2 * inner + column * SIDE});
                        turn = !turn;
                    });
            }
            multiply_all(
                first, last, 2 * inner, width, both, both_right,
                [&](Index row, Index column, const Bfloat16* left, const Bfloat16* right) {
                    multiply(
                        left, right, 2 * inner / SIDE, sums, SIDE, true,
                        RowByRow(2 * inner / SIDE, fetch(grad_x, row, column)));
                    write(sums, grad_x, row, column);
                });
        });
        const auto in = [](float* begin, Index columns) {
            return [=](Index row, Index column) { return begin + row * columns + column; };
        };
        const auto packed = [&](const Bfloat16* left) {
            return [=](Index first, Index, Index t, Index, Bfloat16*) -> Left {
                return {left + first * tokens + t * SIDE, tokens};
            };
        };
        const auto to_pack = [&](Index first, Index last, Index t, Index part, Bfloat16* memory) -> Left {
            return {pack_left(first, last, part, memory, [&](Index output, Index k, Bfloat16* square) {
                turned_as_left(grad.at(t + k, output), square);
            }), part};
        };
        sum_over_tokens(inner, tokens, width, states, threads, packed(grad_gate), in(grad_gate_weight, width));
        sum_over_tokens(inner, tokens, width, states, threads, packed(grad_up), in(grad_up_weight, width));
        sum_over_tokens(width, tokens, inner, product, threads, to_pack, in(grad_down_weight, inner));
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
