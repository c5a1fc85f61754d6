// A step of Muon as `optim.Muon` has it, on a CPU with products in bf16: a thread does a matrix at a time, from its
// gradient to its new numbers, and what it needs of it stays in its cache.
//
// What becomes of a matrix depends on nothing beside it, nor on the number of threads.
//
// gemlet/kernels/muon.py calls the functions at the end. Nothing is checked here.

#include "products.h"

#ifdef PRODUCTS

#include <cmath>
#include <optional>
#include <vector>

namespace {

// 32 rows of 32 numbers.
struct Sums {
    alignas(64) float begin[SQUARE];
    auto rows() const {
        return [this](Index i) { return begin + i * SIDE; };
    }
    // Becomes alpha times itself and beta times a square of a left factor.
    void combine(float alpha, float beta, const Bfloat16* square) {
        for (Index i = 0; i < SQUARE; i += 16) {
            const __m512 other = _mm512_mul_ps(_mm512_set1_ps(beta), widened(load(square + i)));
            _mm512_store_ps(begin + i, _mm512_fmadd_ps(_mm512_set1_ps(alpha), _mm512_load_ps(begin + i), other));
        }
    }
};

// A matrix x with no more rows than columns becomes its polar factor, U V^T of U S V^T, by polynomials in bf16.
class Polar {
    const Index rows, columns;
    Array<Bfloat16> left{rows * columns}, right{rows * columns};  // x
    Array<Bfloat16> turned{rows * columns};                       // its transpose, a right factor
    Array<Bfloat16> gram{rows * rows}, gram_right{rows * rows}, inner{rows * rows};
    Array<Sums> column{rows / SIDE};

    Bfloat16* left_at(Index row, Index k) const { return left + row * columns + k * SIDE; }
    Bfloat16* right_at(Index k, Index column) const { return right + column * rows + k * SIDE; }
    Bfloat16* turned_at(Index k, Index column) const { return turned + column * columns + k * SIDE; }

    // A symmetric matrix's square, and the one across the diagonal.
    static void both(const Sums& sums, Bfloat16* here, Bfloat16* across) {
        as_left(sums.rows(), here);
        turned_as_left(sums.rows(), across);
    }

  public:
    Polar(Index rows, Index columns) : rows(rows), columns(columns) {}
    bool is_for(Index rows, Index columns) const { return this->rows == rows && this->columns == columns; }

    // Some numbers of x, or of its transpose.
    void put(const Sums& sums, Index row, Index k) {
        as_left(sums.rows(), left_at(row, k));
        as_right(sums.rows(), right_at(row, k));
        turned_as_right(sums.rows(), turned_at(k, row));
    }
    void put_turned(const Sums& sums, Index k, Index row) {
        turned_as_left(sums.rows(), left_at(row, k));
        turned_as_right(sums.rows(), right_at(row, k));
        as_right(sums.rows(), turned_at(k, row));
    }
    const Bfloat16* at(Index row, Index k) const { return left_at(row, k); }

    // x becomes a x + (b x x^T + c (x x^T)^2) x.
    void step(float a, float b, float c) {
        Sums sums;
        for (Index i = 0; i < rows; i += SIDE)
            for (Index j = i; j < rows; j += SIDE) {
                multiply(left_at(i, 0), turned_at(0, j), columns / SIDE, sums.begin, SIDE, true);
                both(sums, gram + i * rows + j * SIDE, gram + j * rows + i * SIDE);
                as_right(sums.rows(), gram_right + j * rows + i * SIDE);
                turned_as_right(sums.rows(), gram_right + i * rows + j * SIDE);
            }
        for (Index i = 0; i < rows; i += SIDE)
            for (Index j = i; j < rows; j += SIDE) {
                multiply(gram + i * rows, gram_right + j * rows, rows / SIDE, sums.begin, SIDE, true);
                sums.combine(c, b, gram + i * rows + j * SIDE);
                both(sums, inner + i * rows + j * SIDE, inner + j * rows + i * SIDE);
            }
        for (Index k = 0; k < columns; k += SIDE) {
            for (Index i = 0; i < rows; i += SIDE) {
                Sums& all = column[i / SIDE];
                multiply(inner + i * rows, right_at(0, k), rows / SIDE, all.begin, SIDE, true);
                all.combine(1, a, left_at(i, k));
            }
            for (Index i = 0; i < rows; i += SIDE) put(column[i / SIDE], i, k);
        }
    }
};

// ---- a step

struct Rates {
    float rate, momentum, decay, keep;  // `keep` of a mean square stays from one step to the next
    const float* polynomials;           // three numbers for each
    Index count;
};

struct Matrix {
    float* const numbers;  // [rows, columns]
    const float* const grad;
    float *const momentum, *const squares;  // the mean squares of the vectors of the longer side
    const Index rows, columns;
    const bool fresh;  // there are no mean squares yet

    bool tall() const { return rows >= columns; }
    Index longer() const { return std::max(rows, columns); }
    Index shorter() const { return std::min(rows, columns); }

    // use(at, i, j) for each 16 numbers of a square's row i from j on, which are at `at` in the matrix.
    template <class Use>
    void for_square(Index row, Index column, const Use& use) const {
        for (Index i = 0; i < SIDE; i++)
            for (Index j = 0; j < SIDE; j += 16) use((row + i) * columns + column + j, i, j);
    }
    template <class Use>
    void for_squares(const Use& use) const {
        for (Index row = 0; row < rows; row += SIDE)
            for (Index column = 0; column < columns; column += SIDE) use(row, column);
    }

    // What is made orthogonal: Nesterov's momentum.
    __m512 ahead(Index at, float by) const {
        const __m512 g = _mm512_loadu_ps(grad + at), m = _mm512_loadu_ps(momentum + at);
        return _mm512_fmadd_ps(_mm512_set1_ps(by), _mm512_sub_ps(m, g), g);
    }

    void step(const Rates& rates, Polar& polar) const {
        const __m512 scale = _mm512_set1_ps(1 / (add_gradient(rates.momentum) + 1e-7f));
        for_squares([&](Index row, Index column) {
            Sums sums;
            for_square(row, column, [&](Index at, Index i, Index j) {
                _mm512_store_ps(sums.begin + i * SIDE + j, _mm512_mul_ps(ahead(at, rates.momentum), scale));
            });
            tall() ? polar.put_turned(sums, row, column) : polar.put(sums, row, column);
        });
        for (const float* p = rates.polynomials; p < rates.polynomials + 3 * rates.count; p += 3)
            polar.step(p[0], p[1], p[2]);
        const float rate = rates.rate * std::sqrt(std::max(1.0f, float(rows) / columns));
        update(polar, evened(polar, rates.keep).data(), rate, 1 - rates.rate * rates.decay);
    }

    // The gradient goes into the momentum. Gives the norm of what is made orthogonal.
    float add_gradient(float by) const {
        double total = 0;
        for (Index row = 0; row < rows; row++) {
            __m512 sum = _mm512_setzero_ps();
            for (Index at = row * columns; at < (row + 1) * columns; at += 16) {
                const __m512 g = _mm512_loadu_ps(grad + at), m = _mm512_loadu_ps(momentum + at);
                _mm512_storeu_ps(momentum + at, _mm512_fmadd_ps(_mm512_set1_ps(1 - by), _mm512_sub_ps(g, m), m));
                const __m512 x = ahead(at, by);
                sum = _mm512_fmadd_ps(x, x, sum);
            }
            total += _mm512_reduce_add_ps(sum);
        }
        return std::sqrt(total);
    }

    // For each vector of the longer side what evens it out, with the norm of the whole as it is.
    std::vector<float> evened(const Polar& polar, float keep) const {
        std::vector<float> now(longer()), factors(longer());
        double total = 0, divided = 0;
        for (Index k = 0; k < longer(); k += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (Index row = 0; row < shorter(); row += SIDE)
                for (Index i = 0; i < SIDE; i++) {
                    const __m512 x = widened(load(polar.at(row, k / SIDE * SIDE) + i * SIDE + k % SIDE));
                    sum = _mm512_fmadd_ps(x, x, sum);
                }
            _mm512_storeu_ps(now.data() + k, _mm512_div_ps(sum, _mm512_set1_ps(shorter())));
        }
        for (Index k = 0; k < longer(); k++) {
            squares[k] = fresh ? now[k] : squares[k] + (1 - keep) * (now[k] - squares[k]);
            factors[k] = squares[k] + 1e-16f;
            total += now[k];
            divided += now[k] / factors[k];
        }
        for (float& factor : factors) factor = std::sqrt(total / (factor * divided + 1e-30));
        return factors;
    }

    void update(const Polar& polar, const float* factors, float rate, float remains) const {
        alignas(64) Bfloat16 turned[SQUARE];
        for_squares([&](Index row, Index column) {
            const Bfloat16* square = tall() ? polar.at(column, row) : polar.at(row, column);
            if (tall()) {
                turned_as_left([=](Index i) { return square + i * SIDE; }, turned);
                square = turned;
            }
            for_square(row, column, [&](Index at, Index i, Index j) {
                const __m512 factor =
                    tall() ? _mm512_set1_ps(factors[row + i]) : _mm512_loadu_ps(factors + column + j);
                const __m512 by = _mm512_mul_ps(factor, _mm512_set1_ps(rate));
                const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(numbers + at), _mm512_set1_ps(remains));
                _mm512_storeu_ps(numbers + at, _mm512_fnmadd_ps(by, widened(load(square + i * SIDE + j)), x));
            });
        });
    }
};

}  // namespace

extern "C" {
int can_multiply() { return CAN_MULTIPLY; }
// For each of `count` matrices [rows, columns]; `fresh` are those whose squares, [the longer side], are not there yet.
void update(
    float* const* numbers, const float* const* grads, float* const* momenta, float* const* squares,
    const int64_t* rows, const int64_t* columns, const int64_t* fresh, int64_t count, float rate, float momentum,
    float decay, float keep, const float* polynomials, int64_t polynomial_count, int threads) {
    const Rates rates{rate, momentum, decay, keep, polynomials, polynomial_count};
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        std::optional<Polar> polar;
#pragma omp for schedule(dynamic)
        for (Index i = 0; i < count; i++) {
            const Matrix matrix{numbers[i], grads[i], momenta[i], squares[i], rows[i], columns[i], bool(fresh[i])};
            if (!polar || !polar->is_for(matrix.shorter(), matrix.longer()))
                polar.emplace(matrix.shorter(), matrix.longer());
            matrix.step(rates, *polar);
        }
    }
}
}

#else
extern "C" int can_multiply() { return 0; }
#endif
