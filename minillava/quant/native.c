/* The inner loops of integer layers that torch has no fast kernel for, and the decoder layers of a
 * new token made of them, for CPUs with AVX2.
 *
 * native.py compiles this file and documents its functions. R rows of activations x (R, K) are
 * multiplied by a weight (N, K). All matrices are contiguous, row by row. Sums of integers are
 * exact. Rounding, scaling and widening give the same bits as the torch code that runs without this
 * file (the rotation apart, which sums in another order). Norms, gates and attention of whole layers
 * sum in another order too.
 */

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define AHEAD 2048 /* bytes of a weight that are fetched ahead: a CPU alone stops at a page */
#define LANES 8 /* floats of a vector */
#define LINE 64 /* bytes of a line of the CPU's cache */
#define GROUP 32 /* columns of an int4 weight that share a step and a low */
#define PANEL 16 /* rows of a weight that many rows of activations are multiplied by at a time */
#define PANEL_AHEAD 512 /* bytes of them that are fetched ahead, from the second cache to the first */
#define TILE 4 /* rows of activations that are multiplied by them at a time */
#define SHIFT 64 /* makes digits of 7 bits unsigned */

static inline int32_t sum_lanes(__m256i v) {
    __m128i s = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}

static inline float sum_floats(__m256 v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

/* e^x to about one unit in the last place (Cephes' expf); x is held between -87 and 88. */
static inline __m256 exponential(__m256 x) {
    x = _mm256_min_ps(_mm256_set1_ps(88.0f), _mm256_max_ps(_mm256_set1_ps(-87.0f), x)); /* NaN stays */
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_sub_ps(x, _mm256_mul_ps(n, _mm256_set1_ps(0.693359375f)));
    r = _mm256_add_ps(r, _mm256_mul_ps(n, _mm256_set1_ps(2.12194440e-4f)));
    const float factors[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    __m256 y = _mm256_set1_ps(1.9875691500e-4f);
    for (int i = 0; i < 5; i++)
        y = _mm256_add_ps(_mm256_mul_ps(y, r), _mm256_set1_ps(factors[i]));
    y = _mm256_add_ps(_mm256_add_ps(_mm256_mul_ps(_mm256_mul_ps(y, r), r), r), _mm256_set1_ps(1.0f));
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(y, _mm256_castsi256_ps(power));
}

/* One butterfly inside a vector: lanes whose sign is set hold the difference, the others the sum. */
static inline __m256 butterfly(__m256 v, __m256 partner, int signs) {
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(signs), bits), bits);
    __m256 flip = _mm256_castsi256_ps(_mm256_slli_epi32(set, 31));
    return _mm256_add_ps(partner, _mm256_xor_ps(v, flip));
}

/* h = x H for one block of b columns, b a power of two and at least 8, H with entries +-1. */
static void hadamard(const float *x, float *h, long b) {
    for (long i = 0; i < b; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        v = butterfly(v, _mm256_permute_ps(v, 0xb1), 0xaa);
        v = butterfly(v, _mm256_permute_ps(v, 0x4e), 0xcc);
        v = butterfly(v, _mm256_permute2f128_ps(v, v, 1), 0xf0);
        _mm256_storeu_ps(h + i, v);
    }
    for (long half = 8; half < b; half *= 2)
        for (long at = 0; at < b; at += 2 * half)
            for (long i = at; i < at + half; i += 8) {
                __m256 first = _mm256_loadu_ps(h + i), second = _mm256_loadu_ps(h + i + half);
                _mm256_storeu_ps(h + i, _mm256_add_ps(first, second));
                _mm256_storeu_ps(h + i + half, _mm256_sub_ps(first, second));
            }
}

/* Digits of one row x (K). h: memory for K floats, or x itself. second: codes of the second digit,
 * or NULL. Returns the row's step. */
static float row_to_digits(const float *x, float *h, int8_t *first, int8_t *second, long K, long b, float limit,
                           float tiny) {
    const float norm = 1.0f / sqrtf((float)b);
    float largest = 0.0f, wrong = 0.0f, lanes[8], wrongs[8];
    for (long at = 0; at < K; at += b)
        hadamard(x + at, h + at, b);
    __m256 most = _mm256_setzero_ps(), bad = _mm256_setzero_ps();
    const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    for (long i = 0; i < K; i += 8) {
        __m256 v = _mm256_mul_ps(_mm256_loadu_ps(h + i), _mm256_set1_ps(norm));
        _mm256_storeu_ps(h + i, v);
        most = _mm256_max_ps(_mm256_and_ps(v, magnitude), most);
        bad = _mm256_add_ps(bad, _mm256_sub_ps(v, v)); /* NaN if v is not finite */
    }
    _mm256_storeu_ps(lanes, most);
    _mm256_storeu_ps(wrongs, bad);
    for (int i = 0; i < 8; i++) {
        largest = lanes[i] > largest ? lanes[i] : largest;
        wrong += wrongs[i];
    }
    float size = largest / limit;
    size = (size > tiny ? size : tiny) + wrong;
    const float inverse = 1.0f / size;
    for (long i = 0; i < K; i++) {
        float value = h[i] * inverse, whole = rintf(value);
        first[i] = (int8_t)(int)whole;
        h[i] = (value - whole) * (2.0f * limit);
    }
    if (second)
        for (long i = 0; i < K; i++)
            second[i] = (int8_t)(int)rintf(h[i]);
    return size;
}

/* h = the row of x times 1 / sqrt(mean of squares + eps) times weight. */
static void normalise(const float *x, const float *weight, float *h, long K, float eps) {
    __m256 squares = _mm256_setzero_ps();
    for (long i = 0; i < K; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        squares = _mm256_add_ps(squares, _mm256_mul_ps(v, v));
    }
    const __m256 factor = _mm256_set1_ps(1.0f / sqrtf(sum_floats(squares) / (float)K + eps));
    for (long i = 0; i < K; i += 8) {
        __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + i), factor);
        _mm256_storeu_ps(h + i, _mm256_mul_ps(_mm256_loadu_ps(weight + i), v));
    }
}

/* h = silu(x) * other. */
static void gate(const float *x, const float *other, float *h, long K) {
    const __m256 one = _mm256_set1_ps(1.0f);
    for (long i = 0; i < K; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        __m256 below = _mm256_add_ps(one, exponential(_mm256_sub_ps(_mm256_setzero_ps(), v)));
        _mm256_storeu_ps(h + i, _mm256_mul_ps(_mm256_div_ps(v, below), _mm256_loadu_ps(other + i)));
    }
}

int to_digits(const float *x, int8_t *codes, float *step, long R, long K, long b, long digits, float limit,
              float tiny, int threads) {
    int failed = 0;
#pragma omp parallel for num_threads(threads) if (R > 1) reduction(| : failed)
    for (long r = 0; r < R; r++) {
        float *h = malloc(K * sizeof(float));
        if (h)
            step[r] = row_to_digits(x + r * K, h, codes + r * K, digits == 2 ? codes + (R + r) * K : NULL, K, b, limit, tiny);
        failed |= !h;
        free(h);
    }
    return failed;
}

/* The result from one sum, or from those of two digits. */
static inline float scaled(int32_t first, int32_t second, float share, float scale, float step) {
    float y = (float)first;
    if (share != 0.0f)
        y += (float)second * share;
    return y * scale * step;
}

int scale_sums(const int32_t *sums, float *y, const float *scale, const float *step, long R,
                long N, float share, int threads) {
#pragma omp parallel for num_threads(threads) if (R > 1)
    for (long r = 0; r < R; r++)
        if (share == 0.0f)
            for (long n = 0; n < N; n++)
                y[r * N + n] = (float)sums[r * N + n] * scale[n] * step[r];
        else
            for (long n = 0; n < N; n++)
                y[r * N + n] = scaled(sums[r * N + n], sums[(R + r) * N + n], share, scale[n], step[r]);
    return 0;
}

static inline int32_t dot_int8(const int8_t *w, const int16_t *x, long K) {
    __m256i a = _mm256_setzero_si256(), b = a;
    long k = 0;
    for (; k + 32 <= K; k += 32) {
        _mm_prefetch((const char *)w + k + AHEAD, _MM_HINT_T0);
        __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + k)));
        __m256i high = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(w + k + 16)));
        a = _mm256_add_epi32(a, _mm256_madd_epi16(low, _mm256_loadu_si256((const __m256i *)(x + k))));
        b = _mm256_add_epi32(b, _mm256_madd_epi16(high, _mm256_loadu_si256((const __m256i *)(x + k + 16))));
    }
    int32_t sum = sum_lanes(_mm256_add_epi32(a, b));
    for (; k < K; k++)
        sum += w[k] * x[k];
    return sum;
}

/* The sum over the groups of a row of low times the sum of the group's activations. */
static inline int32_t dot_low(const int8_t *low, const int16_t *sums, long groups) {
    __m256i a = _mm256_setzero_si256();
    long g = 0;
    for (; g + 16 <= groups; g += 16)
        a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(low + g))),
                                                  _mm256_loadu_si256((const __m256i *)(sums + g))));
    int32_t sum = sum_lanes(a);
    for (; g < groups; g++)
        sum += low[g] * sums[g];
    return sum;
}

/* The sum of step * code * x over one row of codes, of which 32 bytes hold two groups. */
static inline int32_t dot_int4(const uint8_t *w, const uint8_t *step, const int8_t *x, long K) {
    const __m256i nibble = _mm256_set1_epi8(15), low_byte = _mm256_set1_epi16(255);
    __m256i a = _mm256_setzero_si256(), b = a;
    for (long k = 0; k < K; k += 2 * GROUP, w += GROUP, step += 2) {
        _mm_prefetch((const char *)w + AHEAD, _MM_HINT_T0);
        __m256i bytes = _mm256_loadu_si256((const __m256i *)w);
        __m256i first = _mm256_and_si256(bytes, nibble);
        __m256i second = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble);
        first = _mm256_maddubs_epi16(first, _mm256_loadu_si256((const __m256i *)(x + k)));
        second = _mm256_maddubs_epi16(second, _mm256_loadu_si256((const __m256i *)(x + k + GROUP)));
        __m256i s = _mm256_and_si256(_mm256_set1_epi8((char)step[0]), low_byte);
        __m256i t = _mm256_and_si256(_mm256_set1_epi8((char)step[1]), low_byte);
        a = _mm256_add_epi32(a, _mm256_madd_epi16(first, s));
        b = _mm256_add_epi32(b, _mm256_madd_epi16(second, t));
    }
    return sum_lanes(_mm256_add_epi32(a, b));
}

/* A weight (N, K): codes (N, K) of int8, or, if it has steps, codes of 4 bits (N, K / 2). */
typedef struct {
    const void *codes;
    const uint8_t *step; /* (N, K / GROUP), or NULL */
    const int8_t *low;   /* as step */
    const float *scale;  /* (N) */
} weight;

/* Activations (R, K) as digits. */
typedef struct {
    int8_t *codes; /* (R, K), of two digits (2 R, K) */
    int16_t *wide; /* the same in 16 bits, or, for a weight of 4 bits, the sums of their groups (R, K / GROUP) */
    float *step;   /* (R) */
    long R;
    float share; /* of the second digit's sum, 0: there is one digit */
} digits;

/* Fill `wide` for row r of the codes. */
static void widen_row(const digits *x, long r, long K, int four_bits) {
    const int8_t *codes = x->codes + r * K;
    if (!four_bits) {
        for (long k = 0; k < K; k++)
            x->wide[r * K + k] = codes[k];
        return;
    }
    for (long g = 0; g < K / GROUP; g++) {
        int sum = 0;
        for (long k = g * GROUP; k < (g + 1) * GROUP; k++)
            sum += codes[k];
        x->wide[r * (K / GROUP) + g] = (int16_t)sum;
    }
}

/* y (R, N) = x w^T, or, if `add`, y + x w^T. All threads of a team call it, and none waits at its end. */
static void multiply_rows(const digits *x, const weight *w, float *y, long N, long K, int add) {
    const long R = x->R, G = K / GROUP;
    const int8_t *codes = w->codes;
#pragma omp for nowait
    for (long n = 0; n < N; n++)
        for (long r = 0; r < R; r++) {
            int32_t first, second = 0;
            if (w->step) {
                first = dot_int4((const uint8_t *)codes + n * K / 2, w->step + n * G, x->codes + r * K, K);
                first += dot_low(w->low + n * G, x->wide + r * G, G);
            } else {
                first = dot_int8(codes + n * K, x->wide + r * K, K);
                if (x->share != 0.0f)
                    second = dot_int8(codes + n * K, x->wide + (R + r) * K, K);
            }
            float value = scaled(first, second, x->share, w->scale[n], x->step[r]);
            y[r * N + n] = add ? y[r * N + n] + value : value;
        }
}

int multiply(int8_t *codes, float *step, const void *w, const uint8_t *wstep, const int8_t *wlow, const float *scale,
             float *y, long R, long N, long K, float share, int threads) {
    const long rows = share == 0.0f ? R : 2 * R;
    const weight matrix = {w, wstep, wlow, scale};
    const digits x = {codes, malloc(rows * K * sizeof(int16_t)), step, R, share};
    if (!x.wide)
        return 1;
    for (long r = 0; r < rows; r++)
        widen_row(&x, r, K, wstep != NULL);
#pragma omp parallel num_threads(threads)
    multiply_rows(&x, &matrix, y, N, K, 0);
    free(x.wide);
    return 0;
}

/* Two groups of a 4-bit weight as integers, wide (2 GROUP). */
static inline void widen_pair(const uint8_t *w, const uint8_t *step, const int8_t *low, int8_t *wide) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m128i count = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m256i bytes = _mm256_loadu_si256((const __m256i *)w), level[2];
    for (int i = 0; i < 2; i++) { /* the 16 values of a group, modulo 256 */
        __m256i products = _mm256_mullo_epi16(_mm256_cvtepu8_epi16(count), _mm256_set1_epi16(step[i]));
        __m128i values = _mm_packus_epi16(_mm256_castsi256_si128(products), _mm256_extracti128_si256(products, 1));
        values = _mm_add_epi8(values, _mm_set1_epi8(low[i]));
        level[i] = _mm256_broadcastsi128_si256(values);
    }
    __m256i first = _mm256_shuffle_epi8(level[0], _mm256_and_si256(bytes, nibble));
    __m256i second = _mm256_shuffle_epi8(level[1], _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble));
    _mm256_storeu_si256((__m256i *)wide, first);
    _mm256_storeu_si256((__m256i *)(wide + GROUP), second);
}

/* Eight vectors of eight 32-bit values, rows become columns. */
static inline void transpose(__m256i v[8]) {
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm256_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm256_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        v[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}

/* A panel: PANEL rows of a weight from row n on, four columns of each after one another, so that
 * a vector holds four columns of eight rows. panel (Kp / 4, PANEL, 4), zeros after column K and
 * after row N. scratch: memory for PANEL rows of Kp. offsets: SHIFT times the sum of each row. */
static void fill_panel(const weight *w, long n, long N, long K, long Kp, int8_t *scratch, int8_t *panel,
                       int32_t *offsets) {
    const long G = K / GROUP;
    for (long i = 0; i < PANEL; i++) {
        int8_t *row = scratch + i * Kp;
        const long at = n + i;
        memset(row, 0, Kp);
        if (at < N && w->step)
            for (long p = 0; p < G / 2; p++)
                widen_pair((const uint8_t *)w->codes + at * K / 2 + p * GROUP, w->step + at * G + 2 * p,
                           w->low + at * G + 2 * p, row + 2 * p * GROUP);
        else if (at < N)
            memcpy(row, (const int8_t *)w->codes + at * K, K);
        int32_t total = 0;
        for (long k = 0; k < Kp; k++)
            total += row[k];
        offsets[i] = SHIFT * total;
    }
    for (long k = 0; k < Kp; k += 32)
        for (long half = 0; half < PANEL; half += 8) {
            __m256i v[8];
            for (int i = 0; i < 8; i++)
                v[i] = _mm256_loadu_si256((const __m256i *)(scratch + (half + i) * Kp + k));
            transpose(v);
            for (int i = 0; i < 8; i++)
                _mm256_storeu_si256((__m256i *)(panel + (k + 4 * i) * PANEL + 4 * half), v[i]);
        }
}

/* sums (TILE, PANEL) of products of TILE rows of x (TILE, Kp) and a panel. */
static inline void multiply_tile(const uint8_t *x, const int8_t *panel, int32_t *sums, long Kp) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i s[TILE][2];
    for (int r = 0; r < TILE; r++)
        s[r][0] = s[r][1] = _mm256_setzero_si256();
    for (long k = 0; k < Kp; k += 4, panel += 4 * PANEL) {
        _mm_prefetch((const char *)panel + PANEL_AHEAD, _MM_HINT_T0);
        const __m256i low = _mm256_loadu_si256((const __m256i *)panel);
        const __m256i high = _mm256_loadu_si256((const __m256i *)(panel + 32));
        for (int r = 0; r < TILE; r++) {
            int32_t four;
            memcpy(&four, x + r * Kp + k, 4);
            const __m256i a = _mm256_set1_epi32(four);
            s[r][0] = _mm256_add_epi32(s[r][0], _mm256_madd_epi16(_mm256_maddubs_epi16(a, low), ones));
            s[r][1] = _mm256_add_epi32(s[r][1], _mm256_madd_epi16(_mm256_maddubs_epi16(a, high), ones));
        }
    }
    for (int r = 0; r < TILE; r++) {
        _mm256_storeu_si256((__m256i *)(sums + r * PANEL), s[r][0]);
        _mm256_storeu_si256((__m256i *)(sums + r * PANEL + 8), s[r][1]);
    }
}

/* The same as multiply(), for many rows of digits between -63 and 63. These become unsigned by
 * adding SHIFT, for an instruction that multiplies unsigned by signed bytes and adds two products in
 * 16 bits: 2 * 127 * 127 fits. */
int multiply_many(const int8_t *codes, const float *step, const void *w, const uint8_t *wstep, const int8_t *wlow,
                  const float *scale, float *y, long R, long N, long K, float share, int threads) {
    const weight matrix = {w, wstep, wlow, scale};
    const long count = share == 0.0f ? 1 : 2, Kp = (K + 31) / 32 * 32, Rp = (R + TILE - 1) / TILE * TILE;
    uint8_t *x = malloc(count * Rp * Kp); /* each digit's rows, and rows that complete a tile */
    int failed = !x;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        int8_t *panel = malloc(2 * PANEL * Kp), *scratch = panel + PANEL * Kp;
        int32_t offsets[PANEL], sums[2][TILE * PANEL];
        failed |= !panel;
        if (x)
#pragma omp for
            for (long r = 0; r < count * Rp; r++) {
                const long digit = r / Rp, row = r % Rp;
                memset(x + r * Kp, SHIFT, Kp);
                for (long k = 0; row < R && k < K; k++)
                    x[r * Kp + k] = (uint8_t)(codes[(digit * R + row) * K + k] + SHIFT);
            }
        if (x)
#pragma omp for schedule(dynamic)
            for (long n = 0; n < N; n += PANEL) {
                if (!panel)
                    continue;
                fill_panel(&matrix, n, N, K, Kp, scratch, panel, offsets);
                for (long r = 0; r < R; r += TILE) {
                    for (long digit = 0; digit < count; digit++)
                        multiply_tile(x + (digit * Rp + r) * Kp, panel, sums[digit], Kp);
                    for (long i = 0; i < TILE && r + i < R; i++)
                        for (long j = 0; j < PANEL && n + j < N; j++) {
                            const int32_t first = sums[0][i * PANEL + j] - offsets[j];
                            const int32_t second = count == 2 ? sums[1][i * PANEL + j] - offsets[j] : 0;
                            y[(r + i) * N + n + j] = scaled(first, second, share, scale[n + j], step[r + i]);
                        }
                }
            }
        free(panel);
    }
    free(x);
    return failed;
}

/* One head of a new row: y = softmax(q k^T / sqrt(Dh)) v over S rows, q and y (Dh). visible: which
 * rows it sees, NULL: all. weights: memory for S floats and 8 more. */
static void attend_head(const float *q, const float *k, const float *v, const uint8_t *visible, float *y,
                        float *weights, long S, long Dh) {
    const float scale = 1.0f / sqrtf((float)Dh);
    float largest = -INFINITY, total = 0.0f;
    for (long s = 0; s < S; s++) {
        __m256 a = _mm256_setzero_ps(), b = a;
        for (long d = 0; d + 8 <= Dh; d += 16) {
            _mm_prefetch((const char *)(k + s * Dh + d) + AHEAD, _MM_HINT_T0);
            a = _mm256_add_ps(a, _mm256_mul_ps(_mm256_loadu_ps(q + d), _mm256_loadu_ps(k + s * Dh + d)));
            if (d + 16 <= Dh)
                b = _mm256_add_ps(b, _mm256_mul_ps(_mm256_loadu_ps(q + d + 8), _mm256_loadu_ps(k + s * Dh + d + 8)));
        }
        weights[s] = visible && !visible[s] ? -INFINITY : sum_floats(_mm256_add_ps(a, b)) * scale;
        largest = weights[s] > largest ? weights[s] : largest;
    }
    for (long s = 0; s < S; s += 8) /* the memory after the last is there, and not read */
        _mm256_storeu_ps(weights + s, exponential(_mm256_sub_ps(_mm256_loadu_ps(weights + s), _mm256_set1_ps(largest))));
    memset(y, 0, Dh * sizeof(float));
    for (long s = 0; s < S; s++) {
        if (visible && !visible[s])
            continue;
        total += weights[s];
        const __m256 weight = _mm256_set1_ps(weights[s]);
        for (long d = 0; d < Dh; d += 8) {
            _mm_prefetch((const char *)(v + s * Dh + d) + AHEAD, _MM_HINT_T0);
            __m256 part = _mm256_mul_ps(weight, _mm256_loadu_ps(v + s * Dh + d));
            _mm256_storeu_ps(y + d, _mm256_add_ps(_mm256_loadu_ps(y + d), part));
        }
    }
    for (long d = 0; d < Dh; d++)
        y[d] /= total;
}

/* h = x (Dh) turned by the angles of its position, see llama.rotate. */
static void turn(const float *x, const float *cosine, const float *sine, float *h, long Dh) {
    const long half = Dh / 2;
    for (long d = 0; d < half; d++) {
        h[d] = x[d] * cosine[d] + x[d + half] * sine[d];
        h[d + half] = x[d + half] * cosine[d + half] + x[d] * sine[d + half];
    }
}

/* A decoder layer: its weights, and its part of the cache (B, Hkv, room, Dh). */
typedef struct {
    const struct {
        weight q, k, v, o, gate, up, down;
        const float *norm1, *norm2;
    } *weights;
    float *keys, *values;
} layer;

/* One new row per sample: what all layers share, and memory for what is between their products. */
typedef struct {
    float *x;                  /* (B, D) */
    const float *cosine, *sine; /* (B, Dh) */
    const int64_t *at;         /* (B) where a key goes, NULL: all at end - 1 */
    const uint8_t *visible;    /* (B, end), NULL: everything */
    long B, D, M, H, Hkv, Dh, room, end, most;
    float eps, limit, tiny;
    float *h, *q, *k, *v, *y, *gate, *up, *scores; /* scores: end + LANES + Dh for each thread */
    digits rows;
} token;

/* Rows x (B, K) as digits for a weight: as they are; or normalised with a weight other (K); or, if
 * `gated`, silu(x) * other (B, K). h: memory for (B, K), or x itself if it may be overwritten. */
static void read_rows(const token *t, const float *x, const float *other, int gated, float *h, long K, int four_bits) {
    const digits *rows = &t->rows;
    const long B = t->B, b = (K & -K) < t->most ? (K & -K) : t->most;
#pragma omp for
    for (long r = 0; r < B; r++) {
        int8_t *second = rows->share == 0.0f ? NULL : rows->codes + (B + r) * K;
        if (gated)
            gate(x + r * K, other + r * K, h + r * K, K);
        else if (other)
            normalise(x + r * K, other, h + r * K, K, t->eps);
        rows->step[r] = row_to_digits(other ? h + r * K : x + r * K, h + r * K, rows->codes + r * K, second, K, b, t->limit, t->tiny);
        widen_row(rows, r, K, four_bits);
        if (second)
            widen_row(rows, B + r, K, four_bits);
    }
}

/* Cache the new keys and values, and attend to the cache: y (B, H, Dh). */
static void attend(const token *t, const layer *l) {
    const long Hkv = t->Hkv, Dh = t->Dh, end = t->end, shared = t->H / Hkv;
    float *scores = t->scores + omp_get_thread_num() * (end + LANES + Dh), *turned = scores + end + LANES;
#pragma omp for
    for (long i = 0; i < t->B * Hkv; i++) {
        const long b = i / Hkv, row = t->at ? t->at[b] : end - 1;
        const float *cosine = t->cosine + b * Dh, *sine = t->sine + b * Dh;
        float *keys = l->keys + i * t->room * Dh, *values = l->values + i * t->room * Dh;
        memset(keys + (end - 1) * Dh, 0, Dh * sizeof(float));
        memset(values + (end - 1) * Dh, 0, Dh * sizeof(float));
        turn(t->k + i * Dh, cosine, sine, keys + row * Dh, Dh);
        memcpy(values + row * Dh, t->v + i * Dh, Dh * sizeof(float));
        for (long g = i * shared; g < (i + 1) * shared; g++) {
            turn(t->q + g * Dh, cosine, sine, turned, Dh);
            attend_head(turned, keys, values, t->visible ? t->visible + b * end : NULL, t->y + g * Dh, scores, end, Dh);
        }
    }
}

/* One layer, by all threads of a team. */
static void decode_layer(const token *t, const layer *l) {
    const long D = t->D, M = t->M, heads = t->H * t->Dh, shared = t->Hkv * t->Dh;
    const int four_bits = l->weights->q.step != NULL;
    read_rows(t, t->x, l->weights->norm1, 0, t->h, D, four_bits);
    multiply_rows(&t->rows, &l->weights->q, t->q, heads, D, 0);
    multiply_rows(&t->rows, &l->weights->k, t->k, shared, D, 0);
    multiply_rows(&t->rows, &l->weights->v, t->v, shared, D, 0);
#pragma omp barrier
    attend(t, l);
    read_rows(t, t->y, NULL, 0, t->y, heads, four_bits);
    multiply_rows(&t->rows, &l->weights->o, t->x, D, heads, 1);
#pragma omp barrier
    read_rows(t, t->x, l->weights->norm2, 0, t->h, D, four_bits);
    multiply_rows(&t->rows, &l->weights->gate, t->gate, M, D, 0);
    multiply_rows(&t->rows, &l->weights->up, t->up, M, D, 0);
#pragma omp barrier
    read_rows(t, t->gate, t->up, 1, t->gate, M, four_bits);
    multiply_rows(&t->rows, &l->weights->down, t->x, D, M, 1);
#pragma omp barrier
}

/* The next `bytes` of memory at `start`, from the start of a line of the CPU's cache. */
static void *take(char *start, long *taken, long bytes) {
    const long before = *taken;
    *taken += (bytes + LINE - 1) / LINE * LINE;
    return start ? start + before : NULL;
}

/* Place the temporary values of a token in the memory at `start`; returns how many bytes they take. */
static long place(token *t, char *start, int threads) {
    const long B = t->B, heads = t->H * t->Dh, shared = t->Hkv * t->Dh, f = sizeof(float);
    const long most = t->M > t->D ? t->M : t->D, K = most > heads ? most : heads;
    float **rows[] = {&t->h, &t->q, &t->k, &t->v, &t->y, &t->gate, &t->up};
    const long columns[] = {t->D, heads, shared, shared, heads, t->M, t->M};
    long taken = 0;
    for (int i = 0; i < 7; i++)
        *rows[i] = take(start, &taken, B * columns[i] * f);
    t->scores = take(start, &taken, threads * (t->end + LANES + t->Dh) * f);
    t->rows.step = take(start, &taken, B * f);
    t->rows.codes = take(start, &taken, 2 * B * K);
    t->rows.wide = take(start, &taken, 2 * B * K * sizeof(int16_t));
    return taken;
}

int decode_layers(const layer *layers, float *x, const float *cosine, const float *sine, const int64_t *at,
                  const uint8_t *visible, long count, long B, long D, long M, long H, long Hkv, long Dh, long room,
                  long end, long most, float eps, float limit, float tiny, float share, int threads) {
    token t = {.x = x, .cosine = cosine, .sine = sine, .at = at, .visible = visible, .B = B, .D = D, .M = M, .H = H,
               .Hkv = Hkv, .Dh = Dh, .room = room, .end = end, .most = most, .eps = eps, .limit = limit, .tiny = tiny,
               .rows = {.R = B, .share = share}};
    char *memory = aligned_alloc(LINE, place(&t, NULL, threads));
    if (!memory)
        return 1;
    place(&t, memory, threads);
#pragma omp parallel num_threads(threads)
    for (long i = 0; i < count; i++)
        decode_layer(&t, layers + i);
    free(memory);
    return 0;
}

int widen_int4(const uint8_t *w, const uint8_t *step, const int8_t *low, int8_t *wide, long pairs,
                int threads) {
#pragma omp parallel for num_threads(threads)
    for (long p = 0; p < pairs; p++)
        widen_pair(w + p * GROUP, step + 2 * p, low + 2 * p, wide + 2 * p * GROUP);
    return 0;
}
