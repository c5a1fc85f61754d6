// The polar factor of matrices, U V^T of U S V^T, by polynomials in bf16 as `optim.orthogonalise` has them, on a CPU with
// products in bf16. A thread does a matrix at a time, which stays in its cache.
//
// What becomes of a matrix depends on nothing beside it, nor on the number of threads.
//
// gemlet/kernels/polar.py calls the functions at the end. Nothing is checked here.

#include "products.h"

#ifdef PRODUCTS

#include <cmath>

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

// A matrix x with no more rows than columns, and what is computed of it, as squares.
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

inline __m512 read(const float* x) { return _mm512_loadu_ps(x); }
inline __m512 read(const Bfloat16* x) { return widened(load(x)); }
inline void write(__m512 x, float* to) { _mm512_storeu_ps(to, x); }
inline void write(__m512 x, Bfloat16* to) { _mm256_storeu_si256((__m256i*)to, narrowed(x)); }

// x [rows, columns], divided by its norm, goes through the polynomials.
template <class T>
void orthogonalise(
    const T* x, T* out, Index rows, Index columns, const float* polynomials, Index count, Polar& polar) {
    const bool tall = rows > columns;
    __m512 squares = _mm512_setzero_ps();
    for (Index i = 0; i < rows * columns; i += 16) squares = _mm512_fmadd_ps(read(x + i), read(x + i), squares);
    const __m512 scale = _mm512_set1_ps(1 / (std::sqrt(_mm512_reduce_add_ps(squares)) + 1e-7f));
    for (Index i = 0; i < rows; i += SIDE)
        for (Index j = 0; j < columns; j += SIDE) {
            Sums sums;
            for (Index r = 0; r < SIDE; r++)
                for (Index k = 0; k < SIDE; k += 16)
                    _mm512_store_ps(
                        sums.begin + r * SIDE + k, _mm512_mul_ps(read(x + (i + r) * columns + j + k), scale));
            tall ? polar.put_turned(sums, i, j) : polar.put(sums, i, j);
        }
    for (Index i = 0; i < count; i++) polar.step(polynomials[3 * i], polynomials[3 * i + 1], polynomials[3 * i + 2]);
    alignas(64) Bfloat16 turned[SQUARE];
    for (Index i = 0; i < rows; i += SIDE)
        for (Index j = 0; j < columns; j += SIDE) {
            const Bfloat16* square = tall ? polar.at(j, i) : polar.at(i, j);
            if (tall) {
                turned_as_left([=](Index r) { return square + r * SIDE; }, turned);
                square = turned;
            }
            for (Index r = 0; r < SIDE; r++)
                for (Index k = 0; k < SIDE; k += 16)
                    write(read(square + r * SIDE + k), out + (i + r) * columns + j + k);
        }
}

template <class T>
void orthogonalise(
    const T* x, T* out, Index matrices, Index rows, Index columns, const float* polynomials, Index count,
    int threads) {
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        Polar polar(std::min(rows, columns), std::max(rows, columns));
#pragma omp for schedule(dynamic)
        for (Index i = 0; i < matrices; i++)
            orthogonalise(
                x + i * rows * columns, out + i * rows * columns, rows, columns, polynomials, count, polar);
    }
}

}  // namespace

extern "C" {
int can_multiply() { return CAN_MULTIPLY; }
void orthogonalise_float32(
    const float* x, float* out, int64_t matrices, int64_t rows, int64_t columns, const float* polynomials,
    int64_t count, int threads) {
    orthogonalise(x, out, matrices, rows, columns, polynomials, count, threads);
}
void orthogonalise_bfloat16(
    const Bfloat16* x, Bfloat16* out, int64_t matrices, int64_t rows, int64_t columns, const float* polynomials,
    int64_t count, int threads) {
    orthogonalise(x, out, matrices, rows, columns, polynomials, count, threads);
}
}

#else
extern "C" int can_multiply() { return 0; }
#endif
