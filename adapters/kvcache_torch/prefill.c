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
#define LINE 16 /* floats of a cache line */
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
typedef float quarter __attribute__((vector_size(16), aligned(4), may_alias));
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
#define NEAREST 12582912.0f /* 1.5 * 2^23: floats of this size are whole numbers */
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

/* A tile that memory is asked for while another is worked on: else it would wait for the arithmetic. */
typedef struct {
    const float *keys, *values;
    int64_t count;
} tile;

/* score[t + i] = q K_i of n tokens from number `t` on. */
static inline __attribute__((always_inline)) void scores(const int n, const int vectors, int64_t t, tile now,
                                                         const tile *next, int64_t width, int64_t value_width,
                                                         const queries *q, queries *score) {
    vec sum[ACROSS][VECTORS];
    const tile *ahead = t < next->count ? next : &now;
    product(n, vectors, now.keys + t * width, width, 1, q, width, sum, 1, ahead->keys + t * width,
            ahead->values + t * value_width);
#pragma GCC unroll 8
    for (int i = 0; i < n; i++)
#pragma GCC unroll 3
        for (int v = 0; v < vectors; v++) score[t + i].lanes[v] = sum[i][v];
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

/* e^x for x <= 0: 2^(x log2 e) as an exponent and a polynomial on what is left, between -1/2 and 1/2 (of degree 5, the
 * one whose largest relative error is least: 9e-8). The sum with NEAREST has the whole number in its last bits. Never
 * less than 2^-126. */
static inline vec power(vec x) {
    const vec y = larger((vec){0} - 126.0f, x * 1.44269504f), whole = y + NEAREST, left = y - (whole - NEAREST);
    vec p = left * 1.32647271e-3f + 9.67151286e-3f;
    p = p * left + 5.55073375e-2f;
    p = p * left + 2.40222421e-1f;
    p = p * left + 6.93146978e-1f;
    p = p * left + 1.0f;
    return (vec)((ivec)p + ((ivec)whole << 23));
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

/* What a tile, from position `first` on, adds to a block's state. */
static inline __attribute__((always_inline)) void add_tile(const int vectors, block *b, tile now, const tile *next,
                                                           int64_t width, int64_t value_width, int32_t first, int edge) {
    queries score[TILE], kept;
    const int64_t count = now.count, last = count - ACROSS;
    int64_t t = 0;
    for (; t + ACROSS <= count; t += ACROSS) scores(ACROSS, vectors, t, now, next, width, value_width, b->q, score);
    /* The rest: some tokens once more, the same again. */
    if (t < count && t)
        scores(ACROSS, vectors, last, now, next, width, value_width, b->q, score);
    else
        for (; t < count; t++) scores(1, vectors, t, now, next, width, value_width, b->q, score);
    for (t = count; t < next->count; t++) {
        for (int64_t d = 0; d < width; d += LINE) __builtin_prefetch(next->keys + t * width + d, 0, 2);
        for (int64_t d = 0; d < value_width; d += LINE) __builtin_prefetch(next->values + t * value_width + d, 0, 2);
    }
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
        weigh(vectors, score, now.values + d, value_width, b->result + d, &kept, count);
}

/* The same for the first `some` queries, in as few vectors as hold them. */
static void add_tiles(block *b, int64_t some, tile now, const tile *next, int64_t width, int64_t value_width,
                      int32_t first, int edge) {
    if (some <= LANES)
        add_tile(1, b, now, next, width, value_width, first, edge);
    else if (some <= 2 * LANES)
        add_tile(2, b, now, next, width, value_width, first, edge);
    else
        add_tile(3, b, now, next, width, value_width, first, edge);
}

/* Of `left` tokens that begin there. */
static inline tile tile_of(const float *keys, const float *values, int64_t left) {
    return (tile){keys, values, left < TILE ? left : TILE};
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
        const float *k = keys + (before + at) * l->width, *v = values + (before + at) * l->value_width;
        const tile now = tile_of(k, v, end - at);
        const tile next = tile_of(k + TILE * l->width, v + TILE * l->value_width, end - at - now.count);
        const int edge = at <= oldest[some - 1] || at + now.count > newest[0] + 1; /* not all see all */
        add_tiles(b, some, now, &next, l->width, l->value_width, at, edge);
    }
}

/* to[i][j] = from[j][i] * scale, four by four. */
static inline __attribute__((always_inline)) void turn(const float *const from[4], float *const to[4], float scale) {
    quarter a[4];
    for (int i = 0; i < 4; i++) a[i] = *(const quarter *)from[i] * scale;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) *(quarter *)to[i] = (quarter){a[0][i], a[1][i], a[2][i], a[3][i]};
}

/* Queries into lanes: from[lane] are `width` floats. */
static void to_lanes(const float *const *from, queries *to, int64_t lanes, int64_t width, float scale) {
    for (int64_t lane = 0; lane < lanes; lane += 4) {
        const float *const *f = from + lane;
        int64_t d = 0;
        for (; d + 4 <= width; d += 4)
            turn((const float *[]){f[0] + d, f[1] + d, f[2] + d, f[3] + d},
                 (float *[]){to[d].at + lane, to[d + 1].at + lane, to[d + 2].at + lane, to[d + 3].at + lane}, scale);
        for (; d < width; d++)
            for (int i = 0; i < 4; i++) to[d].at[lane + i] = f[i][d] * scale;
    }
}

/* And back, the first `some`; `width` is a multiple of 4. */
static void from_lanes(const queries *from, float *const *to, int64_t some, int64_t width) {
    for (int64_t lane = 0; lane < some; lane += 4)
        for (int64_t d = 0; d < width; d += 4) {
            const queries *f = from + d;
            float nowhere[4], *t[4];
            for (int i = 0; i < 4; i++) t[i] = lane + i < some ? to[lane + i] + d : nowhere;
            turn((const float *[]){f[0].at + lane, f[1].at + lane, f[2].at + lane, f[3].at + lane}, t, 1.0f);
        }
}

/* The first `some` lanes: queries of one row and head from number `begin` on, a token's group side by side. The other
 * lanes repeat the last. q: the row's, of the group's first head. */
static void begin_block(const layer *l, block *b, int64_t begin, int64_t some, int64_t start, int64_t window,
                        const float *q, float scale) {
    const float *from[QUERIES];
    for (int64_t lane = 0; lane < QUERIES; lane++) {
        const int64_t query = begin + (lane < some ? lane : some - 1), token = query / l->groups;
        from[lane] = q + query % l->groups * l->q[1] + token * l->q[2];
        b->largest.at[lane] = LOWEST;
        b->total.at[lane] = 0.0f;
        ((int32_t *)&b->newest)[lane] = start + token;
        ((int32_t *)&b->oldest)[lane] = start + token < window ? -1 : start + token - window;
    }
    to_lanes(from, b->q, QUERIES, l->width, scale);
    memset(b->result, 0, l->value_width * sizeof(queries));
}

/* out: the row's, of the group's first head. */
static void end_block(const layer *l, block *b, int64_t begin, int64_t some, float *out) {
    for (int v = 0; v < VECTORS; v++) {
        const vec share = 1.0f / b->total.lanes[v];
        for (int64_t d = 0; d < l->value_width; d++) b->result[d].lanes[v] *= share;
    }
    float *to[QUERIES];
    for (int64_t lane = 0; lane < some; lane++) {
        const int64_t query = begin + lane;
        to[lane] = out + (query / l->groups * l->heads * l->groups + query % l->groups) * l->value_width;
    }
    from_lanes(b->result, to, some, l->value_width);
}

/* For decode steps: what up to QUERIES scaled queries [some, width] get of one head's K and V [size, width], all of it.
 * width: a multiple of ACROSS. state[i]: largest score, sum of the weights, and the weighted sum of V. after: the tile
 * that is read then. */
void kvcache_many(const float *q, const float *keys, const float *values, float **state, int64_t some, int64_t size,
                  int64_t width, const float *next_keys, const float *next_values, int64_t next_count) {
    block b;
    const tile after = {next_keys, next_values, next_count};
    const int64_t lanes = (some + LANES - 1) / LANES * LANES;
    const float *from[QUERIES];
    for (int64_t lane = 0; lane < lanes; lane++) {
        from[lane] = q + (lane < some ? lane : some - 1) * width;
        b.largest.at[lane] = LOWEST;
        b.total.at[lane] = 0.0f;
    }
    to_lanes(from, b.q, lanes, width, 1.0f);
    memset(b.result, 0, width * sizeof(queries));
    for (int64_t at = 0; at < size; at += TILE) {
        const float *k = keys + at * width, *v = values + at * width;
        const tile now = tile_of(k, v, size - at), more = tile_of(k + TILE * width, v + TILE * width, size - at - now.count);
        add_tiles(&b, some, now, more.count ? &more : &after, width, width, at, 0);
    }
    float *to[QUERIES];
    for (int64_t lane = 0; lane < some; lane++) {
        state[lane][0] = b.largest.at[lane];
        state[lane][1] = b.total.at[lane];
        to[lane] = state[lane] + 2;
    }
    from_lanes(b.result, to, some, width);
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
