// One step of a Gemma 3 model on a CPU: R rows, each a new token of one of several sequences, to logits.
//
// The weights are read where they lie, a row of [out, in] after the other, and every row is multiplied with all R
// activations while it is at hand: the time of a step is that of reading the weights once. Activations are float32.
//
// A row's arithmetic never depends on the other rows, on the number of threads or on how a prompt was cut: every dot
// product is LANES partial sums in order of the columns, added up in one fixed way; every sum of attention goes over
// chunks of CHUNK positions counted from the first visible one.
//
// gemlet/native.py fills the structures and calls the three functions at the end. Nothing is checked here.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

// ---- what Python fills in

enum Format : int32_t { FP32, BF16, INT8, INT4 };

struct Matrix {  // [rows, columns], row by row
    const void* values;
    const float* scales;  // one a row, for INT8
    int32_t rows, columns, format;
};

struct Layer {
    Matrix q, k, v, o, gate, up, down;
    const float *input_norm, *q_norm, *k_norm, *post_attention_norm, *pre_feedforward_norm, *post_feedforward_norm;
    void *keys, *values;     // [slots, K, places, H] in the cache's format
    int32_t places, window;  // a window that no position reaches: full attention
    int32_t rope;            // which of the frequencies
};

struct Model {
    Matrix embedding, head;
    const float* norm;
    const float* frequencies;  // [2, H / 2], of RoPE
    const Layer* layers;
    int32_t num_layers, hidden, heads, key_heads, head_dim, inner, cache_format;
    float embedding_scale, query_scale, eps;
};

namespace {

// ---- vectors

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;  // two registers where they are narrower
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef uint8_t Pairs __attribute__((vector_size(LANES)));  // of four bits

// f(0), ..., f(N - 1), written out, so that what they index stays in registers.
#define INLINE __attribute__((always_inline))
template <int N, class F>
INLINE inline void each(F f) {
    if constexpr (N > 0) {
        each<N - 1>(f);
        f(std::integral_constant<int, N - 1>());
    }
}

template <class Vector>
inline Vector load(const void* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

inline Floats splat(float x) { return x - Floats{}; }

template <class To, class From>
inline To as(From from) {  // the same bits
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// Whole numbers, widened. GCC before 14 makes two halves and more of __builtin_convertvector here.
inline Ints widen(Halves v) {
#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX512F__)
    typedef int16_t Shorts __attribute__((vector_size(32)));
    return __builtin_ia32_pmovzxwd512_mask(as<Shorts>(v), Ints{}, -1);
#elif defined(__GNUC__) && !defined(__clang__) && defined(__AVX2__)
    typedef int16_t Shorts __attribute__((vector_size(16)));
    return __builtin_ia32_pmovzxwd256(as<Shorts>(v));
#else
    return __builtin_convertvector(v, Ints);
#endif
}

inline Ints widen(Bytes v) {
#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX2__)
    typedef char Chars __attribute__((vector_size(16)));
#if defined(__AVX512F__)
    return __builtin_ia32_pmovsxbd512_mask(as<Chars>(v), Ints{}, -1);
#else
    typedef int64_t Pair __attribute__((vector_size(16)));  // in a register: memory written in halves is slow to read whole
    return __builtin_ia32_pmovsxbd256(as<Chars>(Pair{as<int64_t>(v), 0}));
#endif
#else
    return __builtin_convertvector(v, Ints);
#endif
}

inline Ints widen(Pairs v) {
#if defined(__GNUC__) && !defined(__clang__) && defined(__AVX2__) && !defined(__AVX512F__)
    typedef char Chars __attribute__((vector_size(16)));
    typedef int64_t Pair __attribute__((vector_size(16)));
    return __builtin_ia32_pmovzxbd256(as<Chars>(Pair{as<int64_t>(v), 0}));
#else
    return widen(as<Bytes>(v)) & 255;
#endif
}

// a * b + c, rounded once. The compiler must not choose (-ffp-contract=off), or rows would differ with what is beside
// them.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__has_builtin) && __has_builtin(__builtin_elementwise_fma)
    return __builtin_elementwise_fma(a, b, c);
#elif defined(__AVX512F__)
    return __builtin_ia32_vfmaddps512_mask(a, b, c, -1, 4);
#elif defined(__AVX2__) && defined(__FMA__)
    return __builtin_ia32_vfmaddps256(a, b, c);
#elif defined(__FP_FAST_FMAF)
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

inline float fma(float a, float b, float c) {
#if defined(__FP_FAST_FMAF)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

inline float sum(Floats v) {
#if defined(__AVX512F__)
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#else
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
#endif
    return v[0];
}

// e^x to 2 units in the last place: 2^n e^r with n = round(x / ln 2), e^r by its Taylor series. Below -87 it stays there.
inline Floats exponential(Floats x) {
    x = x < splat(-87.0f) ? splat(-87.0f) : x > splat(88.0f) ? splat(88.0f) : x;
    Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer lands in the low bits
    Floats n = shifted - 12582912.0f;
    Floats r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
    Floats p = splat(1 / 5040.0f);
    for (float c : {1 / 720.0f, 1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f}) p = fma(p, r, splat(c));
    return p * as<Floats>((as<Ints>(shifted) << 23) + (127 << 23));
}

// ---- the formats of weights and of the cache: LANES values from column k on, or one

struct Fp32 {
    static constexpr int STEP = LANES;  // columns at a time
    static size_t bytes(int columns) { return size_t(columns) * 4; }
    static void read(const char* row, int k, Floats* w) { w[0] = load<Floats>(row + size_t(k) * 4); }
    static float one(const char* row, int k) { return load<float>(row + size_t(k) * 4); }
    static void write(char* row, int k, float x) { std::memcpy(row + size_t(k) * 4, &x, 4); }
};

struct Bf16 {
    static constexpr int STEP = LANES;
    static size_t bytes(int columns) { return size_t(columns) * 2; }
    static void read(const char* row, int k, Floats* w) {
        w[0] = as<Floats>(widen(load<Halves>(row + size_t(k) * 2)) << 16);
    }
    static float one(const char* row, int k) {
        return as<float>(uint32_t(load<uint16_t>(row + size_t(k) * 2)) << 16);
    }
    static uint16_t round(float x) {  // to the nearest, ties to even
        const uint32_t bits = as<uint32_t>(x);
        return x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    static void write(char* row, int k, float x) {
        uint16_t bits = round(x);
        std::memcpy(row + size_t(k) * 2, &bits, 2);
    }
};

struct Int8 {  // times the row's scale
    static constexpr int STEP = LANES;
    static size_t bytes(int columns) { return columns; }
    static void read(const char* row, int k, Floats* w) {
        w[0] = __builtin_convertvector(widen(load<Bytes>(row + k)), Floats);
    }
    static float one(const char* row, int k) { return int8_t(row[k]); }
};

struct Int4 {  // groups of 32 columns: a scale in bf16, then 16 bytes; byte i holds 8 + column i and, above, 8 + column i + 16
    static constexpr int STEP = 32;
    static size_t bytes(int columns) { return size_t(columns) / 32 * 18; }
    static float scale(const char* row, int k) { return Bf16::one(row + size_t(k) / 32 * 18, 0); }
    static void read(const char* row, int k, Floats* w) {
        const char* group = row + size_t(k) / 32 * 18 + 2;
        const Floats by = splat(scale(row, k)), lifted = by * -8;
        each<16 / LANES>([&](auto i) INLINE {
            Ints pair = widen(load<Pairs>(group + i * LANES));
            w[i] = fma(__builtin_convertvector(pair & 15, Floats), by, lifted);  // exact: no more than 12 bits
            w[i + 16 / LANES] = fma(__builtin_convertvector(pair >> 4, Floats), by, lifted);
        });
    }
    static float one(const char* row, int k) {
        const int pair = uint8_t(row[size_t(k) / 32 * 18 + 2 + k % 16]);
        return float((k % 32 < 16 ? pair & 15 : pair >> 4) - 8) * scale(row, k);
    }
};

// Calls f with the type of a format: of weights, or of those that a cache may have.
template <class F>
void with_cache(int32_t format, F f) {
    return format == FP32 ? f(Fp32()) : f(Bf16());
}

template <class F>
void with(int32_t format, F f) {
    switch (format) {
        case FP32: return f(Fp32());
        case BF16: return f(Bf16());
        case INT8: return f(Int8());
        case INT4: return f(Int4());
    }
}

// ---- products

constexpr int ROWS = 64;  // rows taken through the model at a time
constexpr int TILE = 12;  // weight rows unpacked at a time, where there are many activations

// out[r][n] = dot(weight row n, x[r]) for R activations and N weight rows from `n` on. STREAMED weights come from memory:
// the rows behind are asked for meanwhile, since N short streams at once are more than a processor foresees.
template <class W, bool STREAMED, int R, int N>
__attribute__((noinline)) void tile(const char* weights, int columns, const float* scales, int n, const float* const* x, float* const* out) {
    const size_t bytes = W::bytes(columns);
    const int whole = columns / W::STEP * W::STEP;
    constexpr int UNIT = W::STEP / LANES;
    const char* row[N];
    Floats sums[R][N] = {};
    for (int j = 0; j < N; j++) row[j] = weights + (n + j) * bytes;
    const char* ahead = weights + (n + N) * bytes;
    const int pace = N * int(bytes) / std::max(1, whole / W::STEP);
    for (int k = 0; k < whole; k += W::STEP, ahead += pace) {
        if constexpr (STREAMED)
            for (int b = 0; b < pace; b += 64) __builtin_prefetch(ahead + b);
        each<N>([&](auto j) INLINE {
            Floats w[UNIT];
            W::read(row[j], k, w);
            each<R>([&](auto r) INLINE {
                each<UNIT>([&](auto u) INLINE { sums[r][j] = fma(w[u], load<Floats>(x[r] + k + u * LANES), sums[r][j]); });
            });
        });
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < N; j++) {
            float total = sum(sums[r][j]);
            for (int k = whole; k < columns; k++) total = fma(W::one(row[j], k), x[r][k], total);
            out[r][n + j] = scales ? total * scales[n + j] : total;
        }
}

template <class W, bool STREAMED, int R, int N>
inline void tiles(const char* w, int columns, const float* scales, int n, int end, const float* const* x, float* const* out) {
    for (; n + N <= end; n += N) tile<W, STREAMED, R, N>(w, columns, scales, n, x, out);
    for (; n < end; n++) tile<W, STREAMED, R, 1>(w, columns, scales, n, x, out);
}

// 1 to 4 activations; 2 and 3 are made 4, since reading the weights takes longer than multiplying them.
template <class W, bool STREAMED = true>
void few(const char* w, int columns, const float* scales, int begin, int end, int rows, const float* const* x,
         float* const* out) {
    if (rows == 1) return tiles<W, STREAMED, 1, 8>(w, columns, scales, begin, end, x, out);
    const float* four[4];
    float* to[4];
    for (int r = 0; r < 4; r++) four[r] = x[std::min(r, rows - 1)], to[r] = out[std::min(r, rows - 1)];
    constexpr int N = LANES == 16 ? 3 : 2;  // with 16 registers, 4 x 2 sums leave room for what is read
    tiles<W, STREAMED, 4, N>(w, columns, scales, begin, end, four, to);
}

// out[r][n] for the weight rows begin <= n < end and any number of activations.
void multiply(const Matrix& m, int begin, int end, int rows, const float* const* x, float* const* out) {
    with(m.format, [&](auto format) {
        using W = decltype(format);
        const char* weights = static_cast<const char*>(m.values);
        if (rows <= 4) return few<W>(weights, m.columns, m.scales, begin, end, rows, x, out);
        thread_local std::vector<float> unpacked;  // stays in a core's cache while the activations pass
        const int K = m.columns, whole = K / W::STEP * W::STEP;
        unpacked.resize(size_t(TILE) * K);
        for (int n = begin; n < end; n += TILE) {
            const int count = std::min(TILE, end - n);
            for (int j = 0; j < count; j++) {
                const char* from = weights + (n + j) * W::bytes(K);
                for (size_t b = 0; b < W::bytes(K); b += 64) __builtin_prefetch(from + TILE * W::bytes(K) + b);
                float* to = &unpacked[size_t(j) * K];
                for (int k = 0; k < whole; k += W::STEP) {
                    Floats w[W::STEP / LANES];
                    W::read(from, k, w);
                    for (int u = 0; u < W::STEP / LANES; u++) store(to + k + u * LANES, w[u]);
                }
                for (int k = whole; k < K; k++) to[k] = W::one(from, k);
            }
            const float* scales = m.scales ? m.scales + n : nullptr;
            float* columns[4];
            for (int r = 0; r < rows; r += 4) {
                const int R = std::min(4, rows - r);
                for (int i = 0; i < R; i++) columns[i] = out[r + i] + n;
                few<Fp32, false>(reinterpret_cast<const char*>(unpacked.data()), K, scales, 0, count, R, x + r, columns);
            }
        }
    });
}

// to = x / rms(x) * gain, for `size` values; with `add`, what is normalised is added to `to`.
void normalise(const float* x, const float* gain, int size, float eps, float* to, bool add = false) {
    Floats squares = {};
    const int whole = size / LANES * LANES;
    for (int i = 0; i < whole; i += LANES) squares = fma(load<Floats>(x + i), load<Floats>(x + i), squares);
    float total = sum(squares);
    for (int i = whole; i < size; i++) total = fma(x[i], x[i], total);
    const float scale = 1 / std::sqrt(total / size + eps);
    for (int i = 0; i < size; i++) to[i] = (add ? to[i] : 0) + x[i] * scale * gain[i];
}

// gate = gelu(gate) * up, with gelu(x) = x / (1 + e^(-2u)), u = sqrt(2 / pi) (x + 0.044715 x^3): its tanh form
void gated(float* gate, const float* up, int size) {
    for (int i = 0; i < size; i += LANES) {
        const int n = std::min(LANES, size - i);
        Floats x = {}, y = {};
        std::memcpy(&x, gate + i, 4 * n);
        std::memcpy(&y, up + i, 4 * n);
        Floats u = (x + 0.044715f * x * x * x) * 0.797884561f;
        Floats result = x / (1 + exponential(-2 * u)) * y;
        std::memcpy(gate + i, &result, 4 * n);
    }
}

// ---- attention

constexpr int CHUNK = 128;  // positions whose scores are held at a time

// What some of the visible positions give the G heads of a group: softmax(scores) @ values is sums / weight.
struct Partial {
    float *top, *weight, *sums;  // [G], [G], [G, H]
};

template <class C, int G>
inline void weigh(const char* values, int count, int H, const float* weights, float* sums) {
    const size_t bytes = C::bytes(H);
    int h = 0;
    for (; h + 2 * LANES <= H; h += 2 * LANES) {
        Floats total[2][G];
        each<2>([&](auto u) INLINE { each<G>([&](auto g) INLINE { total[u][g] = load<Floats>(sums + g * H + h + u * LANES); }); });
        for (int j = 0; j < count; j++)
            each<2>([&](auto u) INLINE {
                Floats v;
                C::read(values + j * bytes, h + u * LANES, &v);
                each<G>([&](auto g) INLINE { total[u][g] = fma(splat(weights[g * CHUNK + j]), v, total[u][g]); });
            });
        each<2>([&](auto u) INLINE { each<G>([&](auto g) INLINE { store(sums + g * H + h + u * LANES, total[u][g]); }); });
    }
    for (; h < H; h++)
        for (int g = 0; g < G; g++)
            for (int j = 0; j < count; j++)
                sums[g * H + h] = fma(weights[g * CHUNK + j], C::one(values + j * bytes, h), sums[g * H + h]);
}

// One chunk: the positions first <= p < end, at most CHUNK of them, of a ring.
template <class C>
void attend(const float* q, int G, int H, const char* keys, const char* values, int places, int first, int end,
            Partial to) {
    alignas(64) float weights[4 * CHUNK];
    const int cut = std::min(end, (first / places + 1) * places);  // where the ring begins anew
    const int begins[] = {first, cut}, ends[] = {cut, end}, size = end - first;
    for (int g = 0; g < G; g += 4) {
        const int heads = std::min(4, G - g);
        const float* rows[4];
        float* out[4];
        for (int i = 0; i < heads; i++) rows[i] = q + (g + i) * H;
        for (int s = 0; s < 2; s++) {
            const int place = begins[s] % places, n = ends[s] - begins[s];
            for (int i = 0; i < heads; i++) out[i] = weights + i * CHUNK + (begins[s] - first) - place;
            few<C>(keys, H, nullptr, place, place + n, heads, rows, out);
        }
        for (int i = 0; i < heads; i++) {
            float* w = weights + i * CHUNK;
            const float top = *std::max_element(w, w + size);
            Floats total = {};
            for (int j = 0; j < size; j += LANES) {
                for (int k = std::max(size - j, 0); k < LANES; k++) w[j + k] = -INFINITY;
                Floats e = exponential(load<Floats>(w + j) - top);
                store(w + j, e);
                for (int k = std::max(size - j, 0); k < LANES; k++) w[j + k] = 0;
                total += load<Floats>(w + j);
            }
            to.top[g + i] = top;
            to.weight[g + i] = sum(total);
        }
        float* sums = to.sums + g * H;
        std::fill(sums, sums + heads * H, 0.0f);
        for (int s = 0; s < 2; s++) {
            const char* from = values + size_t(begins[s] % places) * C::bytes(H);
            const int n = ends[s] - begins[s];
            const float* w = weights + (begins[s] - first);
            if (heads == 4) weigh<C, 4>(from, n, H, w, sums);
            else
                for (int i = 0; i < heads; i++) weigh<C, 1>(from, n, H, w + i * CHUNK, sums + i * H);
        }
    }
}

void merge(Partial into, Partial from, int G, int H) {
    for (int g = 0; g < G; g++) {
        const float top = std::max(into.top[g], from.top[g]);
        const float a = std::exp(into.top[g] - top), b = std::exp(from.top[g] - top);
        into.top[g] = top;
        into.weight[g] = fma(into.weight[g], a, from.weight[g] * b);
        for (int h = 0; h < H; h++) into.sums[g * H + h] = fma(into.sums[g * H + h], a, from.sums[g * H + h] * b);
    }
}

// ---- threads

// The threads of a decoder. They run the same function; `share` deals out a loop and waits until all of it is done.
class Team {
  public:
    explicit Team(int size) : size(std::max(1, size)) {
        for (int i = 1; i < this->size; i++) others.emplace_back([this] { serve(); });
    }

    ~Team() {
        stopping = true;
        begin();
        for (auto& thread : others) thread.join();
    }

    template <class F>
    void run(F f) {
        call = [](void* f) { (*static_cast<F*>(f))(); };
        argument = &f;
        begin();
        f();
        wait();
    }

    // f(begin, end) for parts of 0 <= i < items, each by whoever is free; then everyone has all results.
    template <class F>
    void share(int items, int grain, F f) {
        for (int i; (i = next.fetch_add(grain, std::memory_order_relaxed)) < items;) f(i, std::min(i + grain, items));
        wait();
    }

    const int size;

  private:
    static void pause(int spins) {
        if (spins % 4096 == 4095) return std::this_thread::yield();
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    void wait() {
        const unsigned now = phase.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            arrived.store(0, std::memory_order_relaxed);
            next.store(0, std::memory_order_relaxed);
            phase.store(now + 1, std::memory_order_release);
        } else
            for (int spins = 0; phase.load(std::memory_order_acquire) == now; spins++) pause(spins);
    }

    void begin() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            job.fetch_add(1, std::memory_order_release);
        }
        condition.notify_all();
    }

    void serve() {
        for (unsigned done = 0;; done++) {
            for (int spins = 0; spins < SPINS && job.load(std::memory_order_acquire) == done; spins++) pause(spins);
            if (job.load(std::memory_order_acquire) == done) {
                std::unique_lock<std::mutex> lock(mutex);
                condition.wait(lock, [&] { return job.load(std::memory_order_acquire) != done; });
            }
            if (stopping) return;
            call(argument);
            wait();
        }
    }

    static constexpr int SPINS = 2000;  // some tens of microseconds: what lies between two tokens
    std::vector<std::thread> others;
    std::atomic<int> next{0}, arrived{0};
    std::atomic<unsigned> phase{0}, job{0};
    std::atomic<bool> stopping{false};
    std::mutex mutex;
    std::condition_variable condition;
    void (*call)(void*) = nullptr;
    void* argument = nullptr;
};

// ---- the model

struct Rows {  // what is taken in
    const int32_t *tokens, *slots, *positions;
    int count;
    float* const* logits;  // where each row's go, or null
};

class Decoder {
  public:
    Decoder(const Model& model, int threads)
        : m(model), team(threads), layers(model.layers, model.layers + model.num_layers), D(m.hidden), H(m.head_dim),
          group(m.heads / m.key_heads), packed((m.heads + 2 * m.key_heads) * H), x(ROWS * D), normed(ROWS * D),
          added(ROWS * D), qkv(size_t(ROWS) * packed), attended(size_t(ROWS) * m.heads * H), gate(size_t(ROWS) * m.inner),
          up(size_t(ROWS) * m.inner), angles(size_t(ROWS) * 2 * H) {}

    void step(Rows rows) {
        for (; rows.count > 0; rows.count -= ROWS) {
            Rows part = rows;
            part.count = std::min(rows.count, ROWS);
            prepare(part);
            team.run([&] { take(part); });
            rows.tokens += ROWS, rows.slots += ROWS, rows.positions += ROWS, rows.logits += ROWS;
        }
    }

  private:
    static void point(std::vector<float>& buffer, size_t stride, int rows, std::vector<float*>& to) {
        to.resize(rows);
        for (int r = 0; r < rows; r++) to[r] = &buffer[r * stride];
    }

    void prepare(const Rows& rows) {
        point(normed, D, rows.count, normed_rows);
        point(added, D, rows.count, added_rows);
        point(attended, size_t(m.heads) * H, rows.count, attended_rows);
        point(gate, m.inner, rows.count, gate_rows);
        point(up, m.inner, rows.count, up_rows);
        for (int i = 0, offset = 0; i < 3; offset += (i++ ? m.key_heads : m.heads) * H) {
            qkv_rows[i].resize(rows.count);
            for (int r = 0; r < rows.count; r++) qkv_rows[i][r] = &qkv[size_t(r) * packed + offset];
        }
        last_rows.clear(), logit_rows.clear();
        for (int r = 0; r < rows.count; r++)
            if (rows.logits[r]) last_rows.push_back(normed_rows[r]), logit_rows.push_back(rows.logits[r]);
        // Long contexts of few rows are dealt out chunk by chunk, else row by row; the arithmetic is the same.
        chunks = 0;
        if (rows.count * m.key_heads < 4 * team.size)
            for (int r = 0; r < rows.count; r++) chunks = std::max(chunks, rows.positions[r] / CHUNK + 1);
        partials.resize(size_t(std::max(chunks, 2)) * rows.count * m.key_heads * group * (H + 2));
    }

    // Everything, by every thread of the team.
    void take(const Rows& rows) {
        const int R = rows.count;
        team.share(R, 1, [&](int r, int) { embed(rows, r); });
        for (size_t l = 0; l < layers.size(); l++) {
            const Layer& layer = layers[l];
            const float* next_norm = l + 1 < layers.size() ? layers[l + 1].input_norm : m.norm;
            project({&layer.q, &layer.k, &layer.v}, R, normed_rows, qkv_rows);
            team.share(R * (m.heads + 2 * m.key_heads), 1, [&](int i, int) { turn(rows, layer, i); });
            with_cache(m.cache_format, [&](auto format) { attention<decltype(format)>(rows, layer); });
            project(layer.o, R, attended_rows, added_rows);
            team.share(R, 1, [&](int r, int) { add(r, layer.post_attention_norm, layer.pre_feedforward_norm); });
            team.share(m.inner, grain(m.inner), [&](int begin, int end) {
                multiply(layer.gate, begin, end, R, normed_rows.data(), gate_rows.data());
                multiply(layer.up, begin, end, R, normed_rows.data(), up_rows.data());
                for (int r = 0; r < R; r++) gated(gate_rows[r] + begin, up_rows[r] + begin, end - begin);
            });
            project(layer.down, R, gate_rows, added_rows);
            team.share(R, 1, [&](int r, int) { add(r, layer.post_feedforward_norm, next_norm); });
        }
        if (!last_rows.empty()) project(m.head, last_rows.size(), last_rows, logit_rows);
    }

    int grain(int rows) const {  // a multiple of what any tile takes, some parts a thread
        return std::max(24, rows / (8 * team.size) / 24 * 24);
    }

    void project(const Matrix& w, int R, const std::vector<float*>& from, const std::vector<float*>& to) {
        team.share(w.rows, grain(w.rows), [&](int begin, int end) { multiply(w, begin, end, R, from.data(), to.data()); });
    }

    void project(std::initializer_list<const Matrix*> ws, int R, const std::vector<float*>& from, std::vector<float*>* to) {
        int total = 0;
        for (const Matrix* w : ws) total += w->rows;
        team.share(total, grain(total), [&](int begin, int end) {
            std::vector<float*>* out = to;
            for (const Matrix* w : ws) {
                if (begin < w->rows && end > 0)
                    multiply(*w, std::max(begin, 0), std::min(end, w->rows), R, from.data(), out->data());
                begin -= w->rows, end -= w->rows, out++;
            }
        });
    }

    void embed(const Rows& rows, int r) {
        with(m.embedding.format, [&](auto format) {
            using W = decltype(format);
            const int token = rows.tokens[r];
            const char* row = static_cast<const char*>(m.embedding.values) + token * W::bytes(D);
            const float scale = m.embedding_scale * (m.embedding.scales ? m.embedding.scales[token] : 1);
            for (int k = 0; k < D; k++) {
                float value = W::one(row, k) * scale;
                if (m.embedding.format == BF16) {  // as the embedding of a model in bf16 does
                    uint16_t rounded = Bf16::round(value);
                    value = Bf16::one(reinterpret_cast<const char*>(&rounded), 0);
                }
                x[size_t(r) * D + k] = value;
            }
        });
        normalise(&x[size_t(r) * D], layers[0].input_norm, D, m.eps, normed_rows[r]);
        for (int i = 0; i < H; i++) {
            const float angle = float(rows.positions[r]) * m.frequencies[i];
            angles[size_t(r) * 2 * H + 2 * i] = std::cos(angle);
            angles[size_t(r) * 2 * H + 2 * i + 1] = std::sin(angle);
        }
    }

    void add(int r, const float* post_norm, const float* next_norm) {
        normalise(added_rows[r], post_norm, D, m.eps, &x[size_t(r) * D], true);
        normalise(&x[size_t(r) * D], next_norm, D, m.eps, normed_rows[r]);
    }

    // Head i of all rows: queries and keys are normalised and turned by their position, keys and values kept.
    void turn(const Rows& rows, const Layer& layer, int i) {
        const int heads = m.heads + 2 * m.key_heads, r = i / heads, head = i % heads;
        float* v = &qkv[size_t(r) * packed + size_t(head) * H];
        const bool query = head < m.heads, value = head >= m.heads + m.key_heads;
        if (!value) {
            normalise(v, query ? layer.q_norm : layer.k_norm, H, m.eps, v);
            const float scale = query ? m.query_scale : 1;
            const float* turns = &angles[size_t(r) * 2 * H + layer.rope * H];
            for (int h = 0; h < H / 2; h++) {
                const float c = turns[2 * h], s = turns[2 * h + 1], a = v[h], b = v[h + H / 2];
                v[h] = (a * c - b * s) * scale;
                v[h + H / 2] = (b * c + a * s) * scale;
            }
        }
        if (query) return;
        const int k = (head - m.heads) % m.key_heads, place = rows.positions[r] % layer.places;
        const size_t row = (size_t(rows.slots[r]) * m.key_heads + k) * layer.places + place;
        with_cache(m.cache_format, [&](auto format) {
            using C = decltype(format);
            char* to = static_cast<char*>(value ? layer.values : layer.keys) + row * C::bytes(H);
            for (int h = 0; h < H; h++) C::write(to, h, v[h]);
        });
    }

    template <class C>
    void attention(const Rows& rows, const Layer& layer) {
        const int K = m.key_heads, pairs = rows.count * K;
        auto partial = [&](int i) {
            float* at = &partials[size_t(i) * group * (H + 2)];
            return Partial{at, at + group, at + 2 * group};
        };
        auto first = [&](int pair) { return std::max(0, rows.positions[pair / K] - layer.window + 1); };
        auto chunk = [&](int pair, int c, Partial to) {
            const int r = pair / K, k = pair % K, begin = first(pair) + c * CHUNK;
            const int end = std::min(begin + CHUNK, rows.positions[r] + 1);
            const size_t ring = (size_t(rows.slots[r]) * K + k) * layer.places * C::bytes(H);
            attend<C>(&qkv[size_t(r) * packed + size_t(k) * group * H], group, H, static_cast<const char*>(layer.keys) + ring,
                      static_cast<const char*>(layer.values) + ring, layer.places, begin, end, to);
        };
        auto count = [&](int pair) { return (rows.positions[pair / K] - first(pair)) / CHUNK + 1; };
        auto finish = [&](int pair, Partial whole) {
            float* to = attended_rows[pair / K] + size_t(pair % K) * group * H;
            for (int g = 0; g < group; g++)
                for (int h = 0; h < H; h++) to[g * H + h] = whole.sums[g * H + h] / whole.weight[g];
        };
        if (chunks) {
            team.share(pairs * chunks, 1, [&](int i, int) {
                if (i % chunks < count(i / chunks)) chunk(i / chunks, i % chunks, partial(i));
            });
            team.share(pairs, 1, [&](int pair, int) {
                for (int c = 1; c < count(pair); c++) merge(partial(pair * chunks), partial(pair * chunks + c), group, H);
                finish(pair, partial(pair * chunks));
            });
        } else
            team.share(pairs, 1, [&](int pair, int) {
                chunk(pair, 0, partial(2 * pair));
                for (int c = 1; c < count(pair); c++) {
                    chunk(pair, c, partial(2 * pair + 1));
                    merge(partial(2 * pair), partial(2 * pair + 1), group, H);
                }
                finish(pair, partial(2 * pair));
            });
    }

    const Model m;
    Team team;
    const std::vector<Layer> layers;
    const int D, H, group, packed;
    std::vector<float> x, normed, added, qkv, attended, gate, up, angles, partials;
    std::vector<float*> normed_rows, added_rows, attended_rows, gate_rows, up_rows, qkv_rows[3], last_rows, logit_rows;
    int chunks = 0;
};

}  // namespace

extern "C" {

void* decoder_new(const Model* model, int32_t threads) { return new Decoder(*model, threads); }

void decoder_free(void* decoder) { delete static_cast<Decoder*>(decoder); }

void decoder_step(void* decoder, const int32_t* tokens, const int32_t* slots, const int32_t* positions, int32_t rows,
                  float* const* logits) {
    static_cast<Decoder*>(decoder)->step({tokens, slots, positions, rows, logits});
}
}
