/* y = x W^T + b for few rows of x: W, far larger than all else, is read once, in order.
 *
 * x: [rows, in]; weight: [out, in]; bias: [out] or null; y: [rows, out]; all contiguous. */
#include <stdint.h>

/* A tile of outputs and rows whose sums stay in registers. With few rows there is so little to compute that one output
 * at a time, the weight read as one stream, is faster (`tests/bench/torch_linear.py`). */
#define OUTPUTS 3
#define ALONE 2
#ifdef __AVX512F__
#define LANES 16
#define MOST 8
#else
#define LANES 8
#define MOST 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float half __attribute__((vector_size(32), aligned(4), may_alias));
typedef float quarter __attribute__((vector_size(16), aligned(4), may_alias));

static inline float sum_of(const vec lanes) {
#if LANES == 16
    const half eight = ((const half *)&lanes)[0] + ((const half *)&lanes)[1];
#else
    const half eight = lanes;
#endif
    const quarter four = ((const quarter *)&eight)[0] + ((const quarter *)&eight)[1];
    return four[0] + four[1] + four[2] + four[3];
}

/* What is left behind the last whole vector. */
static __attribute__((noinline)) float rest(const float *a, const float *b, int64_t from, int64_t to) {
    float sum = 0.0f;
    for (; from < to; from++) sum += a[from] * b[from];
    return sum;
}

/* `outputs` and `rows` are constants wherever this is used, so that every loop over them is unrolled. */
static inline __attribute__((always_inline)) void tile(const int outputs, const int rows, const float *x,
                                                       const float *weight, const float *bias, float *y, int64_t in,
                                                       int64_t out) {
    vec sum[OUTPUTS][MOST];
#pragma GCC unroll 4
    for (int o = 0; o < outputs; o++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) sum[o][r] = (vec){0};
    int64_t d = 0;
    for (; d + LANES <= in; d += LANES)
#pragma GCC unroll 4
        for (int o = 0; o < outputs; o++) {
            const float *at = weight + o * in + d;
            const vec w = *(const vec *)at;
            /* Asked for in time to be in the second-level cache: the first is too small for what memory has under way.
             * Not every processor foresees enough even of one stream. */
            __builtin_prefetch(at + (outputs > 1 ? 8 : 4) * in, 0, 2);
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) sum[o][r] += w * *(const vec *)(x + r * in + d);
        }
#pragma GCC unroll 4
    for (int o = 0; o < outputs; o++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            float total = sum_of(sum[o][r]) + (bias ? bias[o] : 0.0f);
            if (d < in) total += rest(weight + o * in, x + r * in, d, in);
            y[r * out + o] = total;
        }
}

#define CASE(outputs, rows) \
    case rows: tile(outputs, rows, x, weight, bias, y, in, out); break;

static void one(int rows, const float *x, const float *weight, const float *bias, float *y, int64_t in, int64_t out) {
    switch (rows) { CASE(1, 1) CASE(1, 2) CASE(1, 3) CASE(1, 4) CASE(1, 5) CASE(1, 6) CASE(1, 7) CASE(1, 8) }
}

static void several(int rows, const float *x, const float *weight, const float *bias, float *y, int64_t in,
                    int64_t out) {
    switch (rows) {
        CASE(OUTPUTS, 1) CASE(OUTPUTS, 2) CASE(OUTPUTS, 3) CASE(OUTPUTS, 4)
        CASE(OUTPUTS, 5) CASE(OUTPUTS, 6) CASE(OUTPUTS, 7) CASE(OUTPUTS, 8)
    }
}

void kvcache_linear(const float *x, const float *weight, const float *bias, float *y, int64_t rows, int64_t in,
                    int64_t out) {
    const int64_t outputs = rows <= ALONE ? 1 : OUTPUTS, tiles = (out + outputs - 1) / outputs;
#pragma omp parallel for schedule(static)
    for (int64_t item = 0; item < tiles; item++) {
        const int64_t first = item * outputs, here = out - first < outputs ? out - first : outputs;
        for (int64_t row = 0; row < rows; row += MOST) {
            const int some = rows - row < MOST ? rows - row : MOST;
            const float *from = x + row * in;
            if (here == OUTPUTS)
                several(some, from, weight + first * in, bias ? bias + first : 0, y + row * out + first, in, out);
            else
                for (int64_t o = first; o < first + here; o++)
                    one(some, from, weight + o * in, bias ? bias + o : 0, y + row * out + o, in, out);
        }
    }
}
