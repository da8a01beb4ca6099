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
#define LINE 16 /* floats of a cache line */
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

/* A tile that memory is asked for while another is worked on: else it would wait for the arithmetic. */
typedef struct {
    const float *keys, *values;
    int64_t count;
} tile;

/* Asks for the tokens from number `first` on. */
static inline void ask(const float *at, int64_t first, int64_t count, int64_t width) {
    for (int64_t d = first * width; d < count * width; d += LINE) __builtin_prefetch(at + d, 0, 2);
}

/* `n`, wherever this is used, is a constant, so that every loop over it is unrolled; so, mostly, is `width`. While a
 * tile's scores are computed the next tile of K is asked for, and while it is weighed the next of V. */
static inline __attribute__((always_inline)) void scores(const int n, const float *q, const float *keys,
                                                         float (*score)[TILE], int64_t count, int64_t width,
                                                         const tile *next) {
    for (int64_t t = 0; t < count; t++) {
        const float *key = keys + t * width, *ahead = t < next->count ? next->keys + t * width : key;
        vec sum[MOST];
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) sum[i] = (vec){0};
        int64_t d = 0;
        for (; d + LANES <= width; d += LANES) {
            const vec k = *(const vec *)(key + d);
            __builtin_prefetch(ahead + d, 0, 2);
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
    ask(next->keys, count, next->count, width);
}

/* results[i] = results[i] * kept[i] + score[i] V. */
static inline __attribute__((always_inline)) void weigh(const int n, float (*score)[TILE], const float *values,
                                                        float **results, const float *kept, int64_t count,
                                                        int64_t width, const tile *next) {
    int64_t at = 0;
    for (; at + 4 * LANES <= width; at += 4 * LANES) {
        vec sum[MOST][4];
#pragma GCC unroll 4
        for (int i = 0; i < n; i++)
#pragma GCC unroll 4
            for (int d = 0; d < 4; d++) sum[i][d] = *(const vec *)(results[i] + at + LANES * d) * kept[i];
        for (int64_t t = 0; t < count; t++) {
            const float *value = values + t * width, *ahead = t < next->count ? next->values + t * width : value;
#pragma GCC unroll 4
            for (int d = 0; d < 4; d++) {
                const vec v = *(const vec *)(value + at + LANES * d);
                __builtin_prefetch(ahead + at + LANES * d, 0, 2);
#pragma GCC unroll 4
                for (int i = 0; i < n; i++) sum[i][d] += score[i][t] * v;
            }
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
    ask(next->values, count, next->count, width);
}

/* What a tile adds to n queries' states, see `attend`. */
static inline __attribute__((always_inline)) void add_tile(const int n, const float *q, const float *keys,
                                                           const float *values, float **state, int64_t count,
                                                           int64_t width, const tile *next) {
    float score[MOST][TILE], kept[MOST], *results[MOST];
    scores(n, q, keys, score, count, width, next);
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
    weigh(n, score, values, results, kept, count, width, next);
}

/* Up to QUERIES scaled queries [queries, width] over one head's K and V [size, width]. state[i]: largest score, sum of
 * the weights, and the weighted sum of V. `after`: the tile that this thread reads then. */
static inline __attribute__((always_inline)) void attend(const float *q, const float *k, const float *v, float **state,
                                                         int64_t queries, int64_t size, int64_t width, tile after) {
    for (int64_t i = 0; i < queries; i++) {
        memset(state[i], 0, (width + 2) * sizeof(float));
        state[i][0] = -1e30f;
    }
    for (int64_t first = 0; first < size; first += TILE) {
        const int64_t count = size - first < TILE ? size - first : TILE;
        const float *keys = k + first * width, *values = v + first * width;
        const int64_t left = size - first - count;
        const tile more = {keys + TILE * width, values + TILE * width, left < TILE ? left : TILE};
        const tile *next = left ? &more : &after;
        for (int64_t i = 0; i < queries; i += MOST) {
            const int64_t some = queries - i < MOST ? queries - i : MOST;
            const float *from = q + i * width;
            if (some == 1) add_tile(1, from, keys, values, state + i, count, width, next);
            if (some == 2) add_tile(2, from, keys, values, state + i, count, width, next);
#if MOST == 4
            if (some == 3) add_tile(3, from, keys, values, state + i, count, width, next);
            if (some == 4) add_tile(4, from, keys, values, state + i, count, width, next);
#endif
        }
    }
}

/* The same for many queries, which are the lanes of vectors there: in prefill.c. */
void kvcache_many(const float *q, const float *k, const float *v, float **state, int64_t queries, int64_t size,
                  int64_t width, const float *next_keys, const float *next_values, int64_t next_count);

/* The first tile of a piece and head, number `item` of `items`: empty behind the last. strides: as below. */
static inline tile first_tile(int64_t item, int64_t items, int64_t heads, const int64_t *pieces, const float *keys,
                              const float *values, const int64_t *strides, int64_t width) {
    if (item >= items) return (tile){0, 0, 0};
    const int64_t *piece = pieces + item / heads * 4, head = item % heads, at = piece[0] * width;
    return (tile){keys + head * strides[6] + at, values + head * strides[7] + at, piece[1] < TILE ? piece[1] : TILE};
}

/* shape: B, H, G, D, pieces. strides: rows and heads of q, k, v; heads of keys, values.
 * pieces [pieces, 4]: first slot, slots, first reader, readers. readers: rows. slots [B]: where new tokens go.
 * starts [B + 1], parts: row b's partial results are those of the readers parts[starts[b]] to parts[starts[b + 1] - 1]. */
void kvcache_decode(const float *q, const float *k, const float *v, float *keys, float *values, float *out,
                    float *scratch, const int64_t *shape, const int64_t *strides, const int64_t *pieces,
                    const int64_t *readers, const int64_t *slots, const int64_t *starts, const int64_t *parts,
                    float scale) {
    const int64_t rows = shape[0], heads = shape[1], groups = shape[2], width = shape[3], count = shape[4];
    const int64_t state = width + 2, per_reader = heads * groups * state, items = count * heads;
    int64_t taken = 0; /* of the items, a piece and head each; a thread takes one ahead, to ask for it in time */
#pragma omp parallel
    {
        int64_t item = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
        const tile begin = first_tile(item, items, heads, pieces, keys, values, strides, width);
        ask(begin.keys, 0, begin.count, width);
        ask(begin.values, 0, begin.count, width);
#pragma omp for schedule(static)
        for (int64_t one = 0; one < rows * heads; one++) {
            const int64_t row = one / heads, head = one % heads;
            const int64_t to = slots[row] * width;
            memcpy(keys + head * strides[6] + to, k + row * strides[2] + head * strides[3], width * sizeof(float));
            memcpy(values + head * strides[7] + to, v + row * strides[4] + head * strides[5], width * sizeof(float));
        }
        for (int64_t then; item < items; item = then) {
            then = __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED);
            const tile next = first_tile(then, items, heads, pieces, keys, values, strides, width);
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
                    kvcache_many(scaled, k_at, v_at, to, queries, piece[1], width, next.keys, next.values, next.count);
                else if (width == 64)
                    attend(scaled, k_at, v_at, to, queries, piece[1], 64, next);
                else if (width == 128)
                    attend(scaled, k_at, v_at, to, queries, piece[1], 128, next);
                else
                    attend(scaled, k_at, v_at, to, queries, piece[1], width, next);
            }
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t one = 0; one < rows * heads * groups; one++) {
            const int64_t row = one / (heads * groups), query = one % (heads * groups);
            const float *mine = scratch + query * state;
            float *result = out + one * width, largest = -1e30f, total = 0.0f;
            for (int64_t at = starts[row]; at < starts[row + 1]; at++) {
                const float score = mine[parts[at] * per_reader];
                largest = score > largest ? score : largest;
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
