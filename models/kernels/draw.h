/* Drawing tokens with shared noise: models.sampling once more. Included by cpu.c.
 *
 * Invariant: a row's token depends on its logits and its `Draw` alone; which thread does which part changes nothing.
 */
#ifndef MEDUSA_DRAW_H
#define MEDUSA_DRAW_H

#include <math.h>
#include <stdlib.h>

#include "team.h"
#include "vec.h"

#define GOLDEN 0x9E3779B97F4A7C15u
#define SPAN 8192    /* tokens of a row that one thread looks at in one go */
#define DEEPEST 48.0f /* noise lies between -3 and 38: a score that much below the best one never wins, and e^-48 is no mass */

typedef uint64_t longs __attribute__((vector_size(8 * LANES)));

static void *room(int64_t count, int64_t size) {
    void *memory = malloc((count ? count : 1) * size);
    if (!memory) abort();
    return memory;
}

/* How a row is drawn. A temperature of 0 takes the largest logit; 0 is no top_k, 1 no top_p. */
typedef struct {
    float temperature, top_p, min_p;
    int32_t top_k;
    uint64_t key; /* models.sampling.noise_key */
} Draw;

/* What is known of one part of a row: the best token, or of a row to be truncated the sum of e^(score - its best). */
typedef struct {
    float best, sum;
    int64_t token;
} Part;

typedef struct {
    float score;
    int32_t token;
} Candidate;

/* splitmix64's finaliser (Steele et al., OOPSLA 2014). */
#define MIX(x) \
    do { \
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u; \
        x = (x ^ (x >> 27)) * 0x94D049BB133111EBu; \
        x ^= x >> 31; \
    } while (0)

/* models.sampling.noise_key, of a key that has its seed and choice. */
INLINE uint64_t position_key(uint64_t key, int64_t position) {
    uint64_t x = key + (uint64_t)(position + 1) * GOLDEN;
    MIX(x);
    return x;
}

/* A number in (0, 1) of each lane's key + token * GOLDEN, fine near 0. */
INLINE floats uniform(const longs *from) {
    longs x = *from;
    MIX(x);
    const ints high = __builtin_convertvector(x >> 35, ints), low = __builtin_convertvector((x >> 11) & 0xffffff, ints);
    const floats u = __builtin_convertvector(high, floats) * 0x1p-29f +
                     (__builtin_convertvector(low, floats) * 0x1p-53f + 0x1p-54f);
    return choose(u > 0x1.fffffep-1f, splat(0x1.fffffep-1f), u);
}

/* Gumbel noise, -log(-log(1 - u)). */
INLINE floats gumbel(floats u) {
    const floats left = 1.0f - u; /* log(1 - u) by Kahan's way: exact where u is small */
    const ints all = left == 1.0f;
    return -logarithm(choose(all, u, -logarithm(left) * (u / choose(all, splat(1.0f), 1.0f - left))));
}

/* At least that noise, and hardly more where it is large: -log(1 - u) >= u, and log2(1 + m) >= m. */
INLINE floats gumbel_at_most(floats u) {
    return 0.01f - __builtin_convertvector((ints)u - 0x3f800000, floats) * (0.69314718f * 0x1p-23f);
}

/* Logits `first` to `first` + LANES of a row times `sharpness`; behind its end, minus infinity. */
INLINE floats scores_at(const float *logits, int64_t first, int64_t vocab, float sharpness) {
    if (first + LANES <= vocab) return load(logits + first) * sharpness;
    floats v = splat(-INFINITY);
    memcpy(&v, logits + first, (vocab - first) * sizeof *logits);
    return v * sharpness;
}

/* 1 / temperature, as far as products with it stay finite; of none, 1. */
INLINE float sharpness_of(float temperature) { return temperature > 1e-30f ? 1.0f / temperature : temperature > 0 ? 1e30f : 1.0f; }

/* The best token of a part, the first of equals. */
INLINE Part best_of(const float *logits, int64_t first, int64_t end, int64_t vocab, const Draw *draw, const int is_noisy) {
    const float sharpness = sharpness_of(draw->temperature);
    floats best = splat(-INFINITY), bar = best;
    ints tokens = {0}, here = {0};
    longs steps = {0};
    for (int lane = 0; lane < LANES; lane++) {
        here[lane] = (int32_t)first + lane;
        steps[lane] = (uint64_t)(first + lane) * GOLDEN + draw->key;
    }
    for (int64_t i = first; i < end; i += LANES, here += LANES, steps += (uint64_t)LANES * GOLDEN) {
        floats v = scores_at(logits, i, vocab, sharpness);
        if (is_noisy) {
            const floats u = uniform(&steps);
            if (!any_of(v + gumbel_at_most(u) >= bar)) continue; /* as nearly always: spare the logarithms */
            v += gumbel(u);
        }
        const ints is_better = v > best;
        best = choose(is_better, v, best);
        bar = is_noisy ? splat(max_of(best)) : bar;
        tokens = (is_better & here) | (~is_better & tokens);
    }
    Part part = {best[0], 0.0f, tokens[0]};
    for (int lane = 1; lane < LANES; lane++)
        if (best[lane] > part.best || (best[lane] == part.best && tokens[lane] < part.token))
            part = (Part){best[lane], 0.0f, tokens[lane]};
    return part;
}

/* The sum of e^(score - best) over a part. */
INLINE float mass_below(const float *logits, int64_t first, int64_t end, int64_t vocab, float sharpness, float best) {
    floats sum = splat(0.0f);
    for (int64_t i = first; i < end; i += LANES) sum += exponential(scores_at(logits, i, vocab, sharpness) - best);
    return sum_of(sum);
}

static Part mass_of(const float *logits, int64_t first, int64_t end, int64_t vocab, float sharpness) {
    floats most = splat(-INFINITY);
    for (int64_t i = first; i < end; i += LANES) most = larger(scores_at(logits, i, vocab, sharpness), most);
    const float best = max_of(most);
    return (Part){best, best > -INFINITY ? mass_below(logits, first, end, vocab, sharpness, best) : 0.0f, 0};
}

static int is_truncated(const Draw *draw) {
    return draw->temperature > 0 && (draw->top_p < 1.0f || draw->top_k > 0 || draw->min_p > 0.0f);
}

static Part look_at(const float *logits, int64_t first, int64_t vocab, const Draw *draw) {
    const int64_t end = first + SPAN < vocab ? first + SPAN : vocab;
    if (is_truncated(draw)) return mass_of(logits, first, end, vocab, sharpness_of(draw->temperature));
    return draw->temperature > 0 ? best_of(logits, first, end, vocab, draw, 1) : best_of(logits, first, end, vocab, draw, 0);
}

static int by_score(const void *a, const void *b) {
    const Candidate *x = a, *y = b;
    if (x->score != y->score) return x->score < y->score ? 1 : -1;
    return (x->token > y->token) - (x->token < y->token);
}

/* All tokens with at least this score, in any order. */
static int64_t collect(const float *logits, int64_t vocab, float sharpness, float least, Candidate *found) {
    int64_t count = 0;
    for (int64_t i = 0; i < vocab; i += LANES) {
        const floats v = scores_at(logits, i, vocab, sharpness);
        if (!any_of(v >= least)) continue;
        for (int lane = 0; lane < LANES && i + lane < vocab; lane++)
            if (v[lane] >= least) found[count++] = (Candidate){v[lane], (int32_t)(i + lane)};
    }
    return count;
}

INLINE double share_of(const Candidate *candidate, float best) { return exponential(splat(candidate->score - best))[0]; }

static double sum_shares(const Candidate *found, int64_t count, float best) {
    double sum = 0.0;
    for (int64_t k = 0; k < count; k++) sum += share_of(found + k, best);
    return sum;
}

/* The tokens that min_p, top_k and top_p keep, in that order, each of what the one before has kept; best first. best:
 * the largest score; total: the sum of e^(score - best) over the vocabulary. */
static int64_t keep_best(const float *logits, int64_t vocab, const Draw *draw, float best, double total, Candidate *found) {
    const float worst = draw->min_p > 0.0f ? best + logf(draw->min_p) : -INFINITY;
    const int is_cut = draw->top_k > 0 || draw->min_p > 0.0f, is_nucleus = draw->top_p < 1.0f;
    int64_t count = 0;
    for (float depth = 8.0f;; depth += 4.0f) { /* usually few tokens are near the best one */
        const float least = best - depth > worst ? best - depth : worst;
        count = collect(logits, vocab, sharpness_of(draw->temperature), least, found);
        if (least <= worst || depth >= DEEPEST || (draw->top_k > 0 && count >= draw->top_k)) break;
        if (!is_cut && sum_shares(found, count, best) >= draw->top_p * total) break;
    }
    qsort(found, count, sizeof *found, by_score);
    if (draw->top_k > 0 && draw->top_k < count) count = draw->top_k;
    if (!is_nucleus) return count;
    const double limit = draw->top_p * (is_cut ? sum_shares(found, count, best) : total);
    double sum = share_of(found, best);
    int64_t kept = 1;
    while (kept < count && sum < limit) sum += share_of(found + kept++, best);
    return kept;
}

/* Draw among the tokens that are kept. `found`: room for the whole vocabulary. */
static int64_t draw_truncated(const float *logits, int64_t vocab, const Draw *draw, const Part *parts, int64_t num_parts,
                              Candidate *found) {
    float best = -INFINITY, most = -INFINITY;
    double total = 0.0;
    for (int64_t k = 0; k < num_parts; k++) best = parts[k].best > best ? parts[k].best : best;
    if (!(best > -INFINITY)) return 0;
    for (int64_t k = 0; k < num_parts; k++) total += parts[k].sum * exponential(splat(parts[k].best - best))[0];
    const int64_t kept = keep_best(logits, vocab, draw, best, total, found);
    int64_t token = found[0].token;
    for (int64_t k = 0; k < kept; k += LANES) {
        longs steps = {0};
        floats v = splat(-INFINITY);
        for (int lane = 0; lane < LANES && k + lane < kept; lane++) {
            steps[lane] = draw->key + (uint64_t)found[k + lane].token * GOLDEN;
            v[lane] = found[k + lane].score;
        }
        v += gumbel(uniform(&steps));
        for (int lane = 0; lane < LANES; lane++)
            if (v[lane] > most) most = v[lane], token = found[k + lane].token;
    }
    return token;
}

/* A row's token, when all of its parts have been looked at. */
static int64_t decide(const float *logits, int64_t vocab, const Draw *draw, const Part *parts, int64_t num_parts) {
    if (is_truncated(draw)) {
        Candidate *found = room(vocab, sizeof *found); /* of which hardly any page is touched */
        const int64_t token = draw_truncated(logits, vocab, draw, parts, num_parts, found);
        free(found);
        return token;
    }
    const Part *best = parts;
    for (int64_t k = 1; k < num_parts; k++)
        if (parts[k].best > best->best) best = parts + k;
    return best->token;
}

/* A row of a drafter's scores that is to have the verifier's noise: what is likeliest then is likeliest drawn. */
typedef struct {
    float *scores; /* replaced */
    Draw draw;
    float sureness; /* what the sum is multiplied by */
    float least;    /* score at the temperature below which nothing would be drawn, were these the verifier's scores */
    float outside;  /* what a score below that loses */
} Noisy;

/* The score of the last token that the row's draw would keep. */
static float least_kept(const float *logits, int64_t vocab, const Draw *draw) {
    if (!is_truncated(draw)) return -INFINITY;
    const Part all = mass_of(logits, 0, vocab, vocab, sharpness_of(draw->temperature));
    if (!(all.best > -INFINITY)) return -INFINITY;
    Candidate *found = room(vocab, sizeof *found);
    const float least = found[keep_best(logits, vocab, draw, all.best, all.sum, found) - 1].score;
    free(found);
    return least;
}

static void perturb(const Noisy *row, const int64_t *tokens, int64_t first, int64_t end) {
    const float sharpness = sharpness_of(row->draw.temperature);
    for (int64_t i = first; i < end; i += LANES) {
        const int64_t here = i + LANES <= end ? LANES : end - i;
        longs steps = {0};
        memcpy(&steps, tokens + i, here * sizeof *tokens);
        steps = steps * GOLDEN + row->draw.key;
        const floats score = scores_at(row->scores, i, end, sharpness);
        const floats kept = choose(score < row->least, score - row->outside, score);
        const floats v = (kept + gumbel(uniform(&steps))) * row->sureness;
        memcpy(row->scores + i, &v, here * sizeof *row->scores);
    }
}

/* Two stages: what is kept of each row, then its noise. */
static void perturb_rows(Team *team, Noisy *rows, int64_t count, const int64_t *tokens, int64_t vocab) {
    const int64_t piece = 2048, pieces = (vocab + piece - 1) / piece;
    for (int64_t i; (i = take(team, 1)) < count;) rows[i].least = least_kept(rows[i].scores, vocab, &rows[i].draw);
    meet(team);
    for (int64_t i; (i = take(team, 1)) < count * pieces;) {
        const int64_t first = i % pieces * piece, end = first + piece < vocab ? first + piece : vocab;
        perturb(rows + i / pieces, tokens, first, end);
    }
    meet(team);
}

#endif
