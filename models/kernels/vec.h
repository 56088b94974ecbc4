/* Float vectors of the machine's own width in GCC's portable notation. The few steps that it has no words for (half
 * floats, and the 8-bit products of linear.h) are chosen by the compiler's target: AVX-512, AVX2, NEON, or plain C.
 *
 * Invariant: a lane's result depends on that lane's operands alone, so that callers can promise row independence.
 */
#ifndef MEDUSA_VEC_H
#define MEDUSA_VEC_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint16_t half; /* IEEE binary16 */

INLINE floats load(const float *from) {
    floats v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE void store(float *to, floats v) { memcpy(to, &v, sizeof v); }

INLINE floats splat(float value) { return value - (floats){0}; }

INLINE floats choose(ints mask, floats yes, floats no) { return (floats)((mask & (ints)yes) | (~mask & (ints)no)); }

INLINE floats larger(floats a, floats b) {
#if LANES == 16
    return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif LANES == 8
    return (floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

/* Whether any lane of a comparison is true. */
INLINE int any_of(ints mask) {
#if LANES == 16
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif LANES == 8
    return _mm256_movemask_ps((__m256)mask) != 0;
#else
    int32_t any = 0;
    for (int lane = 0; lane < LANES; lane++) any |= mask[lane];
    return any != 0;
#endif
}

INLINE floats magnitude(floats v) { return (floats)((ints)v & 0x7fffffff); }

/* Shuffles: EACH(f, w) lists f(lane, w) for all lanes. */
#define FOUR(f, lane, w) f(lane, w), f(lane + 1, w), f(lane + 2, w), f(lane + 3, w)
#if LANES == 16
#define EACH(f, w) FOUR(f, 0, w), FOUR(f, 4, w), FOUR(f, 8, w), FOUR(f, 12, w)
#elif LANES == 8
#define EACH(f, w) FOUR(f, 0, w), FOUR(f, 4, w)
#else
#define EACH(f, w) FOUR(f, 0, w)
#endif
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

/* v with every lane moved down by w. */
#define TURNED_LANE(lane, w) ((lane) + w) % LANES
#define TURNED(v, w) SHUFFLE(v, v, EACH(TURNED_LANE, w))

/* Of every 2w lanes, the first w are sums of two lanes of a that lie w apart, the others those of b. */
#define FIRST_LANE(lane, w) (lane) + ((lane) & (w) ? LANES - (w) : 0)
#define SECOND_LANE(lane, w) FIRST_LANE(lane, w) + (w)
#define MERGED(a, b, w) (SHUFFLE(a, b, EACH(FIRST_LANE, w)) + SHUFFLE(a, b, EACH(SECOND_LANE, w)))

/* Lane i: the sum of the lanes of v[i]. Overwrites v. */
INLINE floats sums_of(floats v[LANES]) {
#if LANES == 16
    for (int i = 0; i < 8; i++) v[i] = MERGED(v[i], v[i + 8], 8);
#endif
#if LANES >= 8
    for (int i = 0; i < 4; i++) v[i] = MERGED(v[i], v[i + 4], 4);
#endif
    for (int i = 0; i < 2; i++) v[i] = MERGED(v[i], v[i + 2], 2);
    return MERGED(v[0], v[1], 1);
}

/* The sum of all lanes, always in the same order. */
INLINE float sum_of(floats v) {
#if LANES == 16
    v += TURNED(v, 8);
#endif
#if LANES >= 8
    v += TURNED(v, 4);
#endif
    v += TURNED(v, 2);
    v += TURNED(v, 1);
    return v[0];
}

/* The largest lane. */
INLINE float max_of(floats v) {
#if LANES == 16
    v = larger(v, TURNED(v, 8));
#endif
#if LANES >= 8
    v = larger(v, TURNED(v, 4));
#endif
    v = larger(v, TURNED(v, 2));
    v = larger(v, TURNED(v, 1));
    return v[0];
}

/* e^x, relative error 2e-7 (Cephes' expf): 2^n times a polynomial of the rest. 0 below -87; x is at most 88. */
INLINE floats exponential(floats x) {
    ints tiny = x < -87.0f;
    x = choose(tiny, splat(-87.0f), x);
    floats n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23 leaves no room for a fraction */
    floats r = x - n * 0.693359375f + n * 2.12194440e-4f;
    floats p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    ints exponent = (__builtin_convertvector(n, ints) + 127) << 23;
    return choose(tiny, splat(0.0f), p * (floats)exponent);
}

/* log x, relative error 2e-7 (Cephes' logf), of x that is positive, finite and not denormal. */
INLINE floats logarithm(floats x) {
    const ints exponent = ((ints)x - 0x3f3504f3) >> 23; /* of x = m * 2^exponent, m from sqrt(1/2) to sqrt(2) */
    const floats r = (floats)((ints)x - (exponent << 23)) - 1.0f, n = __builtin_convertvector(exponent, floats);
    floats p = splat(7.0376836292e-2f);
    p = p * r - 1.1514610310e-1f;
    p = p * r + 1.1676998740e-1f;
    p = p * r - 1.2420140846e-1f;
    p = p * r + 1.4249322787e-1f;
    p = p * r - 1.6668057665e-1f;
    p = p * r + 2.0000714765e-1f;
    p = p * r - 2.4999993993e-1f;
    p = p * r + 3.3333331174e-1f;
    return r + (p * r * (r * r) - n * 2.12194440e-4f - 0.5f * (r * r)) + n * 0.693359375f;
}

INLINE floats from_bf16(const uint16_t *from) {
    halves bits;
    memcpy(&bits, from, sizeof bits);
    return (floats)(__builtin_convertvector(bits, words) << 16);
}

INLINE floats from_half(const half *from) {
#if LANES == 16
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif LANES == 8 && defined(__F16C__)
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#elif defined(__ARM_NEON)
    return (floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)));
#else
    floats v = {0};
    for (int i = 0; i < LANES; i++) {
        _Float16 value;
        memcpy(&value, from + i, 2);
        v[i] = (float)value;
    }
    return v;
#endif
}

INLINE void to_half(half *to, floats v) {
#if LANES == 16
    _mm256_storeu_si256((__m256i *)to, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif LANES == 8 && defined(__F16C__)
    _mm_storeu_si128((__m128i *)to, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__ARM_NEON)
    vst1_u16(to, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
    for (int i = 0; i < LANES; i++) {
        _Float16 value = (_Float16)v[i];
        memcpy(to + i, &value, 2);
    }
#endif
}

#endif
