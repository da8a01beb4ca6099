/* One layer of a decode step, at the speed of memory: every row's new K and V are written, then each piece of K/V is
 * read once for all rows that see it. A piece runs an online softmax (Milakov and Gimelshein) over tiles that stay in
 * the first-level cache; a row's pieces are merged by their log-sum-exp (flash-decoding, and the cascade of FlashInfer
 * and Hydragen for pieces that several rows share).
 *
 * q: [B, H * G, D]; k, v: the new tokens' [B, H, D]; keys, values: the pool [H, slots, D]; out: [B, H * G, D].
 * A token's D floats are adjacent, other strides are given in floats.
 * scratch: readers * H * G * (D + 2) floats. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define TILE 64
#define QUERIES 8 /* at once */
#define WIDEST 256

/* So many queries at once stay in registers, with the four vectors of a tile of V for each; and MANY of those that
 * kvcache_many takes. */
#define FEWEST_MANY 12
#ifdef __AVX512F__
#define LANES 16
#define MOST 4
#define MANY 48
#else
#define LANES 8
#define MOST 2
#define MANY 24
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* `n`, wherever this is used, is a constant, so that every loop over it is unrolled; so, mostly, is `width`. While a
 * tile's scores are computed the next tile of K is asked for, and while it is weighed the next of V: else memory would
 * wait for the arithmetic. */
static inline __attribute__((always_inline)) void scores(const int n, const float *q, const float *keys,
                                                         float (*score)[TILE], int64_t count, int64_t width) {
    for (int64_t t = 0; t < count; t++) {
        const float *key = keys + t * width;
        vec sum[MOST];
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) sum[i] = (vec){0};
        int64_t d = 0;
        for (; d + LANES <= width; d += LANES) {
            const vec k = *(const vec *)(key + d);
            __builtin_prefetch(key + TILE * width + d, 0, 2);
#pragma GCC unroll 4
            for (int i = 0; i < n; i++) sum[i] += k * *(const vec *)(q + i * width + d);
        }
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            float total = 0.0f;
            for (int lane = 0; lane < LANES; lane++) total += sum[i][lane];
            for (int64_t at = d; at < width; at++) total += key[at] * q[i * width + at];
            score[i][t] = total;
        }
    }
}

/* results[i] = results[i] * kept[i] + score[i] V. */
static inline __attribute__((always_inline)) void weigh(const int n, float (*score)[TILE], const float *values,
                                                        float **results, const float *kept, int64_t count,
                                                        int64_t width) {
    int64_t at = 0;
    for (; at + 4 * LANES <= width; at += 4 * LANES) {
        vec sum[MOST][4];
#pragma GCC unroll 4
        for (int i = 0; i < n; i++)
#pragma GCC unroll 4
            for (int d = 0; d < 4; d++) sum[i][d] = *(const vec *)(results[i] + at + LANES * d) * kept[i];
        for (int64_t t = 0; t < count; t++)
#pragma GCC unroll 4
            for (int d = 0; d < 4; d++) {
                const vec v = *(const vec *)(values + t * width + at + LANES * d);
                __builtin_prefetch(values + (t + TILE) * width + at + LANES * d, 0, 2);
#pragma GCC unroll 4
                for (int i = 0; i < n; i++) sum[i][d] += score[i][t] * v;
            }
#pragma GCC unroll 4
        for (int i = 0; i < n; i++)
#pragma GCC unroll 4
            for (int d = 0; d < 4; d++) *(vec *)(results[i] + at + LANES * d) = sum[i][d];
    }
    for (int i = 0; i < n; i++)
        for (int64_t d = at; d < width; d++) {
            float sum = results[i][d] * kept[i];
            for (int64_t t = 0; t < count; t++) sum += score[i][t] * values[t * width + d];
            results[i][d] = sum;
        }
}

/* What a tile adds to n queries' states, see `attend`. */
static inline __attribute__((always_inline)) void add_tile(const int n, const float *q, const float *keys,
                                                           const float *values, float **state, int64_t count,
                                                           int64_t width) {
    float score[MOST][TILE], kept[MOST], *results[MOST];
    scores(n, q, keys, score, count, width);
    for (int i = 0; i < n; i++) {
        float largest = state[i][0], total = 0.0f;
        for (int64_t t = 0; t < count; t++) largest = score[i][t] > largest ? score[i][t] : largest;
        for (int64_t t = 0; t < count; t++) {
            score[i][t] = expf(score[i][t] - largest);
            total += score[i][t];
        }
        kept[i] = expf(state[i][0] - largest);
        state[i][0] = largest;
        state[i][1] = state[i][1] * kept[i] + total;
        results[i] = state[i] + 2;
    }
    weigh(n, score, values, results, kept, count, width);
}

/* Up to QUERIES scaled queries [queries, width] over one head's K and V [size, width]. state[i]: largest score, sum of
 * the weights, and the weighted sum of V. */
static inline __attribute__((always_inline)) void attend(const float *q, const float *k, const float *v, float **state,
                                                         int64_t queries, int64_t size, int64_t width) {
    for (int64_t i = 0; i < queries; i++) {
        memset(state[i], 0, (width + 2) * sizeof(float));
        state[i][0] = -1e30f;
    }
    for (int64_t first = 0; first < size; first += TILE) {
        const int64_t count = size - first < TILE ? size - first : TILE;
        const float *keys = k + first * width, *values = v + first * width;
        for (int64_t i = 0; i < queries; i += MOST) {
            const int64_t some = queries - i < MOST ? queries - i : MOST;
            const float *from = q + i * width;
            if (some == 1) add_tile(1, from, keys, values, state + i, count, width);
            if (some == 2) add_tile(2, from, keys, values, state + i, count, width);
#if MOST == 4
            if (some == 3) add_tile(3, from, keys, values, state + i, count, width);
            if (some == 4) add_tile(4, from, keys, values, state + i, count, width);
#endif
        }
    }
}

/* The same for many queries, which are the lanes of vectors there: in prefill.c. */
void kvcache_many(const float *q, const float *k, const float *v, float **state, int64_t queries, int64_t size,
                  int64_t width);

/* shape: B, H, G, D, pieces. strides: rows and heads of q, k, v; heads of keys, values.
 * pieces [pieces, 4]: first slot, slots, first reader, readers. readers: rows. slots [B]: where new tokens go.
 * starts [B + 1], parts: row b's partial results are those of the readers parts[starts[b]] to parts[starts[b + 1] - 1]. */
void kvcache_decode(const float *q, const float *k, const float *v, float *keys, float *values, float *out,
                    float *scratch, const int64_t *shape, const int64_t *strides, const int64_t *pieces,
                    const int64_t *readers, const int64_t *slots, const int64_t *starts, const int64_t *parts,
                    float scale) {
    const int64_t rows = shape[0], heads = shape[1], groups = shape[2], width = shape[3], count = shape[4];
    const int64_t state = width + 2, per_reader = heads * groups * state;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t item = 0; item < rows * heads; item++) {
            const int64_t row = item / heads, head = item % heads;
            const int64_t to = slots[row] * width;
            memcpy(keys + head * strides[6] + to, k + row * strides[2] + head * strides[3], width * sizeof(float));
            memcpy(values + head * strides[7] + to, v + row * strides[4] + head * strides[5], width * sizeof(float));
        }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < count * heads; item++) {
            const int64_t *piece = pieces + item / heads * 4, head = item % heads, total = piece[3] * groups;
            const float *k_at = keys + head * strides[6] + piece[0] * width;
            const float *v_at = values + head * strides[7] + piece[0] * width;
            for (int64_t first = 0, queries; first < total; first += queries) {
                const int many = total - first >= FEWEST_MANY && width % 8 == 0;
                const int64_t most = many ? MANY : QUERIES;
                queries = total - first < most ? total - first : most;
                float scaled[MANY * WIDEST], *to[MANY];
                for (int64_t i = 0; i < queries; i++) {
                    const int64_t reader = piece[2] + (first + i) / groups, query = head * groups + (first + i) % groups;
                    const float *from = q + readers[reader] * strides[0] + query * strides[1];
                    for (int64_t d = 0; d < width; d++) scaled[i * width + d] = from[d] * scale;
                    to[i] = scratch + reader * per_reader + query * state;
                }
                if (many)
                    kvcache_many(scaled, k_at, v_at, to, queries, piece[1], width);
                else if (width == 64)
                    attend(scaled, k_at, v_at, to, queries, piece[1], 64);
                else if (width == 128)
                    attend(scaled, k_at, v_at, to, queries, piece[1], 128);
                else
                    attend(scaled, k_at, v_at, to, queries, piece[1], width);
            }
        }
#pragma omp for schedule(static)
        for (int64_t item = 0; item < rows * heads * groups; item++) {
            const int64_t row = item / (heads * groups), query = item % (heads * groups);
            const float *mine = scratch + query * state;
            float *result = out + item * width, largest = -1e30f, total = 0.0f;
            for (int64_t at = starts[row]; at < starts[row + 1]; at++) {
                const float one = mine[parts[at] * per_reader];
                largest = one > largest ? one : largest;
            }
            for (int64_t d = 0; d < width; d++) result[d] = 0.0f;
            for (int64_t at = starts[row]; at < starts[row + 1]; at++) {
                const float *part = mine + parts[at] * per_reader, weight = expf(part[0] - largest);
                total += weight * part[1];
                for (int64_t d = 0; d < width; d++) result[d] += weight * part[2 + d];
            }
            for (int64_t d = 0; d < width; d++) result[d] /= total;
        }
    }
}
