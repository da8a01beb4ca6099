/* Attention of few queries over many tokens, at the speed of memory: K and V are read once for all queries.
 * The tokens are cut into chunks for the threads; each chunk runs an online softmax (Milakov and Gimelshein) over tiles
 * that stay in the first-level cache, and the chunks are merged by their log-sum-exp (flash-decoding).
 *
 * q, out: [B, H, Q, D] contiguous; lse: [B, H, Q]; k, v: [B, H, S, D], tokens D apart, other strides in floats.
 * scratch: B * H * chunks * Q * (D + 2) floats. */
#include <math.h>
#include <stdint.h>

#define TILE 64
#define QUERIES 8 /* at most */

/* Ask for memory that the next loop reads: K and V take turns, which the processor's own prefetching does not foresee. */
static inline void fetch(const float *at, int64_t floats) {
    for (int64_t d = 0; d < floats; d += 16) __builtin_prefetch(at + d);
}

static void chunk(const float *q, const float *k, const float *v, float *partial, int64_t queries, int64_t size,
                  int64_t width, float scale) {
    float score[QUERIES][TILE];
    for (int64_t i = 0; i < queries; i++) {
        float *state = partial + i * (width + 2);
        state[0] = -1e30f;
        for (int64_t d = 1; d < width + 2; d++) state[d] = 0.0f;
    }
    for (int64_t first = 0; first < size; first += TILE) {
        const int64_t count = size - first < TILE ? size - first : TILE;
        const float *keys = k + first * width, *values = v + first * width;
        for (int64_t t = 0; t < count; t++) {
            const float *key = keys + t * width;
            fetch(values + t * width, width);
            for (int64_t i = 0; i < queries; i++) {
                const float *query = q + i * width;
                float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                for (int64_t d = 0; d < width; d++) sum += query[d] * key[d];
                score[i][t] = sum * scale;
            }
        }
        for (int64_t i = 0; i < queries; i++) {
            float *state = partial + i * (width + 2), *result = state + 2;
            float largest = state[0];
            for (int64_t t = 0; t < count; t++) largest = score[i][t] > largest ? score[i][t] : largest;
            float total = 0.0f;
            for (int64_t t = 0; t < count; t++) {
                score[i][t] = expf(score[i][t] - largest);
                total += score[i][t];
            }
            const float kept = expf(state[0] - largest);
            state[0] = largest;
            state[1] = state[1] * kept + total;
            for (int64_t at = 0; at < width; at += 64) {
                const int64_t part = width - at < 64 ? width - at : 64;
                float sum[64];
                for (int64_t d = 0; d < part; d++) sum[d] = result[at + d] * kept;
                if (part == 64) {
                    for (int64_t t = 0; t < count; t++) {
                        const float weight = score[i][t];
                        const float *value = values + t * width + at;
                        if (i == 0) fetch(keys + (TILE + t) * width + at, 64);
                        for (int64_t d = 0; d < 64; d++) sum[d] += weight * value[d];
                    }
                } else {
                    for (int64_t t = 0; t < count; t++)
                        for (int64_t d = 0; d < part; d++) sum[d] += score[i][t] * values[t * width + at + d];
                }
                for (int64_t d = 0; d < part; d++) result[at + d] = sum[d];
            }
        }
    }
}

void kvcache_decode(const float *q, const float *k, const float *v, float *out, float *lse, float *scratch,
                    const int64_t *shape, const int64_t *strides, float scale) {
    const int64_t rows = shape[0], heads = shape[1], queries = shape[2], size = shape[3], width = shape[4];
    const int64_t chunks = shape[5], per = (size + chunks - 1) / chunks, state = queries * (width + 2);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t item = 0; item < rows * heads * chunks; item++) {
            const int64_t pair = item / chunks, row = pair / heads, head = pair % heads;
            const int64_t first = item % chunks * per;
            const int64_t count = size - first < per ? size - first : per;
            chunk(q + pair * queries * width, k + row * strides[0] + head * strides[1] + first * width,
                  v + row * strides[2] + head * strides[3] + first * width, scratch + item * state, queries,
                  count > 0 ? count : 0, width, scale);
        }
#pragma omp for schedule(static)
        for (int64_t at = 0; at < rows * heads * queries; at++) {
            const float *parts = scratch + at / queries * chunks * state + at % queries * (width + 2);
            float largest = -1e30f, total = 0.0f;
            for (int64_t c = 0; c < chunks; c++)
                if (parts[c * state] > largest) largest = parts[c * state];
            float *result = out + at * width;
            for (int64_t d = 0; d < width; d++) result[d] = 0.0f;
            for (int64_t c = 0; c < chunks; c++) {
                const float weight = expf(parts[c * state] - largest);
                total += weight * parts[c * state + 1];
                for (int64_t d = 0; d < width; d++) result[d] += weight * parts[c * state + 2 + d];
            }
            for (int64_t d = 0; d < width; d++) result[d] /= total;
            lse[at] = largest + logf(total);
        }
    }
}
