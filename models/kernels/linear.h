/* Linear layers of int8 weights with a scale per output and 32 inputs, or of 4-bit ones with a scale and a least value, on
 * rows of int8 with a scale per 32 inputs. Sums are exact integers within such a group, and floats over groups, in order.
 *
 * Invariant: a row's outputs come from the same operations in the same order whatever rows are beside it. How many rows
 * share one pass over the weights depends on the others, and changes no operation.
 */
#ifndef MEDUSA_LINEAR_H
#define MEDUSA_LINEAR_H

#include "team.h"
#include "vec.h"

#define GROUP 32
#define BLOCK 16 /* outputs whose weights lie side by side */
#define PARTS (BLOCK / LANES)
#define PREFETCH 4096 /* bytes ahead in the weights; to the second-level cache, which takes more at a time than the first */
#if defined(__AVX2__)
#define TILE 8 /* rows that share a pass over the weights, as many as the registers hold */
#else
#define TILE 4
#endif

typedef struct {
    const uint8_t *weight;   /* int8: [outputs / 16][inputs / 32][8][16][4], the value + 128
                              * int4: [outputs / 16][inputs / 32][4][16][4], 16 inputs in the low halves, 16 in the high */
    const uint16_t *scale;   /* int8: [outputs / 16][inputs / 32][16] bfloat16
                              * int4: [outputs / 16][inputs / 32][2][16] binary16, scales and then what 0 stands for */
    const float *bias;       /* [outputs] or null */
    int64_t outputs, inputs; /* multiples of 16 and of 32 */
    int64_t bits;            /* 8 or 4 */
} Linear;

/* Quantised rows. */
typedef struct {
    int8_t *value;   /* [rows][inputs] */
    float *scale;    /* [rows][inputs / 32] */
    int32_t *offset; /* [rows][inputs / 32]: -128 times the sum of the values, since weights are stored with + 128 */
    float *sum;      /* [rows][inputs / 32]: the scale times the sum of the values */
    int64_t inputs;
} Rows;

/* Values [begin, end) of a row, whole groups. from: [inputs], the row's. */
INLINE void quantize(const Rows *rows, int64_t row, int64_t begin, int64_t end, const float *from) {
    enum { COUNT = GROUP / LANES };
    typedef int8_t bytes __attribute__((vector_size(LANES)));
    const int64_t groups = rows->inputs / GROUP;
    for (int64_t g = begin / GROUP; g < end / GROUP; g++) {
        floats v[COUNT], most = splat(0.0f);
        for (int i = 0; i < COUNT; i++) {
            v[i] = load(from + g * GROUP + i * LANES);
            most = larger(magnitude(v[i]), most);
        }
        const float largest = max_of(most), inverse = largest > 0 ? 127.0f / largest : 0.0f;
        int8_t *to = rows->value + row * rows->inputs + g * GROUP;
        ints sums = {0};
        for (int i = 0; i < COUNT; i++) {
            ints q = __builtin_convertvector((v[i] * inverse + 12582912.0f) - 12582912.0f, ints);
            bytes narrow = __builtin_convertvector(q, bytes);
            memcpy(to + i * LANES, &narrow, sizeof narrow);
            sums += q;
        }
        rows->scale[row * groups + g] = largest / 127.0f;
        const float sum = sum_of(__builtin_convertvector(sums, floats)); /* exact */
        rows->offset[row * groups + g] = -128 * (int32_t)sum;
        rows->sum[row * groups + g] = largest / 127.0f * sum;
    }
}

INLINE void quantize_row(const Rows *rows, int64_t row, const float *from) { quantize(rows, row, 0, rows->inputs, from); }

/* The weights [inputs] of one output of 8 bits: a table's row. */
INLINE void read_row(const Linear *table, int64_t output, float *to) {
    const int64_t groups = table->inputs / GROUP, block = output / BLOCK, place = output % BLOCK;
    for (int64_t g = block * groups; g < (block + 1) * groups; g++, to += GROUP) {
        const uint8_t *weight = table->weight + g * GROUP * BLOCK + 4 * place;
        const uint32_t bits = (uint32_t)table->scale[g * BLOCK + place] << 16; /* of a bfloat16 */
        float scale;
        memcpy(&scale, &bits, sizeof scale);
        for (int i = 0; i < GROUP; i++) to[i] = scale * (weight[i / 4 * 4 * BLOCK + i % 4] - 128);
    }
}

/* dot[r]: what 16 outputs sum up over one group of `count` rows, `stride` values apart (their offsets `offsets` apart). */
INLINE void dot_group(const uint8_t *w, const int8_t *x, int64_t stride, const int32_t *offset, int64_t offsets,
                      const int count, ints dot[][PARTS]) {
#if defined(__AVX512VNNI__)
    for (int r = 0; r < count; r++) dot[r][0] = (ints)_mm512_set1_epi32(offset[r * offsets]);
    for (int j = 0; j < 8; j++) {
        __m512i weights = _mm512_loadu_si512(w + 64 * j);
        for (int r = 0; r < count; r++) {
            int32_t four;
            memcpy(&four, x + r * stride + 4 * j, sizeof four);
            dot[r][0] = (ints)_mm512_dpbusd_epi32((__m512i)dot[r][0], weights, _mm512_set1_epi32(four));
        }
    }
#elif defined(__AVX2__)
    (void)offset, (void)offsets; /* the weights are made signed here */
    const __m256i ones = _mm256_set1_epi16(1);
    for (int r = 0; r < count; r++) dot[r][0] = dot[r][1] = (ints){0};
    for (int part = 0; part < 2; part++)
        for (int j = 0; j < 8; j++) {
            __m256i stored = _mm256_loadu_si256((const __m256i *)(w + 64 * j + 32 * part));
            __m256i weights = _mm256_xor_si256(stored, _mm256_set1_epi8(-128)), size = _mm256_abs_epi8(weights);
            for (int r = 0; r < count; r++) {
                int32_t four;
                memcpy(&four, x + r * stride + 4 * j, sizeof four);
                __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(_mm256_set1_epi32(four), weights));
                dot[r][part] += (ints)_mm256_madd_epi16(pairs, ones);
            }
        }
#elif defined(__ARM_FEATURE_DOTPROD)
    (void)offset, (void)offsets; /* the weights are made signed here */
    for (int r = 0; r < count; r++)
        for (int part = 0; part < PARTS; part++) dot[r][part] = (ints){0};
    for (int j = 0; j < 8; j++)
        for (int part = 0; part < PARTS; part++) {
            int8x16_t weights = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + 64 * j + 16 * part), vdupq_n_u8(128)));
            for (int r = 0; r < count; r++) {
                int32_t four;
                memcpy(&four, x + r * stride + 4 * j, sizeof four);
                dot[r][part] = (ints)vdotq_s32((int32x4_t)dot[r][part], weights, vreinterpretq_s8_s32(vdupq_n_s32(four)));
            }
        }
#else
    for (int r = 0; r < count; r++)
        for (int output = 0; output < BLOCK; output++) {
            int32_t sum = offset[r * offsets];
            for (int j = 0; j < 8; j++)
                for (int i = 0; i < 4; i++) sum += w[64 * j + 4 * output + i] * x[r * stride + 4 * j + i];
            dot[r][output / LANES][output % LANES] = sum;
        }
#endif
}

/* The same of `width` parts of a block of int4 weights as they are stored, w: [4][16][4] from the first part on. */
INLINE void dot_group_int4(const uint8_t *w, const int8_t *x, int64_t stride, const int count, const int width,
                           ints dot[][PARTS]) {
    for (int r = 0; r < count; r++)
        for (int part = 0; part < width; part++) dot[r][part] = (ints){0};
#if defined(__AVX512VNNI__)
    for (int j = 0; j < 8; j++) {
        __m512i both = _mm512_loadu_si512(w + 64 * (j % 4));
        __m512i weights = _mm512_and_si512(j < 4 ? both : _mm512_srli_epi16(both, 4), _mm512_set1_epi8(15));
        for (int r = 0; r < count; r++) {
            int32_t four;
            memcpy(&four, x + r * stride + 4 * j, sizeof four);
            dot[r][0] = (ints)_mm512_dpbusd_epi32((__m512i)dot[r][0], weights, _mm512_set1_epi32(four));
        }
    }
#elif defined(__AVX2__)
    /* All 8 products of a pair fit into 16 bits: 8 * 2 * 15 * 127 < 2^15. */
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
    for (int part = 0; part < width; part++) {
        __m256i pairs[TILE];
        for (int j = 0; j < 4; j++) {
            __m256i both = _mm256_loadu_si256((const __m256i *)(w + 64 * j + 32 * part));
            __m256i near = _mm256_and_si256(both, low), far = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            for (int r = 0; r < count; r++) {
                int32_t four, later;
                memcpy(&four, x + r * stride + 4 * j, sizeof four);
                memcpy(&later, x + r * stride + 4 * j + 16, sizeof later);
                __m256i sum = _mm256_maddubs_epi16(near, _mm256_set1_epi32(four));
                sum = j ? _mm256_add_epi16(pairs[r], sum) : sum;
                pairs[r] = _mm256_add_epi16(sum, _mm256_maddubs_epi16(far, _mm256_set1_epi32(later)));
            }
        }
        for (int r = 0; r < count; r++) dot[r][part] = (ints)_mm256_madd_epi16(pairs[r], ones);
    }
#elif defined(__ARM_FEATURE_DOTPROD)
    for (int j = 0; j < 8; j++)
        for (int part = 0; part < width; part++) {
            uint8x16_t both = vld1q_u8(w + 64 * (j % 4) + 16 * part);
            int8x16_t weights = vreinterpretq_s8_u8(j < 4 ? vandq_u8(both, vdupq_n_u8(15)) : vshrq_n_u8(both, 4));
            for (int r = 0; r < count; r++) {
                int32_t four;
                memcpy(&four, x + r * stride + 4 * j, sizeof four);
                dot[r][part] = (ints)vdotq_s32((int32x4_t)dot[r][part], weights, vreinterpretq_s8_s32(vdupq_n_s32(four)));
            }
        }
#else
    for (int r = 0; r < count; r++)
        for (int output = 0; output < width * LANES; output++)
            for (int j = 0; j < 8; j++)
                for (int i = 0; i < 4; i++)
                    dot[r][output / LANES][output % LANES] +=
                        (w[64 * (j % 4) + 4 * output + i] >> (j < 4 ? 0 : 4) & 15) * x[r * stride + 4 * j + i];
#endif
}

/* sum[r]: outputs of `width` parts of a block are added to it, for `count` rows from `row` on; `weight` and `scale` are the
 * block's, from the first of these parts on. */
INLINE void add_int4(const uint8_t *weight, const uint16_t *scale, const Rows *rows, int64_t row, const int count,
                     const int width, const int is_first, floats sum[][PARTS]) {
    const int64_t groups = rows->inputs / GROUP, size = GROUP * BLOCK / 2;
    for (int64_t g = 0; g < groups; g++, weight += size, scale += 2 * BLOCK) {
        ints dot[TILE][PARTS];
        for (int i = 0; i < size / 64 && is_first; i++) __builtin_prefetch(weight + PREFETCH + 64 * i, 0, 1);
        dot_group_int4(weight, rows->value + row * rows->inputs + g * GROUP, rows->inputs, count, width, dot);
        for (int part = 0; part < width; part++) {
            const floats each = from_half(scale + part * LANES), least = from_half(scale + BLOCK + part * LANES);
            for (int r = 0; r < count; r++) {
                const int64_t at = (row + r) * groups + g;
                sum[r][part] += __builtin_convertvector(dot[r][part], floats) * (each * rows->scale[at]);
                sum[r][part] += least * rows->sum[at];
            }
        }
    }
}

/* The same of whole blocks of int8 weights. */
INLINE void add_int8(const uint8_t *weight, const uint16_t *scale, const Rows *rows, int64_t row, const int count,
                     floats sum[][PARTS]) {
    const int64_t groups = rows->inputs / GROUP, size = GROUP * BLOCK;
    const float *row_scale = rows->scale + row * groups;
    const int32_t *offset = rows->offset + row * groups;
    for (int64_t g = 0; g < groups; g++, weight += size, scale += BLOCK) {
        ints dot[TILE][PARTS];
        for (int i = 0; i < size / 64; i++) __builtin_prefetch(weight + PREFETCH + 64 * i, 0, 1);
        dot_group(weight, rows->value + row * rows->inputs + g * GROUP, rows->inputs, offset + g, groups, count, dot);
        for (int part = 0; part < PARTS; part++) {
            const floats each = from_bf16(scale + part * LANES);
            for (int r = 0; r < count; r++)
                sum[r][part] += __builtin_convertvector(dot[r][part], floats) * (each * row_scale[r * groups + g]);
        }
    }
}

/* out[r]: the outputs of one block for `count` rows from `row` on, bias included. `count` and
 * `bits` are constant at each call. */
INLINE void block_outputs(const Linear *linear, int64_t block, const Rows *rows, int64_t row, const int count,
                          const int bits, floats out[][PARTS]) {
    const int64_t groups = linear->inputs / GROUP, size = GROUP * BLOCK * bits / 8;
    const uint8_t *weight = linear->weight + block * groups * size;
    const uint16_t *scale = linear->scale + block * groups * BLOCK * (bits == 4 ? 2 : 1);
    for (int r = 0; r < count; r++)
        for (int part = 0; part < PARTS; part++)
            out[r][part] = linear->bias ? load(linear->bias + block * BLOCK + part * LANES) : splat(0.0f);
    if (bits == 4 && count > 2) { /* part by part, so that the sums stay in registers */
        for (int part = 0; part < PARTS; part++) {
            floats sum[TILE][PARTS];
            for (int r = 0; r < count; r++) sum[r][0] = out[r][part];
            add_int4(weight + part * 4 * LANES, scale + part * LANES, rows, row, count, 1, part == 0, sum);
            for (int r = 0; r < count; r++) out[r][part] = sum[r][0];
        }
    } else if (bits == 4) add_int4(weight, scale, rows, row, count, PARTS, 1, out);
    else add_int8(weight, scale, rows, row, count, out);
}

#endif
