/* Attention of the rows of one step over their slots: the shared past of a request, then each row's own path.
 *
 * A row sees `context` slots and the chain up to itself; a tree node sees the whole chain, its ancestors and itself. Keys
 * are taken in the order of their positions, KEYS at a time (online softmax), so the place of a row in the batch, the
 * other rows, and the nodes that are not its ancestors change no operation.
 *
 * Invariants: row independence, as above; head sizes are multiples of 16.
 */
#ifndef MEDUSA_ATTENTION_H
#define MEDUSA_ATTENTION_H

#include <math.h>

#include "linear.h"
#include "team.h"
#include "vec.h"

#define KEYS 32
#define AHEAD 16 /* keys that are asked for before they are needed: slots may lie anywhere */
#define MAX_DIM 256
#define TOGETHER 4 /* heads that go through the keys at once: their chains of operations fill each other's gaps */
#define QUERY_ROWS 16 /* most rows of one piece of work: they share the keys in the cache */

/* The rows of one request, as models.batch lays them out. */
typedef struct {
    int64_t table;     /* where its slots begin in Step.table: context, then chain */
    int64_t context;   /* number of slots before this step's rows */
    int64_t first;     /* its first packed row */
    int64_t chain;     /* rows of the chain */
    int64_t rows;      /* rows of the chain and the tree */
} Segment;

typedef struct {
    const Segment *segments;
    int64_t num_segments;
    const int64_t *table;   /* slots of all segments, one after another */
    const int64_t *positions; /* [rows] */
    const int64_t *slots;   /* [rows]: where a row's own K and V are */
    const int32_t *parents; /* [rows]: the packed row above a tree node, -1 above those right under the chain */
    int64_t rows;
} Step;

typedef struct {
    const void *keys, *values; /* [slots][kv_heads][dim] */
    int64_t is_half;           /* binary16, or float */
    int64_t heads, kv_heads, k_dim, v_dim;
    int64_t window;            /* 0: none; else a key is seen iff its position is less than so far back */
    float scaling;
} Attention;

/* What one thread works with. */
typedef struct {
    _Alignas(64) float keys[KEYS * MAX_DIM], values[KEYS * MAX_DIM];
    float scores[TOGETHER][KEYS], most[QUERY_ROWS * 64], total[QUERY_ROWS * 64];
} Scratch;

INLINE void fetch(float *to, const void *pool, int64_t is_half, int64_t at, int64_t dim) {
    for (int64_t c = 0; c < dim; c += LANES)
        store(to + c, is_half ? from_half((const half *)pool + at + c) : load((const float *)pool + at + c));
}

INLINE void fetch_slot(Scratch *scratch, const Attention *a, int64_t head, int64_t slot, int64_t place) {
    const int64_t at = slot * a->kv_heads + head;
    fetch(scratch->keys + place * a->k_dim, a->keys, a->is_half, at * a->k_dim, a->k_dim);
    fetch(scratch->values + place * a->v_dim, a->values, a->is_half, at * a->v_dim, a->v_dim);
}

INLINE void prefetch_slot(const Attention *a, int64_t head, int64_t slot) {
    const int64_t size = a->is_half ? sizeof(half) : sizeof(float), at = slot * a->kv_heads + head;
    for (int64_t c = 0; c < a->k_dim * size; c += 64) __builtin_prefetch((const char *)a->keys + at * a->k_dim * size + c);
    for (int64_t c = 0; c < a->v_dim * size; c += 64) __builtin_prefetch((const char *)a->values + at * a->v_dim * size + c);
}

/* `heads` query heads of one row over `count` keys in the scratch, of which those below `begin` are out of its window.
 * query, out: [heads][dim]; most, total: [heads]. */
INLINE void attend_keys(Scratch *scratch, const int heads, const int64_t k_dim, const int64_t v_dim, float scaling,
                        const float *query, int64_t begin, int64_t count, float *most, float *total, float *out) {
    floats best[TOGETHER], sums[TOGETHER];
    float decay[TOGETHER];
    for (int h = 0; h < heads; h++) best[h] = splat(most[h]), sums[h] = splat(0.0f);
    for (int64_t first = 0; first < count; first += LANES)
        for (int h = 0; h < heads; h++) {
            float *scores = scratch->scores[h] + first;
            const float *q = query + h * k_dim, *keys = scratch->keys + first * k_dim;
            floats parts[LANES];
            for (int i = 0; i < LANES; i++) parts[i] = load(q) * load(keys + i * k_dim);
            for (int64_t c = LANES; c < k_dim; c += LANES)
                for (int i = 0; i < LANES; i++) parts[i] += load(q + c) * load(keys + i * k_dim + c);
            store(scores, sums_of(parts) * scaling);
            if (first < begin || first + LANES > count)
                for (int64_t j = 0; j < LANES; j++)
                    if (first + j < begin || first + j >= count) scores[j] = -INFINITY;
            best[h] = larger(load(scores), best[h]);
        }
    for (int h = 0; h < heads; h++) {
        const float now = max_of(best[h]);
        for (int64_t j = 0; j < count; j += LANES) {
            floats weight = exponential(load(scratch->scores[h] + j) - now);
            store(scratch->scores[h] + j, weight);
            sums[h] += weight;
        }
        decay[h] = exponential(splat(most[h] - now))[0];
        total[h] = total[h] * decay[h] + sum_of(sums[h]);
        most[h] = now;
    }
    enum { WIDE = 4 };
    for (int64_t c = 0; c < v_dim; c += WIDE * LANES) {
        const int wide = v_dim - c < WIDE * LANES ? (v_dim - c) / LANES : WIDE;
        floats sum[TOGETHER][WIDE];
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < wide; i++) sum[h][i] = load(out + h * v_dim + c + i * LANES) * decay[h];
        for (int64_t j = 0; j < count; j++)
            for (int i = 0; i < wide; i++) {
                floats value = load(scratch->values + j * v_dim + c + i * LANES);
                for (int h = 0; h < heads; h++) sum[h][i] += scratch->scores[h][j] * value;
            }
        for (int h = 0; h < heads; h++)
            for (int i = 0; i < wide; i++) store(out + h * v_dim + c + i * LANES, sum[h][i]);
    }
}

/* The same with all counts known to the compiler for usual heads: a matter of speed alone. */
static void attend_heads(Scratch *scratch, const Attention *a, int heads, const float *query, int64_t begin,
                         int64_t count, float *most, float *total, float *out) {
#define ATTEND(n, dim_k, dim_v) \
    attend_keys(scratch, n, dim_k, dim_v, a->scaling, query, begin, count, most, total, out)
    const int dim = a->k_dim == a->v_dim ? a->k_dim : 0;
    if (dim == 64 && heads == 1) ATTEND(1, 64, 64);
    else if (dim == 64 && heads == 2) ATTEND(2, 64, 64);
    else if (dim == 64 && heads == 3) ATTEND(3, 64, 64);
    else if (dim == 64 && heads == 4) ATTEND(4, 64, 64);
    else if (dim == 128 && heads == 4) ATTEND(4, 128, 128);
    else
        for (int h = 0; h < heads; h++, query += a->k_dim, out += a->v_dim, most++, total++)
            ATTEND(1, a->k_dim, a->v_dim);
#undef ATTEND
}

/* The slots of a tree node's path below the chain, in order. Returns how many. */
INLINE int64_t node_path(const Step *step, int64_t row, int64_t *path) {
    int64_t depth = 0;
    for (int64_t r = row; r >= 0; r = step->parents[r]) depth++;
    for (int64_t r = row, i = depth; r >= 0; r = step->parents[r]) path[--i] = step->slots[r];
    return depth;
}

/* Rows [begin, end) of a segment with all query heads of one kv head. query, out: [rows][heads][dim]. `narrow`: `attend`. */
static void attend_rows(Scratch *scratch, const Attention *a, const Step *step, const Segment *segment, int64_t begin,
                        int64_t end, int64_t kv_head, const float *query, float *out, const Rows *narrow) {
    const int64_t shared = a->heads / a->kv_heads, width = segment->context + segment->chain;
    const int64_t *table = step->table + segment->table;
    int64_t paths[QUERY_ROWS][64], seen[QUERY_ROWS], from[QUERY_ROWS], first = INT64_MAX, last = 0;
    for (int64_t r = begin; r < end; r++) {
        const int64_t i = r - begin;
        seen[i] = r < segment->chain ? segment->context + r + 1 : width + node_path(step, segment->first + r, paths[i]);
        from[i] = a->window && seen[i] > a->window ? seen[i] - a->window : 0;
        first = from[i] < first ? from[i] : first;
        last = seen[i] > last ? seen[i] : last;
        for (int64_t h = 0; h < shared; h++) {
            scratch->most[i * shared + h] = -INFINITY;
            scratch->total[i * shared + h] = 0;
            float *to = out + ((segment->first + r) * a->heads + kv_head * shared + h) * a->v_dim;
            memset(to, 0, a->v_dim * sizeof(float));
        }
    }
    for (int64_t block = first / KEYS * KEYS; block < last; block += KEYS) {
        for (int64_t p = block; p < block + KEYS && p < width && p < last; p++) {
            if (p + AHEAD < width) prefetch_slot(a, kv_head, table[p + AHEAD]);
            fetch_slot(scratch, a, kv_head, table[p], p - block);
        }
        for (int64_t r = begin; r < end; r++) {
            const int64_t i = r - begin, stop = seen[i] < block + KEYS ? seen[i] : block + KEYS;
            if (stop <= block || stop <= from[i]) continue;
            for (int64_t p = block > width ? block : width; p < stop; p++)
                fetch_slot(scratch, a, kv_head, paths[i][p - width], p - block);
            for (int64_t h = 0; h < shared; h += TOGETHER) {
                const int64_t head = (segment->first + r) * a->heads + kv_head * shared + h;
                attend_heads(scratch, a, shared - h < TOGETHER ? shared - h : TOGETHER, query + head * a->k_dim,
                             from[i] - block, stop - block, scratch->most + i * shared + h,
                             scratch->total + i * shared + h, out + head * a->v_dim);
            }
        }
    }
    for (int64_t r = begin; r < end; r++) {
        const int64_t row = segment->first + r, head = kv_head * shared; /* the first of this kv head's */
        float *to = out + row * a->heads * a->v_dim;
        for (int64_t h = 0; h < shared; h++) {
            const float total = scratch->total[(r - begin) * shared + h];
            for (int64_t c = (head + h) * a->v_dim; c < (head + h + 1) * a->v_dim; c += LANES) store(to + c, load(to + c) / total);
        }
        if (narrow) quantize(narrow, row, head * a->v_dim, (head + shared) * a->v_dim, to);
    }
}

/* Few rows are dealt in small pieces, so that every thread gets some. */
INLINE int64_t piece_rows(const Segment *segment) { return segment->rows > 2 * QUERY_ROWS ? QUERY_ROWS : 4; }

INLINE int64_t num_pieces(const Segment *segment) { return (segment->rows + piece_rows(segment) - 1) / piece_rows(segment); }

/* One stage: all rows. The last rows of a chain see most, so pieces are dealt from the end. `narrow`: `out` once more,
 * quantised, if that is wanted; a kv head's outputs are then whole groups. */
static void attend(Team *team, Scratch *scratch, const Attention *a, const Step *step, const float *query, float *out,
                   const Rows *narrow) {
    int64_t total = 0, done = 0, s = 0;
    for (int64_t i = 0; i < step->num_segments; i++) total += num_pieces(step->segments + i) * a->kv_heads;
    for (int64_t piece; (piece = take(team, 1)) < total;) {
        for (; piece - done >= num_pieces(step->segments + s) * a->kv_heads; s++)
            done += num_pieces(step->segments + s) * a->kv_heads;
        const Segment *segment = step->segments + s;
        const int64_t size = piece_rows(segment);
        const int64_t begin = (num_pieces(segment) - 1 - (piece - done) / a->kv_heads) * size;
        const int64_t end = begin + size < segment->rows ? begin + size : segment->rows;
        attend_rows(scratch, a, step, segment, begin, end, (piece - done) % a->kv_heads, query, out, narrow);
    }
    meet(team);
}

#endif
