/* One layer of a step of several tokens per row: the new K and V are written, then blocks of queries go over the
 * extents of their row with an online softmax (Milakov and Gimelshein), tile by tile as in FlashAttention. K and V are
 * read where they lie. The queries of a block are the lanes of vectors, so that both products of a tile are one loop:
 * a number of K or V times a vector, and so that no softmax ever has to go across a vector. The heads of a query group
 * stand side by side as queries of one K/V head.
 *
 * q: [B, H * G, T, D]; k, v: the new tokens' [B, H, T, D]; keys, values: the pool [H, slots, D]; out: [B, T, H * G, D].
 * V may have another D, a multiple of ACROSS. A token's D floats are adjacent, other strides are given in floats.
 *
 * Compiled without -ffast-math: `power` needs its roundings, and a NaN in the scores has to show in the result. */
#include <stdint.h>
#include <string.h>

#define TILE 64
#define WIDEST 256
#define VECTORS 3 /* of queries, at once */

/* ACROSS * VECTORS sums stay in registers. */
#ifdef __AVX512F__
#define LANES 16
#define ACROSS 8
#else
#define LANES 8
#define ACROSS 4
#endif
#define QUERIES (VECTORS * LANES)

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4 * LANES), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4 * LANES), may_alias));

/* Per query of a block, one to a lane. */
typedef union {
    float at[QUERIES];
    vec lanes[VECTORS];
    ivec whole[VECTORS];
} queries;

/* A block of queries on its way over the tokens. */
typedef struct {
    queries q[WIDEST], result[WIDEST];
    queries largest, total; /* score, sum of the weights */
    queries newest, oldest; /* a query sees the positions from oldest + 1 to newest */
} block;

#define LOWEST -1e30f
#define HIDDEN -3e38f /* a score so far below LOWEST that its weight is nothing even before any other is known */

/* `n` and `vectors`, wherever they are used, are constants, so that the loops over them are unrolled. */

/* sum[i] = the sum over j < size of a[i * across + j * along] * b[j]. With `ahead`, a constant too, memory is meanwhile
 * asked for ACROSS * size floats behind `one` and behind `two`: a little in each turn, because all at once would wait for
 * each other. Four turns are one, because counting them takes the place of arithmetic. */
static inline __attribute__((always_inline)) void product(const int n, const int vectors, const float *a,
                                                          int64_t across, int64_t along, const queries *b, int64_t size,
                                                          vec (*sum)[VECTORS], const int ahead, const float *one,
                                                          const float *two) {
#pragma GCC unroll 8
    for (int i = 0; i < n; i++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) sum[i][v] = (vec){0};
#pragma GCC unroll 4
    for (int64_t j = 0; j < size; j++) {
        vec lanes[VECTORS];
        if (ahead) {
            __builtin_prefetch(one + ACROSS * j, 0, 2);
            __builtin_prefetch(two + ACROSS * j, 0, 2);
        }
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) lanes[v] = b[j].lanes[v];
#pragma GCC unroll 8
        for (int i = 0; i < n; i++)
#pragma GCC unroll 3
            for (int v = 0; v < vectors; v++) sum[i][v] += a[i * across + j * along] * lanes[v];
    }
}

/* score[i] = q K_i of n tokens. Meanwhile the next tile of K and V is asked for: else memory would wait for the
 * arithmetic. */
static inline __attribute__((always_inline)) void scores(const int n, const int vectors, const float *keys,
                                                         const float *values, int64_t width, int64_t value_width,
                                                         const queries *q, queries *score) {
    vec sum[ACROSS][VECTORS];
    product(n, vectors, keys, width, 1, q, width, sum, 1, keys + TILE * width, values + TILE * value_width);
#pragma GCC unroll 8
    for (int i = 0; i < n; i++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) score[i].lanes[v] = sum[i][v];
}

/* result[d] = result[d] * kept + weight V_d for ACROSS of V's columns. */
static inline __attribute__((always_inline)) void weigh(const int vectors, const queries *weight, const float *values,
                                                        int64_t width, queries *result, const queries *kept,
                                                        int64_t count) {
    vec sum[ACROSS][VECTORS];
    product(ACROSS, vectors, values, 1, width, weight, count, sum, 0, 0, 0);
#pragma GCC unroll 8
    for (int i = 0; i < ACROSS; i++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) result[i].lanes[v] = result[i].lanes[v] * kept->lanes[v] + sum[i][v];
}

/* Per lane; b where b is not a number, but not where a is none. */
static inline vec larger(vec a, vec b) {
    vec result;
    for (int i = 0; i < LANES; i++) result[i] = a[i] > b[i] ? a[i] : b[i];
    return result;
}

/* e^x for x <= 0: 2^(x log2 e) as an exponent and a polynomial on what is left, between -1/2 and 1/2 (of degree 6, the
 * one whose largest relative error is least: 2e-9). Never less than 2^-126. */
static inline vec power(vec x) {
    const vec y = larger((vec){0} - 126.0f, x * 1.44269504f);
    const ivec whole = __builtin_convertvector(y - 0.5f, ivec);
    const vec left = y - __builtin_convertvector(whole, vec);
    vec p = left * 1.53533619e-4f + 1.33988744e-3f;
    p = p * left + 9.61843736e-3f;
    p = p * left + 5.55033247e-2f;
    p = p * left + 2.40226479e-1f;
    p = p * left + 6.93147203e-1f;
    p = p * left + 1.0f;
    return (vec)((ivec)p + (whole << 23));
}

/* Hides from each query what it does not see of `count` tokens from position `first` on. */
static void hide(const block *b, queries *score, int32_t first, int64_t count) {
    for (int64_t t = 0; t < count; t++)
        for (int v = 0; v < VECTORS; v++) {
            const ivec at = (ivec){0} + (first + (int32_t)t);
            const ivec seen = (at <= b->newest.whole[v]) & (at > b->oldest.whole[v]);
            score[t].whole[v] = (score[t].whole[v] & seen) | ((ivec)((vec){0} + HIDDEN) & ~seen);
        }
}

/* What `count` tokens from position `first` on, at most TILE, add to a block's state. */
static inline __attribute__((always_inline)) void add_tile(const int vectors, block *b, const float *keys,
                                                           const float *values, int64_t width, int64_t value_width,
                                                           int32_t first, int64_t count, int edge) {
    queries score[TILE], kept;
    int64_t t = 0;
    for (; t + ACROSS <= count; t += ACROSS)
        scores(ACROSS, vectors, keys + t * width, values + t * value_width, width, value_width, b->q, score + t);
    /* The rest: some tokens once more, the same again. */
    const int64_t last = count - ACROSS;
    if (t < count && t)
        scores(ACROSS, vectors, keys + last * width, values + last * value_width, width, value_width, b->q, score + last);
    else
        for (; t < count; t++)
            scores(1, vectors, keys + t * width, values + t * value_width, width, value_width, b->q, score + t);
    if (edge) hide(b, score, first, count);
    vec largest[VECTORS];
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++) largest[v] = b->largest.lanes[v];
    for (t = 0; t < count; t++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) largest[v] = larger(score[t].lanes[v], largest[v]);
#pragma GCC unroll 3
    for (int v = 0; v < vectors; v++) {
        vec total = {0};
        for (t = 0; t < count; t++) {
            score[t].lanes[v] = power(score[t].lanes[v] - largest[v]);
            total += score[t].lanes[v];
        }
        kept.lanes[v] = power(b->largest.lanes[v] - largest[v]);
        b->largest.lanes[v] = largest[v];
        b->total.lanes[v] = b->total.lanes[v] * kept.lanes[v] + total;
    }
    for (int64_t d = 0; d < value_width; d += ACROSS)
        weigh(vectors, score, values + d, value_width, b->result + d, &kept, count);
}

/* The same for the first `some` queries, in as few vectors as hold them. */
static void add_tiles(block *b, int64_t some, const float *keys, const float *values, int64_t width,
                      int64_t value_width, int32_t first, int64_t count, int edge) {
    if (some <= LANES)
        add_tile(1, b, keys, values, width, value_width, first, count, edge);
    else if (some <= 2 * LANES)
        add_tile(2, b, keys, values, width, value_width, first, count, edge);
    else
        add_tile(3, b, keys, values, width, value_width, first, count, edge);
}

/* What all blocks of queries have in common. Sizes as above; strides of rows, heads and tokens of q, k, v; of heads of
 * the pool. */
typedef struct {
    int64_t rows, heads, groups, tokens, width, value_width, threads;
    int64_t q[3], k[3], v[3], keys, values;
} layer;

/* A row: position of its first new token, new tokens, its first extent, extents. */
typedef struct {
    int64_t start, count, extent, extents;
} row;

/* A run of adjacent slots, and the position of the first. */
typedef struct {
    int64_t slot, size, first;
} extent;

/* What of an extent the first `some` queries of a block see. keys, values: their head's. */
static void add_extent(const layer *l, block *b, int64_t some, extent run, const float *keys, const float *values) {
    const int32_t *newest = (const int32_t *)&b->newest, *oldest = (const int32_t *)&b->oldest;
    const int64_t before = run.slot - run.first, last = newest[some - 1];
    const int64_t end = run.first + run.size <= last ? run.first + run.size : last + 1;
    for (int64_t at = run.first <= oldest[0] ? oldest[0] + 1 : run.first; at < end; at += TILE) {
        const int64_t count = end - at < TILE ? end - at : TILE;
        const int edge = at <= oldest[some - 1] || at + count > newest[0] + 1; /* not all see all */
        const float *k = keys + (before + at) * l->width, *v = values + (before + at) * l->value_width;
        add_tiles(b, some, k, v, l->width, l->value_width, at, count, edge);
    }
}

/* The first `some` lanes: queries of one row and head from number `begin` on, a token's group side by side. The other
 * lanes repeat the last. q: the row's, of the group's first head. */
static void begin_block(const layer *l, block *b, int64_t begin, int64_t some, int64_t start, int64_t window,
                        const float *q, float scale) {
    for (int64_t lane = 0; lane < QUERIES; lane++) {
        const int64_t query = begin + (lane < some ? lane : some - 1), token = query / l->groups;
        const float *from = q + query % l->groups * l->q[1] + token * l->q[2];
        for (int64_t d = 0; d < l->width; d++) b->q[d].at[lane] = from[d] * scale;
        b->largest.at[lane] = LOWEST;
        b->total.at[lane] = 0.0f;
        ((int32_t *)&b->newest)[lane] = start + token;
        ((int32_t *)&b->oldest)[lane] = start + token < window ? -1 : start + token - window;
    }
    memset(b->result, 0, l->value_width * sizeof(queries));
}

/* out: the row's, of the group's first head. */
static void end_block(const layer *l, block *b, int64_t begin, int64_t some, float *out) {
    for (int v = 0; v < VECTORS; v++) {
        const vec share = 1.0f / b->total.lanes[v];
        for (int64_t d = 0; d < l->value_width; d++) b->result[d].lanes[v] *= share;
    }
    for (int64_t lane = 0; lane < some; lane++) {
        const int64_t query = begin + lane;
        float *to = out + (query / l->groups * l->heads * l->groups + query % l->groups) * l->value_width;
        for (int64_t d = 0; d < l->value_width; d++) to[d] = b->result[d].at[lane];
    }
}

/* For decode steps: what up to QUERIES scaled queries [some, width] get of one head's K and V [size, width], all of it.
 * width: a multiple of ACROSS. state[i]: largest score, sum of the weights, and the weighted sum of V. */
void kvcache_many(const float *q, const float *keys, const float *values, float **state, int64_t some, int64_t size,
                  int64_t width) {
    block b;
    const int64_t lanes = (some + LANES - 1) / LANES * LANES;
    for (int64_t lane = 0; lane < lanes; lane++) {
        const float *from = q + (lane < some ? lane : some - 1) * width;
        for (int64_t d = 0; d < width; d++) b.q[d].at[lane] = from[d];
        b.largest.at[lane] = LOWEST;
        b.total.at[lane] = 0.0f;
    }
    memset(b.result, 0, width * sizeof(queries));
    for (int64_t at = 0; at < size; at += TILE) {
        const int64_t count = size - at < TILE ? size - at : TILE;
        add_tiles(&b, some, keys + at * width, values + at * width, width, width, at, count, 0);
    }
    for (int64_t lane = 0; lane < some; lane++) {
        state[lane][0] = b.largest.at[lane];
        state[lane][1] = b.total.at[lane];
        for (int64_t d = 0; d < width; d++) state[lane][2 + d] = b.result[d].at[lane];
    }
}

/* extents: what a row's new tokens see, themselves included. slots [B, T]: where new tokens go. window: positions that
 * a token sees, itself included. What padding gets is 0. */
void kvcache_prefill(const float *q, const float *k, const float *v, float *keys, float *values, float *out,
                     const layer *l, const row *rows, const extent *extents, const int64_t *slots, int64_t window,
                     float scale) {
    const int64_t longest = l->tokens * l->groups;
    int64_t most = QUERIES; /* queries of a block; fewer where there are few, so that all threads have some */
    while (most > LANES && l->rows * l->heads * ((longest + most - 1) / most) < 2 * l->threads) most -= LANES;
    const int64_t blocks = (longest + most - 1) / most;
    const int64_t token_out = l->heads * l->groups * l->value_width;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t item = 0; item < l->rows * l->tokens; item++) {
            const int64_t at = item / l->tokens, token = item % l->tokens;
            if (token >= rows[at].count) {
                memset(out + item * token_out, 0, token_out * sizeof(float));
                continue;
            }
            const float *k_at = k + at * l->k[0] + token * l->k[2], *v_at = v + at * l->v[0] + token * l->v[2];
            float *key = keys + slots[item] * l->width, *value = values + slots[item] * l->value_width;
            for (int64_t head = 0; head < l->heads; head++) {
                memcpy(key + head * l->keys, k_at + head * l->k[1], l->width * sizeof(float));
                memcpy(value + head * l->values, v_at + head * l->v[1], l->value_width * sizeof(float));
            }
        }
        /* The last block of a row sees most: it comes first. */
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < blocks * l->rows * l->heads; item++) {
            const int64_t head = item % l->heads, at = item / l->heads % l->rows;
            const int64_t begin = (blocks - 1 - item / l->heads / l->rows) * most;
            const int64_t left = rows[at].count * l->groups - begin, some = left < most ? left : most;
            if (some <= 0) continue;
            block b;
            begin_block(l, &b, begin, some, rows[at].start, window, q + at * l->q[0] + head * l->groups * l->q[1], scale);
            for (int64_t one = rows[at].extent; one < rows[at].extent + rows[at].extents; one++)
                add_extent(l, &b, some, extents[one], keys + head * l->keys, values + head * l->values);
            end_block(l, &b, begin, some, out + at * l->tokens * token_out + head * l->groups * l->value_width);
        }
    }
}
